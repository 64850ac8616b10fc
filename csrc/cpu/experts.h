// The experts that the rows of a step have chosen, from what route_experts writes.
#pragma once

#include "kernels.h"

namespace skipkernels::cpu {

// Functions are static: instruction-set units must not share them, see setup.py's CPU_SOURCES.

// Of one expert: its choices are expert_pairs[begin, end).
struct Choices {
    int expert, begin, end;
    int count() const { return end - begin; }
};

// The first chosen expert from `expert` on; none: its number is that of all experts.
static inline Choices chosen_from(int expert, const int32_t* begins, int64_t num_begins) {
    while (expert + 1 < num_begins && begins[expert] == begins[expert + 1]) ++expert;
    return {expert, begins[expert], expert + 1 < num_begins ? begins[expert + 1] : begins[expert]};
}

static inline int num_chosen(const int32_t* begins, int64_t num_begins) {
    int count = 0;
    for (int64_t expert = 0; expert + 1 < num_begins; ++expert) count += begins[expert] < begins[expert + 1];
    return count;
}

// From router_logits of the rows of the list to all other outputs of route_experts.
void choose_experts(const RouteExperts& op, const Scratch& s);

}  // namespace skipkernels::cpu
