// Ends a row's step: records what ran, appends the token, moves the row on or ends it, arms the next step.
#include <algorithm>
#include <limits>

#include "kernels.h"

namespace skipkernels::cpu {

int64_t advance_tasks(const Instruction&, const Scratch&) { return 1; }

void advance_run(const Instruction& ins, int64_t, int64_t, Scratch& s) {
    const Advance& op = ins.advance;
    for (int i = 0; i < s.num_rows; ++i) {
        const int row = s.rows[i];
        const int32_t token = op.next_token[row];
        const int64_t map_at = (row * op.max_seq_len + op.generated[row]) * op.num_hidden_layers;
        const int32_t seq_len = ++op.seq_len[row], generated = ++op.generated[row];
        op.token_ids[row * op.token_capacity + seq_len] = token;
        op.input_ids[row] = token;
        op.seen[row * op.vocab_size + token] = 1;
        const int32_t* eos = op.eos_token_ids + row * op.max_eos;
        const bool done = std::find(eos, eos + op.max_eos, token) != eos + op.max_eos ||
                          generated >= op.max_new_tokens[row] || seq_len >= op.max_seq_len;
        op.active[row] = !done;
        op.skip_remaining[row] = 0;
        for (int64_t layer = 0; layer < op.num_hidden_layers; ++layer) {
            int32_t& run = op.run_ffn[layer * op.batch_size + row];
            float& similarity = op.similarity[layer * op.batch_size + row];
            op.run_map[map_at + layer] = run != 0;
            op.similarity_map[map_at + layer] = similarity;
            run = !done;
            similarity = std::numeric_limits<float>::quiet_NaN();
        }
        op.progress[2 * row] = generated;
        op.progress[2 * row + 1] = !done;
    }
}

}  // namespace skipkernels::cpu
