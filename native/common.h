// Shared by the kernels: what is exported, for which processors it is compiled, and exp.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// One library for every x86-64: the loader picks the widest vectors the processor has. The bodies
// must be inlined into the clones, or they would be compiled for the baseline only.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static __forceinline
#endif

// Stands before a loop over channels whose pointers never overlap.
#if defined(__clang__)
#define CHANNELS _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define CHANNELS _Pragma("GCC ivdep")
#else
#define CHANNELS __pragma(loop(ivdep))
#endif

// exp by range reduction and a Taylor polynomial: unlike expf it vectorises, and every lane of
// every clone gives the same bits. Below the smallest normal number it is 0.
INLINE float exponential(float x) {
    const float at = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    const float shifted = at * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
    const float n = shifted - 12582912.0f;
    const float r = (at - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
    float series = 1.0f / 5040;
    series = series * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    const float power = std::bit_cast<float>((static_cast<std::int32_t>(n) + 127) << 23);
    return x < -87.0f ? 0.0f : series * power;
}

INLINE double exponential(double x) { return std::exp(x); }

constexpr int LANES = 16;

// Sums of term(i) in lanes, as a float sum in order would not vectorise.
template <typename T = float, typename F>
INLINE T summed(std::int64_t n, F term) {
    T lanes[LANES] = {};
    const std::int64_t whole = n / LANES * LANES;
    for (std::int64_t i = 0; i < whole; i += LANES)
        for (int l = 0; l < LANES; l++)
            lanes[l] += term(i + l);
    for (std::int64_t i = whole; i < n; i++)
        lanes[i - whole] += term(i);
    for (int width = LANES / 2; width; width /= 2)
        for (int l = 0; l < width; l++)
            lanes[l] += lanes[l + width];
    return lanes[0];
}
