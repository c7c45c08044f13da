// RWKV-4's weighted mean, forward and backward; `spikelm/kernels/wkv4.py` has the equations and the
// encoding of the state. k, v, out and their gradients are [B, T, C], each of the state is [B, C],
// decay, bonus and their gradients are [C]; begins [B, T] marks the first tokens of documents.

#include <algorithm>
#include <vector>

#include "common.h"

// The exponent of a weight that is 0.
#define EMPTY T(-1e38)

// Channels that the backward pass takes at once, so that their history stays in the cache.
static const std::int64_t BLOCK = 64;

// The weights of two terms with exponents a and b, relative to the larger one.
template <typename T>
struct Weights {
    T largest, past, present;
};

template <typename T>
INLINE Weights<T> weigh(T a, T b) {
    const T gap = a - b;
    const T small = exponential(gap < 0 ? gap : -gap);
    return {gap < 0 ? b : a, gap < 0 ? small : T(1), gap < 0 ? T(1) : small};
}

// A document begins with an empty state, and where q is 0 the state is empty.
template <typename T>
INLINE void open(std::int64_t C, bool first, T* p, T* q, T* o) {
    CHANNELS
    for (std::int64_t c = 0; c < C; ++c) {
        p[c] = first ? T(0) : p[c];
        q[c] = first ? T(0) : q[c];
        o[c] = q[c] == 0 ? EMPTY : o[c];
    }
}

template <typename T>
INLINE void forward(std::int64_t B, std::int64_t tokens, std::int64_t C, const T* k, const T* v,
                    const T* decay, const T* bonus, T* state_p, T* state_q,
                    T* state_o, const std::uint8_t* begins, T* out) {
    for (std::int64_t b = 0; b < B; ++b) {
        T* p = state_p + b * C;
        T* q = state_q + b * C;
        T* o = state_o + b * C;
        for (std::int64_t t = 0; t < tokens; ++t) {
            const std::int64_t row = (b * tokens + t) * C;
            const T* key = k + row;
            const T* value = v + row;
            T* y = out + row;
            const bool first = begins && begins[b * tokens + t];
            if (t == 0 || first) open(C, first, p, q, o);
            CHANNELS
            for (std::int64_t c = 0; c < C; ++c) {
                const Weights<T> read = weigh(o[c], bonus[c] + key[c]);
                y[c] = (read.past * p[c] + read.present * value[c]) /
                       (read.past * q[c] + read.present);
                const Weights<T> write = weigh(o[c] + decay[c], key[c]);
                p[c] = write.past * p[c] + write.present * value[c];
                q[c] = write.past * q[c] + write.present;
                o[c] = write.largest;
            }
        }
    }
}

// grad_p and grad_q are the gradients of the final state and become those of the initial one; the
// gradients of decay and bonus are added to what is there. A sweep forwards stores the state that
// each token finds, a sweep backwards carries the gradient of that state in the same encoding.
template <typename T>
INLINE void backward(std::int64_t B, std::int64_t tokens, std::int64_t C, const T* k, const T* v,
                     const T* decay, const T* bonus, const T* state_p, const T* state_q,
                     const T* state_o, const std::uint8_t* begins, const T* grad, T* grad_p,
                     T* grad_q, T* grad_o, T* grad_k, T* grad_v, T* grad_decay, T* grad_bonus) {
    std::vector<T> found(3 * tokens * BLOCK);
    T p[BLOCK], q[BLOCK], o[BLOCK], gp[BLOCK], gq[BLOCK], go[BLOCK];
    for (std::int64_t b = 0; b < B; ++b) {
        for (std::int64_t at = 0; at < C; at += BLOCK) {
            const std::int64_t n = std::min(BLOCK, C - at), state = b * C + at;
            const T* w = decay + at;
            const T* u = bonus + at;
            T* gw = grad_decay + at;
            T* gu = grad_bonus + at;
            CHANNELS
            for (std::int64_t c = 0; c < n; ++c) {
                p[c] = state_p[state + c];
                q[c] = state_q[state + c];
                o[c] = state_o[state + c];
            }
            for (std::int64_t t = 0; t < tokens; ++t) {
                const std::int64_t row = (b * tokens + t) * C + at;
                const T* key = k + row;
                const T* value = v + row;
                T* kept = found.data() + 3 * t * BLOCK;
                const bool first = begins && begins[b * tokens + t];
                if (t == 0 || first) open(n, first, p, q, o);
                CHANNELS
                for (std::int64_t c = 0; c < n; ++c) {
                    kept[c] = p[c];
                    kept[BLOCK + c] = q[c];
                    kept[2 * BLOCK + c] = o[c];
                    const Weights<T> write = weigh(o[c] + w[c], key[c]);
                    p[c] = write.past * p[c] + write.present * value[c];
                    q[c] = write.past * q[c] + write.present;
                    o[c] = write.largest;
                }
            }
            CHANNELS
            for (std::int64_t c = 0; c < n; ++c) {
                gp[c] = grad_p[state + c];
                gq[c] = grad_q[state + c];
                go[c] = -o[c];
            }
            for (std::int64_t t = tokens - 1; t >= 0; --t) {
                const std::int64_t row = (b * tokens + t) * C + at;
                const T* key = k + row;
                const T* value = v + row;
                const T* gy = grad + row;
                const T* kept = found.data() + 3 * t * BLOCK;
                T* gk = grad_k + row;
                T* gv = grad_v + row;
                CHANNELS
                for (std::int64_t c = 0; c < n; ++c) {
                    const T P = kept[c], Q = kept[BLOCK + c], O = kept[2 * BLOCK + c];
                    const Weights<T> read = weigh(O, u[c] + key[c]);
                    const T sum = read.past * Q + read.present;
                    const T y = (read.past * P + read.present * value[c]) / sum;
                    const T of_p = gy[c] / sum, of_q = -of_p * y;
                    const T written = exponential(key[c] + go[c]);
                    const T of_bonus = read.present * (of_p * value[c] + of_q);
                    gv[c] = read.present * of_p + written * gp[c];
                    gk[c] = of_bonus + written * (gp[c] * value[c] + gq[c]);
                    gu[c] += of_bonus;
                    gw[c] += exponential(w[c] + go[c] + O) * (gp[c] * P + gq[c] * Q);
                    const Weights<T> carry = weigh(go[c] + w[c], -read.largest);
                    gp[c] = carry.past * gp[c] + carry.present * of_p;
                    gq[c] = carry.past * gq[c] + carry.present * of_q;
                    go[c] = carry.largest;
                }
                if (begins && begins[b * tokens + t]) {
                    CHANNELS
                    for (std::int64_t c = 0; c < n; ++c) {
                        gp[c] = gq[c] = 0;
                        go[c] = EMPTY;
                    }
                }
            }
            CHANNELS
            for (std::int64_t c = 0; c < n; ++c) {
                const T P = state_p[state + c], Q = state_q[state + c];
                const T to_state = Q == 0 ? T(0) : exponential(state_o[state + c] + go[c]);
                grad_p[state + c] = to_state * gp[c];
                grad_q[state + c] = to_state * gq[c];
                grad_o[state + c] = to_state * (gp[c] * P + gq[c] * Q);
            }
        }
    }
}

#define DEFINE(T, SUFFIX)                                                                         \
    EXPORT CLONES void spikelm_wkv4_forward_##SUFFIX(                                             \
        std::int64_t B, std::int64_t tokens, std::int64_t C, const T* k, const T* v,              \
        const T* decay, const T* bonus, T* p, T* q, T* o, const std::uint8_t* begins, T* out) {   \
        forward<T>(B, tokens, C, k, v, decay, bonus, p, q, o, begins, out);                       \
    }                                                                                             \
    EXPORT CLONES void spikelm_wkv4_backward_##SUFFIX(                                            \
        std::int64_t B, std::int64_t tokens, std::int64_t C, const T* k, const T* v,              \
        const T* decay, const T* bonus, const T* p, const T* q, const T* o,                       \
        const std::uint8_t* begins, const T* grad, T* grad_p, T* grad_q, T* grad_o, T* grad_k,    \
        T* grad_v, T* grad_decay, T* grad_bonus) {                                                \
        backward<T>(B, tokens, C, k, v, decay, bonus, p, q, o, begins, grad, grad_p, grad_q,      \
                    grad_o, grad_k, grad_v, grad_decay, grad_bonus);                              \
    }

DEFINE(float, f32)
DEFINE(double, f64)
