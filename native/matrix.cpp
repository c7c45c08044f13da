// See matrix.h. Here: memory, the choice of instruction set, the walk over tiles, and plain C++
// steps for processors without their own.

#include "matrix.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string_view>

#include "matrix_steps.h"
#include "memory.h"

#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace {

using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::uint8_t;

constexpr int64_t BLOCK = 64, TILE = 256;  // bytes

int64_t per_block(int bits) { return BLOCK * 8 / bits; }

// Which output of a block its byte p holds (in the low half, for int4).
constexpr int output_of(int p) { return 16 * (p >> 2 & 3) + 4 * (p >> 4) + (p & 3); }

// ---- plain C++

template <int BITS>
void scalar_strip(const Step& step) {
    constexpr int64_t OUTPUTS = BLOCK * 8 / BITS;
    int32_t sums[OUTPUTS] = {};
    for (int64_t i = 0; i < 4 * step.quads; ++i) {
        const int32_t count = step.value[i];
        const uint8_t* row = step.rows + (step.index ? step.index[i] : i) * step.stride;
        for (int p = 0; p < BLOCK; ++p) {
            if (BITS == 8) {
                sums[p] += count * row[p];
            } else {
                sums[p] += count * (row[p] & 15);
                sums[BLOCK + p] += count * (row[p] >> 4);
            }
        }
    }
    for (int64_t half = 0; half < OUTPUTS; half += BLOCK)
        for (int p = 0; p < BLOCK; ++p) step.sums[half + output_of(p)] += sums[half + p];
}

template <int OFFSET>
int32_t scalar_correction(const int8_t* value, int64_t n) {
    int32_t sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += value[i];
    return -OFFSET * sum;
}

int64_t scalar_list(const int8_t* counts, int64_t n, int32_t* index, int8_t* value) {
    int64_t events = 0;
    for (int64_t i = 0; i < n; ++i)
        if (counts[i]) {
            index[events] = static_cast<int32_t>(i);
            value[events++] = counts[i];
        }
    return events;
}

template <int BITS>
int32_t scalar_dot(const uint8_t* row, const int8_t* counts, int64_t bytes) {
    return plain_dot<BITS>(row, counts, bytes);
}

}  // namespace

const Steps scalar_steps = {
    {{scalar_strip<8>}, {scalar_strip<4>}},
    {1, 1},
    {scalar_correction<128>, scalar_correction<8>},
    scalar_list,
    {1.0, 1.0},
    {scalar_dot<8>, scalar_dot<4>},
};

namespace {

// ---- instruction set

#if HAS_NEON_STEPS
bool has_dot_products() {
#if defined(__ARM_FEATURE_DOTPROD)
    return true;
#elif defined(__linux__)
    constexpr unsigned long BIT = 1ul << 20;  // HWCAP_ASIMDDP
    return getauxval(AT_HWCAP) & BIT;
#else
    return false;
#endif
}
#endif

// Null if the machine, or the compiler, lacks the instructions.
const Steps* steps_of(int isa) {
#if HAS_X86_STEPS
    if (isa == AVX512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        return &avx512_steps;
    if (isa == AVX2 && __builtin_cpu_supports("avx2")) return &avx2_steps;
#endif
#if HAS_NEON_STEPS
    if (isa == NEON) return has_dot_products() ? &neon_dot_steps : &neon_steps;
#endif
    return isa == SCALAR ? &scalar_steps : nullptr;
}

Isa from_environment() {
    constexpr std::string_view NAMES[] = {"scalar", "avx2", "avx512", "neon"};
    const char* name = std::getenv("SPIKELM_ISA");
    for (int i = NEON; i >= SCALAR; --i)
        if ((!name || !*name || NAMES[i] == name) && steps_of(i)) return Isa(i);
    return UNKNOWN;
}

struct Choice {
    std::atomic<Isa> isa = from_environment();
    std::atomic<const Steps*> steps = steps_of(isa == UNKNOWN ? SCALAR : Isa(isa));
};

Choice& choice() {
    static Choice now;
    return now;
}

// ---- panels

// Outputs that lie together in memory, by the blocks of 64 bytes.
struct Panel {
    uint8_t* data;
    int64_t first, outputs, blocks, stride;
};

// The one that holds output `first`.
Panel panel_at(const Matrix& m, int64_t first) {
    const int64_t width = PANEL * 8 / m.bits, block = per_block(m.bits);
    first = first / width * width;
    const int64_t outputs = std::min(m.outputs - first, width);
    const int64_t blocks = (outputs + block - 1) / block;
    return {m.data + m.inputs * (first * m.bits / 8), first, outputs, blocks, blocks * BLOCK};
}

// Four weights at a time; no byte borrows from the next, as its top bit is set.
template <int BITS>
void unpack_block(const uint8_t* block, int8_t* weights) {
    using std::uint32_t;
    constexpr uint32_t EIGHTS = 0x08080808, TOPS = 0x80808080, HALVES = 0x0f0f0f0f;
    uint32_t from[16], to[16 * 8 / BITS];
    std::memcpy(from, block, sizeof from);
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const uint32_t four = from[4 * j + i];  // the inverse of `output_of` is itself
            if (BITS == 8) {
                to[4 * i + j] = four ^ TOPS;
            } else {
                to[4 * i + j] = (((four & HALVES) | TOPS) - EIGHTS) ^ TOPS;
                to[16 + 4 * i + j] = (((four >> 4 & HALVES) | TOPS) - EIGHTS) ^ TOPS;
            }
        }
    std::memcpy(weights, to, sizeof to);
}

// A panel's part of the outputs [first, last).
void run(const Matrix& m, const Panel& panel, int64_t first, int64_t last, const int32_t* index,
         const int8_t* value, int64_t quads, int32_t correction, int32_t* out) {
    const Steps& with = steps();
    const bool dense = !index;
    const int kind = m.bits == 4;
    const int64_t widest = with.blocks[kind], block = per_block(m.bits);
    const int64_t blocks = (last - first + block - 1) / block;
    const int64_t windows = std::max<int64_t>(1, quads / (dense ? DENSE_WINDOW[kind] : WINDOW));
    const uint8_t* data = panel.data + (first - panel.first) * m.bits / 8;
    alignas(64) int32_t sums[2 * PANEL];
    std::fill_n(sums, blocks * block, correction);
    const auto window = [&](int64_t w) { return quads * std::min(w, windows) / windows; };
    // The rows of the first window, which no step before it asks for.
    for (int64_t i = 0; !dense && i < 4 * window(1); ++i)
        for (int64_t b = 0; b < blocks; ++b) FETCH(data + index[i] * panel.stride + b * BLOCK);
    for (int64_t w = 0; w < windows; ++w) {
        const int64_t begin = window(w), end = window(w + 1), ahead = window(w + 2);
        for (int64_t b = 0; b < blocks; b += widest) {
            const uint8_t* rows = data + b * BLOCK;
            const uint8_t* next = dense ? rows + 4 * end * panel.stride : rows;
            with.strip[kind][std::min(widest, blocks - b) - 1](
                {dense ? rows + 4 * begin * panel.stride : rows, panel.stride,
                 dense ? nullptr : index + 4 * begin, value + 4 * begin, end - begin, next,
                 dense ? nullptr : index + 4 * end, ahead - end, sums + b * block});
        }
    }
    if (dense && m.inputs % 4) {
        // The inputs after the last whole quad, as a list of their own.
        const auto final = static_cast<int32_t>(m.inputs - 1);
        int32_t tail[4] = {final, final, final, final};
        int8_t counts[4] = {};
        for (int64_t i = 4 * quads; i < m.inputs; ++i) {
            tail[i % 4] = static_cast<int32_t>(i);
            counts[i % 4] = value[i];
        }
        for (int64_t b = 0; b < blocks; b += widest)
            with.strip[kind][std::min(widest, blocks - b) - 1](
                {data + b * BLOCK, panel.stride, tail, counts, 1, nullptr, nullptr, 0,
                 sums + b * block});
    }
    std::copy_n(sums, last - first, out + first);
}

void run(const Matrix& m, const int32_t* index, const int8_t* value, int64_t quads, int64_t begin,
         int64_t end, int32_t correction, int32_t* out) {
    const int64_t last = std::min(end * m.tile, m.outputs);
    for (int64_t at = begin * m.tile; at < last;) {
        const Panel panel = panel_at(m, at);
        const int64_t until = std::min(last, panel.first + panel.outputs);
        run(m, panel, at, until, index, value, quads, correction, out);
        at = until;
    }
}

}  // namespace

const Steps& steps() { return *choice().steps.load(std::memory_order_relaxed); }

Isa isa() { return choice().isa.load(std::memory_order_relaxed); }

bool set_isa(Isa wanted) {
    const Steps* found = steps_of(wanted);
    if (!found) return false;
    choice().isa = wanted;
    choice().steps = found;
    return true;
}

Matrix* matrix_new(int64_t inputs, int64_t outputs, int bits, const int8_t* weights) {
    if (inputs < 1 || inputs > MAX_INPUTS || outputs < 1 || (bits != 4 && bits != 8)) return nullptr;
    if (isa() == UNKNOWN) return nullptr;
    const int64_t block = per_block(bits), tile = TILE * 8 / bits;
    const int64_t bytes = inputs * ((outputs + block - 1) / block) * BLOCK;
    uint8_t* data = allocate(bytes);
    if (!data) return nullptr;
    auto* m = new (std::nothrow)
        Matrix{inputs, outputs, bits, tile, (outputs + tile - 1) / tile, data, bytes};
    if (!m) {
        release(data, bytes);
        return nullptr;
    }
    for (int64_t at = 0; at < outputs;) {
        const Panel panel = panel_at(*m, at);
        at += panel.outputs;
        for (int64_t i = 0; i < inputs; ++i) {
            const int8_t* row = weights + i * outputs + panel.first;
            const auto weight = [&](int64_t o) { return o < panel.outputs ? row[o] : 0; };
            uint8_t* to = panel.data + i * panel.stride;
            for (int64_t b = 0; b < panel.blocks; ++b)
                for (int p = 0; p < BLOCK; ++p) {
                    const int64_t o = b * block + output_of(p);
                    to[b * BLOCK + p] = static_cast<uint8_t>(
                        bits == 8 ? weight(o) + 128 : (weight(o) + 8) | (weight(o + 64) + 8) << 4);
                }
        }
    }
    return m;
}

void matrix_free(Matrix* matrix) {
    if (!matrix) return;
    release(matrix->data, matrix->bytes);
    delete matrix;
}

void matrix_unpack(const Matrix& m, int64_t begin, int64_t end, int8_t* weights) {
    const int64_t block = per_block(m.bits), last = std::min(end * m.tile, m.outputs);
    const auto unpack = m.bits == 8 ? unpack_block<8> : unpack_block<4>;
    for (int64_t at = begin * m.tile; at < last;) {
        const Panel panel = panel_at(m, at);
        const int64_t until = std::min(last, panel.first + panel.outputs);
        for (int64_t i = 0; i < m.inputs; ++i) {
            const uint8_t* from = panel.data + i * panel.stride + (at - panel.first) * m.bits / 8;
            int8_t* to = weights + i * m.outputs;
            int64_t first = at;
            for (; first + block <= until; first += block, from += BLOCK) unpack(from, to + first);
            if (first < until) {
                int8_t whole[2 * BLOCK];
                unpack(from, whole);
                std::copy_n(whole, until - first, to + first);
            }
        }
        at = until;
    }
}

int64_t list_events(const int8_t* counts, int64_t n, int32_t* index, int8_t* value) {
    const int64_t events = steps().list(counts, n, index, value);
    // Counts of 0 for a row that is read anyway.
    for (int64_t i = events; i % 4; ++i) {
        index[i] = index[events - 1];
        value[i] = 0;
    }
    return events;
}

void event_product(const Matrix& m, const int32_t* index, const int8_t* value, int64_t events,
                   int64_t tile_begin, int64_t tile_end, int32_t* out) {
    const int32_t correction = steps().correction[m.bits == 8 ? 0 : 1](value, events);
    run(m, index, value, (events + 3) / 4, tile_begin, tile_end, correction, out);
}

void dense_product(const Matrix& m, const int8_t* counts, int64_t tile_begin, int64_t tile_end,
                   int32_t* out) {
    const int32_t correction = steps().correction[m.bits == 8 ? 0 : 1](counts, m.inputs);
    run(m, nullptr, counts, m.inputs / 4, tile_begin, tile_end, correction, out);
}

bool reads_all(const Matrix& m, int64_t events) {
    const double active = steps().break_even[m.bits == 8 ? 0 : 1] * static_cast<double>(m.inputs);
    return static_cast<double>(events) > active;
}

void product(const Matrix& m, const int8_t* counts, const int32_t* index, const int8_t* value,
             int64_t events, int64_t tile_begin, int64_t tile_end, int32_t* out) {
    if (reads_all(m, events))
        dense_product(m, counts, tile_begin, tile_end, out);
    else
        event_product(m, index, value, events, tile_begin, tile_end, out);
}
