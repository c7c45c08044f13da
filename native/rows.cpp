// The matrices of native/matrix.h for Python: several rows of counts at once, on several threads.

#include <algorithm>
#include <vector>

#include "common.h"
#include "matrix.h"
#include "pool.h"

namespace {

// Bytes of weights per thread that repay waking it.
constexpr std::int64_t MIN_BYTES = std::int64_t{1} << 17;

struct Product {
    const Matrix* matrix;
    const std::int8_t* counts;
    std::int64_t rows;
    const std::int32_t* index;
    const std::int8_t* value;
    const std::int64_t* events;
    std::int32_t* out;

    static void run(void* context, int part, int parts) {
        const auto& job = *static_cast<const Product*>(context);
        const Matrix& m = *job.matrix;
        const std::int64_t room = m.inputs + 4;
        for (std::int64_t r = 0; r < job.rows; ++r)
            product(m, job.counts + r * m.inputs, job.index + r * room, job.value + r * room,
                    job.events[r], m.tiles * part / parts, m.tiles * (part + 1) / parts,
                    job.out + r * m.outputs);
    }
};

struct Unpacking {
    const Matrix* matrix;
    std::int8_t* weights;

    static void run(void* context, int part, int parts) {
        const auto& job = *static_cast<const Unpacking*>(context);
        const std::int64_t tiles = job.matrix->tiles;
        matrix_unpack(*job.matrix, tiles * part / parts, tiles * (part + 1) / parts, job.weights);
    }
};

int parts_for(const Matrix& m, std::int64_t bytes, int wanted) {
    if (wanted > threads()) set_threads(wanted);
    const std::int64_t most = std::min(m.tiles, std::max<std::int64_t>(bytes / MIN_BYTES, 1));
    return static_cast<int>(std::min<std::int64_t>(wanted, most));
}

}  // namespace

EXPORT int spikelm_isa() { return isa(); }
EXPORT int spikelm_set_isa(int wanted) { return set_isa(static_cast<Isa>(wanted)); }

EXPORT Matrix* spikelm_matrix_new(std::int64_t inputs, std::int64_t outputs, int bits,
                                  const std::int8_t* weights) {
    return matrix_new(inputs, outputs, bits, weights);
}

EXPORT void spikelm_matrix_free(Matrix* matrix) { matrix_free(matrix); }

EXPORT std::int64_t spikelm_matrix_bytes(const Matrix* matrix) { return matrix->bytes; }

EXPORT void spikelm_matrix_unpack(const Matrix* matrix, std::int8_t* weights, int threads) {
    Unpacking job{matrix, weights};
    parallel(Unpacking::run, &job, parts_for(*matrix, matrix->bytes, threads));
}

// counts [rows, inputs], out [rows, outputs].
EXPORT void spikelm_matrix_product(const Matrix* matrix, const std::int8_t* counts,
                                   std::int64_t rows, std::int32_t* out, int threads) {
    constexpr std::int64_t AT_ONCE = 16;  // rows whose lists are kept
    thread_local std::vector<std::int32_t> index;
    thread_local std::vector<std::int8_t> value;
    const std::int64_t inputs = matrix->inputs, room = inputs + 4;
    index.resize(AT_ONCE * room);
    value.resize(AT_ONCE * room);
    for (; rows > 0; rows -= AT_ONCE) {
        const std::int64_t some = std::min(rows, AT_ONCE);
        std::int64_t events[AT_ONCE], all = 0;
        for (std::int64_t r = 0; r < some; ++r) {
            events[r] = list_events(counts + r * inputs, inputs, index.data() + r * room,
                                    value.data() + r * room);
            all += events[r];
        }
        Product job{matrix, counts, some, index.data(), value.data(), events, out};
        parallel(Product::run, &job, parts_for(*matrix, all * (matrix->bytes / inputs), threads));
        counts += some * inputs;
        out += some * matrix->outputs;
    }
}
