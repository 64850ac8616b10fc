// hidden_states (rows, hidden) = scale * embed_tokens (vocab, hidden)[input_ids (rows)], or for a prompt row without
// a token its row of prompt_embeddings
#include "blocks.h"
#include "kernels.h"
#include "numbers.h"

namespace skipkernels::cpu {

// One row of the weights in fp32.
static void copy_weights(const Matrix& weights, int64_t columns, int64_t row, float* to) {
    with_float_type(weights.format, [&](auto type) {
        const auto* from = static_cast<const decltype(type)*>(weights.data) + row * columns;
        for (int64_t j = 0; j < columns; ++j) to[j] = to_float(from[j]);
    });
    if (!is_float(weights.format)) dequantize_row(weights.format, columns, weights.data, row, to);
}

int64_t embed_tasks(const Instruction&, const Scratch&) { return 1; }

void embed_run(const Instruction& ins, int64_t, int64_t, Scratch& s) {
    const Embed& op = ins.embed;
    for (int i = 0; i < s.num_rows; ++i) {
        const int row = s.rows[i];
        float* to = op.hidden_states + row * op.hidden_size;
        if (op.input_ids[row] < 0) {
            const int64_t prompt_row = row - (op.num_rows - op.num_prompt_rows);
            std::memcpy(to, op.prompt_embeddings + prompt_row * op.hidden_size, op.hidden_size * sizeof(float));
            continue;
        }
        copy_weights(op.embed_tokens, op.hidden_size, op.input_ids[row], to);
        for (int64_t j = 0; j < op.hidden_size; ++j) to[j] *= op.scale;
    }
}

}  // namespace skipkernels::cpu
