// intermediate (rows, intermediate) *= up @ x for the listed neurons, x = rms_norm(hidden_states); no other row of
// up_proj (intermediate, hidden) is read. A task is a panel of the list; of quantised rows, which lie in one piece
// each, a group.
//
// Each (neuron, row) pair has one vector accumulator that walks k in order, as in linear.h: what a neuron gets does not
// depend on the list it stands in, and with every neuron listed the bits are those of gate_up_act.
#include "linear.h"
#include "neuron_rows.h"

namespace skipkernels::SKIPKERNELS_ISA {

int64_t up_proj_mul_tasks(const Instruction& ins, const Scratch&) {
    const int64_t listed = *ins.up_proj_mul.num_neurons;
    return is_float(ins.up_proj_mul.up_proj.format) ? num_panels(listed) : cpu::num_groups(listed);
}

void up_proj_mul_pack(const Instruction& ins, int begin, int end, Scratch& s) {
    const UpProjMul& op = ins.up_proj_mul;
    pack_rms_norm(op.up_proj, op.hidden_states, op.hidden_size, op.post_attention_layernorm, op.rms_norm_eps, begin,
                  end, s);
}

// out (N, kPanelRows) = w[R] (k) * x; what is `ahead` and the beginning of the rows `next` are fetched meanwhile
template <class T, int R, int N>
static void listed_rows(const T* const* w, const T* const* next, RowsAhead<T>& ahead, int64_t k,
                        const typename Multiply<T>::Activation* x, float* out) {
    using M = Multiply<T>;
    constexpr int W = M::width, kLine = 64 / static_cast<int>(sizeof(T));
    Vec acc[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) acc[r][n] = splat(0.0f);
    auto step = [&](int64_t from, auto load_weight) {
        decltype(load_weight(w[0])) weight[R];
        for (int r = 0; r < R; ++r) weight[r] = load_weight(w[r] + from);
        for (int n = 0; n < N; ++n) {
            const auto activation = M::activation(x + from * N + n * W);
            for (int r = 0; r < R; ++r) acc[r][n] = M::add(weight[r], activation, acc[r][n]);
        }
    };
    int64_t j = 0;
    for (; j + kLine <= k; j += kLine) {
        ahead.fetch(R);
        if (N <= 2) {
            for (int r = 0; r < R; ++r) prefetch_beside(w[r], next[r], j, k);
        }
        for (int u = 0; u < kLine; u += W) step(j + u, [](const T* p) { return M::weight(p); });
    }
    for (; j + W <= k; j += W) step(j, [](const T* p) { return M::weight(p); });
    if (j < k) {
        const int left = static_cast<int>(k - j);
        step(j, [left](const T* p) { return M::weight_first(p, left); });
    }
    reduce_tile<R, N>(acc, out);
}

template <class T, int R, int... N>
static void listed_rows_of(int n, std::integer_sequence<int, N...>, const T* const* w, const T* const* next,
                           RowsAhead<T>& ahead, int64_t k, const typename Multiply<T>::Activation* x, float* out) {
    ((n == N + 1 ? listed_rows<T, R, N + 1>(w, next, ahead, k, x, out) : void()), ...);
}

// out (active rows, kPanelRows) of `count` neurons from list[0] on; the list goes on to `end`
template <class T>
static void listed_panel(const T* up, const int32_t* list, int count, const int32_t* end, int64_t k, Scratch& s) {
    constexpr int R = 4, kDistance = 2 * R;  // rows, of which L2 holds many
    constexpr auto kRows = std::make_integer_sequence<int, cpu::kMaxTile>{};
    const Tiles tiles(s.num_rows);
    for (int at = 0; at < count; at += R) {
        const T *w[R], *next[R], *coming[R];
        const int height = count - at < R ? count - at : R;
        int fetched = 0;
        for (int r = 0; r < R; ++r) {
            auto row = [&](const int32_t* neuron) { return up + *(neuron < end ? neuron : end - 1) * k; };
            const int32_t* own = list + at + r;
            w[r] = row(own);
            next[r] = row(own + R);
            if (own + kDistance < end) coming[fetched++] = up + own[kDistance] * k;
        }
        RowsAhead<T> ahead(coming, fetched, 0, k);
        for (int tile = 0; tile < tiles.count; ++tile) {
            const int begin = tiles.begin(tile), n = tiles.size(tile);
            const auto* x = packed_tile<T>(s, k, begin);
            float* out = s.panel + begin * cpu::kPanelRows + at;
            if (height == R) {
                listed_rows_of<T, R>(n, kRows, w, next, ahead, k, x, out);
            } else {
                for (int r = 0; r < height; ++r) listed_rows_of<T, 1>(n, kRows, w + r, next + r, ahead, k, x, out + r);
            }
        }
    }
}

// intermediate of a row *= products, for `count` neurons
static void multiply_listed(const UpProjMul& op, int row, const int32_t* list, int count, const float* products) {
    float* values = op.intermediate + row * op.intermediate_size;
    for (int r = 0; r < count; ++r) {
        float& value = values[list[r]];
        if (value != 0.0f) value *= products[r];
    }
}

template <class T>
static void multiply_panels(const UpProjMul& op, int64_t begin, int64_t end, Scratch& s) {
    const auto* up = static_cast<const T*>(op.up_proj.data);
    const int64_t k = op.hidden_size;
    const int32_t* list_end = op.neurons + *op.num_neurons;
    for (int64_t panel = begin; panel < end; ++panel) {
        const int32_t* list = op.neurons + panel * cpu::kPanelRows;
        if (list >= list_end) return;  // none is listed
        const int count = static_cast<int>(list_end - list < cpu::kPanelRows ? list_end - list : cpu::kPanelRows);
        if (list[count - 1] - list[0] == count - 1) {  // neighbours, as where prompts keep all
            const auto* w = up + list[0] * k;
            linear_panel(w, k, count, w + count * k, s.panel, s);
        } else {
            listed_panel(up, list, count, list_end, k, s);
        }
        for (int i = 0; i < s.num_rows; ++i) multiply_listed(op, s.rows[i], list, count, s.panel + i * cpu::kPanelRows);
    }
}

template <Format format>
static void multiply_groups(const UpProjMul& op, int64_t begin, int64_t end, const Scratch& s) {
    const int32_t* list_end = op.neurons + *op.num_neurons;
    const SingleRowsProduct<format> product(op.hidden_size, s);
    for (int64_t group = begin; group < end; ++group) {
        const int32_t* list = op.neurons + group * cpu::kLanes;
        if (list >= list_end) return;  // none is listed
        const int count = static_cast<int>(list_end - list < cpu::kLanes ? list_end - list : cpu::kLanes);
        product.listed(op.up_proj.parts[0], list, count, list_end,
                       [&](int i, const float* products) { multiply_listed(op, s.rows[i], list, count, products); });
    }
}

void up_proj_mul_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const UpProjMul& op = ins.up_proj_mul;
    with_float_type(op.up_proj.format, [&](auto type) { multiply_panels<decltype(type)>(op, begin, end, s); });
    with_block_format(op.up_proj.format,
                      [&](auto format) { multiply_groups<decltype(format)::value>(op, begin, end, s); });
}

}  // namespace skipkernels::SKIPKERNELS_ISA
