// neuron_scale of each decode row: 0 in its sequence's warm-up, then the factor on its thresholds for neurons.
#include "../ratio_controller.h"
#include "kernels.h"

namespace skipkernels::cpu {

int64_t neuron_gate_tasks(const Instruction&, const Scratch&) { return 1; }

void neuron_gate_run(const Instruction& ins, int64_t, int64_t, Scratch& s) {
    const NeuronGate& op = ins.neuron_gate;
    for (int i = 0; i < s.num_rows; ++i) {
        const int row = s.rows[i], token = op.num_generated[row];
        float scale = 0.0f;
        if (token >= op.warmup_tokens[row]) {
            scale = op.threshold_scale[row];
            if (op.neuron_target_ratio[row] > 0) {
                const NeuronController controller(op, row);
                op.threshold_scale[row] = controller.adapted(scale);
                scale = controller.neuron_scale(op.threshold_scale[row]);
            }
        }
        op.neuron_scale[row] = scale;
        op.scale_map[row * op.max_seq_len + token] = scale;
    }
}

}  // namespace skipkernels::cpu
