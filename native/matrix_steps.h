// What an instruction set provides to native/matrix.cpp.
#pragma once

#include "common.h"
#include "matrix.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_X86_STEPS 1
#else
#define HAS_X86_STEPS 0
#endif
#if defined(__aarch64__) && defined(__GNUC__) && !defined(__AARCH64EB__)
#define HAS_NEON_STEPS 1
#else
#define HAS_NEON_STEPS 0
#endif

constexpr std::int64_t PANEL = 4096;  // bytes
// Quads of rows between asking for a line and using it. The steps ask for it in L2, whose own
// prefetcher then runs along the row: 13-17 GB/s where lines asked into L1 come at 8-10, as many
// as it can wait for (one EPYC 9004 core, 80 % silent). Rows shorter than 2 KB gain less. A step
// costs too much for 2 quads of listed rows, and 8 are too many for short lists; for all rows in
// order, by bits (8, 4), fewer do.
constexpr std::int64_t WINDOW = 4, DENSE_WINDOW[] = {2, 4};

#if defined(__GNUC__)
#define FETCH(address) __builtin_prefetch(address, 0, 2)
#else
#define FETCH(address) static_cast<void>(address)
#endif

// Some quads of rows (four inputs each) times one strip of a tile.
struct Step {
    const std::uint8_t* rows;   // the strip of input 0
    std::int64_t stride;        // bytes from one input to the next
    const std::int32_t* index;  // four inputs a quad; null: the inputs 0, 1, 2, ...
    const std::int8_t* value;   // their counts
    std::int64_t quads;
    const std::uint8_t* next_rows;  // the strip and the quads that come after this step: their
    const std::int32_t* next_index; // lines are fetched while this one computes
    std::int64_t next_quads;
    std::int32_t* sums;  // [outputs of the strip], added to
};

// An output's bytes (outputs.h) times the counts.
using RowDot = std::int32_t (*)(const std::uint8_t* row, const std::int8_t* counts,
                             std::int64_t bytes);

// What the stored weights' offset, and whatever else depends on the counts alone, adds to a sum.
using Correction = std::int32_t (*)(const std::int8_t* value, std::int64_t n);

// Rows of counts with all inputs of a tile. `interleave` stores a block of four inputs' rows (the
// last ones may be missing) as the instructions take them, 256 bytes for int8 and 512 for int4.
// `multiply` adds what so many quads of 256 or 512 bytes give to the sums of one to TOGETHER rows of
// counts: each load of weights serves them all.
constexpr int TOGETHER = 3, MANY_ROWS = 32;

struct Dense {
    void (*interleave[2])(const std::uint8_t* rows, std::int64_t stride, std::int64_t inputs,
                          std::uint8_t* to);
    void (*multiply[2][TOGETHER])(const std::uint8_t* tile, std::int64_t quads,
                                  const std::int8_t* const* counts, std::int32_t* const* sums);
    // The share of active inputs above which this is faster, by bits, for few rows and for many.
    double share[2][2];
};

struct Steps {
    void (*strip[2][4])(const Step&);  // by bits (8, 4) and 64-byte blocks, less one
    int blocks[2];                     // the most blocks a strip may have
    Correction correction[2];
    std::int64_t (*list)(const std::int8_t*, std::int64_t, std::int32_t*, std::int8_t*);
    double break_even[2];  // share of active inputs above which the dense form is faster
    RowDot dot[2];
    const Dense* dense;  // null: there is no such form
};

const Steps& steps();  // of the instruction set in use

template <int BITS>
INLINE std::int32_t plain_dot(const std::uint8_t* row, const std::int8_t* counts,
                              std::int64_t bytes) {
    std::int32_t sum = 0;
    if (BITS == 8) {
        for (std::int64_t i = 0; i < bytes; ++i) sum += std::int32_t{row[i]} * counts[i];
        return sum;
    }
    for (std::int64_t at = 0; at < bytes; at += 64) {
        const std::int8_t *low = counts + 2 * at, *high = low + 64;
        for (int p = 0; p < 64; ++p) sum += (row[at + p] & 15) * low[p] + (row[at + p] >> 4) * high[p];
    }
    return sum;
}

extern const Steps scalar_steps;
#if HAS_X86_STEPS
extern const Steps avx2_steps, avx512_steps;
#endif
#if HAS_NEON_STEPS
extern const Steps neon_steps, neon_dot_steps;
#endif
