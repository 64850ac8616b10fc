// What a failed launch says.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "scheduler.h"

namespace cuda_host {

std::string text_of(uint3 index) {
    return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string text_of(const Site& site) {
    const char* slash = std::strrchr(site.file, '/');
    return std::string(site.call) + " (" + (slash ? slash + 1 : site.file) + ":" + std::to_string(site.line) + ")";
}

void fail(const char* what, ...) {
    char message[512];
    va_list arguments;
    va_start(arguments, what);
    std::vsnprintf(message, sizeof message, what, arguments);
    va_end(arguments);
    if (!scheduler.in_kernel()) throw std::logic_error(message);
    scheduler.fail(message);
}

std::string Scheduler::place() const {
    const Block& block = *current_->block;
    return "kernel " + function_name(block.grid->launch->function) + ", block " + text_of(block.index) + ", thread " +
           text_of(current_->index);
}

void Scheduler::fail(const std::string& message) {
    failure_ = place() + ": " + message;
    current_->fiber->suspend();
    std::abort();  // a failed launch resumes nobody
}

std::string Scheduler::describe(unsigned block, unsigned thread) const {
    const auto after = std::find_if(grids_.begin(), grids_.end(), [&](const Grid& g) { return g.first_block > block; });
    const Grid& grid = *std::prev(after);
    return "thread " + text_of(unravel(thread, grid.launch->block)) + " of block " +
           text_of(unravel(block - grid.first_block, grid.launch->grid)) +
           (&grid == current_->block->grid ? "" : " of kernel " + function_name(grid.launch->function));
}

// Everybody waits, for something that cannot happen any more.
void Scheduler::describe_waiting() {
    std::ostringstream report;
    for (const Grid& grid : grids_) {
        if (grid.complete()) continue;
        report << "kernel " << function_name(grid.launch->function) << ": no thread can go on";
        for (const auto& block : grid.resident) {
            report << "\n  block " << text_of(block->index) << ":";
            std::vector<std::string> groups;
            std::vector<std::vector<const Thread*>> members;
            for (const Thread& thread : block->threads) {
                std::ostringstream group;
                if (thread.exited) {
                    group << "exited";
                } else if (!thread.site.call) {
                    group << "poll";
                } else if (thread.mask) {
                    group << "wait at " << text_of(thread.site) << " in warp " << thread.number / 32 << " with mask 0x"
                          << std::hex << thread.mask;
                } else {
                    group << "wait at " << text_of(thread.site);
                }
                const auto found = std::find(groups.begin(), groups.end(), group.str());
                if (found == groups.end()) members.emplace_back();
                members[static_cast<size_t>(found - groups.begin())].push_back(&thread);
                if (found == groups.end()) groups.push_back(group.str());
            }
            for (size_t i = 0; i < groups.size(); ++i) {
                report << "\n    " << members[i].size() << " of " << block->threads.size() << " threads " << groups[i]
                       << ": " << text_of(members[i].front()->index);
                if (members[i].size() > 1) report << " to " << text_of(members[i].back()->index);
            }
        }
        break;
    }
    failure_ = report.str();
}

}  // namespace cuda_host
