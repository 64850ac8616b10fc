// hidden_states (rows, hidden) = embed_tokens (vocab, hidden)[input_ids (rows)], or for a prompt row without a token
// its row of prompt_embeddings
#include "kernels.h"
#include "numbers.h"

namespace skipkernels::cpu {

int64_t embed_tasks(const Instruction&, const Scratch&) { return 1; }

void embed_run(const Instruction& ins, int64_t, int64_t, Scratch& s) {
    const Embed& op = ins.embed;
    with_float_type(op.embed_tokens.format, [&](auto type) {
        using T = decltype(type);
        for (int i = 0; i < s.num_rows; ++i) {
            const int row = s.rows[i];
            float* to = op.hidden_states + row * op.hidden_size;
            if (op.input_ids[row] < 0) {
                const int64_t prompt_row = row - (op.num_rows - op.num_prompt_rows);
                std::memcpy(to, op.prompt_embeddings + prompt_row * op.hidden_size, op.hidden_size * sizeof(float));
                continue;
            }
            const T* from = static_cast<const T*>(op.embed_tokens.data) + op.input_ids[row] * op.hidden_size;
            for (int64_t j = 0; j < op.hidden_size; ++j) to[j] = to_float(from[j]);
        }
    });
}

}  // namespace skipkernels::cpu
