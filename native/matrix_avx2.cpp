// The steps with AVX2, which multiplies unsigned by signed bytes into saturating int16 pairs.
//
// int8 must not saturate: 127 * 127 + 127 * 128 = 32385 fits, so the unsigned factor is |count| and
// the signed one the weight, turned into -w - 1 where the count is negative. What that lacks, the
// sum of |count| over negative counts, is left to the correction.

#include "matrix_steps.h"

#if HAS_X86_STEPS

#include <immintrin.h>

#define TARGET __attribute__((target("avx2,popcnt")))

namespace {

template <int BITS, bool LISTED, bool AHEAD>
TARGET inline __attribute__((always_inline)) void quads(const Step& step, std::int64_t first,
                                                        std::int64_t last, __m256i* sums) {
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const __m256i offset = _mm256_set1_epi8(-128), zero = _mm256_setzero_si256();
    for (std::int64_t q = first; q < last; ++q) {
        const std::uint8_t* row[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            row[i] = step.rows + (LISTED ? step.index[4 * q + i] : 4 * q + i) * step.stride;
            if (AHEAD)
                _mm_prefetch(step.next_rows + (LISTED ? step.next_index[4 * q + i] : 4 * q + i) * step.stride,
                             _MM_HINT_T1);
        }
        std::int32_t four;
        __builtin_memcpy(&four, step.value + 4 * q, 4);
        const __m256i counts = _mm256_set1_epi32(four);
        // Flipping the top bit undoes the stored offset, flipping the others too gives -w - 1.
        const __m256i flip = _mm256_xor_si256(offset, _mm256_cmpgt_epi8(zero, counts));
        const __m256i magnitude = _mm256_abs_epi8(counts);
        // Halves of the 64-byte block.
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            const auto load = [&](int i) __attribute__((target("avx2"), always_inline)) {
                return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row[i] + 32 * h));
            };
            const __m256i r0 = load(0), r1 = load(1), r2 = load(2), r3 = load(3);
            const __m256i low01 = _mm256_unpacklo_epi8(r0, r1);
            const __m256i high01 = _mm256_unpackhi_epi8(r0, r1);
            const __m256i low23 = _mm256_unpacklo_epi8(r2, r3);
            const __m256i high23 = _mm256_unpackhi_epi8(r2, r3);
            const __m256i z[4] = {
                _mm256_unpacklo_epi16(low01, low23), _mm256_unpackhi_epi16(low01, low23),
                _mm256_unpacklo_epi16(high01, high23), _mm256_unpackhi_epi16(high01, high23)};
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                if (BITS == 8) {
                    const __m256i pairs = _mm256_maddubs_epi16(magnitude, z[j] ^ flip);
                    __m256i& sum = sums[2 * j + h];
                    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
                } else {
                    // At most 2 * 127 * 15 in an int16.
                    const __m256i lows = _mm256_maddubs_epi16(z[j] & low, counts);
                    const __m256i highs =
                        _mm256_maddubs_epi16(_mm256_srli_epi16(z[j], 4) & low, counts);
                    __m256i& sum = sums[2 * j + h];
                    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(lows, ones));
                    __m256i& other = sums[8 + 2 * j + h];
                    other = _mm256_add_epi32(other, _mm256_madd_epi16(highs, ones));
                }
            }
        }
    }
}

// One 64-byte block: two would not leave a register for anything but sums.
template <int BITS>
TARGET void strip(const Step& step) {
    constexpr int REGISTERS = BITS == 8 ? 8 : 16;
    // Loops over registers are unrolled, or the sums would live in memory.
    __m256i sums[REGISTERS];
#pragma GCC unroll 16
    for (int i = 0; i < REGISTERS; ++i) sums[i] = _mm256_setzero_si256();
    const std::int64_t ahead = step.quads < step.next_quads ? step.quads : step.next_quads;
    if (step.index) {
        quads<BITS, true, true>(step, 0, ahead, sums);
        quads<BITS, true, false>(step, ahead, step.quads, sums);
    } else {
        quads<BITS, false, true>(step, 0, ahead, sums);
        quads<BITS, false, false>(step, ahead, step.quads, sums);
    }
#pragma GCC unroll 16
    for (int i = 0; i < REGISTERS; ++i) {
        auto* out = reinterpret_cast<__m256i*>(step.sums + 8 * i);
        _mm256_storeu_si256(out, _mm256_add_epi32(_mm256_loadu_si256(out), sums[i]));
    }
}

template <int BITS>
TARGET std::int32_t correction(const std::int8_t* value, std::int64_t n) {
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < n; ++i)
        sum += BITS == 8 ? (value[i] < 0 ? -value[i] : 0) : -8 * value[i];
    return sum;
}

TARGET std::int64_t list(const std::int8_t* counts, std::int64_t n, std::int32_t* index,
                         std::int8_t* value) {
    std::int64_t events = 0;
    const auto take = [&](std::int64_t i) {
        index[events] = static_cast<std::int32_t>(i);
        value[events++] = counts[i];
    };
    std::int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(counts + i));
        const __m256i silent = _mm256_cmpeq_epi8(c, _mm256_setzero_si256());
        std::uint32_t fired = ~static_cast<std::uint32_t>(_mm256_movemask_epi8(silent));
        for (; fired; fired &= fired - 1) take(i + __builtin_ctz(fired));
    }
    for (; i < n; ++i)
        if (counts[i]) take(i);
    return events;
}

template <int BITS>
TARGET std::int32_t dot(const std::uint8_t* row, const std::int8_t* counts, std::int64_t bytes) {
    return plain_dot<BITS>(row, counts, bytes);
}

}  // namespace

const Steps avx2_steps = {
    {{strip<8>}, {strip<4>}},
    {1, 1},
    {correction<8>, correction<4>},
    list,
    {0.75, 0.8},
    {dot<8>, dot<4>},
    nullptr,
};

#endif
