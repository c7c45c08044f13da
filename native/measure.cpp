// What limits the products of native/matrix.h: the same memory read without arithmetic. For
// benchmarks.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "common.h"
#include "matrix.h"
#include "matrix_steps.h"
#include "pool.h"

// A vector on its way through a matrix. The arrays have room for inputs + 4.
struct Job {
    const Matrix* matrix;
    const std::int8_t* counts;
    std::int32_t* index;
    std::int8_t* value;
    std::int64_t events;
    std::int32_t* out;
};

namespace {

using std::int64_t;
using std::uint64_t;
using std::uint8_t;

constexpr int64_t STRIP = 256;  // bytes

#if defined(__GNUC__)
using Line = uint64_t __attribute__((vector_size(64)));
#else
using Line = uint64_t;
#endif

// Whole lines, with the widest loads there are: one word of each comes slower, as the prefetchers
// see less and fewer lines are on their way.
INLINE void read(const uint8_t* from, int64_t bytes, Line& sum) {
    for (int64_t at = 0; at < bytes; at += sizeof(Line)) {
        Line line;
        std::memcpy(&line, from + at, sizeof line);
        sum += line;
    }
}

uint64_t total(const Line& sum) {
    uint64_t words[sizeof sum / 8];
    std::memcpy(words, &sum, sizeof sum);
    return std::accumulate(words, words + sizeof sum / 8, uint64_t{0});
}

// Of the rows [begin, end) in a list, if they exist, BYTES each; those `ahead` of them are fetched.
template <int64_t BYTES>
INLINE void touch(const Job& job, const uint8_t* strip, int64_t stride, int64_t begin, int64_t end,
                  int64_t ahead, Line& sum) {
    for (int64_t i = begin; i < end; ++i) {
        if (i + ahead < job.events) {
            const uint8_t* next = strip + job.index[i + ahead] * stride;
            for (int64_t line = 0; line < BYTES; line += 64) FETCH(next + line);
        }
        if (i >= 0) read(strip + job.index[i] * stride, BYTES, sum);
    }
}

// The listed rows' bytes [first, last) of a panel, by strips, as an event product does.
CLONES uint64_t touch(const Job& job, const uint8_t* panel, int64_t stride, int64_t first,
                      int64_t last) {
    Line sum = {};
    const int64_t rows = stride < 2048 ? 16 : 8;  // from asking to reading: what was fastest
    for (int64_t begin = -rows; begin < job.events; begin += rows) {
        const int64_t end = std::min(begin + rows, job.events);
        int64_t at = first;
        for (; at + STRIP <= last; at += STRIP)
            touch<STRIP>(job, panel + at, stride, begin, end, rows, sum);
        for (; at < last; at += 64) touch<64>(job, panel + at, stride, begin, end, rows, sum);
    }
    return total(sum);
}

uint64_t touch(const Job& job, int part, int parts) {
    uint64_t sum = 0;
    const Matrix& m = *job.matrix;
    const int64_t row = m.bytes / m.inputs, tile = m.tile * m.bits / 8;
    const int64_t last = std::min(m.tiles * (part + 1) / parts * tile, row);
    for (int64_t at = m.tiles * part / parts * tile; at < last;) {
        const int64_t panel = at / PANEL * PANEL, stride = std::min(PANEL, row - panel);
        const int64_t until = std::min(last, panel + stride);
        sum += touch(job, m.data + m.inputs * panel, stride, at - panel, until - panel);
        at = until;
    }
    return sum;
}

CLONES uint64_t stream(const Job& job, int part, int parts) {
    Line sum = {};
    const int64_t lines = job.matrix->bytes / 64;
    const int64_t first = lines * part / parts, last = lines * (part + 1) / parts;
    read(job.matrix->data + 64 * first, 64 * (last - first), sum);
    return total(sum);
}

struct Pass {
    Job* jobs;
    int64_t n;
    std::atomic<uint64_t> sum{0};
};

template <uint64_t (*READ)(const Job&, int, int)>
void read_all(void* context, int part, int parts) {
    auto& pass = *static_cast<Pass*>(context);
    for (int64_t j = 0; j < pass.n; ++j) pass.sum += READ(pass.jobs[j], part, parts);
}

template <bool EVENT>
void multiply(void* context, int part, int parts) {
    const Job& job = *static_cast<const Job*>(context);
    const Matrix& m = *job.matrix;
    const int64_t begin = m.tiles * part / parts, end = m.tiles * (part + 1) / parts;
    if (EVENT)
        event_product(m, job.index, job.value, job.events, begin, end, job.out);
    else
        dense_product(m, job.counts, begin, end, job.out);
}

}  // namespace

// The vectors through their matrices, one after the other. Lists are made as a decoder does.
EXPORT void spikelm_measure_event(Job* jobs, int64_t n, int parts) {
    if (parts > threads()) set_threads(parts);
    for (Job* job = jobs; job < jobs + n; ++job) {
        job->events = list_events(job->counts, job->matrix->inputs, job->index, job->value);
        parallel(multiply<true>, job, parts);
    }
}

EXPORT void spikelm_measure_dense(Job* jobs, int64_t n, int parts) {
    if (parts > threads()) set_threads(parts);
    for (Job* job = jobs; job < jobs + n; ++job) parallel(multiply<false>, job, parts);
}

// Reads the rows that the last event pass listed; returns the sum of their words.
EXPORT uint64_t spikelm_measure_touch(Job* jobs, int64_t n, int parts) {
    if (parts > threads()) set_threads(parts);
    Pass pass{jobs, n};
    parallel(read_all<touch>, &pass, parts);
    return pass.sum;
}

// Reads the matrices from end to end; returns the sum of their words.
EXPORT uint64_t spikelm_measure_stream(Job* jobs, int64_t n, int parts) {
    if (parts > threads()) set_threads(parts);
    Pass pass{jobs, n};
    parallel(read_all<stream>, &pass, parts);
    return pass.sum;
}
