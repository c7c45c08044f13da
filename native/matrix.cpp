// See matrix.h. Here: memory, the choice of instruction set, the walk over tiles, and plain C++
// steps for processors without their own.

#include "matrix.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string_view>
#include <vector>

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

// Bytes of weights that a few rows pass over together, half of a small L2; and the width in bytes of
// the tiles that many rows pass over, 64 KB with SPAN inputs.
constexpr int64_t SHARED = int64_t{1} << 18, STRIP = 128;

// Asks for a line in L2.
INLINE void fetch(const void* line) {
#if defined(__GNUC__)
    __builtin_prefetch(line, 0, 2);
#else
    static_cast<void>(line);
#endif
}

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
    nullptr,
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

// Four weights at a time: flipping the top bit adds what stored weights are offset by.
template <int BITS>
void pack_block(const int8_t* weights, uint8_t* block) {
    using std::uint32_t;
    constexpr uint32_t EIGHTS = 0x08080808, TOPS = 0x80808080, HALVES = 0x0f0f0f0f;
    uint32_t from[16 * 8 / BITS], to[16];
    std::memcpy(from, weights, sizeof from);
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const uint32_t four = from[4 * j + i];  // as `output_of` orders them
            if (BITS == 8) {
                to[4 * i + j] = four ^ TOPS;
            } else {
                const uint32_t other = from[16 + 4 * j + i];
                to[4 * i + j] = ((four & HALVES) ^ EIGHTS) | ((other & HALVES) ^ EIGHTS) << 4;
            }
        }
    std::memcpy(block, to, sizeof to);
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

// Quads [begin, end) of the `listed` ones, all inputs in order if there is no list. The next ones
// are fetched meanwhile, beyond the end too.
struct Quads {
    const int32_t* index;
    const int8_t* value;
    int64_t begin, end, listed;
};

// Adds a panel's part of the outputs [first, last) to `out`.
void run(const Matrix& m, const Panel& panel, int64_t first, int64_t last, const Quads& quads,
         int32_t* out) {
    const Steps& with = steps();
    const bool dense = !quads.index;
    const int kind = m.bits == 4;
    const int64_t widest = with.blocks[kind], block = per_block(m.bits);
    const int64_t blocks = (last - first + block - 1) / block;
    const int64_t some = quads.end - quads.begin;
    const int64_t windows = std::max<int64_t>(1, some / (dense ? DENSE_WINDOW[kind] : WINDOW));
    const uint8_t* data = panel.data + (first - panel.first) * m.bits / 8;
    alignas(64) int32_t sums[2 * PANEL];
    std::copy_n(out + first, last - first, sums);
    const auto window = [&](int64_t w) {
        return std::min(quads.begin + some * w / windows, quads.listed);
    };
    // The rows of the first window, which no step before it asks for.
    for (int64_t i = 0; !dense && !quads.begin && i < 4 * window(1); ++i)
        for (int64_t b = 0; b < blocks; ++b) FETCH(data + quads.index[i] * panel.stride + b * BLOCK);
    for (int64_t w = 0; w < windows; ++w) {
        const int64_t begin = window(w), end = window(w + 1), ahead = window(w + 2);
        for (int64_t b = 0; b < blocks; b += widest) {
            const uint8_t* rows = data + b * BLOCK;
            const uint8_t* next = dense ? rows + 4 * end * panel.stride : rows;
            with.strip[kind][std::min(widest, blocks - b) - 1](
                {dense ? rows + 4 * begin * panel.stride : rows, panel.stride,
                 dense ? nullptr : quads.index + 4 * begin, quads.value + 4 * begin, end - begin,
                 next, dense ? nullptr : quads.index + 4 * end, ahead - end, sums + b * block});
        }
    }
    if (dense && quads.end == quads.listed && m.inputs % 4) {
        // The inputs after the last whole quad, as a list of their own.
        const auto final = static_cast<int32_t>(m.inputs - 1);
        int32_t tail[4] = {final, final, final, final};
        int8_t counts[4] = {};
        for (int64_t i = 4 * quads.end; i < m.inputs; ++i) {
            tail[i % 4] = static_cast<int32_t>(i);
            counts[i % 4] = quads.value[i];
        }
        for (int64_t b = 0; b < blocks; b += widest)
            with.strip[kind][std::min(widest, blocks - b) - 1](
                {data + b * BLOCK, panel.stride, tail, counts, 1, nullptr, nullptr, 0,
                 sums + b * block});
    }
    std::copy_n(sums, last - first, out + first);
}

// The parts of panels that tiles [begin, end) are made of.
template <typename F>
void for_panels(const Matrix& m, int64_t begin, int64_t end, F visit) {
    const int64_t last = std::min(end * m.tile, m.outputs);
    for (int64_t at = begin * m.tile; at < last;) {
        const Panel panel = panel_at(m, at);
        const int64_t until = std::min(last, panel.first + panel.outputs);
        visit(panel, at, until);
        at = until;
    }
}

// All quads of a row with the panels of tiles [begin, end).
void run(const Matrix& m, const Quads& quads, int64_t begin, int64_t end, int32_t correction,
         int32_t* out) {
    for_panels(m, begin, end, [&](const Panel& panel, int64_t first, int64_t last) {
        std::fill(out + first, out + last, correction);
        run(m, panel, first, last, quads, out);
    });
}

int32_t correction(const Matrix& m, const int8_t* counts) {
    return steps().correction[m.bits == 4](counts, m.inputs);
}

// What a row's product reads, none of it done.
Quads quads_of(const Matrix& m, const Sent& row) {
    if (reads_all(m, row.events)) return {nullptr, row.counts, 0, 0, m.inputs / 4};
    return {row.index, row.value, 0, 0, (row.events + 3) / 4};
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
    const auto pack = bits == 8 ? pack_block<8> : pack_block<4>;
    for (int64_t at = 0; at < outputs;) {
        const Panel panel = panel_at(*m, at);
        at += panel.outputs;
        for (int64_t i = 0; i < inputs; ++i) {
            const int8_t* row = weights + i * outputs + panel.first;
            uint8_t* to = panel.data + i * panel.stride;
            int64_t o = 0;
            for (; o + block <= panel.outputs; o += block, to += BLOCK) pack(row + o, to);
            if (o < panel.outputs) {
                int8_t whole[2 * BLOCK] = {};
                std::copy_n(row + o, panel.outputs - o, whole);
                pack(whole, to);
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
    const int64_t block = per_block(m.bits);
    const auto unpack = m.bits == 8 ? unpack_block<8> : unpack_block<4>;
    for_panels(m, begin, end, [&](const Panel& panel, int64_t at, int64_t until) {
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
    });
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

int64_t list_spans(const int8_t* counts, int64_t n, int32_t* index, int8_t* value,
                   int32_t* quads) {
    int64_t all = 0;
    for (int64_t first = 0; first < n; first += SPAN) {
        const int64_t events = list_events(counts + first, std::min(SPAN, n - first), index, value);
        const int64_t fours = (events + 3) / 4;
        *quads++ = static_cast<int32_t>(fours);
        index += 4 * fours, value += 4 * fours;
        all += events;
    }
    return all;
}

void event_product(const Matrix& m, const int32_t* index, const int8_t* value, int64_t events,
                   int64_t tile_begin, int64_t tile_end, int32_t* out) {
    const int64_t quads = (events + 3) / 4;
    run(m, {index, value, 0, quads, quads}, tile_begin, tile_end,
        steps().correction[m.bits == 4](value, events), out);
}

void dense_product(const Matrix& m, const int8_t* counts, int64_t tile_begin, int64_t tile_end,
                   int32_t* out) {
    const int64_t quads = m.inputs / 4;
    run(m, {nullptr, counts, 0, quads, quads}, tile_begin, tile_end, correction(m, counts), out);
}

bool reads_all(const Matrix& m, int64_t events) {
    const double active = steps().break_even[m.bits == 4] * static_cast<double>(m.inputs);
    return static_cast<double>(events) > active;
}

void product(const Matrix& m, const int8_t* counts, const int32_t* index, const int8_t* value,
             int64_t events, int64_t tile_begin, int64_t tile_end, int32_t* out) {
    if (reads_all(m, events))
        dense_product(m, counts, tile_begin, tile_end, out);
    else
        event_product(m, index, value, events, tile_begin, tile_end, out);
}

namespace {

void few_products(const Matrix& m, const Sent* rows, int64_t num_rows, int64_t begin,
                  int64_t end) {
    std::vector<Quads> quads(num_rows);
    for_panels(m, begin, end, [&](const Panel& panel, int64_t first, int64_t last) {
        for (int64_t r = 0; r < num_rows; ++r) {
            quads[r] = quads_of(m, rows[r]);
            std::fill(rows[r].out + first, rows[r].out + last,
                      steps().correction[m.bits == 4](rows[r].value, rows[r].events));
        }
        const int64_t block = per_block(m.bits);
        const int64_t bytes = (last - first + block - 1) / block * BLOCK;
        const int64_t inputs = num_rows == 1 ? m.inputs : SHARED / bytes / 4 * 4;
        for (int64_t until = inputs; until < m.inputs + inputs; until += inputs)
            for (int64_t r = 0; r < num_rows; ++r) {
                Quads& some = quads[r];
                some.begin = some.end;
                if (until >= m.inputs) {
                    some.end = some.listed;
                } else if (some.index) {
                    const int32_t *events = rows[r].index, *last_one = events + rows[r].events;
                    const int32_t* start = std::min(events + 4 * some.begin, last_one);
                    some.end = (std::lower_bound(start, last_one, until) - events + 3) / 4;
                } else {
                    some.end = std::min(until / 4, some.listed);
                }
                if (some.begin < some.end || !some.listed)
                    run(m, panel, first, last, some, rows[r].out);
            }
    });
}

// SPAN inputs of a strip of outputs, side by side, so that they fall into different sets of the
// cache: rows of whole panels would not. DENSE: four inputs interleaved.
template <bool DENSE>
struct Tile {
    const uint8_t* from;
    int64_t stride, blocks, inputs;
    alignas(64) uint8_t data[SPAN * STRIP * (1 + DENSE)];

    void set(const Matrix& m, const Panel& panel, int64_t at, int64_t outputs, int64_t input) {
        const int64_t block = per_block(m.bits);
        from = panel.data + input * panel.stride + (at - panel.first) * m.bits / 8;
        stride = panel.stride, blocks = (outputs + block - 1) / block;
        inputs = std::min(SPAN, m.inputs - input);
    }
    // Parts [begin, end) of the rows.
    void copy(int bits, int64_t begin, int64_t end, int64_t parts) {
        constexpr int64_t AHEAD = 16;
        const int64_t quads = (inputs + 3) / 4;
        for (int64_t q = quads * begin / parts; q < quads * end / parts; ++q) {
            const int64_t first = 4 * q, last = std::min(first + 4, inputs);
            for (int64_t i = first + AHEAD; i < std::min(last + AHEAD, inputs); ++i)
                for (int64_t b = 0; b < blocks; ++b) fetch(from + i * stride + b * BLOCK);
            for (int64_t b = 0; DENSE && b < blocks; ++b)
                steps().dense->interleave[bits == 4](from + first * stride + b * BLOCK, stride,
                                                     last - first, quad(bits, q, b));
            for (int64_t i = first; !DENSE && i < last; ++i)
                std::memcpy(data + i * STRIP, from + i * stride, blocks * BLOCK);
        }
    }
    // Interleaved: the blocks of int8 side by side, those of int4 one after the other.
    uint8_t* quad(int bits, int64_t q, int64_t block) {
        if (bits == 8) return data + (q * blocks + block) * 256;
        return data + (block * (SPAN / 4) + q) * 512;
    }
};

template <bool DENSE>
void many_products(const Matrix& m, const Sent* sent, int64_t rows, int64_t begin, int64_t end) {
    const Steps& with = steps();
    const int kind = m.bits == 4;
    const int64_t block = per_block(m.bits), width = STRIP / BLOCK * block;
    const int64_t widest = with.blocks[kind];
    // One is in use while the next one is copied.
    Tile<DENSE> tiles[2], *tile = tiles, *next = tiles + 1;
    std::vector<int32_t> sums(rows * width), corrections(rows);
    std::vector<int64_t> done(rows);  // events of a row
    for (int64_t r = 0; r < rows; ++r) corrections[r] = correction(m, sent[r].counts);
    const auto events = [&](int64_t r, int64_t span) {
        const int64_t quads = sent[r].quads[span];
        for (int64_t b = 0; b < tile->blocks; b += widest)
            with.strip[kind][std::min(widest, tile->blocks - b) - 1](
                {tile->data + b * BLOCK, STRIP, sent[r].index + done[r], sent[r].value + done[r],
                 quads, nullptr, nullptr, 0, sums.data() + r * width + b * block});
        done[r] += 4 * quads;
    };
    const auto all = [&](int64_t r, int64_t n, int64_t input) {
        const int64_t quads = tile->inputs / 4, groups = m.bits == 8 ? 1 : tile->blocks;
        const auto multiply = with.dense->multiply[m.bits == 4 || tile->blocks == 2][n - 1];
        const int8_t *counts[TOGETHER], *last[TOGETHER];
        int8_t tail[TOGETHER][4] = {};
        for (int64_t group = 0; group < groups; ++group) {
            int32_t* to[TOGETHER];
            for (int64_t i = 0; i < n; ++i) {
                counts[i] = sent[r + i].counts + input;
                to[i] = sums.data() + (r + i) * width + group * block;
                std::copy_n(counts[i] + 4 * quads, tile->inputs % 4, tail[i]);
                last[i] = tail[i];
            }
            multiply(tile->quad(m.bits, 0, group), quads, counts, to);
            if (tile->inputs % 4) multiply(tile->quad(m.bits, quads, group), 1, last, to);
        }
    };
    for_panels(m, begin, end, [&](const Panel& panel, int64_t first, int64_t last) {
        const auto outputs = [&](int64_t at) { return std::min(width, last - at); };
        tile->set(m, panel, first, outputs(first), 0);
        tile->copy(m.bits, 0, 1, 1);
        for (int64_t at = first; at < last; at += width) {
            for (int64_t r = 0; r < rows; ++r)
                std::fill_n(sums.data() + r * width, width, corrections[r]);
            std::fill(done.begin(), done.end(), 0);
            for (int64_t input = 0; input < m.inputs; input += SPAN) {
                if (input + SPAN < m.inputs)
                    next->set(m, panel, at, outputs(at), input + SPAN);
                else if (at + width < last)
                    next->set(m, panel, at + width, outputs(at + width), 0);
                else
                    next->inputs = 0;
                for (int64_t r = 0; r < rows;) {
                    const int64_t n = DENSE ? std::min<int64_t>(rows - r, TOGETHER) : 1;
                    next->copy(m.bits, r, r + n, rows);
                    if (DENSE)
                        all(r, n, input);
                    else
                        events(r, input / SPAN);
                    r += n;
                }
                std::swap(tile, next);
            }
            for (int64_t r = 0; r < rows; ++r)
                std::copy_n(sums.data() + r * width, outputs(at), sent[r].out + at);
        }
    });
}

// Whether so much fires that reading the inputs in order is faster for the rows together.
bool all_dense(const Matrix& m, const Sent* rows, int64_t num_rows) {
    const Dense* dense = steps().dense;
    int64_t events = 0;
    for (int64_t r = 0; r < num_rows; ++r) events += rows[r].events;
    if (!dense || num_rows <= TOGETHER) return false;
    const double share = dense->share[m.bits == 4][num_rows >= MANY_ROWS];
    return static_cast<double>(events) > share * static_cast<double>(num_rows * m.inputs);
}

}  // namespace

void products(const Matrix& m, const Sent* rows, int64_t num_rows, int64_t begin, int64_t end) {
    if (all_dense(m, rows, num_rows))
        many_products<true>(m, rows, num_rows, begin, end);
    else if (num_rows && rows->quads)
        many_products<false>(m, rows, num_rows, begin, end);
    else if (num_rows)
        few_products(m, rows, num_rows, begin, end);
}
