// Ends a step: records what ran, appends the token, moves a decode row on, ends it or lets it wait for a block, and
// arms the next step. Prompt rows end with their step.
#include <algorithm>
#include <limits>

#include "kernels.h"

namespace skipkernels::cpu {

namespace {

enum Status : int32_t { ended, decoding, waits_for_block };  // as the state's `progress` names them

void end_prompt_row(const Advance& op, int row) {
    op.active[row] = 0;
    for (int64_t layer = 0; layer < op.num_hidden_layers; ++layer) op.run_ffn[layer * op.num_rows + row] = 0;
}

Status status_of(const Advance& op, int row, int32_t token) {
    const int32_t* eos = op.eos_token_ids + row * op.max_eos;
    const int32_t position = op.row_position[row];
    if (std::find(eos, eos + op.max_eos, token) != eos + op.max_eos ||
        op.num_generated[row] >= op.max_new_tokens[row] || position >= op.max_seq_len) {
        return ended;
    }
    return op.block_table[row * op.blocks_per_sequence + position / op.block_size] < 0 ? waits_for_block : decoding;
}

void advance_row(const Advance& op, int row) {
    const int32_t token = op.next_token[row];
    const int64_t map_at = (row * op.max_seq_len + op.num_generated[row]) * op.num_hidden_layers;
    const int32_t position = ++op.row_position[row], num_generated = ++op.num_generated[row];
    op.token_ids[row * op.token_capacity + position] = token;
    op.input_ids[row] = token;
    uint8_t& seen = op.seen[row * op.vocab_size + token];
    seen = static_cast<uint8_t>(std::min((seen | 1) + 2, 255));
    const Status status = status_of(op, row, token);
    op.active[row] = status == decoding;
    op.skip_remaining[row] = 0;
    for (int64_t layer = 0; layer < op.num_hidden_layers; ++layer) {
        int32_t& run = op.run_ffn[layer * op.num_rows + row];
        float& similarity = op.similarity[layer * op.num_sequences + row];
        op.run_map[map_at + layer] = run != 0;
        op.similarity_map[map_at + layer] = similarity;
        run = status == decoding;
        similarity = std::numeric_limits<float>::quiet_NaN();
    }
    op.progress[2 * row] = num_generated;
    op.progress[2 * row + 1] = status;
}

}  // namespace

int64_t advance_tasks(const Instruction&, const Scratch&) { return 1; }

void advance_run(const Instruction& ins, int64_t, int64_t, Scratch& s) {
    const Advance& op = ins.advance;
    for (int i = 0; i < s.num_rows; ++i) {
        const int row = s.rows[i];
        row < op.num_sequences ? advance_row(op, row) : end_prompt_row(op, row);
    }
}

}  // namespace skipkernels::cpu
