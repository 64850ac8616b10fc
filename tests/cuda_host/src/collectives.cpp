// Barriers, warp collectives and what else kernels call.
#include <cstdlib>
#include <cstring>

#include "scheduler.h"

namespace cuda_host {

namespace {

bool same_site(const Site& a, const Site& b) {
    return a.line == b.line && std::strcmp(a.call, b.call) == 0 && std::strcmp(a.file, b.file) == 0;
}

}  // namespace

void Scheduler::barrier(Site site) {
    Block& block = *current_->block;
    if (block.arrived == 0) block.first_arrived = current_;
    const Thread& first = *block.first_arrived;
    if (block.arrived && !same_site(first.site, site)) {
        fail("arrives at " + text_of(site) + ", while thread " + text_of(first.index) + " waits at " +
             text_of(first.site));
    }
    if (++block.arrived == block.threads.size()) {
        block.arrived = 0;
        std::vector<Thread*> threads;
        for (Thread& thread : block.threads) threads.push_back(&thread);
        race::detector.join(threads);
        make_ready(std::move(threads));
        current_->fiber->suspend();
    } else {
        suspend(site);
    }
}

void Scheduler::collective(Site site, uint32_t mask, void* operand, void (*complete)(LaneOperands&, uint32_t)) {
    Thread& thread = *current_;
    const unsigned warp = thread.number / 32;
    uint32_t& waiting = thread.block->waiting_lanes[warp];
    thread.site = site;
    thread.mask = mask;
    thread.operand = operand;
    if (!(mask >> thread.number % 32 & 1)) fail("is not in its own mask at " + text_of(site));
    waiting |= 1u << thread.number % 32;
    if ((waiting & mask) == mask) {
        std::vector<Thread*> lanes;
        void* operands[32] = {};
        for (unsigned lane = 0; lane < 32; ++lane) {
            if (!(mask >> lane & 1)) continue;
            Thread& other = thread.block->threads[warp * 32 + lane];
            if (other.mask != mask || !same_site(other.site, site)) break;  // reported once nobody can go on
            operands[lane] = other.operand;
            lanes.push_back(&other);
        }
        if (lanes.size() == static_cast<size_t>(__popc(mask))) {
            complete(operands, mask);
            waiting &= ~mask;
            race::detector.join(lanes);
            make_ready(std::move(lanes));
        }
    }
    thread.fiber->suspend();
}

void block_barrier(Site site) { scheduler.barrier(site); }

void warp_collective(Site site, uint32_t mask, void* operand, void (*complete)(LaneOperands&, uint32_t)) {
    scheduler.collective(site, mask, operand, complete);
}

void maybe_yield() { scheduler.maybe_yield(); }
void wait_a_while() { scheduler.wait_a_while(); }
void fence() {
    race::detector.fence(scheduler.current());
    scheduler.maybe_yield();
}
void made_progress() { scheduler.made_progress(); }
unsigned lane_id() { return scheduler.current().number % 32; }

void complete_shuffle(LaneOperands& operands, uint32_t mask) {
    uint64_t bits[32] = {};
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (mask >> lane & 1) bits[lane] = static_cast<const ShuffleOperand*>(operands[lane])->bits;
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        auto& operand = *static_cast<ShuffleOperand*>(operands[lane]);
        if (!(mask >> operand.source & 1)) {
            scheduler.fail(text_of(scheduler.current().site) + ": lane " + std::to_string(lane) + " reads lane " +
                           std::to_string(operand.source) + ", which is not in the mask");
        }
        operand.bits = bits[operand.source];
    }
}

uint32_t vote(Site site, uint32_t mask, bool predicate) {
    struct Vote {
        bool predicate;
        uint32_t result;
    } operand{predicate, 0};
    warp_collective(site, mask, &operand, [](LaneOperands& operands, uint32_t mask) {
        uint32_t result = 0;
        for (unsigned lane = 0; lane < 32; ++lane) {
            if (mask >> lane & 1) result |= uint32_t{static_cast<const Vote*>(operands[lane])->predicate} << lane;
        }
        for (void* lane : operands) {
            if (lane) static_cast<Vote*>(lane)->result = result;
        }
    });
    return operand.result;
}

}  // namespace cuda_host
