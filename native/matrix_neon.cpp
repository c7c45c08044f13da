// The steps with NEON. Four rows are interleaved byte by byte, so that one sdot multiplies 4
// outputs with the counts of four inputs. It takes signed bytes: flipping the top bit undoes what
// int8 weights are stored with, and leaves nothing to correct. Processors before Armv8.2 multiply
// into int16 instead.

#include "matrix_steps.h"

#if HAS_NEON_STEPS

#include <arm_neon.h>

#define DOT_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))

namespace {

struct Dot {
    DOT_TARGET static inline int32x4_t add(int32x4_t sum, int8x16_t weights, int8x16_t counts) {
        return vdotq_s32(sum, weights, counts);
    }
};

struct Pairs {
    static inline int32x4_t add(int32x4_t sum, int8x16_t weights, int8x16_t counts) {
        const int16x8_t low = vmull_s8(vget_low_s8(weights), vget_low_s8(counts));
        const int16x8_t high = vmull_high_s8(weights, counts);
        return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
    }
};

// HALF of a block (0, 1) for int4, whose sums take 16 registers each; the whole block for int8.
template <class By, int BITS, int HALF, bool LISTED, bool AHEAD>
INLINE void quads(const Step& step, std::int64_t first, std::int64_t last, int32x4_t* sums) {
    constexpr int LANES = BITS == 8 ? 4 : 2;  // of 16 bytes
    const uint8x16_t low = vdupq_n_u8(15), top = vdupq_n_u8(128);
    for (std::int64_t q = first; q < last; ++q) {
        const std::uint8_t* row[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const std::int64_t at = 4 * q + i;
            row[i] = step.rows + (LISTED ? step.index[at] : at) * step.stride;
            if (AHEAD) FETCH(step.next_rows + (LISTED ? step.next_index[at] : at) * step.stride);
        }
        std::int32_t four;
        __builtin_memcpy(&four, step.value + 4 * q, 4);
        const int8x16_t counts = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 4
        for (int h = 0; h < LANES; ++h) {
            uint8x16_t r[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                r[i] = vld1q_u8(row[i] + 16 * (LANES * HALF + h));
                if (BITS == 8) r[i] = veorq_u8(r[i], top);
            }
            const uint16x8_t low01 = vreinterpretq_u16_u8(vzip1q_u8(r[0], r[1]));
            const uint16x8_t high01 = vreinterpretq_u16_u8(vzip2q_u8(r[0], r[1]));
            const uint16x8_t low23 = vreinterpretq_u16_u8(vzip1q_u8(r[2], r[3]));
            const uint16x8_t high23 = vreinterpretq_u16_u8(vzip2q_u8(r[2], r[3]));
            const uint16x8_t z[4] = {vzip1q_u16(low01, low23), vzip2q_u16(low01, low23),
                                     vzip1q_u16(high01, high23), vzip2q_u16(high01, high23)};
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const uint8x16_t w = vreinterpretq_u8_u16(z[j]);
                int32x4_t& sum = sums[LANES * j + h];
                if (BITS == 8) {
                    sum = By::add(sum, vreinterpretq_s8_u8(w), counts);
                } else {
                    sum = By::add(sum, vreinterpretq_s8_u8(vandq_u8(w, low)), counts);
                    int32x4_t& other = sums[8 + LANES * j + h];
                    other = By::add(other, vreinterpretq_s8_u8(vshrq_n_u8(w, 4)), counts);
                }
            }
        }
    }
}

template <class By, int BITS, int HALF>
INLINE void part(const Step& step) {
    int32x4_t sums[16];
    // Where in step.sums the four outputs of a register are.
    const auto out = [&](int i) {
        return step.sums + (BITS == 8 ? 4 * i : 16 * (i / 2) + 4 * (2 * HALF + i % 2));
    };
    for (int i = 0; i < 16; ++i) sums[i] = vld1q_s32(out(i));
    // The second half finds its lines where the first had them fetched.
    const std::int64_t next = HALF ? 0 : step.next_quads;
    const std::int64_t ahead = step.quads < next ? step.quads : next;
    if (step.index) {
        quads<By, BITS, HALF, true, true>(step, 0, ahead, sums);
        quads<By, BITS, HALF, true, false>(step, ahead, step.quads, sums);
    } else {
        quads<By, BITS, HALF, false, true>(step, 0, ahead, sums);
        quads<By, BITS, HALF, false, false>(step, ahead, step.quads, sums);
    }
    for (int i = 0; i < 16; ++i) vst1q_s32(out(i), sums[i]);
}

// One 64-byte block: sums and four rows fill the registers.
template <class By, int BITS>
INLINE void block(const Step& step) {
    part<By, BITS, 0>(step);
    if (BITS == 4) part<By, BITS, 1>(step);
}

template <int BITS>
DOT_TARGET void strip_dot(const Step& step) { block<Dot, BITS>(step); }

template <int BITS>
void strip_pairs(const Step& step) { block<Pairs, BITS>(step); }

template <int OFFSET>
std::int32_t correction(const std::int8_t* value, std::int64_t n) {
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < n; ++i) sum += value[i];
    return -OFFSET * sum;
}

std::int64_t list(const std::int8_t* counts, std::int64_t n, std::int32_t* index,
                  std::int8_t* value) {
    std::int64_t events = 0;
    const auto take = [&](std::int64_t i) {
        index[events] = static_cast<std::int32_t>(i);
        value[events++] = counts[i];
    };
    std::int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        // One bit in four for every count that is not zero.
        const int8x16_t c = vld1q_s8(counts + i);
        const uint8x8_t nibbles = vshrn_n_u16(vreinterpretq_u16_u8(vtstq_s8(c, c)), 4);
        std::uint64_t fired = vget_lane_u64(vreinterpret_u64_u8(nibbles), 0) & 0x1111111111111111u;
        for (; fired; fired &= fired - 1) take(i + __builtin_ctzll(fired) / 4);
    }
    for (; i < n; ++i)
        if (counts[i]) take(i);
    return events;
}

template <int BITS>
std::int32_t dot(const std::uint8_t* row, const std::int8_t* counts, std::int64_t bytes) {
    return plain_dot<BITS>(row, counts, bytes);
}

}  // namespace

// Where the dense form gets faster is not measured: AVX2's numbers.
const Steps neon_steps = {
    {{strip_pairs<8>}, {strip_pairs<4>}},
    {1, 1},
    {correction<0>, correction<8>},
    list,
    {0.75, 0.8},
    {dot<8>, dot<4>},
    nullptr,
};
const Steps neon_dot_steps = {
    {{strip_dot<8>}, {strip_dot<4>}},
    {1, 1},
    {correction<0>, correction<8>},
    list,
    {0.75, 0.8},
    {dot<8>, dot<4>},
    nullptr,
};

#endif
