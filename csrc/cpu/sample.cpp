// next_token (sequences) from logits (sequences, vocab): argmax, or Gumbel-max over the tokens that survive top-k,
// top-p and min-p. A task is a row. The Python twin, and the definition, is sample() in
// skipkernels/program/reference.py.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "../philox.h"
#include "kernels.h"

namespace skipkernels::cpu {

int64_t sample_tasks(const Instruction&, const Scratch& s) { return s.num_rows; }

namespace {

float adjusted(const Sample& op, int row, int64_t token) {
    const int64_t at = row * op.vocab_size + token;
    const int32_t adjusts = op.adjusts[row];
    float score = op.logits[at];
    if (adjusts & kAdjustsBias) score += op.logit_bias[at];
    if (const int seen = op.seen[at]) {
        const float penalty = op.repetition_penalty[row];
        score = score > 0 ? score / penalty : score * penalty;
        if (const int times = seen >> 1; times && adjusts & kAdjustsCounts) {
            const float frequency = static_cast<float>(times) * op.frequency_penalty[row];
            score = (score - frequency) - op.presence_penalty[row];
        }
    }
    const bool allowed = !(adjusts & kAdjustsMask) ||
                         (static_cast<uint32_t>(op.token_mask[row * op.mask_words + token / 32]) >> (token % 32) & 1);
    return allowed ? score : -std::numeric_limits<float>::infinity();
}

// As torch's argmax: the first of equals, and a NaN above all. score(token) is asked once for each token.
template <class Score>
int32_t argmax(int64_t vocab_size, Score score) {
    int32_t best = 0;
    float best_score = score(0);
    for (int64_t token = 1; token < vocab_size; ++token) {
        const float value = score(token);
        if (value > best_score || (std::isnan(value) && !std::isnan(best_score))) {
            best = static_cast<int32_t>(token), best_score = value;
        }
    }
    return best;
}

int32_t greedy(const Sample& op, int row) {
    return argmax(op.vocab_size, [&](int64_t token) { return adjusted(op, row, token); });
}

// Drops from `kept` what top-k removes; ties at the edge stay.
void apply_top_k(std::vector<int32_t>& kept, const std::vector<float>& scores, int64_t top_k) {
    if (top_k <= 0 || top_k >= static_cast<int64_t>(kept.size())) return;
    std::vector<float> sorted = scores;
    std::nth_element(sorted.begin(), sorted.begin() + (top_k - 1), sorted.end(), std::greater<float>());
    const float edge = sorted[top_k - 1];
    kept.erase(std::remove_if(kept.begin(), kept.end(), [&](int32_t id) { return !(scores[id] >= edge); }), kept.end());
}

// Keeps the shortest prefix, by falling score and rising id, that holds top_p of the probability.
void apply_top_p(std::vector<int32_t>& kept, const std::vector<float>& scores, float top_p) {
    if (top_p >= 1.0f) return;
    std::stable_sort(kept.begin(), kept.end(), [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
    const double top = scores[kept[0]];
    double total = 0;
    for (int32_t id : kept) total += std::exp(scores[id] - top);
    double before = 0;
    size_t count = 0;
    for (; count < kept.size() && before < static_cast<double>(top_p) * total; ++count) {
        before += std::exp(scores[kept[count]] - top);
    }
    kept.resize(std::max<size_t>(count, 1));
}

int32_t draw(const Sample& op, int row) {
    std::vector<float> scores(op.vocab_size);
    for (int64_t token = 0; token < op.vocab_size; ++token)
        scores[token] = adjusted(op, row, token) / op.temperature[row];
    const int32_t top = argmax(op.vocab_size, [&](int64_t token) { return scores[token]; });
    if (!std::isfinite(scores[top])) return top;
    std::vector<int32_t> kept(op.vocab_size);
    std::iota(kept.begin(), kept.end(), 0);
    apply_top_k(kept, scores, op.top_k[row]);
    apply_top_p(kept, scores, op.top_p[row]);
    const double floor = op.min_p[row] > 0 ? scores[top] + std::log(static_cast<double>(op.min_p[row]))
                                           : -std::numeric_limits<double>::infinity();
    int32_t best = kept[0];
    double best_value = -std::numeric_limits<double>::infinity();
    for (int32_t id : kept) {
        if (scores[id] < floor) continue;
        const double uniform = philox_uniform(static_cast<uint64_t>(op.seed[row]), static_cast<uint32_t>(id),
                                              static_cast<uint32_t>(op.num_generated[row]), kSampleStream);
        const double value = scores[id] - std::log(-std::log(uniform));
        if (value > best_value) best = id, best_value = value;
    }
    return best;
}

// log softmax of the model's own logits: of the row's token, then of the likeliest ones.
void record_logprobs(const Sample& op, int row) {
    const float* logits = op.logits + row * op.vocab_size;
    const int64_t at = row * op.max_seq_len + op.num_generated[row];
    const double top = *std::max_element(logits, logits + op.vocab_size);
    double total = 0;
    for (int64_t token = 0; token < op.vocab_size; ++token) total += std::exp(logits[token] - top);
    const double log_total = top + std::log(total);
    float* logprobs = op.logprobs + at * op.num_logprobs_kept;
    logprobs[0] = static_cast<float>(logits[op.next_token[row]] - log_total);
    const int64_t count = std::min<int64_t>(op.num_logprobs[row] - 1, op.vocab_size);
    if (count == 0) return;
    std::vector<int32_t> likeliest(op.vocab_size);
    std::iota(likeliest.begin(), likeliest.end(), 0);
    std::partial_sort(likeliest.begin(), likeliest.begin() + count, likeliest.end(),
                      [&](int32_t a, int32_t b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); });
    for (int64_t i = 0; i < count; ++i) {
        op.top_tokens[at * op.num_top_kept + i] = likeliest[i];
        logprobs[1 + i] = static_cast<float>(logits[likeliest[i]] - log_total);
    }
}

}  // namespace

void sample_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const Sample& op = ins.sample;
    for (int64_t task = begin; task < end; ++task) {
        const int row = s.rows[task];
        op.next_token[row] = op.temperature[row] == 0 ? greedy(op, row) : draw(op, row);
        if (op.num_logprobs[row]) record_logprobs(op, row);
    }
}

}  // namespace skipkernels::cpu
