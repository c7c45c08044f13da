// The adaptive integer neuron in training, forward and backward; `spikelm/neurons/integer.py` has the
// equations. x, values, counts and their gradients are [R, C], v_threshold is [R], dead zones and
// their gradient are [C]. With a power, u stands for what becomes counts in place of x.

#include <algorithm>
#include <vector>

#include "common.h"

// What all rows share.
template <typename T>
struct Neuron {
    T k, power, low, high;  // counts per mean |u|, and their clip
    T band;                 // width of the band around the edge of the dead zone
};

constexpr double MIN_THRESHOLD = 1e-5, MAX_THRESHOLD = 1e4;

// |x / m|^(power - 1), which x is multiplied by.
template <typename T>
INLINE void factors(std::int64_t C, const T* x, T m, T power, T* out) {
    if (power == T(1.5)) {
        CHANNELS
        for (std::int64_t c = 0; c < C; ++c) out[c] = std::sqrt(std::fabs(x[c]) / m);
    } else if (power == T(2)) {
        CHANNELS
        for (std::int64_t c = 0; c < C; ++c) out[c] = std::fabs(x[c]) / m;
    } else {
        for (std::int64_t c = 0; c < C; ++c) out[c] = std::pow(std::fabs(x[c]) / m, power - 1);
    }
}

// A row's u, its mean |u| and its threshold. u may be where the factors are.
template <typename T>
struct Scaled {
    T m, mean, threshold;
};

template <typename T>
INLINE Scaled<T> scaled(std::int64_t C, const T* x, const Neuron<T>& neuron, T* factor, T* u) {
    Scaled<T> s;
    s.m = s.mean = summed<T>(C, [&](std::int64_t c) { return std::fabs(x[c]); }) / T(C);
    if (neuron.power != 1) {
        factors(C, x, std::max(s.m, T(MIN_THRESHOLD)), neuron.power, factor);
        CHANNELS
        for (std::int64_t c = 0; c < C; ++c) u[c] = x[c] * factor[c];
        s.mean = summed<T>(C, [&](std::int64_t c) { return std::fabs(u[c]); }) / T(C);
    } else {
        std::copy(x, x + C, u);
    }
    // In this order what is not a number stays none.
    s.threshold = std::min(std::max(s.mean / neuron.k, T(MIN_THRESHOLD)), T(MAX_THRESHOLD));
    return s;
}

template <typename T>
INLINE void forward(std::int64_t R, std::int64_t C, const T* x, const T* zone,
                    const Neuron<T>& neuron, T* values, T* counts, T* thresholds) {
    for (std::int64_t r = 0; r < R; ++r, x += C, values += C, counts += C) {
        const Scaled<T> s = scaled(C, x, neuron, values, counts);
        const T threshold = thresholds[r] = s.threshold;
        CHANNELS
        for (std::int64_t c = 0; c < C; ++c) {
            const T u = counts[c];
            const T fires = std::fabs(u) > zone[c] * s.mean ? T(1) : T(0);
            const T count = std::rint(u / threshold) * fires;
            counts[c] = std::min(std::max(count, neuron.low), neuron.high);
            values[c] = counts[c] * threshold;
        }
    }
}

template <typename T>
INLINE void backward(std::int64_t R, std::int64_t C, const T* x, const T* zone,
                     const Neuron<T>& neuron, const T* grad, T* grad_x, T* grad_zone) {
    std::vector<T> memory(2 * C);
    T *factor = memory.data(), *u = factor + C;
    // Unsigned counts end at 0 exactly, the others half a count behind the clip.
    const T from = neuron.low == 0 ? T(0) : neuron.low - T(0.5), to = neuron.high + T(0.5);
    for (std::int64_t r = 0; r < R; ++r, x += C, grad += C, grad_x += C) {
        const Scaled<T> s = scaled(C, x, neuron, factor, u);
        const T least = neuron.low == 0 ? T(0) : from * s.threshold, most = to * s.threshold;
        if (grad_zone) {
            CHANNELS
            for (std::int64_t c = 0; c < C; ++c) {
                const T jump = std::min(std::max(u[c] / s.threshold, neuron.low), neuron.high);
                const T beyond = std::fabs(std::fabs(u[c]) - zone[c] * s.mean);
                grad_zone[c] -= beyond < neuron.band / 2 * s.mean
                                    ? grad[c] * jump * s.threshold / neuron.band
                                    : T(0);
            }
        }
        CHANNELS
        for (std::int64_t c = 0; c < C; ++c)
            grad_x[c] = u[c] <= most && u[c] >= least ? grad[c] : T(0);
        if (neuron.power == 1) continue;
        // u depends on x also through the mean m, unless that is at its least.
        T through = 0;
        if (s.m >= T(MIN_THRESHOLD))
            through = (T(1) - neuron.power) / s.m / T(C) *
                      summed<T>(C, [&](std::int64_t c) { return grad_x[c] * u[c]; });
        CHANNELS
        for (std::int64_t c = 0; c < C; ++c) {
            const T sign = x[c] > 0 ? T(1) : (x[c] < 0 ? T(-1) : T(0));
            grad_x[c] = grad_x[c] * neuron.power * factor[c] + sign * through;
        }
    }
}

// How often each channel stood near the edge of its dead zone; of unsigned neurons above 0 only.
template <typename T>
INLINE void edges(std::int64_t R, std::int64_t C, const T* x, const T* zone,
                  const Neuron<T>& neuron, T* near) {
    std::vector<T> memory(2 * C);
    T *factor = memory.data(), *u = factor + C;
    for (std::int64_t r = 0; r < R; ++r, x += C) {
        const Scaled<T> s = scaled(C, x, neuron, factor, u);
        CHANNELS
        for (std::int64_t c = 0; c < C; ++c) {
            const T beyond = std::fabs(std::fabs(u[c]) - zone[c] * s.mean);
            const bool counts = neuron.low < 0 || u[c] > 0;
            near[c] += counts && beyond < neuron.band / 2 * s.mean ? T(1) : T(0);
        }
    }
}

#define DEFINE(T, SUFFIX)                                                                          \
    EXPORT CLONES void spikelm_integer_forward_##SUFFIX(                                           \
        std::int64_t R, std::int64_t C, const T* x, const T* zone, double k, double power,         \
        double low, double high, T* values, T* counts, T* thresholds) {                            \
        forward<T>(R, C, x, zone, {T(k), T(power), T(low), T(high), T(0)}, values, counts,         \
                   thresholds);                                                                    \
    }                                                                                              \
    EXPORT CLONES void spikelm_integer_backward_##SUFFIX(                                          \
        std::int64_t R, std::int64_t C, const T* x, const T* zone, double k, double power,         \
        double low, double high, double band, const T* grad, T* grad_x, T* grad_zone) {            \
        backward<T>(R, C, x, zone, {T(k), T(power), T(low), T(high), T(band)}, grad, grad_x,       \
                    grad_zone);                                                                    \
    }                                                                                              \
    EXPORT CLONES void spikelm_integer_edges_##SUFFIX(                                             \
        std::int64_t R, std::int64_t C, const T* x, const T* zone, double power, double low,       \
        double band, T* near) {                                                                    \
        edges<T>(R, C, x, zone, {T(1), T(power), T(low), T(0), T(band)}, near);                    \
    }

DEFINE(float, f32)
DEFINE(double, f64)
