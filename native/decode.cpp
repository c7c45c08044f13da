// One token of a whole model: a list of operations on the vectors of a row, made by
// spikelm/decoder/program.py. Operations of one wave do not depend on each other, so the threads
// share a wave and meet at its end. The rows are tokens of as many sequences, and what a row gets
// does not depend on the others; or they are the next tokens of one sequence, and every operation
// is done for all of them before the next, in order if it remembers. Vectors lie in a row's arena
// of floats; what a sequence remembers lies in its state.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "common.h"
#include "matrix.h"
#include "outputs.h"
#include "pool.h"

extern "C" void spikelm_lif_forward_f32(std::int64_t, std::int64_t, std::int64_t, const float*,
                                        float*, const float*, const float*, const float*,
                                        const std::uint8_t*, int, float*, float*);
extern "C" void spikelm_wkv4_forward_f32(std::int64_t, std::int64_t, std::int64_t, const float*,
                                         const float*, const float*, const float*, float*, float*,
                                         float*, const std::uint8_t*, float*);

namespace {

// In the order of `Code` in program.py.
enum Code : std::int32_t {
    EMBED,
    NORM,
    SPIKE,
    MATVEC,
    KEEP,
    CONV,
    DELTA,
    RWKV7,
    WINDOW,
    GATED_ADD,
    ADD_SPIKES,
    WKV4,
    GLA,
    MEAN,
    ROUTE,
    ADD_EXPERTS,
    OPEN,
    OUTPUTS,
    ESTIMATE,
    SHORTLIST
};

// The meaning of the fields is each operation's own; program.py fills them by name.
struct Op {
    std::int32_t code, wave, list;
    std::int32_t when;  // done where this float of the arena is not 0; always if negative
    std::int32_t size[10];
    std::int32_t at[10];
    std::int32_t state[4];
    float number[8];
    const void* data[9];
};

// What a neuron population sends: the counts, and the list of those that are not 0. Or a list of
// outputs that are wanted: only `index` and `fired`.
struct Events {
    std::int8_t *counts, *value;
    std::int32_t *index, *quads;
    std::int64_t fired = -1;  // -1: not asked for this token
    float v_threshold = 0;
};

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

struct Row {
    // Zero pages until they are written to, as the logits' of most tokens of a prompt never are.
    std::unique_ptr<float[], Free> arena;
    std::vector<char> memory;  // of the lists
    std::vector<Events> lists;
    std::vector<float> scores;  // of softmax attention
    std::vector<std::int32_t> integers;  // of wanted outputs
    std::int64_t token = 0, position = 0;
    float within = INFINITY;  // how far below the largest logit they are exact
    const Row* before = nullptr;  // the token before it, if that is a row of this call too
    // Bytes of matrix-valued states that were read or written, and those of a dense update.
    std::atomic<std::int64_t> touched{0}, dense{0};
    char* const* state = nullptr;
    const std::int64_t* slots = nullptr;  // the second axis of the state tensors
};

struct Program {
    std::vector<Op> ops;
    std::vector<std::size_t> waves;
    std::vector<std::int32_t> list_sizes;
    std::vector<std::int64_t> list_at;  // bytes from the start of a row's memory
    std::vector<std::int64_t> bits_at;  // the same of what is told of a row: a bit for each neuron
    std::int64_t row_bits = 0;          // bytes of all bits of a row
    std::int64_t arena = 0, list_bytes = 0;
    std::int64_t wanted = 0;   // outputs of the widest matrix that is read by output
    std::int64_t head = 0;     // the first of the operations that make the logits
    std::vector<std::unique_ptr<Row>> rows;
    std::int64_t silent = 0, total = 0;
    std::atomic<int> broken{-1};
};

INLINE void prefetch([[maybe_unused]] const float* at) {
#if defined(__GNUC__)
    __builtin_prefetch(at, 0, 2);
#endif
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

template <typename T>
INLINE const T* data(const Op& op, int i) {
    return static_cast<const T*>(op.data[i]);
}

INLINE float* vector(const Op& op, Row& row, int i) {
    return op.at[i] < 0 ? nullptr : row.arena.get() + op.at[i];
}

INLINE float* remembered(const Op& op, const Row& row, int i) {
    return reinterpret_cast<float*>(row.state[op.state[i]]);
}

CLONES void embed(const Op& op, Row& row) {
    const std::int64_t D = op.size[0];
    std::memcpy(vector(op, row, 0), data<float>(op, 0) + row.token * D, D * sizeof(float));
}

INLINE void normalise(float* out, const float* x, std::int64_t n, float eps, const float* weight,
                      const float* bias) {
    if (bias) {
        const float mean = summed(n, [&](std::int64_t i) { return x[i]; }) / n;
        const float variance =
            summed(n, [&](std::int64_t i) { return (x[i] - mean) * (x[i] - mean); }) / n;
        const float scale = 1.0f / std::sqrt(variance + eps);
        CHANNELS
        for (std::int64_t i = 0; i < n; i++)
            out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
    } else {
        const float square = summed(n, [&](std::int64_t i) { return x[i] * x[i]; }) / n;
        const float scale = 1.0f / std::sqrt(square + eps);
        CHANNELS
        for (std::int64_t i = 0; i < n; i++)
            out[i] = x[i] * scale * weight[i];
    }
}

CLONES void norm(const Op& op, Row& row) {
    normalise(vector(op, row, 1), vector(op, row, 0), op.size[0], op.number[0], data<float>(op, 0),
              data<float>(op, 1));
}

// sign(x) m |x / m|^power, m the mean |x|, as `expand` in neurons/integer.py; y may be x.
INLINE void expand(float* y, const float* x, std::int64_t n, float power) {
    const float mean =
        std::max(summed(n, [&](std::int64_t i) { return std::fabs(x[i]); }) / n, 1e-5f);
    if (power == 1.5f) {
        CHANNELS
        for (std::int64_t i = 0; i < n; i++)
            y[i] = x[i] * std::sqrt(std::fabs(x[i]) / mean);
    } else {
        for (std::int64_t i = 0; i < n; i++)
            y[i] = std::copysign(std::pow(std::fabs(x[i]) / mean, power) * mean, x[i]);
    }
}

// The adaptive integer neuron, or with `step` > 0 the one of fixed scale, as in
// neurons/integer.py. Returns v_threshold; its sign bit or NaN tells of an input that is not
// finite.
INLINE float count(const float* x, std::int64_t n, float k, float step, const float* dead_zone,
                   float low, float high, std::int8_t* counts) {
    const float mean = summed(n, [&](std::int64_t i) { return std::fabs(x[i]); }) / n;
    if (!(mean < INFINITY)) return NAN;
    if (step > 0) {
        CHANNELS
        for (std::int64_t i = 0; i < n; i++) {
            const float at = std::min(std::max(x[i] / step, low), high);
            counts[i] = static_cast<std::int8_t>(std::floor(at + 0.5f));
        }
        return step;
    }
    const float v_threshold = std::min(std::max(mean / k, 1e-5f), 1e4f);
    CHANNELS
    for (std::int64_t i = 0; i < n; i++) {
        const float at = std::min(std::max(std::rint(x[i] / v_threshold), low), high);
        counts[i] = static_cast<std::int8_t>(std::fabs(x[i]) > dead_zone[i] * mean ? at : 0.0f);
    }
    return v_threshold;
}

enum Activation : std::int32_t { NONE, SQUARED_RELU, SWIGLU, REGLU, TANH, SIGMOID };

// Spikes 0 or 1 of a LIF neuron, or of one without memory; none if x is not finite.
INLINE const float* threshold(const Op& op, Row& row, const float* x, std::int64_t n) {
    const float size = summed(n, [&](std::int64_t i) { return std::fabs(x[i]); });
    if (!(size < INFINITY)) return nullptr;
    float* fired = vector(op, row, 2);
    const float *tau = data<float>(op, 2), *at = data<float>(op, 3);
    if (tau) {
        spikelm_lif_forward_f32(1, 1, n, x, remembered(op, row, 1), tau, at, nullptr, nullptr,
                                op.size[5], fired, nullptr);
    } else {
        CHANNELS
        for (std::int64_t i = 0; i < n; i++)
            fired[i] = x[i] - at[i] >= 0 ? 1.0f : 0.0f;
    }
    return fired;
}

enum Neuron : std::int32_t { INTEGER, LIF, STEP };

INLINE void list(Events& events, std::int64_t n) {
    std::memset(events.counts + n, 0, OUTPUTS_PADDING);
    events.fired = events.quads
                       ? list_spans(events.counts, n, events.index, events.value, events.quads)
                       : list_events(events.counts, n, events.index, events.value);
}

// size: n, activation, unsigned, max_count, neuron, hard reset; at: x, scratch, scratch of a LIF
// neuron; state: the previous token's input, the membrane; number: k, step, power (0: 1); data: dead
// zone, share of the previous token, tau and threshold.
CLONES bool spike(const Op& op, Row& row) {
    const std::int64_t n = op.size[0];
    const float* x = vector(op, row, 0);
    float* y = vector(op, row, 1);
    if (op.state[0] >= 0) {
        const float* before =
            row.before ? row.before->arena.get() + op.at[0] : remembered(op, row, 0);
        const float* share = data<float>(op, 1);
        CHANNELS
        for (std::int64_t i = 0; i < n; i++)
            y[i] = x[i] + (before[i] - x[i]) * share[i];
        x = y;
    } else if (op.size[1] == SQUARED_RELU) {
        CHANNELS
        for (std::int64_t i = 0; i < n; i++)
            y[i] = x[i] > 0 ? x[i] * x[i] : 0.0f;
        x = y;
    } else if (op.size[1] == SWIGLU) {
        CHANNELS
        for (std::int64_t i = 0; i < n; i++)
            y[i] = x[i] * sigmoid(x[i]) * x[n + i];
        x = y;
    } else if (op.size[1] == REGLU) {
        CHANNELS
        for (std::int64_t i = 0; i < n; i++)
            y[i] = x[i] <= 0 ? 0.0f : x[i] * x[n + i];
        x = y;
    } else if (op.size[1] == TANH) {
        CHANNELS
        for (std::int64_t i = 0; i < n; i++)
            y[i] = 2.0f * sigmoid(2.0f * x[i]) - 1.0f;
        x = y;
    } else if (op.size[1] == SIGMOID) {
        CHANNELS
        for (std::int64_t i = 0; i < n; i++)
            y[i] = sigmoid(x[i]);
        x = y;
    }
    Events& events = row.lists[op.list];
    if (op.size[4] != INTEGER) {
        const float* fired = threshold(op, row, x, n);
        if (!fired) return false;
        for (std::int64_t i = 0; i < n; i++)
            events.counts[i] = static_cast<std::int8_t>(fired[i]);
        events.v_threshold = 1;
        list(events, n);
        return true;
    }
    if (op.number[2] > 0) {
        expand(y, x, n, op.number[2]);
        x = y;
    }
    const float high = static_cast<float>(op.size[3]);
    events.v_threshold = count(x, n, op.number[0], op.number[1], data<float>(op, 0),
                               op.size[2] ? 0.0f : -high, high, events.counts);
    if (!(events.v_threshold > 0)) return false;
    list(events, n);
    return true;
}

// size: adds to what is there; at: y, integers (y itself if it is written anew); data: matrix,
// scale and bias [N].
CLONES void rescale(const Op& op, Row& row, std::int64_t first, std::int64_t last) {
    float* y = vector(op, row, 0);
    const auto* integers = reinterpret_cast<const std::int32_t*>(vector(op, row, 1));
    const float *scale = data<float>(op, 1), *bias = data<float>(op, 2);
    const float v_threshold = row.lists[op.list].v_threshold;
    for (std::int64_t o = first; o < last; o++) {
        const float product_o = static_cast<float>(integers[o]) * scale[o] * v_threshold;
        const float with_bias = bias ? product_o + bias[o] : product_o;
        y[o] = op.size[0] ? y[o] + with_bias : with_bias;
    }
}

INLINE std::int32_t total(const Events& events, std::int64_t n) {
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < n; i++)
        sum += events.counts[i];
    return sum;
}

// Lists the outputs whose gate is open. size: n; at: gates.
void open(const Op& op, Row& row) {
    const float* gate = vector(op, row, 0);
    Events& wanted = row.lists[op.list];
    wanted.fired = 0;
    for (std::int64_t i = 0; i < op.size[0]; i++)
        // What is not a number goes on, to be reported.
        if (!(gate[i] <= 0)) wanted.index[wanted.fired++] = static_cast<std::int32_t>(i);
}

// The wanted outputs of an output-major matrix. size: list of the wanted, whether the integers hold
// the upper halves; at: y, integers; data: matrix, scale and bias [N].
CLONES void outputs(const Op& op, Row& row, std::int64_t begin, std::int64_t end) {
    const auto& matrix = *data<Outputs>(op, 0);
    const Events &events = row.lists[op.list], &wanted = row.lists[op.size[0]];
    // The list is as long as this token makes it: pieces are shares of it.
    const std::int64_t pieces = (matrix.outputs + 63) / 64, first = wanted.fired * begin / pieces;
    const std::int64_t n = wanted.fired * end / pieces - first;
    float* y = vector(op, row, 0);
    const auto* upper = reinterpret_cast<const std::int32_t*>(vector(op, row, 1));
    const float *scale = data<float>(op, 1), *bias = data<float>(op, 2);
    const std::int32_t sum = total(events, matrix.inputs);
    outputs_product(matrix, events.counts, sum, wanted.index + first, n,
                    row.integers.data());
    for (std::int64_t i = first; i < first + n; i++) {
        const std::int32_t o = wanted.index[i];
        std::int32_t integer = row.integers[o];
        // Lower halves are stored less 8.
        if (op.size[1]) integer += 16 * upper[o] + 8 * sum;
        const float product_o = static_cast<float>(integer) * scale[o] * events.v_threshold;
        y[o] = bias ? product_o + bias[o] : product_o;
    }
}

// What the upper halves of 8-bit weights say of the outputs. at: y, integers; data: matrix of the
// upper halves, scale and bias [N].
CLONES void estimate(const Op& op, Row& row, std::int64_t first, std::int64_t last) {
    const auto* integers = reinterpret_cast<const std::int32_t*>(vector(op, row, 1));
    const Events& events = row.lists[op.list];
    const float *scale = data<float>(op, 1), *bias = data<float>(op, 2);
    const float lower = 7.5f * total(events, data<Matrix>(op, 0)->inputs);
    float* y = vector(op, row, 0);
    for (std::int64_t o = first; o < last; o++) {
        const float product_o = (16.0f * integers[o] + lower) * scale[o] * events.v_threshold;
        y[o] = bias ? product_o + bias[o] : product_o;
    }
}

// Lists the outputs that may be within the row's reach of the largest, or that may be positive. size:
// n, list of the spikes, their number, whether the positive are wanted; at: estimates; data: scale. A lower half is 0..15, so the error of an estimate has the variance
// sum count^2 (16^2 - 1) / 12 if halves are as good as random, and is at most 7.5 sum |count|.
CLONES void shortlist(const Op& op, Row& row) {
    constexpr float DEVIATIONS = 6;
    const Events& events = row.lists[op.size[1]];
    float square = 0, most = 0;
    for (std::int64_t i = 0; i < op.size[2]; i++) {
        square += static_cast<float>(events.counts[i]) * events.counts[i];
        most += std::abs(events.counts[i]);
    }
    const float error = std::min(DEVIATIONS * std::sqrt(square * (255.0f / 12)), 7.5f * most);
    const float margin = error * events.v_threshold;
    const std::int64_t n = op.size[0];
    const float *y = vector(op, row, 0), *scale = data<float>(op, 0);
    float best[LANES];
    std::fill(best, best + LANES, -INFINITY);
    const std::int64_t whole = n / LANES * LANES;
    const auto least = [&](std::int64_t i) { return y[i] - margin * scale[i]; };
    for (std::int64_t i = 0; i < whole; i += LANES)
        for (int l = 0; l < LANES; l++)
            best[l] = least(i + l) > best[l] ? least(i + l) : best[l];
    for (std::int64_t i = whole; i < n; i++)
        best[0] = std::max(best[0], least(i));
    const float floor =
        op.size[3] ? 0.0f : *std::max_element(best, best + LANES) - row.within;
    Events& wanted = row.lists[op.list];
    wanted.fired = 0;
    const auto list = [&](std::int64_t i) {
        if (!(y[i] + margin * scale[i] < floor))
            wanted.index[wanted.fired++] = static_cast<std::int32_t>(i);
    };
    for (std::int64_t i = 0; i < whole; i += LANES) {
        std::int32_t some = 0;
        for (int l = 0; l < LANES; l++)
            some |= !(y[i + l] + margin * scale[i + l] < floor);
        for (int l = 0; some && l < LANES; l++)
            list(i + l);
    }
    for (std::int64_t i = whole; i < n; i++)
        list(i);
}

// The rows that take part share what they read.
void matvec(const Op& op, const std::vector<Row*>& rows, std::int64_t begin, std::int64_t end) {
    const Matrix& matrix = *data<Matrix>(op, 0);
    const auto sums = [&](Row& row) {
        return reinterpret_cast<std::int32_t*>(vector(op, row, 1));
    };
    const Events& first = rows[0]->lists[op.list];
    if (rows.size() == 1 && !first.quads) {
        product(matrix, first.counts, first.index, first.value, first.fired, begin, end,
                sums(*rows[0]));
    } else {
        std::vector<Sent> sent;
        sent.reserve(rows.size());
        for (Row* row : rows) {
            const Events& events = row->lists[op.list];
            sent.push_back({events.counts, events.index, events.value, events.quads, events.fired,
                            sums(*row)});
        }
        products(matrix, sent.data(), static_cast<std::int64_t>(sent.size()), begin, end);
    }
    const std::int64_t last = std::min(end * matrix.tile, matrix.outputs);
    for (Row* row : rows)
        (op.code == ESTIMATE ? estimate : rescale)(op, *row, begin * matrix.tile, last);
}

// size: n, adds; at: y. The values of the list's spikes, written to y or added to it.
CLONES void add_spikes(const Op& op, Row& row) {
    const Events& events = row.lists[op.list];
    float* y = vector(op, row, 0);
    CHANNELS
    for (std::int64_t i = 0; i < op.size[0]; i++)
        y[i] = (op.size[1] ? y[i] : 0.0f) + events.counts[i] * events.v_threshold;
}

// size: routed experts, width, top k, sigmoid, shared experts; at: x, weights; data: router.
// Weights of the chosen, 0 for the others, 1 for those that are shared.
CLONES void route(const Op& op, Row& row) {
    const std::int64_t E = op.size[0], D = op.size[1];
    const float *x = vector(op, row, 0), *router = data<float>(op, 0);
    float* weights = vector(op, row, 1);
    std::vector<float> p(E);
    for (std::int64_t e = 0; e < E; e++)
        p[e] = summed(D, [&](std::int64_t i) { return x[i] * router[e * D + i]; });
    if (op.size[3]) {
        for (float& logit : p)
            logit = sigmoid(logit);
    } else {
        const float top = *std::max_element(p.begin(), p.end());
        float total = 0;
        for (float& logit : p)
            total += logit = exponential(logit - top);
        for (float& share : p)
            share /= total;
    }
    std::fill(weights, weights + E, 0.0f);
    std::fill(weights + E, weights + E + op.size[4], 1.0f);
    for (std::int64_t k = 0; k < op.size[2]; k++) {
        const std::int64_t best = std::max_element(p.begin(), p.end()) - p.begin();
        weights[best] = p[best];
        p[best] = -1;
    }
}

// size: experts, width, adds; at: weights, their outputs one behind the other, y.
CLONES void add_experts(const Op& op, Row& row) {
    const std::int64_t D = op.size[1];
    const float *weights = vector(op, row, 0), *outputs = vector(op, row, 1);
    float* y = vector(op, row, 2);
    if (!op.size[2]) std::fill(y, y + D, 0.0f);
    for (std::int64_t e = 0; e < op.size[0]; e++) {
        if (weights[e] == 0) continue;
        CHANNELS
        for (std::int64_t i = 0; i < D; i++)
            y[i] += weights[e] * outputs[e * D + i];
    }
}

// at: a, b, y: y = (a + b) / 2, b normed per head. size: heads, channels; number: norm eps; data:
// norm weight.
CLONES void mean(const Op& op, Row& row) {
    const std::int64_t K = op.size[1];
    const float* a = vector(op, row, 0);
    float *b = vector(op, row, 1), *y = vector(op, row, 2);
    for (std::int64_t h = 0; h < op.size[0]; h++)
        normalise(b + h * K, b + h * K, K, op.number[0], data<float>(op, 0), nullptr);
    CHANNELS
    for (std::int64_t i = 0; i < op.size[0] * K; i++)
        y[i] = (a[i] + b[i]) / 2;
}

// size: channels; at: k, v, r, y; state: p, q, o; data: decay, bonus. y = sigmoid(r) wkv.
CLONES void wkv4(const Op& op, Row& row) {
    const float* r = vector(op, row, 2);
    float* y = vector(op, row, 3);
    spikelm_wkv4_forward_f32(1, 1, op.size[0], vector(op, row, 0), vector(op, row, 1),
                             data<float>(op, 0), data<float>(op, 1), remembered(op, row, 0),
                             remembered(op, row, 1), remembered(op, row, 2), nullptr, y);
    CHANNELS
    for (std::int64_t i = 0; i < op.size[0]; i++)
        y[i] *= sigmoid(r[i]);
}

// Of a head with K rows of V floats; `pending` floats of the rows are read and written too.
INLINE void count_state(Row& row, std::int64_t read, std::int64_t written, std::int64_t K,
                        std::int64_t V, bool pending) {
    const std::int64_t bytes = sizeof(float);
    row.touched += bytes * (V * (read + written) + (pending ? 2 * K : 0));
    row.dense += bytes * 2 * V * K;
}

enum Decay : std::int32_t { CHANNEL, SCALAR, TIED, FIXED };
enum Feature : std::int32_t { RELU, LOGISTIC, SILU, IDENTITY };

INLINE float log_sigmoid(float x) {
    return std::min(x, 0.0f) - std::log1p(exponential(-std::fabs(x)));
}

INLINE float feature(float x, std::int32_t kind) {
    return kind == RELU       ? std::max(x, 0.0f)
           : kind == LOGISTIC ? sigmoid(x)
           : kind == SILU     ? x * sigmoid(x)
                              : x;
}

// size: H, G, K, V, decay, feature map, gates per head; at: q k v, decay logits, gate logits, out;
// state: S; number: gate temperature, scale, norm eps; data: bias of q k v, decay bias, norm
// weight, fixed log-decays [G]. One key/value head and the queries of its group.
CLONES void gla(const Op& op, Row& row, std::int64_t g) {
    const std::int64_t H = op.size[0], G = op.size[1], K = op.size[2], V = op.size[3];
    const std::int64_t gates = op.size[6], each = H / G;
    const float *x = vector(op, row, 0), *bias = data<float>(op, 0);
    const float *logits = vector(op, row, 1), *gate = vector(op, row, 2);
    const float *decay_bias = data<float>(op, 1), *fixed = data<float>(op, 3);
    auto take = [&](std::int64_t at) { return bias ? x[at] + bias[at] : x[at]; };
    const std::int64_t keys = H * K + g * K, values = (H + G) * K + g * V;
    float v[1024], read[1024];
    for (std::int64_t j = 0; j < V; j++)
        v[j] = take(values + j);
    float* S = remembered(op, row, 0) + g * K * V;
    count_state(row, K, K, K, V, false);
    for (std::int64_t i = 0; i < K; i++) {
        const float key = take(keys + i);
        float log_decay;
        if (op.size[4] == CHANNEL)
            log_decay = log_sigmoid(logits[g * K + i] + decay_bias[g * K + i]) / op.number[0];
        else if (op.size[4] == SCALAR)
            log_decay = log_sigmoid(logits[g] + decay_bias[g]) / op.number[0];
        else
            log_decay = op.size[4] == TIED ? log_sigmoid(-key) : fixed[g];
        const float a = exponential(log_decay), k = feature(key, op.size[5]);
        float* row_i = S + i * V;
        for (std::int64_t j = 0; j < V; j++)
            row_i[j] = row_i[j] * a + k * v[j];
    }
    for (std::int64_t h = g * each; h < (g + 1) * each; h++) {
        std::fill(read, read + V, 0.0f);
        for (std::int64_t i = 0; i < K; i++) {
            const float q = op.number[1] * feature(take(h * K + i), op.size[5]);
            if (q == 0) continue;
            const float* row_i = S + i * V;
            for (std::int64_t j = 0; j < V; j++)
                read[j] += q * row_i[j];
        }
        float* out = vector(op, row, 3) + h * V;
        normalise(out, read, V, op.number[2], data<float>(op, 2), nullptr);
        for (std::int64_t j = 0; gates && j < V; j++)
            out[j] *= sigmoid(gate[h * gates + (gates > 1 ? j : 0)]);
    }
}

// size: n, adds; at: x, gate logits, y: y = x sigmoid(gate), or y += it.
CLONES void gated_add(const Op& op, Row& row) {
    const float *x = vector(op, row, 0), *gate = vector(op, row, 1);
    float* y = vector(op, row, 2);
    CHANNELS
    for (std::int64_t i = 0; i < op.size[0]; i++)
        y[i] = (op.size[1] ? y[i] : 0.0f) + x[i] * sigmoid(gate[i]);
}

CLONES void keep(const Op& op, Row& row) {
    std::memcpy(remembered(op, row, 0), vector(op, row, 0), op.size[0] * sizeof(float));
}

// A causal depthwise convolution and SiLU. size: channels, taps; at: x, y; state: the inputs
// before [taps - 1, C]; data: weights [taps, C].
CLONES void conv(const Op& op, Row& row, std::int64_t begin, std::int64_t end) {
    const std::int64_t C = op.size[0], taps = op.size[1];
    const float *x = vector(op, row, 0), *weight = data<float>(op, 0);
    float *y = vector(op, row, 1), *before = taps > 1 ? remembered(op, row, 0) : nullptr;
    CHANNELS
    for (std::int64_t c = begin; c < end; c++) {
        float sum = 0;
        for (std::int64_t t = 0; t < taps - 1; t++)
            sum += before[t * C + c] * weight[t * C + c];
        sum += x[c] * weight[(taps - 1) * C + c];
        y[c] = sum * sigmoid(sum);
    }
    for (std::int64_t t = 0; t + 1 < taps; t++) {
        const float* from = t + 2 < taps ? before + (t + 1) * C : x;
        std::memcpy(before + t * C + begin, from + begin, (end - begin) * sizeof(float));
    }
}

// What the adaptive integer neuron of a head makes of x: k is number[3] (0: off), power number[4]
// (0: 1), max_count size[6] (0: no clip), unsigned size[7].
INLINE bool head_spikes(float* out, const float* x, std::int64_t n, const Op& op,
                        const float* dead_zone) {
    const float k = op.number[3];
    if (!(k > 0)) {
        if (out != x) std::memcpy(out, x, n * sizeof(float));
        return true;
    }
    if (op.number[4] > 0) {
        expand(out, x, n, op.number[4]);
        x = out;
    }
    const float mean = summed(n, [&](std::int64_t i) { return std::fabs(x[i]); }) / n;
    if (!(mean < INFINITY)) return false;
    const float v_threshold = std::min(std::max(mean / k, 1e-5f), 1e4f);
    const float high = op.size[6] ? static_cast<float>(op.size[6]) : INFINITY;
    const float low = op.size[7] ? 0.0f : -high;
    CHANNELS
    for (std::int64_t i = 0; i < n; i++) {
        const float at = std::min(std::max(std::rint(x[i] / v_threshold), low), high);
        out[i] = std::fabs(x[i]) > dead_zone[i] * mean ? at * v_threshold : 0.0f;
    }
    return true;
}

// The head's spikes scaled to unit length.
INLINE bool unit(float* out, const float* x, std::int64_t n, const Op& op, const float* dead_zone) {
    if (!head_spikes(out, x, n, op, dead_zone)) return false;
    const float square = summed(n, [&](std::int64_t i) { return out[i] * out[i]; });
    const float scale = 1.0f / std::sqrt(square + op.number[1]);
    for (std::int64_t i = 0; i < n; i++)
        out[i] *= scale;
    return true;
}

// size: H, K, V, decays per head, erase rates per head, write rates per head, max_count, unsigned;
// at: q k v, gate logits, out; state: S, pending log-decays of its rows (or -1: they owe none);
// number: decay floor, unit eps, norm eps, k of the neurons (0: off); data: gate bias, norm weight,
// dead zones of queries and of keys.
INLINE bool delta_head(const Op& op, Row& row, std::int64_t h, const std::int64_t V) {
    const std::int64_t H = op.size[0], K = op.size[1];
    const std::int64_t decays = op.size[3], erases = op.size[4], writes = op.size[5];
    const float *qkv = vector(op, row, 0), *logits = vector(op, row, 1), *bias = data<float>(op, 0);
    float* S = remembered(op, row, 0) + h * K * V;
    float* pending = op.state[1] < 0 ? nullptr : remembered(op, row, 1) + h * K;
    float q[1024], k[1024], owed[1024], left[1024], erase[1024], write[1024], erased[1024];
    float read[1024];
    if (!unit(q, qkv + h * K, K, op, data<float>(op, 2))) return false;
    if (!unit(k, qkv + (H + h) * K, K, op, data<float>(op, 3))) return false;
    const float* v = qkv + 2 * H * K + h * V;
    // This head's gates, `each` of those of all heads at `at`; a single one is for all n entries.
    auto gates = [&](float* to, std::int64_t n, std::int64_t at, std::int64_t each) {
        const float *x = logits + at + h * each, *b = bias + at + h * each;
        CHANNELS
        for (std::int64_t i = 0; i < each; i++)
            to[i] = sigmoid(x[i] + b[i]);
        if (each == 1) std::fill(to + 1, to + n, to[0]);
    };
    const std::int64_t erase_at = H * decays, write_at = writes ? erase_at + H * erases : erase_at;
    const std::int64_t gate_at = write_at + H * (writes ? writes : 1);
    // Rows that this token writes: those of the keys' spikes, or all if what they lose cannot wait.
    // Behind them the rows that it only reads.
    const bool all = decays && !pending;
    std::int32_t touched[1024 + 1];  // one is written before it is known to count
    std::int64_t n = 0;
    for (std::int64_t i = 0; i < K; i++) {
        touched[n] = static_cast<std::int32_t>(i);
        n += all || k[i] != 0;
    }
    const std::int64_t written = n;
    for (std::int64_t i = 0; i < K && written < K; i++) {
        touched[n] = static_cast<std::int32_t>(i);
        n += !all && k[i] == 0 && q[i] != 0;
    }
    // Rows here and there are found too late by the processor itself. Asked into L2, as L1 takes
    // only as many at a time as it can wait for.
    for (std::int64_t t = 0; t < n && !all; t++)
        for (std::int64_t j = 0; j < V; j += 16)
            prefetch(S + touched[t] * V + j);
    if (decays) gates(owed, K, 0, decays);
    for (std::int64_t i = 0; i < K; i++)
        owed[i] = decays ? op.number[0] * owed[i] : 0.0f;
    if (pending) {
        CHANNELS
        for (std::int64_t i = 0; i < K; i++) {
            owed[i] += pending[i];
            pending[i] = k[i] != 0 ? 0.0f : owed[i];
        }
    }
    gates(erase, K, erase_at, erases);
    for (std::int64_t i = 0; i < K; i++) {
        left[i] = exponential(owed[i]);
        erase[i] *= k[i] * left[i];
    }
    std::fill(erased, erased + V, 0.0f);
    std::fill(read, read + V, 0.0f);
    for (std::int64_t t = 0; t < written; t++) {
        const float *row_i = S + touched[t] * V, b = erase[touched[t]];
        // The branch also keeps GCC from joining rows two by two, which would not vectorise.
        if (b == 0) continue;
        for (std::int64_t j = 0; j < V; j++)
            erased[j] += b * row_i[j];
    }
    gates(write, V, write_at, writes ? writes : 1);
    for (std::int64_t j = 0; j < V; j++)
        erased[j] = write[j] * v[j] - erased[j];
    for (std::int64_t t = 0; t < written; t++) {
        const std::int64_t i = touched[t];
        float* row_i = S + i * V;
        const float k_i = k[i], q_i = q[i], left_i = left[i];
        for (std::int64_t j = 0; j < V; j++) {
            const float s = left_i * row_i[j] + k_i * erased[j];
            row_i[j] = s;
            read[j] += q_i * s;
        }
    }
    for (std::int64_t t = written; t < n; t++) {
        const float *row_i = S + touched[t] * V, q_i = q[touched[t]] * left[touched[t]];
        if (q_i == 0) continue;
        for (std::int64_t j = 0; j < V; j++)
            read[j] += q_i * row_i[j];
    }
    count_state(row, n, written, K, V, pending);
    float* out = vector(op, row, 2) + h * V;
    normalise(out, read, V, op.number[2], data<float>(op, 1), nullptr);
    gates(write, V, gate_at, V);
    for (std::int64_t j = 0; j < V; j++)
        out[j] *= write[j];
    return true;
}

CLONES bool delta(const Op& op, Row& row, std::int64_t h) {
    switch (op.size[2]) {
        case 64:
            return delta_head(op, row, h, 64);
        case 128:
            return delta_head(op, row, h, 128);
        default:
            return delta_head(op, row, h, op.size[2]);
    }
}

// size: H, K; at: r, k, v, decay, rate, gate, mix (or -1), first values, out; state: S; number:
// decay floor, unit eps, norm eps; data: biases of decay, rate and mix, key scale, key rate, bonus,
// norm weight and bias.
INLINE void rwkv7_head(const Op& op, Row& row, std::int64_t h, const std::int64_t K) {
    const std::int64_t at = h * K;
    const float *r = vector(op, row, 0) + at, *keys = vector(op, row, 1) + at;
    const float *values = vector(op, row, 2) + at, *decay = vector(op, row, 3) + at;
    const float *rates = vector(op, row, 4) + at, *gate = vector(op, row, 5) + at;
    const float* mix = op.at[6] < 0 ? nullptr : vector(op, row, 6) + at;
    const float* first = vector(op, row, 7) + at;
    const float *decay_bias = data<float>(op, 0) + at, *rate_bias = data<float>(op, 1) + at;
    const float *key_scale = data<float>(op, 3) + at, *key_rate = data<float>(op, 4) + at;
    const float* bonus = data<float>(op, 5) + at;
    float w[256], k[256], v[256], kappa[256], rate[256], removed[256] = {}, read[256] = {};
    for (std::int64_t i = 0; i < K; i++) {
        w[i] = exponential(op.number[0] * sigmoid(decay[i] + decay_bias[i]));
        rate[i] = sigmoid(rates[i] + rate_bias[i]);
        kappa[i] = keys[i] * key_scale[i];
        k[i] = keys[i] * (1 + (rate[i] - 1) * key_rate[i]);
        v[i] = values[i];
    }
    if (mix) {
        const float* mix_bias = data<float>(op, 2) + at;
        for (std::int64_t i = 0; i < K; i++)
            v[i] += (first[i] - v[i]) * sigmoid(mix[i] + mix_bias[i]);
    }
    const float length = std::sqrt(summed(K, [&](std::int64_t i) { return kappa[i] * kappa[i]; }));
    const float scale = 1.0f / std::max(length, op.number[1]);
    for (std::int64_t i = 0; i < K; i++)
        kappa[i] *= scale;
    float* S = remembered(op, row, 0) + h * K * K;
    count_state(row, K, K, K, K, false);
    for (std::int64_t i = 0; i < K; i++)
        for (std::int64_t j = 0; j < K; j++)
            removed[j] += kappa[i] * S[i * K + j];
    for (std::int64_t i = 0; i < K; i++) {
        const float takes = rate[i] * kappa[i];
        float* row_i = S + i * K;
        for (std::int64_t j = 0; j < K; j++) {
            const float s = w[i] * row_i[j] - takes * removed[j] + k[i] * v[j];
            row_i[j] = s;
            read[j] += r[i] * s;
        }
    }
    float* out = vector(op, row, 8) + at;
    normalise(out, read, K, op.number[2], data<float>(op, 6) + at, data<float>(op, 7) + at);
    const float same = summed(K, [&](std::int64_t i) { return r[i] * k[i] * bonus[i]; });
    for (std::int64_t j = 0; j < K; j++)
        out[j] = (out[j] + same * v[j]) * gate[j];
}

// With the usual size known, sums over a head stay in registers.
CLONES void rwkv7(const Op& op, Row& row, std::int64_t h) {
    if (op.size[1] == 64)
        rwkv7_head(op, row, h, 64);
    else
        rwkv7_head(op, row, h, op.size[1]);
}

INLINE void rotate(float* out, const float* x, std::int64_t K, std::int64_t position,
                   const double* frequency) {
    for (std::int64_t i = 0; i < K / 2; i++) {
        const double angle = static_cast<double>(position) * frequency[i];
        const float c = static_cast<float>(std::cos(angle)),
                    s = static_cast<float>(std::sin(angle));
        const float a = x[i], b = x[K / 2 + i];
        out[i] = a * c - b * s;
        out[K / 2 + i] = b * c + a * s;
    }
}

// size: H, G, K, W (0: as many slots as there are), sinks, gates per head, max_count, unsigned,
// packed; at: q k v and gates, out; state: k, v, sink_k, sink_v; number: norm eps, 0, 0, k and power
// of the queries' neuron (0: off); data: bias of q k v, frequencies (none: no position code), query and
// key norm, dead zone of the queries. Keys and values are floats [K], or `packed` int8 [K] and a
// float scale.
INLINE std::int64_t slots(const Op& op, const Row& row) {
    return op.size[3] ? op.size[3] : row.slots[op.state[0]];
}

CLONES bool window(const Op& op, Row& row, std::int64_t g) {
    const std::int64_t H = op.size[0], G = op.size[1], K = op.size[2], W = slots(op, row);
    const std::int64_t sinks = op.size[4], gates = op.size[5], each = H / G;
    const float *x = vector(op, row, 0), *bias = data<float>(op, 0);
    const auto* frequency = data<double>(op, 1);
    const std::int64_t position = row.position;
    float key[1024], value[1024], query[1024], far[1024];
    auto take = [&](float* out, std::int64_t at) {
        for (std::int64_t i = 0; i < K; i++)
            out[i] = bias ? x[at + i] + bias[at + i] : x[at + i];
    };
    auto step = [&](float* out, float* vector_, const float* weight) {
        if (weight) normalise(vector_, vector_, K, op.number[0], weight, nullptr);
        if (frequency)
            rotate(out, vector_, K, position, frequency);
        else
            std::memcpy(out, vector_, K * sizeof(float));
    };
    auto spiking = [&](float* q) { return head_spikes(q, q, K, op, data<float>(op, 4)); };
    take(query, (H + g) * K);
    step(key, query, data<float>(op, 3));
    take(value, (H + G + g) * K);
    const bool packed = op.size[8];
    const std::int64_t bytes = packed ? K + 4 : K * 4;
    auto at = [&](int state, std::int64_t slot) {
        return row.state[op.state[state]] + (slot * G + g) * bytes;
    };
    auto write = [&](int state, std::int64_t slot, const float* from) {
        char* to = at(state, slot);
        if (!packed) {
            std::memcpy(to, from, bytes);
            return;
        }
        float largest = 0;
        for (std::int64_t i = 0; i < K; i++)
            largest = std::max(largest, std::fabs(from[i]));
        const float unit = largest / 127, divisor = std::max(unit, 1e-30f);
        for (std::int64_t i = 0; i < K; i++)
            to[i] = static_cast<char>(std::rint(from[i] / divisor));
        std::memcpy(to + K, &unit, 4);
    };
    // The product with what stands in a slot, and `weight` times it added to `out`.
    auto score = [&](const float* q, int state, std::int64_t slot) {
        const char* from = at(state, slot);
        if (!packed) {
            const auto* k = reinterpret_cast<const float*>(from);
            return summed(K, [&](std::int64_t i) { return q[i] * k[i]; });
        }
        const auto* k = reinterpret_cast<const std::int8_t*>(from);
        float unit;
        std::memcpy(&unit, from + K, 4);
        return unit * summed(K, [&](std::int64_t i) { return q[i] * k[i]; });
    };
    auto add = [&](float* out, float weight, int state, std::int64_t slot) {
        const char* from = at(state, slot);
        if (!packed) {
            const auto* v = reinterpret_cast<const float*>(from);
            for (std::int64_t i = 0; i < K; i++)
                out[i] += weight * v[i];
            return;
        }
        const auto* v = reinterpret_cast<const std::int8_t*>(from);
        float unit;
        std::memcpy(&unit, from + K, 4);
        for (std::int64_t i = 0; i < K; i++)
            out[i] += weight * unit * v[i];
    };
    write(0, position % W, key);
    write(1, position % W, value);
    if (position < sinks) {
        write(2, position, key);
        write(3, position, value);
    }
    const std::int64_t near = std::min(position + 1, W);
    // Sinks that have left the window keep the distance they have in a full memory.
    const std::int64_t left = std::min(sinks, std::max<std::int64_t>(position - W + 1, 0));
    const float scale = 1.0f / std::sqrt(static_cast<float>(K));
    for (std::int64_t e = 0; e < each; e++) {
        const std::int64_t h = g * each + e;
        float raw[1024];
        take(raw, h * K);
        step(query, raw, data<float>(op, 2));
        if (!spiking(query)) return false;
        float* scores = row.scores.data() + h * (W + sinks);
        float top = -INFINITY;
        for (std::int64_t s = 0; s < near; s++) {
            scores[s] = scale * score(query, 0, s);
            top = std::max(top, scores[s]);
        }
        if (left) {
            if (frequency)
                rotate(far, raw, K, std::min(position, sinks + W - 1), frequency);
            else
                std::memcpy(far, raw, K * sizeof(float));
            if (!spiking(far)) return false;
        }
        for (std::int64_t s = 0; s < left; s++) {
            scores[near + s] = scale * score(far, 2, s);
            top = std::max(top, scores[near + s]);
        }
        for (std::int64_t s = 0; s < near + left; s++)
            scores[s] = exponential(scores[s] - top);
        const float total = summed(near + left, [&](std::int64_t s) { return scores[s]; });
        float* out = vector(op, row, 1) + h * K;
        std::fill(out, out + K, 0.0f);
        for (std::int64_t s = 0; s < near + left; s++) {
            const float weight = scores[s] / total;
            if (s < near)
                add(out, weight, 1, s);
            else
                add(out, weight, 3, s - near);
        }
        const float* gate = x + (H + 2 * G) * K + h * gates;
        for (std::int64_t i = 0; gates && i < K; i++)
            out[i] *= sigmoid(gate[gates > 1 ? i : 0]);
    }
    return true;
}

// In how many pieces an operation can be done.
std::int64_t pieces(const Op& op) {
    switch (op.code) {
        case MATVEC:
            return data<Matrix>(op, 0)->tiles;
        case DELTA:
        case RWKV7:
            return op.size[0];
        case WINDOW:
        case GLA:
            return op.size[1];
        case CONV:
            return (op.size[0] + 255) / 256;
        case ESTIMATE:
            return data<Matrix>(op, 0)->tiles;
        case OUTPUTS:
            return (data<Outputs>(op, 0)->outputs + 63) / 64;
        default:
            return 1;
    }
}

bool execute(const Op& op, Row& row, std::int64_t begin, std::int64_t end) {
    switch (op.code) {
        case EMBED:
            embed(op, row);
            return true;
        case NORM:
            norm(op, row);
            return true;
        case SPIKE:
            return spike(op, row);
        case KEEP:
            keep(op, row);
            return true;
        case GATED_ADD:
            gated_add(op, row);
            return true;
        case ADD_SPIKES:
            add_spikes(op, row);
            return true;
        case MEAN:
            mean(op, row);
            return true;
        case ROUTE:
            route(op, row);
            return true;
        case ADD_EXPERTS:
            add_experts(op, row);
            return true;
        case OPEN:
            open(op, row);
            return true;
        case OUTPUTS:
            outputs(op, row, begin, end);
            return true;
        case SHORTLIST:
            shortlist(op, row);
            return true;
        case WKV4:
            wkv4(op, row);
            return true;
        case GLA:
            for (auto g = begin; g < end; g++)
                gla(op, row, g);
            return true;
        case CONV:
            conv(op, row, begin * 256, std::min<std::int64_t>(end * 256, op.size[0]));
            return true;
        case RWKV7:
            for (auto h = begin; h < end; h++)
                rwkv7(op, row, h);
            return true;
        case DELTA:
            for (auto h = begin; h < end; h++)
                if (!delta(op, row, h)) return false;
            return true;
        case WINDOW:
            for (auto g = begin; g < end; g++)
                if (!window(op, row, g)) return false;
            return true;
        default:
            return false;
    }
}

// The bytes of weights that a token made an operation read.
std::int64_t bytes_read(const Op& op, const Row& row) {
    if (op.when >= 0 && row.arena[op.when] == 0) return 0;
    if (op.code == OUTPUTS)
        return row.lists[op.size[0]].fired * data<Outputs>(op, 0)->stride;
    if (op.code != MATVEC && op.code != ESTIMATE) return 0;
    const Matrix& matrix = *data<Matrix>(op, 0);
    const std::int64_t events = row.lists[op.list].fired;
    return reads_all(matrix, events) ? matrix.bytes : matrix.bytes / matrix.inputs * events;
}

// Whether what an operation does for a token changes what it does for the next one.
bool remembers(const Op& op) {
    switch (op.code) {
        case SPIKE:
            return op.size[4] == LIF;
        case KEEP:
        case CONV:
        case DELTA:
        case RWKV7:
        case WINDOW:
        case WKV4:
        case GLA:
            return true;
        default:
            return false;
    }
}

struct Wave {
    Program* program;
    std::size_t begin, end;
    std::int64_t rows;
    bool sequence;  // the rows are the next tokens of one
};

void run_wave(void* context, int part, int parts) {
    const Wave& wave = *static_cast<Wave*>(context);
    Program& program = *wave.program;
    std::int64_t turn = 0;
    std::vector<Row*> together;
    for (std::size_t i = wave.begin; i < wave.end; i++) {
        const Op& op = program.ops[i];
        const std::int64_t n = pieces(op);
        const bool in_order = wave.sequence && remembers(op);
        together.clear();
        const bool product = op.code == MATVEC || op.code == ESTIMATE;
        // Of a sequence only the last token has logits.
        const bool last_only = wave.sequence && static_cast<std::int64_t>(i) >= program.head;
        for (std::int64_t b = last_only ? wave.rows - 1 : 0; b < wave.rows; b++) {
            Row& row = *program.rows[b];
            std::int64_t begin = n * part / parts, end = n * (part + 1) / parts;
            if (n == 1 && !product) {
                // What cannot be divided goes round the threads.
                if ((in_order ? static_cast<std::int64_t>(i) : turn++) % parts != part) continue;
                begin = 0, end = 1;
            }
            if (op.when >= 0 && row.arena[op.when] == 0) continue;
            if (product) {
                together.push_back(&row);
            } else if (begin < end && !execute(op, row, begin, end)) {
                int none = -1;
                program.broken.compare_exchange_strong(none, static_cast<int>(i));
            }
        }
        if (!together.empty()) matvec(op, together, n * part / parts, n * (part + 1) / parts);
    }
}

// The other list that an operation reads, or -1.
std::int32_t second_list(const Op& op) {
    return op.code == OUTPUTS ? op.size[0] : op.code == SHORTLIST ? op.size[1] : -1;
}

// Where each list lies in a row's memory. It is used anew whenever all lists have been read.
void place_lists(Program& program) {
    std::vector<std::int32_t> until(program.list_sizes.size());
    for (const Op& op : program.ops)
        for (const std::int32_t used : {op.list, second_list(op)})
            if (used >= 0) until[used] = std::max(until[used], op.wave);
    program.list_at.assign(program.list_sizes.size(), -1);
    std::int64_t used = 0;
    std::int32_t busy = -1;
    for (const Op& op : program.ops) {
        if (op.list < 0 || program.list_at[op.list] >= 0) continue;
        if (op.wave > busy) used = 0;
        busy = std::max(busy, until[op.list]);
        program.list_at[op.list] = used;
        const std::int64_t n = std::abs(program.list_sizes[op.list]) + OUTPUTS_PADDING;
        // Counts, values, indices and quads, each from a cache line on.
        used += (2 * n + 5 * list_room(n) + 4 * num_spans(n)) / 64 * 64 + 4 * 64;
        program.list_bytes = std::max(program.list_bytes, used);
    }
}

// Marks the neurons that fired in a row's bits.
void tell(const Program& program, const Op& op, const Row& row, std::uint8_t* bits) {
    if (op.code != SPIKE) return;
    const Events& events = row.lists[op.list];
    bits += program.bits_at[op.list];
    for (std::int64_t i = 0; i < events.fired; i++)
        bits[events.index[i] / 8] |= static_cast<std::uint8_t>(1 << events.index[i] % 8);
}

constexpr std::int64_t DONE = -1, BAD_TOKEN = -2;

}  // namespace

EXPORT void* spikelm_program_new(const Op* ops, std::int64_t num_ops, std::int64_t arena,
                                 const std::int32_t* list_sizes, std::int64_t num_lists) {
    auto* program = new Program;
    program->ops.assign(ops, ops + num_ops);
    program->list_sizes.assign(list_sizes, list_sizes + num_lists);
    program->arena = arena;
    for (const Op& op : program->ops)
        if (op.code == OUTPUTS)
            program->wanted = std::max(program->wanted, data<Outputs>(op, 0)->outputs);
    program->head = num_ops - (ops[num_ops - 1].code == OUTPUTS ? 3 : 1);
    for (std::int64_t i = 0; i < num_ops; i++)
        if (i == 0 || ops[i].wave != ops[i - 1].wave) program->waves.push_back(i);
    program->waves.push_back(num_ops);
    place_lists(*program);
    for (std::int64_t l = 0; l < num_lists; l++) {
        program->bits_at.push_back(program->row_bits);
        program->row_bits += (std::abs(list_sizes[l]) + 7) / 8;
    }
    return program;
}

EXPORT void spikelm_program_free(void* program) { delete static_cast<Program*>(program); }

// One token for each of `rows` sequences, or `rows` tokens of one. `state` holds rows (or 1) x
// num_states addresses, num_slots the second axis of each state tensor, `logits` has as many rows;
// `positions` are those of the sequences, and go on. Logits up to `within` below the largest are exact, others
// may be estimates. `counters` gets the silent and all entries that entered a matrix, and the bytes
// of weights read for them, as if every row read its own; then the bytes of matrix-valued states that
// were touched, and those of a dense update, all of each row. `fired`, if there is one, gets a bit for each neuron
// of each list, those of a row after another, each list from a byte on. Returns the operation that met a number that is not
// finite, DONE, or BAD_TOKEN if nothing was done because a token is none.
EXPORT std::int64_t spikelm_program_run(void* handle, std::int64_t rows, int sequence,
                                        const std::int64_t* tokens, std::int64_t* positions,
                                        char* const* state, const std::int64_t* num_slots,
                                        std::int64_t num_states, std::int64_t logits_at,
                                        std::int64_t num_logits, float within,
                                        float* logits, std::int64_t* counters,
                                        std::uint8_t* fired, int num_threads) {
    auto& program = *static_cast<Program*>(handle);
    for (std::int64_t b = 0; b < rows; b++)
        if (tokens[b] < 0 || tokens[b] >= num_logits) return BAD_TOKEN;
    if (num_threads != threads()) set_threads(num_threads);
    program.broken = -1;
    while (static_cast<std::int64_t>(program.rows.size()) < rows) {
        auto row = std::make_unique<Row>();
        row->arena.reset(static_cast<float*>(std::calloc(program.arena, sizeof(float))));
        row->memory.resize(program.list_bytes + 64);
        row->integers.resize(program.wanted);
        program.rows.push_back(std::move(row));
    }
    for (std::int64_t b = 0; b < rows; b++) {
        Row& row = *program.rows[b];
        row.token = tokens[b];
        row.position = sequence ? positions[0] + b : positions[b];
        row.before = sequence && b ? program.rows[b - 1].get() : nullptr;
        row.state = state + (sequence ? 0 : b * num_states);
        row.within = within;
        row.slots = num_slots;
        row.touched = row.dense = 0;
        for (const Op& op : program.ops) {
            if (op.code != WINDOW) continue;
            const std::size_t most = op.size[0] * (slots(op, row) + op.size[4]);
            if (row.scores.size() < most) row.scores.resize(most);
        }
        row.lists.resize(program.list_sizes.size());
        for (std::size_t l = 0; l < row.lists.size(); l++) {
            const std::int64_t n = std::abs(program.list_sizes[l]) + OUTPUTS_PADDING;
            const auto lines = [](std::int64_t bytes) { return (bytes + 63) / 64 * 64; };
            char* at = row.memory.data() + program.list_at[l];
            at += lines(reinterpret_cast<std::intptr_t>(at)) - reinterpret_cast<std::intptr_t>(at);
            Events& events = row.lists[l];
            events.fired = -1;
            events.counts = reinterpret_cast<std::int8_t*>(at);
            events.value = events.counts + lines(n);
            events.index = reinterpret_cast<std::int32_t*>(events.value + lines(list_room(n)));
            events.quads = rows > FEW_ROWS ? events.index + list_room(n) : nullptr;
        }
    }
    for (std::size_t w = 0; w + 1 < program.waves.size(); w++) {
        Wave wave{&program, program.waves[w], program.waves[w + 1], rows, sequence != 0};
        std::int64_t most = 0;
        for (std::size_t i = wave.begin; i < wave.end; i++)
            most += pieces(program.ops[i]) * rows;
        parallel(run_wave, &wave, static_cast<int>(std::min<std::int64_t>(most, num_threads)));
        if (program.broken >= 0) return program.broken;
        // Now: the memory of the lists is used again.
        if (fired)
            for (std::int64_t b = 0; b < rows; b++)
                for (std::size_t i = wave.begin; i < wave.end; i++)
                    tell(program, program.ops[i], *program.rows[b], fired + b * program.row_bits);
    }
    for (std::int64_t b = 0; b < rows; b++) {
        Row& row = *program.rows[b];
        if (!sequence || b + 1 == rows)
            std::memcpy(logits + (sequence ? 0 : b) * num_logits, row.arena.get() + logits_at,
                        num_logits * sizeof(float));
        std::int64_t* counts = counters + b * 5;
        for (const Op& op : program.ops)
            counts[2] += bytes_read(op, row);
        for (std::size_t l = 0; l < row.lists.size(); l++) {
            // A negative size marks spikes that enter no matrix.
            if (program.list_sizes[l] < 0 || row.lists[l].fired < 0) continue;
            counts[0] += program.list_sizes[l] - row.lists[l].fired;
            counts[1] += program.list_sizes[l];
        }
        counts[3] += row.touched;
        counts[4] += row.dense;
    }
    for (std::int64_t b = 0; b < (sequence ? 1 : rows); b++)
        positions[b] += sequence ? rows : 1;
    return DONE;
}
