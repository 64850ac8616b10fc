#include "kernels.h"

#include <limits>

#include "checks.h"
#include "ops.h"

namespace skipkernels::cuda {

namespace {

constexpr int64_t kMostTokens = 1 << 19;  // whose weights sample can add up, see sample_truncated.cuh
constexpr int64_t kLargestHead = 256;
constexpr int64_t kMostNeuronsOfChunk = 4096;  // that the warps of a block can list in shared memory

void check_size(const char* op, const char* name, int64_t size) {
    skipkernels::check(size > 0 && size <= std::numeric_limits<int32_t>::max(), op, ": ", name,
                       " must lie in 1..2^31-1, got ", size);
}

int64_t rotated_heads(const QkvRopeAppend& op) { return op.num_attention_heads + op.num_key_value_heads; }

// Of a cache whose positions are found through a block table.
template <class Op>
void check_blocks(const char* name, const Op& op) {
    const int64_t size = op.block_size;
    skipkernels::check(size > 0 && (size & (size - 1)) == 0, name, ": block_size must be a power of two on CUDA, got ",
                       size);
    check_size(name, "rows of the cache", op.num_blocks * op.num_key_value_heads * size);
}

template <class Op>
void check_partials(const char* name, const Op& op) {
    skipkernels::check(!op.similarity_partials || op.rows_per_partial == kRowsPerPartial, name,
                       ": rows_per_partial must be ", kRowsPerPartial, " on CUDA, got ", op.rows_per_partial,
                       "; allocate the state for a CUDA device");
}

}  // namespace

bool may_write_flags(const Instruction& ins, const Instruction& reader) {
    if (ins.op == OpCode::advance) return true;
    return ins.op == OpCode::skip_gate &&
           reader.row_mask == ins.skip_gate.run_ffn + ins.skip_gate.layer * ins.skip_gate.num_rows;
}

int64_t num_arrivals(const Instruction& ins) {
    switch (ins.op) {
        case OpCode::qkv_rope_append: {
            const QkvRopeAppend& op = ins.qkv_rope_append;
            const int64_t passes = (ins.num_rows + kRowsOfPass - 1) / kRowsOfPass;
            return op.q_norm || op.k_norm ? passes * rotated_heads(op) : 0;
        }
        case OpCode::decode_attention:
            return ins.num_rows * ins.decode_attention.num_attention_heads;
        case OpCode::select_neurons:
            return 1;
        case OpCode::down_proj_neurons_add:
            return down_proj_neurons_add_arrivals(ins.down_proj_neurons_add);
        case OpCode::sample:
            return ins.num_rows;
        default:
            return 0;
    }
}

int64_t scratch_floats(const Instruction& ins) {
    switch (ins.op) {
        case OpCode::qkv_rope_append: {
            const QkvRopeAppend& op = ins.qkv_rope_append;
            return op.q_norm || op.k_norm ? ins.num_rows * rotated_heads(op) * op.head_dim : 0;
        }
        case OpCode::select_neurons:
            return select_neurons_scratch_floats(ins.select_neurons);
        case OpCode::down_proj_neurons_add:
            return down_proj_neurons_add_scratch_floats(ins.down_proj_neurons_add);
        case OpCode::sample:
            return sample_scratch_floats(ins.sample);
        default:
            return 0;
    }
}

void check(const Instruction& ins) {
    using skipkernels::check;  // of a condition
    check(ins.num_rows >= 1 && ins.num_rows <= kMostRows, "the rows of a step must number 1..", kMostRows,
          " on CUDA, got ", ins.num_rows);
    switch (ins.op) {
        case OpCode::embed:
            check_size("embed", "hidden_size", ins.embed.hidden_size);
            break;
        case OpCode::skip_gate:
            break;
        case OpCode::neuron_gate:
            break;
        case OpCode::gate_proj_act:
            check_size("gate_proj_act", "hidden_size", ins.gate_proj_act.hidden_size);
            check_size("gate_proj_act", "intermediate_size", ins.gate_proj_act.intermediate_size);
            break;
        case OpCode::select_neurons:
            check_size("select_neurons", "intermediate_size", ins.select_neurons.intermediate_size);
            break;
        case OpCode::up_proj_mul:
            check_size("up_proj_mul", "hidden_size", ins.up_proj_mul.hidden_size);
            check_size("up_proj_mul", "intermediate_size", ins.up_proj_mul.intermediate_size);
            break;
        case OpCode::down_proj_neurons_add: {
            const DownProjNeuronsAdd& op = ins.down_proj_neurons_add;
            check_size("down_proj_neurons_add", "hidden_size", op.hidden_size);
            check_size("down_proj_neurons_add", "intermediate_size", op.intermediate_size);
            check(op.neuron_chunk > 0 && op.neuron_chunk <= kMostNeuronsOfChunk,
                  "down_proj_neurons_add: neuron_chunk must lie in 1..", kMostNeuronsOfChunk, " on CUDA, got ",
                  op.neuron_chunk);
            check_partials("down_proj_neurons_add", op);
            break;
        }
        case OpCode::route_experts:
        case OpCode::experts_gate_up_act:
        case OpCode::experts_down_proj_add:
            fail(kInstructionSet[static_cast<size_t>(ins.op)].name, ": has no CUDA kernel; decode experts on a CPU");
        case OpCode::qkv_rope_append:
            check_size("qkv_rope_append", "hidden_size", ins.qkv_rope_append.hidden_size);
            check_size("qkv_rope_append", "qkv_size", ins.qkv_rope_append.qkv_size);
            check_blocks("qkv_rope_append", ins.qkv_rope_append);
            break;
        case OpCode::decode_attention: {
            const DecodeAttention& op = ins.decode_attention;
            check(op.kv_split_size == kKvSplit, "decode_attention: kv_split_size must be ", kKvSplit, " on CUDA, got ",
                  op.kv_split_size, "; allocate the state for a CUDA device");
            check(op.head_dim <= kLargestHead, "decode_attention: head_dim must be at most ", kLargestHead,
                  " on CUDA, got ", op.head_dim);
            check_blocks("decode_attention", op);
            check_size("decode_attention", "positions of a sequence", op.blocks_per_sequence * op.block_size);
            break;
        }
        case OpCode::o_proj_add:
            check_size("o_proj_add", "hidden_size", ins.o_proj_add.hidden_size);
            check_size("o_proj_add", "attention_size", ins.o_proj_add.attention_size);
            break;
        case OpCode::gate_up_act:
            check_size("gate_up_act", "hidden_size", ins.gate_up_act.hidden_size);
            check_size("gate_up_act", "gate_up_size", ins.gate_up_act.gate_up_size);
            break;
        case OpCode::down_proj_add: {
            const DownProjAdd& op = ins.down_proj_add;
            check_size("down_proj_add", "hidden_size", op.hidden_size);
            check_size("down_proj_add", "intermediate_size", op.intermediate_size);
            check_partials("down_proj_add", op);
            break;
        }
        case OpCode::branch_add: {
            const BranchAdd& op = ins.branch_add;
            check_size("branch_add", "hidden_size", op.hidden_size);
            check_partials("branch_add", op);
            break;
        }
        case OpCode::lm_head:
            check_size("lm_head", "hidden_size", ins.lm_head.hidden_size);
            check_size("lm_head", "vocab_size", ins.lm_head.vocab_size);
            break;
        case OpCode::sample:
            check(ins.sample.vocab_size <= kMostTokens, "sample: vocab_size must be at most ", kMostTokens,
                  " on CUDA, got ", ins.sample.vocab_size);
            break;
        case OpCode::advance:
            check(reinterpret_cast<uintptr_t>(ins.advance.progress) % 8 == 0,
                  "advance: progress must be aligned to 8 bytes on CUDA, got ", ins.advance.progress);
            break;
    }
}

// check() refuses these.
#define SKIPKERNELS_NO_LAUNCHER(op) \
    cudaError_t launch_##op(const Step&, const LaunchContext&) { return cudaErrorInvalidValue; }
SKIPKERNELS_NO_LAUNCHER(route_experts)
SKIPKERNELS_NO_LAUNCHER(experts_gate_up_act)
SKIPKERNELS_NO_LAUNCHER(experts_down_proj_add)
#undef SKIPKERNELS_NO_LAUNCHER

cudaError_t launch(const Step& step, const LaunchContext& context) {
    switch (step.ins.op) {
#define SKIPKERNELS_LAUNCH(op, Struct, FIELDS) \
    case OpCode::op:                           \
        return launch_##op(step, context);
        SKIPKERNELS_OPS(SKIPKERNELS_LAUNCH)
#undef SKIPKERNELS_LAUNCH
    }
    return cudaErrorInvalidValue;
}

}  // namespace skipkernels::cuda
