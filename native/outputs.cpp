// See outputs.h.

#include "outputs.h"

#include <algorithm>
#include <new>
#include <numeric>
#include <vector>

#include "common.h"
#include "matrix_steps.h"
#include "memory.h"
#include "pool.h"

namespace {

using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::uint8_t;

constexpr int64_t BLOCK = 64;  // bytes
constexpr int64_t AHEAD = 2;   // outputs between asking for bytes and using them

// Where the weight of an input lies in its output's bytes, and in which half of the byte.
struct Place {
    int64_t byte;
    int shift;
};

INLINE Place place(int64_t input, int bits) {
    if (bits == 8) return {input, 0};
    return {input / (2 * BLOCK) * BLOCK + input % BLOCK, input / BLOCK % 2 ? 4 : 0};
}

INLINE void fetch(const uint8_t* row, int64_t stride) {
#if defined(__GNUC__)
    for (int64_t at = 0; at < stride; at += BLOCK) __builtin_prefetch(row + at, 0, 2);
#else
    (void)row, (void)stride;
#endif
}

struct Unpacking {
    const Outputs* matrix;
    int8_t* weights;

    static void run(void* context, int part, int parts) {
        const auto& job = *static_cast<const Unpacking*>(context);
        const int64_t n = job.matrix->outputs;
        outputs_unpack(*job.matrix, n * part / parts, n * (part + 1) / parts, job.weights);
    }
};

struct Product {
    const Outputs* matrix;
    const int8_t* counts;
    int32_t total;
    const int32_t* all;
    int32_t* out;

    static void run(void* context, int part, int parts) {
        const auto& job = *static_cast<const Product*>(context);
        const int64_t first = job.matrix->outputs * part / parts;
        const int64_t n = job.matrix->outputs * (part + 1) / parts - first;
        outputs_product(*job.matrix, job.counts, job.total, job.all + first, n, job.out);
    }
};

}  // namespace

Outputs* outputs_new(int64_t inputs, int64_t outputs, int bits, const int8_t* weights) {
    if (inputs < 1 || inputs > MAX_INPUTS || outputs < 1 || (bits != 4 && bits != 8)) return nullptr;
    const int64_t block = BLOCK * 8 / bits, stride = (inputs + block - 1) / block * BLOCK;
    uint8_t* data = allocate(outputs * stride);
    if (!data) return nullptr;
    auto* m = new (std::nothrow) Outputs{inputs, outputs, bits, stride, data, outputs * stride};
    if (!m) {
        release(data, outputs * stride);
        return nullptr;
    }
    std::fill_n(data, m->bytes, uint8_t{0});
    // A square at a time, so that neither side is read or written a line per weight.
    for (int64_t from = 0; from < outputs; from += BLOCK)
        for (int64_t i = 0; i < inputs; ++i) {
            const Place at = place(i, bits);
            const int8_t* row = weights + i * outputs;
            for (int64_t o = from; o < std::min(outputs, from + BLOCK); ++o)
                data[o * stride + at.byte] |= static_cast<uint8_t>(
                    static_cast<uint8_t>(row[o] + (bits == 8 ? 128 : 8)) << at.shift);
        }
    return m;
}

void outputs_free(Outputs* matrix) {
    if (!matrix) return;
    release(matrix->data, matrix->bytes);
    delete matrix;
}

void outputs_unpack(const Outputs& m, int64_t begin, int64_t end, int8_t* weights) {
    for (int64_t from = begin; from < end; from += BLOCK)
        for (int64_t i = 0; i < m.inputs; ++i) {
            const Place at = place(i, m.bits);
            int8_t* row = weights + i * m.outputs;
            for (int64_t o = from; o < std::min(end, from + BLOCK); ++o) {
                const int byte = m.data[o * m.stride + at.byte];
                row[o] = static_cast<int8_t>(m.bits == 8 ? byte - 128 : (byte >> at.shift & 15) - 8);
            }
        }
}

void outputs_product(const Outputs& m, const int8_t* counts, int32_t total, const int32_t* wanted,
                     int64_t n, int32_t* out) {
    const RowDot dot = steps().dot[m.bits == 8 ? 0 : 1];
    const int32_t offset = (m.bits == 8 ? 128 : 8) * total;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t o = wanted[i];
        if (i + AHEAD < n) fetch(m.data + wanted[i + AHEAD] * m.stride, m.stride);
        out[o] = dot(m.data + o * m.stride, counts, m.stride) - offset;
    }
}

EXPORT Outputs* spikelm_outputs_new(int64_t inputs, int64_t outputs, int bits,
                                    const int8_t* weights) {
    return outputs_new(inputs, outputs, bits, weights);
}

EXPORT void spikelm_outputs_free(Outputs* matrix) { outputs_free(matrix); }

EXPORT int64_t spikelm_outputs_bytes(const Outputs* matrix) { return matrix->bytes; }

EXPORT void spikelm_outputs_unpack(const Outputs* matrix, int8_t* weights, int threads) {
    Unpacking job{matrix, weights};
    parallel(Unpacking::run, &job, threads);
}

// counts [rows, inputs], out [rows, outputs]: all of them.
EXPORT void spikelm_outputs_product(const Outputs* matrix, const int8_t* counts, int64_t rows,
                                    int32_t* out, int threads) {
    const int64_t inputs = matrix->inputs;
    std::vector<int8_t> padded(inputs + OUTPUTS_PADDING);
    std::vector<int32_t> all(matrix->outputs);
    std::iota(all.begin(), all.end(), 0);
    for (int64_t r = 0; r < rows; ++r, counts += inputs, out += matrix->outputs) {
        std::copy_n(counts, inputs, padded.begin());
        const int32_t total = std::accumulate(counts, counts + inputs, int32_t{0});
        Product job{matrix, padded.data(), total, all.data(), out};
        parallel(Product::run, &job, threads);
    }
}
