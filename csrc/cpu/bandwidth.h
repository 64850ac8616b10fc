// The yardstick of every decode figure: how fast this machine reads memory, with the same threads and instructions.
#pragma once

#include <string>
#include <vector>

namespace skipkernels::cpu {

// Reads `bytes` of fresh memory `repeats` times, each thread its own part; returns the seconds of each repeat.
std::vector<double> measure_read(size_t bytes, int repeats, int num_threads, const std::string& isa);

// Asks the system to back [data, data + bytes) with huge pages; quietly does nothing where it cannot.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace skipkernels::cpu
