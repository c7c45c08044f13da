// The steps with AVX-512 VNNI. Four rows are interleaved byte by byte, so that one vpdpbusd
// multiplies 16 outputs with the counts of four inputs; sums stay in 16 registers.

#include "matrix_steps.h"

#if HAS_X86_STEPS

// GCC 12 warns of its own header, which writes "undefined" as a variable set to itself.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,popcnt")))

namespace {

template <int BITS, int BLOCKS, bool LISTED, bool AHEAD>
TARGET inline __attribute__((always_inline)) void quads(const Step& step, std::int64_t first,
                                                        std::int64_t last, __m512i* sums) {
    const __m512i low = _mm512_set1_epi8(15);
    for (std::int64_t q = first; q < last; ++q) {
        const std::uint8_t* row[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            row[i] = step.rows + (LISTED ? step.index[4 * q + i] : 4 * q + i) * step.stride;
            if (AHEAD) {
                const std::uint8_t* next =
                    step.next_rows + (LISTED ? step.next_index[4 * q + i] : 4 * q + i) * step.stride;
                for (int b = 0; b < BLOCKS; ++b) _mm_prefetch(next + 64 * b, _MM_HINT_T1);
            }
        }
        std::int32_t four;
        __builtin_memcpy(&four, step.value + 4 * q, 4);
        const __m512i counts = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int b = 0; b < BLOCKS; ++b) {
            const __m512i r0 = _mm512_loadu_si512(row[0] + 64 * b);
            const __m512i r1 = _mm512_loadu_si512(row[1] + 64 * b);
            const __m512i r2 = _mm512_loadu_si512(row[2] + 64 * b);
            const __m512i r3 = _mm512_loadu_si512(row[3] + 64 * b);
            const __m512i low01 = _mm512_unpacklo_epi8(r0, r1);
            const __m512i high01 = _mm512_unpackhi_epi8(r0, r1);
            const __m512i low23 = _mm512_unpacklo_epi8(r2, r3);
            const __m512i high23 = _mm512_unpackhi_epi8(r2, r3);
            const __m512i z[4] = {
                _mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                if (BITS == 8) {
                    sums[4 * b + j] = _mm512_dpbusd_epi32(sums[4 * b + j], z[j], counts);
                } else {
                    // The low halves, and 16 x high + low: no shift, no second mask.
                    __m512i* pair = sums + 8 * b + j;
                    pair[0] = _mm512_dpbusd_epi32(pair[0], _mm512_and_si512(z[j], low), counts);
                    pair[4] = _mm512_dpbusd_epi32(pair[4], z[j], counts);
                }
            }
        }
    }
}

template <int BITS, int BLOCKS>
TARGET void strip(const Step& step) {
    constexpr int REGISTERS = BLOCKS * (BITS == 8 ? 4 : 8);
    // Loops over registers are unrolled, or the sums would live in memory.
    __m512i sums[REGISTERS];
#pragma GCC unroll 16
    for (int i = 0; i < REGISTERS; ++i) sums[i] = _mm512_setzero_si512();
    const std::int64_t ahead = step.quads < step.next_quads ? step.quads : step.next_quads;
    if (step.index) {
        quads<BITS, BLOCKS, true, true>(step, 0, ahead, sums);
        quads<BITS, BLOCKS, true, false>(step, ahead, step.quads, sums);
    } else {
        quads<BITS, BLOCKS, false, true>(step, 0, ahead, sums);
        quads<BITS, BLOCKS, false, false>(step, ahead, step.quads, sums);
    }
    if (BITS == 4)
#pragma GCC unroll 2
        for (int b = 0; b < BLOCKS; ++b)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                __m512i* pair = sums + 8 * b + j;
                pair[4] = _mm512_srai_epi32(_mm512_sub_epi32(pair[4], pair[0]), 4);
            }
#pragma GCC unroll 16
    for (int i = 0; i < REGISTERS; ++i) {
        std::int32_t* out = step.sums + 16 * i;
        _mm512_storeu_si512(out, _mm512_add_epi32(_mm512_loadu_si512(out), sums[i]));
    }
}

template <int OFFSET>
TARGET std::int32_t correction(const std::int8_t* value, std::int64_t n) {
    __m512i sums = _mm512_setzero_si512();
    const __m512i ones = _mm512_set1_epi8(1);
    std::int64_t i = 0;
    for (; i + 64 <= n; i += 64)
        sums = _mm512_dpbusd_epi32(sums, ones, _mm512_loadu_si512(value + i));
    if (i < n)
        sums = _mm512_dpbusd_epi32(sums, ones, _mm512_maskz_loadu_epi8(~0ull >> (64 - (n - i)),
                                                                       value + i));
    return -OFFSET * _mm512_reduce_add_epi32(sums);
}

TARGET std::int64_t list(const std::int8_t* counts, std::int64_t n, std::int32_t* index,
                         std::int8_t* value) {
    __m512i inputs = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    std::int64_t events = 0, i = 0;
    // There are no more events than inputs, so 16 of them still have room: what is written beyond
    // those that fired is written over.
    for (; i + 16 <= n; i += 16) {
        const __m512i c =
            _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(counts + i)));
        const __mmask16 fired = _mm512_test_epi32_mask(c, c);
        // Compressing in registers: to memory it is microcode on some processors.
        _mm512_storeu_si512(index + events, _mm512_maskz_compress_epi32(fired, inputs));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(value + events),
                         _mm512_cvtepi32_epi8(_mm512_maskz_compress_epi32(fired, c)));
        inputs = _mm512_add_epi32(inputs, _mm512_set1_epi32(16));
        events += __builtin_popcount(fired);
    }
    for (; i < n; ++i)
        if (counts[i]) {
            index[events] = static_cast<std::int32_t>(i);
            value[events++] = counts[i];
        }
    return events;
}

template <int BITS>
TARGET std::int32_t dot(const std::uint8_t* row, const std::int8_t* counts, std::int64_t bytes) {
    const __m512i low = _mm512_set1_epi8(15);
    __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (std::int64_t at = 0; at < bytes; at += 64) {
        const __m512i weights = _mm512_loadu_si512(row + at);
        if (BITS == 8) {
            __m512i& sum = sums[at / 64 % 2];
            sum = _mm512_dpbusd_epi32(sum, weights, _mm512_loadu_si512(counts + at));
            continue;
        }
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(weights, 4), low);
        sums[0] = _mm512_dpbusd_epi32(sums[0], _mm512_and_si512(weights, low),
                                      _mm512_loadu_si512(counts + 2 * at));
        sums[1] = _mm512_dpbusd_epi32(sums[1], high, _mm512_loadu_si512(counts + 2 * at + 64));
    }
    return _mm512_reduce_add_epi32(_mm512_add_epi32(sums[0], sums[1]));
}

template <int BITS>
TARGET void interleave(const std::uint8_t* rows, std::int64_t stride, std::int64_t inputs,
                       std::uint8_t* to) {
    const __m512i low = _mm512_set1_epi8(15);
    __m512i row[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        row[i] = i < inputs ? _mm512_loadu_si512(rows + i * stride) : _mm512_setzero_si512();
    const __m512i low01 = _mm512_unpacklo_epi8(row[0], row[1]);
    const __m512i high01 = _mm512_unpackhi_epi8(row[0], row[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(row[2], row[3]);
    const __m512i high23 = _mm512_unpackhi_epi8(row[2], row[3]);
    const __m512i z[4] = {_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                          _mm512_unpacklo_epi16(high01, high23),
                          _mm512_unpackhi_epi16(high01, high23)};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        _mm512_storeu_si512(to + 64 * j, BITS == 8 ? z[j] : _mm512_and_si512(z[j], low));
        if (BITS == 4)
            _mm512_storeu_si512(to + 256 + 64 * j,
                                _mm512_and_si512(_mm512_srli_epi16(z[j], 4), low));
    }
}

template <int REGISTERS, int ROWS>
TARGET void multiply(const std::uint8_t* tile, std::int64_t quads, const std::int8_t* const* counts,
                     std::int32_t* const* out) {
    __m512i sums[ROWS][REGISTERS];
#pragma GCC unroll 3
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < REGISTERS; ++i) sums[r][i] = _mm512_loadu_si512(out[r] + 16 * i);
    for (std::int64_t q = 0; q < quads; ++q, tile += 64 * REGISTERS) {
        __m512i c[ROWS];
#pragma GCC unroll 3
        for (int r = 0; r < ROWS; ++r) {
            std::int32_t four;
            __builtin_memcpy(&four, counts[r] + 4 * q, 4);
            c[r] = _mm512_set1_epi32(four);
        }
#pragma GCC unroll 8
        for (int i = 0; i < REGISTERS; ++i) {
            const __m512i weights = _mm512_loadu_si512(tile + 64 * i);
#pragma GCC unroll 3
            for (int r = 0; r < ROWS; ++r)
                sums[r][i] = _mm512_dpbusd_epi32(sums[r][i], weights, c[r]);
        }
    }
#pragma GCC unroll 3
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < REGISTERS; ++i) _mm512_storeu_si512(out[r] + 16 * i, sums[r][i]);
}

const Dense dense = {
    {interleave<8>, interleave<4>},
    {{multiply<4, 1>, multiply<4, 2>, multiply<4, 3>},
     {multiply<8, 1>, multiply<8, 2>, multiply<8, 3>}},
    {{0.7, 0.44}, {0.9, 0.87}},
};

}  // namespace

const Steps avx512_steps = {
    {{strip<8, 1>, strip<8, 2>, strip<8, 3>, strip<8, 4>}, {strip<4, 1>, strip<4, 2>}},
    {4, 2},
    {correction<128>, correction<8>},
    list,
    {0.88, 0.9},
    {dot<8>, dot<4>},
    &dense,
};

#endif
