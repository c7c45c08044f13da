// The matrices of native/matrix.h for Python: several rows of counts at once, on several threads.

#include <algorithm>
#include <memory>
#include <vector>

#include "common.h"
#include "matrix.h"
#include "pool.h"

namespace {

// Bytes of weights per thread that repay waking it.
constexpr std::int64_t MIN_BYTES = std::int64_t{1} << 17;

struct Product {
    const Matrix* matrix;
    const Sent* sent;
    std::int64_t rows;

    static void run(void* context, int part, int parts) {
        const auto& job = *static_cast<const Product*>(context);
        const std::int64_t tiles = job.matrix->tiles;
        products(*job.matrix, job.sent, job.rows, tiles * part / parts, tiles * (part + 1) / parts);
    }
};

struct Listing {
    std::int64_t inputs;
    Sent* sent;
    std::int64_t rows;
    std::int32_t *index, *quads;
    std::int8_t* value;

    static void run(void* context, int part, int parts) {
        const auto& job = *static_cast<const Listing*>(context);
        const std::int64_t n = job.inputs, room = list_room(n), spans = num_spans(n);
        for (std::int64_t r = job.rows * part / parts; r < job.rows * (part + 1) / parts; ++r) {
            Sent& row = job.sent[r];
            std::int32_t* index = job.index + r * room;
            std::int8_t* value = job.value + r * room;
            row.index = index, row.value = value;
            if (job.rows <= FEW_ROWS) {
                row.events = list_events(row.counts, n, index, value);
            } else {
                std::int32_t* quads = job.quads + r * spans;
                row.quads = quads;
                row.events = list_spans(row.counts, n, index, value, quads);
            }
        }
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
    constexpr std::int64_t AT_ONCE = 256;  // rows whose lists are kept
    const Matrix& m = *matrix;
    const std::int64_t most = std::min(rows, AT_ONCE), room = most * list_room(m.inputs) + 4;
    // Not filled with zeros: most of it is never touched.
    const auto index = std::make_unique_for_overwrite<std::int32_t[]>(room);
    const auto value = std::make_unique_for_overwrite<std::int8_t[]>(room);
    std::vector<std::int32_t> quads(most * num_spans(m.inputs));
    std::vector<Sent> sent(most);
    for (; rows > 0; rows -= AT_ONCE) {
        const std::int64_t some = std::min(rows, AT_ONCE);
        for (std::int64_t r = 0; r < some; ++r)
            sent[r] = {counts + r * m.inputs, nullptr, nullptr, nullptr, 0, out + r * m.outputs};
        Listing listing{m.inputs, sent.data(), some, index.get(), quads.data(), value.get()};
        parallel(Listing::run, &listing, parts_for(m, some * m.inputs, threads));
        std::int64_t all = 0;
        for (std::int64_t r = 0; r < some; ++r) all += sent[r].events;
        Product job{&m, sent.data(), some};
        parallel(Product::run, &job, parts_for(m, all * (m.bytes / m.inputs), threads));
        counts += some * m.inputs;
        out += some * m.outputs;
    }
}
