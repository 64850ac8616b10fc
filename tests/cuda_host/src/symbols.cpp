// Names for addresses. Kernels have internal linkage, so dladdr() does not know them, but this library's own file
// lists them.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "scheduler.h"

namespace cuda_host {

namespace {

// Without return type, parameters and "(anonymous namespace)::".
std::string readable(const char* symbol) {
    int status = 0;
    char* text = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
    std::string name = status == 0 ? text : symbol;
    std::free(text);
    static const std::string anonymous = "(anonymous namespace)::";
    for (size_t at; (at = name.find(anonymous)) != std::string::npos;) name.erase(at, anonymous.size());
    size_t end = name.size();
    for (int depth = 0; end > 0; --end) {
        depth += (name[end - 1] == ')') - (name[end - 1] == '(');
        if (depth == 0) break;
    }
    if (end > 1) name.resize(end - 1);
    return name.rfind("void ", 0) == 0 ? name.substr(5) : name;
}

// Address relative to the library -> symbol.
std::map<uintptr_t, std::string> read_symbols(const char* path) {
    std::ifstream file(path, std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    std::map<uintptr_t, std::string> symbols;
    if (bytes.empty()) return symbols;
    const auto at = [&](size_t offset) { return bytes.data() + offset; };
    const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(at(0));
    const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(at(header->e_shoff));
    for (int i = 0; i < header->e_shnum; ++i) {
        if (sections[i].sh_type != SHT_SYMTAB) continue;
        const auto* table = reinterpret_cast<const ElfW(Sym)*>(at(sections[i].sh_offset));
        const char* names = at(sections[sections[i].sh_link].sh_offset);
        for (size_t s = 0; s < sections[i].sh_size / sizeof *table; ++s) {
            if (ELF64_ST_TYPE(table[s].st_info) == STT_FUNC) symbols[table[s].st_value] = names + table[s].st_name;
        }
    }
    return symbols;
}

}  // namespace

std::string function_name(const void* function) {
    Dl_info library;
    if (!dladdr(function, &library)) return "unknown";
    static const auto symbols = read_symbols(library.dli_fname);
    const auto base = reinterpret_cast<uintptr_t>(library.dli_fbase);
    const auto found = symbols.find(reinterpret_cast<uintptr_t>(function) - base);
    return found == symbols.end() ? "unknown" : readable(found->second.c_str());
}

// file:line of a call, as addr2line has it: of calls inlined into one another, the innermost outside of the harness.
std::string source_line(const void* return_address) {
    Dl_info library;
    if (!dladdr(return_address, &library)) return "unknown line";
    std::ostringstream command;
    command << "addr2line -i -s -e '" << library.dli_fname << "' 0x" << std::hex
            << static_cast<const char*>(return_address) - static_cast<const char*>(library.dli_fbase) - 1
            << " 2>/dev/null";
    std::string found = "unknown line";
    FILE* output = popen(command.str().c_str(), "r");
    for (char buffer[256]; output && std::fgets(buffer, sizeof buffer, output);) {
        const std::string line = buffer;
        const bool is_harness = line.rfind("ptx_host.h", 0) == 0 || line.rfind("device.h", 0) == 0;
        if (is_harness || line[0] == '?') continue;
        found = line.substr(0, line.find_first_of(" \n"));
        break;
    }
    if (output) pclose(output);
    return found;
}

}  // namespace cuda_host
