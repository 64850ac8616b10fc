// logits (sequences, vocab) = lm_head (vocab, hidden) @ rms_norm(hidden_states)
#include "activation.h"
#include "linear.h"

namespace skipkernels::SKIPKERNELS_ISA {

int64_t lm_head_tasks(const Instruction& ins, const Scratch&) {
    return num_matrix_tasks(ins.lm_head.lm_head, ins.lm_head.vocab_size);
}

void lm_head_pack(const Instruction& ins, int begin, int end, Scratch& s) {
    const LmHead& op = ins.lm_head;
    pack_rms_norm(op.lm_head, op.hidden_states, op.hidden_size, op.norm, op.rms_norm_eps, begin, end, s);
}

void lm_head_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const LmHead& op = ins.lm_head;
    for_tasks(op.lm_head, op.vocab_size, op.hidden_size, begin, end, s, [&](int64_t first, int height) {
        for (int i = 0; i < s.num_rows; ++i) {
            float* logits = op.logits + s.rows[i] * op.vocab_size + first;
            std::memcpy(logits, s.panel + i * cpu::kPanelRows, height * sizeof(float));
            if (op.softcap > 0) soften(logits, height, op.softcap);
        }
    });
}

}  // namespace skipkernels::SKIPKERNELS_ISA
