// hidden_states (batch, hidden) = embed_tokens (vocab, hidden)[input_ids (batch)]
#include "kernels.h"
#include "numbers.h"

namespace skipkernels::cpu {

int64_t embed_tasks(const Instruction&, const Scratch&) { return 1; }

void embed_run(const Instruction& ins, int64_t, int64_t, Scratch& s) {
    const Embed& op = ins.embed;
    with_weight_type(ins.weight_dtype, [&](auto type) {
        using T = decltype(type);
        for (int i = 0; i < s.num_rows; ++i) {
            const T* from = static_cast<const T*>(op.embed_tokens) + op.input_ids[s.rows[i]] * op.hidden_size;
            float* to = op.hidden_states + s.rows[i] * op.hidden_size;
            for (int64_t j = 0; j < op.hidden_size; ++j) to[j] = to_float(from[j]);
        }
    });
}

}  // namespace skipkernels::cpu
