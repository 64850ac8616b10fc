// The instruction set: one plain struct per op, declared once. Every executor (CPU, CUDA) reads these structs, and
// Python learns their fields from here (bindings.cpp), so there is no second list of names or numbers to keep.
//
// FIELDS lists an op's operands in four kinds:
//   TENSOR(type, name)  pointer to a contiguous buffer; shapes stand in skipkernels/program/table.py
//   MATRIX(name)        a weight matrix, in a format of its own
//   SIZE(name)          a length in elements, taken from the tensors' shapes
//   INT(name) / FLOAT(name)  a parameter
// Pointers named const void* / void* hold cache entries in the instruction's cache_dtype.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace skipkernels {

// What numbers are. Block formats, in a layout that the executor wants, are GGUF's, and e4m3 with fp32 scales.
enum class Format : int32_t { f32, bf16, f16, q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k, f8_e4m3 };
inline constexpr std::string_view kFormatNames[] = {"f32",  "bf16", "f16",  "q8_0", "q4_0", "q4_1",
                                                    "q5_0", "q5_1", "q4_k", "q5_k", "q6_k", "f8_e4m3"};
constexpr bool is_float(Format format) { return format <= Format::f16; }

// How a matrix lies in memory: row after row, or, of blocks, in one of the orders of csrc/cpu/blocks.h.
enum class Layout : int32_t { rows, interleaved, single_rows, single_columns };
inline constexpr std::string_view kLayoutNames[] = {"rows", "interleaved", "single_rows", "single_columns"};

// Rows of a matrix that share a format and a layout.
struct MatrixPart {
    const void* data;
    Format format;
    Layout layout;
    int64_t rows;
};

// A matrix of weights. One of floats has one part; one of blocks may be a stack, since a GGUF may hold v_proj in
// another format than q_proj. `data` and `format` are those of the first part.
struct Matrix {
    static constexpr int kMaxParts = 3;
    const void* data;
    Format format;
    int32_t num_parts;
    MatrixPart parts[kMaxParts];
};

// Bits of `adjusts`, as in skipkernels/program/state.py.
enum Adjusts : int32_t { kAdjustsBias = 1, kAdjustsCounts = 2, kAdjustsMask = 4 };

enum class GateMode : int32_t { dense = 0, similarity = 1, fixed = 2, random = 3 };
enum class BatchRule : int32_t { per_row = 0, all = 1, majority = 2 };
enum class Activation : int32_t { silu = 0, gelu_tanh = 1, clamped_swiglu = 2 };
constexpr float kGateSlope = 1.702f, kGateLimit = 7.0f;  // of clamped_swiglu

// clang-format off
#define SKIPKERNELS_EMBED(TENSOR, MATRIX, SIZE, INT, FLOAT)                                                                    \
  TENSOR(float, hidden_states) MATRIX(embed_tokens) TENSOR(const int32_t, input_ids)                       \
  TENSOR(const float, prompt_embeddings)                                                                               \
  SIZE(num_rows) SIZE(hidden_size) SIZE(vocab_size) SIZE(num_prompt_rows)                                              \
  FLOAT(scale)

#define SKIPKERNELS_SKIP_GATE(TENSOR, MATRIX, SIZE, INT, FLOAT)                                                                \
  TENSOR(int32_t, run_ffn) TENSOR(int32_t, skip_remaining) TENSOR(float, similarity)                                   \
  TENSOR(const float, similarity_partials) TENSOR(const int32_t, num_generated)                                        \
  TENSOR(int32_t, skipped) TENSOR(float, threshold_scale)                                                              \
  TENSOR(const int32_t, gate_mode) TENSOR(const int32_t, gated) TENSOR(const int32_t, first_gated)                     \
  TENSOR(const float, gate_threshold) TENSOR(const int32_t, gate_span) TENSOR(const int32_t, warmup_tokens)            \
  TENSOR(const int32_t, batch_rule) TENSOR(const float, gate_probability) TENSOR(const int64_t, gate_seed)             \
  TENSOR(const float, target_ratio) TENSOR(const int32_t, ramp_tokens)                                                 \
  SIZE(num_hidden_layers) SIZE(num_rows) SIZE(num_sequences) SIZE(num_partials) SIZE(three)                            \
  INT(layer)

#define SKIPKERNELS_NEURON_GATE(TENSOR, MATRIX, SIZE, INT, FLOAT)                                                      \
  TENSOR(float, neuron_scale) TENSOR(const int32_t, num_generated) TENSOR(const int32_t, warmup_tokens)                \
  TENSOR(const int32_t, ramp_tokens) TENSOR(const float, neuron_target_ratio) TENSOR(float, threshold_scale)           \
  TENSOR(const int32_t, skipped) TENSOR(const int64_t, left_out) TENSOR(float, scale_map)                              \
  SIZE(num_rows) SIZE(num_sequences) SIZE(max_seq_len)                                                                 \
  INT(num_hidden_layers) INT(ffn_bytes)

#define SKIPKERNELS_QKV_ROPE_APPEND(TENSOR, MATRIX, SIZE, INT, FLOAT)                                                          \
  TENSOR(const float, hidden_states) TENSOR(const float, input_layernorm) MATRIX(qkv_proj)                 \
  TENSOR(const float, qkv_bias) TENSOR(const float, q_norm) TENSOR(const float, k_norm)                                \
  TENSOR(const float, rope_cos) TENSOR(const float, rope_sin) TENSOR(const float, query_scale)                         \
  TENSOR(const int32_t, position_axes) TENSOR(const int32_t, prompt_positions)                                         \
  TENSOR(float, query) TENSOR(void, k_cache) TENSOR(void, v_cache)                                                     \
  TENSOR(const int32_t, block_table) TENSOR(const int32_t, row_sequence) TENSOR(const int32_t, row_position)           \
  SIZE(num_rows) SIZE(hidden_size) SIZE(qkv_size) SIZE(head_dim) SIZE(max_seq_len) SIZE(rotary_pairs)                  \
  SIZE(num_prompt_rows) SIZE(three) SIZE(num_attention_heads) SIZE(num_blocks) SIZE(num_key_value_heads)               \
  SIZE(block_size) SIZE(num_sequences) SIZE(blocks_per_sequence)                                                       \
  FLOAT(rms_norm_eps)

#define SKIPKERNELS_NORM_ROPE_APPEND(TENSOR, MATRIX, SIZE, INT, FLOAT)                                                 \
  TENSOR(float, qkv) TENSOR(const float, q_norm) TENSOR(const float, k_norm)                                           \
  TENSOR(const float, rope_cos) TENSOR(const float, rope_sin)                                                          \
  TENSOR(float, query) TENSOR(void, k_cache) TENSOR(void, v_cache)                                                     \
  TENSOR(const int32_t, block_table) TENSOR(const int32_t, row_sequence) TENSOR(const int32_t, row_position)           \
  SIZE(num_rows) SIZE(qkv_size) SIZE(query_size) SIZE(key_size) SIZE(max_seq_len) SIZE(rotary_pairs)                   \
  SIZE(num_attention_heads) SIZE(head_dim) SIZE(num_blocks) SIZE(num_key_value_heads) SIZE(block_size)                 \
  SIZE(num_sequences) SIZE(blocks_per_sequence)                                                                        \
  FLOAT(rms_norm_eps)

#define SKIPKERNELS_DECODE_ATTENTION(TENSOR, MATRIX, SIZE, INT, FLOAT)                                                         \
  TENSOR(const float, query) TENSOR(const void, k_cache) TENSOR(const void, v_cache)                                   \
  TENSOR(const int32_t, block_table) TENSOR(const int32_t, row_sequence) TENSOR(const int32_t, row_position)           \
  TENSOR(const float, sinks) TENSOR(float, attn_partials) TENSOR(float, attn_output)                                   \
  SIZE(num_rows) SIZE(num_attention_heads) SIZE(head_dim) SIZE(num_blocks) SIZE(num_key_value_heads) SIZE(block_size)  \
  SIZE(num_sequences) SIZE(blocks_per_sequence) SIZE(num_splits) SIZE(partial_size)                                    \
  FLOAT(scaling) FLOAT(softcap) INT(sliding_window) INT(kv_split_size)

#define SKIPKERNELS_O_PROJ_ADD(TENSOR, MATRIX, SIZE, INT, FLOAT)                                                               \
  TENSOR(const float, attn_output) MATRIX(o_proj) TENSOR(const float, o_proj_bias)                         \
  TENSOR(float, hidden_states)                                                                                         \
  SIZE(num_rows) SIZE(num_attention_heads) SIZE(head_dim) SIZE(hidden_size) SIZE(attention_size)

#define SKIPKERNELS_GATE_UP_ACT(TENSOR, MATRIX, SIZE, INT, FLOAT)                                                             \
  TENSOR(const float, hidden_states) TENSOR(const float, post_attention_layernorm) MATRIX(gate_up_proj)    \
  TENSOR(float, intermediate)                                                                                          \
  SIZE(num_rows) SIZE(hidden_size) SIZE(gate_up_size) SIZE(intermediate_size)                                          \
  FLOAT(rms_norm_eps) INT(activation)

#define SKIPKERNELS_DOWN_PROJ_ADD(TENSOR, MATRIX, SIZE, INT, FLOAT)                                                            \
  TENSOR(const float, intermediate) MATRIX(down_proj) TENSOR(float, hidden_states)                         \
  TENSOR(float, similarity_partials)                                                                                   \
  SIZE(num_rows) SIZE(intermediate_size) SIZE(hidden_size) SIZE(num_partials) SIZE(num_sequences) SIZE(three)                            \
  INT(rows_per_partial)

#define SKIPKERNELS_BRANCH_ADD(TENSOR, MATRIX, SIZE, INT, FLOAT)                                                       \
  TENSOR(float, branch) TENSOR(const float, norm) TENSOR(float, hidden_states) TENSOR(float, similarity_partials)      \
  SIZE(num_rows) SIZE(hidden_size) SIZE(num_partials) SIZE(num_sequences) SIZE(three)                                  \
  FLOAT(multiplier) FLOAT(rms_norm_eps) INT(rows_per_partial)

#define SKIPKERNELS_ROUTE_EXPERTS(TENSOR, MATRIX, SIZE, INT, FLOAT)                                                    \
  TENSOR(const float, hidden_states) TENSOR(const float, post_attention_layernorm) MATRIX(router)                      \
  TENSOR(const float, router_bias)                                                                                     \
  TENSOR(float, router_logits) TENSOR(int32_t, expert_ids) TENSOR(float, expert_weights)                               \
  TENSOR(int32_t, expert_begins) TENSOR(int32_t, expert_pairs) TENSOR(int64_t, experts_read)                           \
  SIZE(num_rows) SIZE(hidden_size) SIZE(num_experts) SIZE(experts_per_token) SIZE(num_begins) SIZE(num_pairs)          \
  SIZE(num_hidden_layers)                                                                                              \
  FLOAT(rms_norm_eps) INT(norm_topk_prob) INT(layer)

#define SKIPKERNELS_EXPERTS_GATE_UP_ACT(TENSOR, MATRIX, SIZE, INT, FLOAT)                                              \
  TENSOR(const float, hidden_states) TENSOR(const float, post_attention_layernorm) MATRIX(gate_up_proj)                \
  TENSOR(const float, gate_up_bias)                                                                                    \
  TENSOR(const int32_t, expert_begins) TENSOR(const int32_t, expert_pairs) TENSOR(const float, gate_thresholds)        \
  TENSOR(const int32_t, row_sequence) TENSOR(const float, neuron_scale) TENSOR(float, expert_intermediate)             \
  SIZE(num_rows) SIZE(hidden_size) SIZE(gate_up_size) SIZE(num_begins) SIZE(num_pairs) SIZE(num_sequences)             \
  SIZE(num_hidden_layers) SIZE(one) SIZE(experts_per_token) SIZE(expert_size)                                          \
  FLOAT(rms_norm_eps) INT(activation) INT(layer)

#define SKIPKERNELS_EXPERTS_DOWN_PROJ_ADD(TENSOR, MATRIX, SIZE, INT, FLOAT)                                            \
  TENSOR(const float, expert_intermediate) TENSOR(const float, expert_weights) TENSOR(const int32_t, expert_begins)    \
  TENSOR(const int32_t, expert_pairs) MATRIX(down_proj) TENSOR(const float, down_proj_bias)                            \
  TENSOR(float, hidden_states) TENSOR(float, similarity_partials)                                                      \
  SIZE(num_rows) SIZE(experts_per_token) SIZE(expert_size) SIZE(num_begins) SIZE(num_pairs) SIZE(down_size)            \
  SIZE(hidden_size) SIZE(num_partials) SIZE(num_sequences) SIZE(three)                                                 \
  INT(rows_per_partial)

#define SKIPKERNELS_EXPERTS_DOWN_PROJ_NEURONS_ADD(TENSOR, MATRIX, SIZE, INT, FLOAT)                                    \
  TENSOR(const float, expert_intermediate) TENSOR(const float, expert_weights) TENSOR(const int32_t, expert_begins)    \
  TENSOR(const int32_t, expert_pairs) MATRIX(down_proj) TENSOR(const float, down_proj_bias)                            \
  TENSOR(float, hidden_states) TENSOR(float, similarity_partials)                                                      \
  SIZE(num_rows) SIZE(experts_per_token) SIZE(expert_size) SIZE(num_begins) SIZE(num_pairs) SIZE(down_size)            \
  SIZE(hidden_size) SIZE(bias_size) SIZE(num_partials) SIZE(num_sequences) SIZE(three)                                 \
  INT(rows_per_partial) INT(neuron_chunk)

#define SKIPKERNELS_GATE_PROJ_ACT(TENSOR, MATRIX, SIZE, INT, FLOAT)                                                    \
  TENSOR(const float, hidden_states) TENSOR(const float, post_attention_layernorm) MATRIX(gate_proj)                  \
  TENSOR(float, intermediate)                                                                                          \
  SIZE(num_rows) SIZE(hidden_size) SIZE(intermediate_size)                                                             \
  FLOAT(rms_norm_eps) INT(activation)

#define SKIPKERNELS_SELECT_NEURONS(TENSOR, MATRIX, SIZE, INT, FLOAT)                                                   \
  TENSOR(float, intermediate) TENSOR(const float, neuron_thresholds) TENSOR(const int32_t, row_sequence)               \
  TENSOR(const float, neuron_scale) TENSOR(const int32_t, num_generated)                                               \
  TENSOR(int32_t, neurons) TENSOR(int32_t, num_neurons) TENSOR(int64_t, left_out) TENSOR(int32_t, kept_map)            \
  SIZE(num_rows) SIZE(intermediate_size) SIZE(num_sequences) SIZE(num_hidden_layers) SIZE(num_thresholds) SIZE(one)    \
  SIZE(max_seq_len) SIZE(two)                                                                                          \
  INT(layer) INT(stage) INT(neuron_bytes)

#define SKIPKERNELS_UP_PROJ_MUL(TENSOR, MATRIX, SIZE, INT, FLOAT)                                                      \
  TENSOR(const float, hidden_states) TENSOR(const float, post_attention_layernorm) MATRIX(up_proj)                    \
  TENSOR(const int32_t, neurons) TENSOR(const int32_t, num_neurons) TENSOR(float, intermediate)                        \
  SIZE(num_rows) SIZE(hidden_size) SIZE(intermediate_size) SIZE(one)                                                   \
  FLOAT(rms_norm_eps)

#define SKIPKERNELS_DOWN_PROJ_NEURONS_ADD(TENSOR, MATRIX, SIZE, INT, FLOAT)                                            \
  TENSOR(const float, intermediate) TENSOR(const int32_t, neurons) TENSOR(const int32_t, num_neurons)                  \
  MATRIX(down_proj) TENSOR(float, hidden_states) TENSOR(float, similarity_partials)                                    \
  SIZE(num_rows) SIZE(intermediate_size) SIZE(one) SIZE(hidden_size) SIZE(num_partials) SIZE(num_sequences)            \
  SIZE(three)                                                                                                          \
  INT(rows_per_partial) INT(neuron_chunk)

#define SKIPKERNELS_LM_HEAD(TENSOR, MATRIX, SIZE, INT, FLOAT)                                                                  \
  TENSOR(const float, hidden_states) TENSOR(const float, norm) MATRIX(lm_head) TENSOR(float, logits)       \
  SIZE(num_rows) SIZE(hidden_size) SIZE(vocab_size) SIZE(num_sequences)                                                \
  FLOAT(rms_norm_eps) FLOAT(softcap)

#define SKIPKERNELS_SAMPLE(TENSOR, MATRIX, SIZE, INT, FLOAT)                                                                   \
  TENSOR(const float, logits) TENSOR(const uint8_t, seen) TENSOR(const int32_t, num_generated)                         \
  TENSOR(const float, temperature) TENSOR(const int32_t, top_k) TENSOR(const float, top_p) TENSOR(const float, min_p)  \
  TENSOR(const float, repetition_penalty) TENSOR(const int32_t, adjusts) TENSOR(const float, logit_bias)               \
  TENSOR(const float, frequency_penalty) TENSOR(const float, presence_penalty) TENSOR(const int32_t, token_mask)       \
  TENSOR(const int64_t, seed) TENSOR(const int32_t, num_logprobs) TENSOR(int32_t, next_token)                          \
  TENSOR(float, logprobs) TENSOR(int32_t, top_tokens)                                                                  \
  SIZE(num_sequences) SIZE(vocab_size) SIZE(mask_words) SIZE(max_seq_len) SIZE(num_logprobs_kept) SIZE(num_top_kept)

#define SKIPKERNELS_ADVANCE(TENSOR, MATRIX, SIZE, INT, FLOAT)                                                                  \
  TENSOR(const int32_t, next_token) TENSOR(const int32_t, eos_token_ids) TENSOR(const int32_t, max_new_tokens)         \
  TENSOR(const int32_t, block_table)                                                                                   \
  TENSOR(int32_t, input_ids) TENSOR(int32_t, token_ids) TENSOR(uint8_t, seen) TENSOR(int32_t, row_position)            \
  TENSOR(int32_t, num_generated) TENSOR(int32_t, active) TENSOR(int32_t, skip_remaining) TENSOR(int32_t, run_ffn)      \
  TENSOR(float, similarity) TENSOR(uint8_t, run_map) TENSOR(float, similarity_map) TENSOR(int32_t, progress)           \
  SIZE(num_sequences) SIZE(max_eos) SIZE(blocks_per_sequence) SIZE(num_rows) SIZE(token_capacity) SIZE(vocab_size)     \
  SIZE(num_hidden_layers) SIZE(max_seq_len) SIZE(two)                                                                  \
  INT(block_size)

// OP(name of the op, name of its struct, its fields)
#define SKIPKERNELS_OPS(OP)                                                                                            \
  OP(embed, Embed, SKIPKERNELS_EMBED)                                                                                  \
  OP(skip_gate, SkipGate, SKIPKERNELS_SKIP_GATE)                                                                       \
  OP(neuron_gate, NeuronGate, SKIPKERNELS_NEURON_GATE)                                                                 \
  OP(qkv_rope_append, QkvRopeAppend, SKIPKERNELS_QKV_ROPE_APPEND)                                                      \
  OP(norm_rope_append, NormRopeAppend, SKIPKERNELS_NORM_ROPE_APPEND)                                                   \
  OP(decode_attention, DecodeAttention, SKIPKERNELS_DECODE_ATTENTION)                                                  \
  OP(o_proj_add, OProjAdd, SKIPKERNELS_O_PROJ_ADD)                                                                     \
  OP(gate_up_act, GateUpAct, SKIPKERNELS_GATE_UP_ACT)                                                               \
  OP(down_proj_add, DownProjAdd, SKIPKERNELS_DOWN_PROJ_ADD)                                                            \
  OP(branch_add, BranchAdd, SKIPKERNELS_BRANCH_ADD)                                                                    \
  OP(route_experts, RouteExperts, SKIPKERNELS_ROUTE_EXPERTS)                                                           \
  OP(experts_gate_up_act, ExpertsGateUpAct, SKIPKERNELS_EXPERTS_GATE_UP_ACT)                                           \
  OP(experts_down_proj_add, ExpertsDownProjAdd, SKIPKERNELS_EXPERTS_DOWN_PROJ_ADD)                                     \
  OP(experts_down_proj_neurons_add, ExpertsDownProjNeuronsAdd, SKIPKERNELS_EXPERTS_DOWN_PROJ_NEURONS_ADD)              \
  OP(gate_proj_act, GateProjAct, SKIPKERNELS_GATE_PROJ_ACT)                                                            \
  OP(select_neurons, SelectNeurons, SKIPKERNELS_SELECT_NEURONS)                                                        \
  OP(up_proj_mul, UpProjMul, SKIPKERNELS_UP_PROJ_MUL)                                                                  \
  OP(down_proj_neurons_add, DownProjNeuronsAdd, SKIPKERNELS_DOWN_PROJ_NEURONS_ADD)                                     \
  OP(lm_head, LmHead, SKIPKERNELS_LM_HEAD)                                                                             \
  OP(sample, Sample, SKIPKERNELS_SAMPLE)                                                                               \
  OP(advance, Advance, SKIPKERNELS_ADVANCE)

#define SKIPKERNELS_POINTER_MEMBER(type, name) type* name;
#define SKIPKERNELS_MATRIX_MEMBER(name) Matrix name;
#define SKIPKERNELS_INT_MEMBER(name) int64_t name;
#define SKIPKERNELS_FLOAT_MEMBER(name) float name;
#define SKIPKERNELS_STRUCT(op, Struct, FIELDS)                                                                         \
  struct Struct {                                                                                                      \
    FIELDS(SKIPKERNELS_POINTER_MEMBER, SKIPKERNELS_MATRIX_MEMBER, SKIPKERNELS_INT_MEMBER, SKIPKERNELS_INT_MEMBER,      \
           SKIPKERNELS_FLOAT_MEMBER)                                                                                   \
  };
SKIPKERNELS_OPS(SKIPKERNELS_STRUCT)

#define SKIPKERNELS_ENUMERATOR(op, Struct, FIELDS) op,
enum class OpCode : int32_t { SKIPKERNELS_OPS(SKIPKERNELS_ENUMERATOR) };
#undef SKIPKERNELS_ENUMERATOR

// One instruction of the recorded program. A row is touched where row_mask[row] is non-zero; num_rows is the length of row_mask.
struct Instruction {
  OpCode op;
  Format cache_dtype;
  const int32_t* row_mask;
  int64_t num_rows;
  union {
#define SKIPKERNELS_UNION_MEMBER(op, Struct, FIELDS) Struct op;
    SKIPKERNELS_OPS(SKIPKERNELS_UNION_MEMBER)
#undef SKIPKERNELS_UNION_MEMBER
  };
};

// Reflection over the structs, for the bindings.
enum class FieldKind { tensor, matrix, size, integer, real };

struct Field {
  std::string_view name;
  FieldKind kind;
  size_t offset;  // in the op's struct
};

struct OpInfo {
  std::string_view name;
  OpCode op;
  const Field* fields;
  size_t num_fields;
};

namespace detail {
#define SKIPKERNELS_TENSOR_FIELD(type, name) Field{#name, FieldKind::tensor, offsetof(Self, name)},
#define SKIPKERNELS_MATRIX_FIELD(name) Field{#name, FieldKind::matrix, offsetof(Self, name)},
#define SKIPKERNELS_SIZE_FIELD(name) Field{#name, FieldKind::size, offsetof(Self, name)},
#define SKIPKERNELS_INT_FIELD(name) Field{#name, FieldKind::integer, offsetof(Self, name)},
#define SKIPKERNELS_FLOAT_FIELD(name) Field{#name, FieldKind::real, offsetof(Self, name)},
#define SKIPKERNELS_FIELD_TABLE(op, Struct, FIELDS)                                                                    \
  struct Struct##Fields {                                                                                              \
    using Self = Struct;                                                                                               \
    static constexpr Field table[] = {FIELDS(SKIPKERNELS_TENSOR_FIELD, SKIPKERNELS_MATRIX_FIELD, SKIPKERNELS_SIZE_FIELD,\
                                             SKIPKERNELS_INT_FIELD, SKIPKERNELS_FLOAT_FIELD)};                         \
  };
SKIPKERNELS_OPS(SKIPKERNELS_FIELD_TABLE)
}  // namespace detail

#define SKIPKERNELS_OP_INFO(op, Struct, FIELDS)                                                                        \
  OpInfo{#op, OpCode::op, detail::Struct##Fields::table, std::size(detail::Struct##Fields::table)},
inline constexpr OpInfo kInstructionSet[] = {SKIPKERNELS_OPS(SKIPKERNELS_OP_INFO)};
// clang-format on

#undef SKIPKERNELS_OP_INFO
#undef SKIPKERNELS_FIELD_TABLE
#undef SKIPKERNELS_FLOAT_FIELD
#undef SKIPKERNELS_INT_FIELD
#undef SKIPKERNELS_SIZE_FIELD
#undef SKIPKERNELS_MATRIX_FIELD
#undef SKIPKERNELS_TENSOR_FIELD
#undef SKIPKERNELS_STRUCT
#undef SKIPKERNELS_FLOAT_MEMBER
#undef SKIPKERNELS_INT_MEMBER
#undef SKIPKERNELS_MATRIX_MEMBER
#undef SKIPKERNELS_POINTER_MEMBER

}  // namespace skipkernels
