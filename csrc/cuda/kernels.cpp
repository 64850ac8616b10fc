#include "kernels.h"

#include <limits>
#include <string_view>

#include "checks.h"
#include "ops.h"

namespace skipkernels::cuda {

namespace {

constexpr int64_t kMostTokens = 1 << 19;  // whose weights sample can add up, see sample_truncated.cuh
constexpr int64_t kLargestHead = 256;
constexpr int64_t kMostExperts = 8192;            // whose counts fit shared memory
constexpr int64_t kMostColumnsOfExperts = 16384;  // of a row that does
constexpr int64_t kMostPairs = 65535;             // blocks along the second axis of a grid
constexpr int64_t kMostNeuronsOfChunk = 4096;     // that the warps of a block can list in shared memory

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

// Blocks lie in planes, and where a kernel reads no lists of rows or columns.
void check_blocks_of(const char* op, const Matrix& matrix, bool reads_blocks, bool reads_parts = false) {
    skipkernels::check(matrix.num_parts == 1 || reads_parts, op,
                       ": has no CUDA kernel for a matrix in several formats; load the model with dtype bf16");
    for (int i = 0; i < matrix.num_parts; ++i) {
        const MatrixPart& part = matrix.parts[i];
        if (is_float(part.format)) continue;
        const std::string_view format = kFormatNames[static_cast<size_t>(part.format)];
        skipkernels::check(reads_blocks, op, ": has no CUDA kernel for a matrix in ", format,
                           "; leave out whole FFN blocks, or load the model with dtype bf16");
        skipkernels::check(part.layout == Layout::rows, op, ": a matrix in ", format, " must lie in planes, got ",
                           kLayoutNames[static_cast<size_t>(part.layout)]);
    }
}

void check_matrices(const Instruction& ins) {
    if (ins.op == OpCode::embed) check_blocks_of("embed", ins.embed.embed_tokens, true);
    if (ins.op == OpCode::qkv_rope_append) check_blocks_of("qkv_rope_append", ins.qkv_rope_append.qkv_proj, true, true);
    if (ins.op == OpCode::o_proj_add) check_blocks_of("o_proj_add", ins.o_proj_add.o_proj, true);
    if (ins.op == OpCode::gate_proj_act) check_blocks_of("gate_proj_act", ins.gate_proj_act.gate_proj, true);
    if (ins.op == OpCode::up_proj_mul) check_blocks_of("up_proj_mul", ins.up_proj_mul.up_proj, false);
    if (ins.op == OpCode::down_proj_add) check_blocks_of("down_proj_add", ins.down_proj_add.down_proj, true);
    if (ins.op == OpCode::down_proj_neurons_add)
        check_blocks_of("down_proj_neurons_add", ins.down_proj_neurons_add.down_proj, false);
    if (ins.op == OpCode::lm_head) check_blocks_of("lm_head", ins.lm_head.lm_head, true);
    if (ins.op != OpCode::gate_up_act) return;
    const Matrix& gate_up = ins.gate_up_act.gate_up_proj;
    check_blocks_of("gate_up_act", gate_up, true, true);
    skipkernels::check(gate_up.num_parts == 1 || gate_up.parts[1].format == gate_up.format,
                       "gate_up_act: gate_proj in ", kFormatNames[static_cast<size_t>(gate_up.format)],
                       " and up_proj in ", kFormatNames[static_cast<size_t>(gate_up.parts[1].format)],
                       " have no CUDA kernel together; use kernels triton, or load the model with dtype bf16");
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
    check_matrices(ins);
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
            check_size("route_experts", "hidden_size", ins.route_experts.hidden_size);
            check_size("route_experts", "num_pairs", ins.route_experts.num_pairs);
            check(ins.route_experts.num_experts <= kMostExperts, "route_experts: num_experts must be at most ",
                  kMostExperts, " on CUDA, got ", ins.route_experts.num_experts);
            break;
        case OpCode::experts_gate_up_act: {
            const ExpertsGateUpAct& op = ins.experts_gate_up_act;
            check(op.hidden_size <= kMostColumnsOfExperts, "experts_gate_up_act: hidden_size must be at most ",
                  kMostColumnsOfExperts, " on CUDA, got ", op.hidden_size);
            check(op.num_pairs <= kMostPairs, "experts_gate_up_act: rows times experts of each must be at most ",
                  kMostPairs, " on CUDA, got ", op.num_pairs);
            break;
        }
        case OpCode::experts_down_proj_add: {
            const ExpertsDownProjAdd& op = ins.experts_down_proj_add;
            check(op.hidden_size <= kRowsPerPartial * kMostPairs, "experts_down_proj_add: hidden_size must be at most ",
                  kRowsPerPartial * kMostPairs, " on CUDA, got ", op.hidden_size);
            check_partials("experts_down_proj_add", op);
            break;
        }
        case OpCode::experts_down_proj_neurons_add: {
            const ExpertsDownProjNeuronsAdd& op = ins.experts_down_proj_neurons_add;
            check(op.hidden_size <= kRowsPerPartial * kMostPairs,
                  "experts_down_proj_neurons_add: hidden_size must be at most ", kRowsPerPartial * kMostPairs,
                  " on CUDA, got ", op.hidden_size);
            check_partials("experts_down_proj_neurons_add", op);
            break;
        }
        case OpCode::qkv_rope_append:
            check_size("qkv_rope_append", "hidden_size", ins.qkv_rope_append.hidden_size);
            check_size("qkv_rope_append", "qkv_size", ins.qkv_rope_append.qkv_size);
            check_blocks("qkv_rope_append", ins.qkv_rope_append);
            break;
        case OpCode::norm_rope_append:
            check_size("norm_rope_append", "qkv_size", ins.norm_rope_append.qkv_size);
            check_blocks("norm_rope_append", ins.norm_rope_append);
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
