// Leaky integrate-and-fire on the token axis, forward and backward; `spikelm/neurons/lif.py` has
// the equations. x, spikes, before and their gradients are [B, T, C], v is [B, C], tau, threshold,
// softness and their gradients are [C]; begins [B, T] marks the first tokens of documents.

#include <vector>

#include "common.h"

// The order of `SURROGATES` in spikelm/neurons/surrogate.py.
enum Surrogate { ARCTAN, SIGMOID, RECTANGLE, TRIANGLE, FAST_SIGMOID, GAUSSIAN };

template <typename T>
INLINE T logistic(T z) {
    const T e = exponential(z < 0 ? z : -z);
    return (z < 0 ? e : T(1)) / (T(1) + e);
}

// Spikes of one token: the threshold, or its soft form if there is a softness.
template <typename T>
INLINE void fire(std::int64_t C, const T* before, const T* threshold,
                 const T* softness, T* spikes) {
    if (softness) {
        CHANNELS
        for (std::int64_t c = 0; c < C; ++c)
            spikes[c] = logistic((before[c] - threshold[c]) / softness[c]);
    } else {
        CHANNELS
        for (std::int64_t c = 0; c < C; ++c)
            spikes[c] = before[c] - threshold[c] >= 0 ? T(1) : T(0);
    }
}

template <typename T>
INLINE void reset(std::int64_t C, const T* before, const T* spikes,
                  const T* threshold, bool hard, T* v) {
    CHANNELS
    for (std::int64_t c = 0; c < C; ++c)
        v[c] = hard ? (T(1) - spikes[c]) * before[c] : before[c] - threshold[c] * spikes[c];
}

// The surrogate's derivative at x = before - threshold.
template <int surrogate, typename T>
INLINE T derivative(T x, T alpha) {
    const T pi = T(3.14159265358979323846), magnitude = x < 0 ? -x : x;
    if constexpr (surrogate == ARCTAN) {
        const T z = pi / 2 * alpha * x;
        return alpha / (2 * (1 + z * z));
    } else if constexpr (surrogate == SIGMOID) {
        const T s = logistic(alpha * x);
        return alpha * s * (T(1) - s);
    } else if constexpr (surrogate == RECTANGLE) {
        return magnitude < T(0.5) / alpha ? alpha : T(0);
    } else if constexpr (surrogate == TRIANGLE) {
        const T height = T(1) - alpha * magnitude;
        return height > 0 ? alpha * height : T(0);
    } else if constexpr (surrogate == FAST_SIGMOID) {
        const T z = T(1) + alpha * magnitude;
        return alpha / (2 * z * z);
    } else {
        const T z = alpha * x;
        return alpha / std::sqrt(2 * pi) * exponential(T(-0.5) * z * z);
    }
}

template <int surrogate, typename T>
INLINE void derivatives(std::int64_t C, const T* before, const T* threshold, T alpha, T* out) {
    CHANNELS
    for (std::int64_t c = 0; c < C; ++c)
        out[c] = derivative<surrogate>(before[c] - threshold[c], alpha);
}

// d spike / d (before - threshold) of one token: the surrogate's, or that of the soft threshold.
template <typename T>
INLINE void slope(std::int64_t C, const T* before, const T* threshold, const T* softness,
                  const T* spikes, int surrogate, T alpha, T* out) {
    if (softness) {
        CHANNELS
        for (std::int64_t c = 0; c < C; ++c)
            out[c] = spikes[c] * (T(1) - spikes[c]) / softness[c];
        return;
    }
    switch (surrogate) {
        case ARCTAN: return derivatives<ARCTAN>(C, before, threshold, alpha, out);
        case SIGMOID: return derivatives<SIGMOID>(C, before, threshold, alpha, out);
        case RECTANGLE: return derivatives<RECTANGLE>(C, before, threshold, alpha, out);
        case TRIANGLE: return derivatives<TRIANGLE>(C, before, threshold, alpha, out);
        case FAST_SIGMOID: return derivatives<FAST_SIGMOID>(C, before, threshold, alpha, out);
        default: return derivatives<GAUSSIAN>(C, before, threshold, alpha, out);
    }
}

// v is the initial membrane and becomes the final one. before may be null (nothing to train).
template <typename T>
INLINE void forward(std::int64_t B, std::int64_t tokens, std::int64_t C, const T* x, T* v,
                    const T* tau, const T* threshold, const T* softness,
                    const std::uint8_t* begins, bool hard, T* spikes, T* before) {
    std::vector<T> scratch(C);
    for (std::int64_t b = 0; b < B; ++b) {
        T* membrane = v + b * C;
        for (std::int64_t t = 0; t < tokens; ++t) {
            const std::int64_t row = (b * tokens + t) * C;
            const T* input = x + row;
            T* charged = before ? before + row : scratch.data();
            if (begins && begins[b * tokens + t])
                CHANNELS
                for (std::int64_t c = 0; c < C; ++c) membrane[c] = 0;
            CHANNELS
            for (std::int64_t c = 0; c < C; ++c)
                charged[c] = membrane[c] + (input[c] - membrane[c]) / tau[c];
            fire(C, charged, threshold, softness, spikes + row);
            reset(C, charged, spikes + row, threshold, hard, membrane);
        }
    }
}

// grad_v is the gradient of the final membrane and becomes that of the initial one v. The
// gradients of tau, threshold and softness are added to what is there; null asks for none.
template <typename T>
INLINE void backward(std::int64_t B, std::int64_t tokens, std::int64_t C, const T* before,
                     const T* v, const T* tau, const T* threshold,
                     const T* softness, const std::uint8_t* begins, bool hard,
                     bool detach_reset, bool detach_membrane, int surrogate, T alpha,
                     const T* grad_spikes, T* grad_v, T* grad_x, T* grad_tau,
                     T* grad_threshold, T* grad_softness) {
    std::vector<T> fired(C), slopes(C), carried(C);
    for (std::int64_t b = 0; b < B; ++b) {
        T* g = grad_v + b * C;
        for (std::int64_t t = tokens - 1; t >= 0; --t) {
            const std::int64_t row = (b * tokens + t) * C;
            const bool first = begins && begins[b * tokens + t];
            const T* u = before + row;
            const T* gs = grad_spikes + row;
            T* gx = grad_x + row;
            T* s = fired.data();
            T* ds = slopes.data();
            fire(C, u, threshold, softness, s);
            slope(C, u, threshold, softness, s, surrogate, alpha, ds);
            if (grad_threshold) {
                CHANNELS
                for (std::int64_t c = 0; c < C; ++c) {
                    const T by_reset = detach_reset ? T(0) : g[c] * (hard ? u[c] : threshold[c]);
                    const T through = (gs[c] - by_reset) * ds[c];
                    grad_threshold[c] -= through + (hard ? T(0) : g[c] * s[c]);
                    if (grad_softness)
                        grad_softness[c] -= through * (u[c] - threshold[c]) / softness[c];
                }
            }
            CHANNELS
            for (std::int64_t c = 0; c < C; ++c) {
                const T by_reset = detach_reset ? T(0) : g[c] * (hard ? u[c] : threshold[c]);
                const T gu = (hard ? g[c] * (T(1) - s[c]) : g[c]) + (gs[c] - by_reset) * ds[c];
                gx[c] = gu / tau[c];
                g[c] = first || detach_membrane ? T(0) : gu - gx[c];
            }
            if (grad_tau) {
                // u - v = (x - v) / tau, with the membrane v that the token found.
                T* found = carried.data();
                if (first) {
                    CHANNELS
                    for (std::int64_t c = 0; c < C; ++c) found[c] = 0;
                } else if (t) {
                    fire(C, u - C, threshold, softness, s);
                    reset(C, u - C, s, threshold, hard, found);
                } else {
                    CHANNELS
                    for (std::int64_t c = 0; c < C; ++c) found[c] = v[b * C + c];
                }
                CHANNELS
                for (std::int64_t c = 0; c < C; ++c) grad_tau[c] -= gx[c] * (u[c] - found[c]);
            }
        }
    }
}

#define DEFINE(T, SUFFIX)                                                                         \
    EXPORT CLONES void spikelm_lif_forward_##SUFFIX(                                              \
        std::int64_t B, std::int64_t tokens, std::int64_t C, const T* x, T* v, const T* tau,      \
        const T* threshold, const T* softness, const std::uint8_t* begins, int hard, T* spikes,   \
        T* before) {                                                                              \
        forward<T>(B, tokens, C, x, v, tau, threshold, softness, begins, hard, spikes, before);   \
    }                                                                                             \
    EXPORT CLONES void spikelm_lif_backward_##SUFFIX(                                             \
        std::int64_t B, std::int64_t tokens, std::int64_t C, const T* before, const T* v,         \
        const T* tau, const T* threshold, const T* softness, const std::uint8_t* begins,          \
        int hard, int detach_reset, int detach_membrane, int surrogate, double alpha,             \
        const T* grad_spikes, T* grad_v, T* grad_x, T* grad_tau, T* grad_threshold,               \
        T* grad_softness) {                                                                       \
        backward<T>(B, tokens, C, before, v, tau, threshold, softness, begins, hard,              \
                    detach_reset, detach_membrane, surrogate, T(alpha), grad_spikes, grad_v,      \
                    grad_x, grad_tau, grad_threshold, grad_softness);                             \
    }

DEFINE(float, f32)
DEFINE(double, f64)
