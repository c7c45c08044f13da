// `make sanitize` and `make neon`: every instruction set against a plain loop, with buffers of exact
// size on the heap, and jobs for the threads. Not part of the library.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "matrix.h"
#include "pool.h"

extern "C" void spikelm_matrix_product(const Matrix* matrix, const std::int8_t* counts,
                                       std::int64_t rows, std::int32_t* out, int threads);

namespace {

using std::int32_t;
using std::int64_t;
using std::int8_t;

void require(bool holds, const char* what, int64_t inputs = 0, int64_t outputs = 0, int bits = 0) {
    if (holds) return;
    std::fprintf(stderr, "%s: %lld x %lld, %d bits, isa %d\n", what, static_cast<long long>(inputs),
                 static_cast<long long>(outputs), bits, isa());
    std::exit(1);
}

void compare(std::mt19937& g, int64_t inputs, int64_t outputs, int bits, int silent_percent) {
    std::vector<int8_t> weights(inputs * outputs), back(weights.size()), counts(inputs);
    for (auto& w : weights) w = static_cast<int8_t>(bits == 8 ? g() % 256 : g() % 16 - 8);
    const bool extreme = g() % 4 == 0;  // the largest counts alone
    for (auto& c : counts) {
        const int count = extreme ? (g() % 2 ? 127 : -127) : static_cast<int>(g() % 255) - 127;
        c = static_cast<int8_t>(static_cast<int>(g() % 100) < silent_percent ? 0 : count);
    }
    std::vector<int64_t> expected(outputs);
    for (int64_t i = 0; i < inputs; ++i)
        for (int64_t o = 0; o < outputs; ++o) expected[o] += counts[i] * weights[i * outputs + o];

    Matrix* m = matrix_new(inputs, outputs, bits, weights.data());
    require(m, "matrix_new", inputs, outputs, bits);
    matrix_unpack(*m, 0, m->tiles, back.data());
    require(back == weights, "matrix_unpack", inputs, outputs, bits);
    std::vector<int32_t> index(inputs + 4), events_out(outputs), dense_out(outputs), out(outputs);
    std::vector<int8_t> value(inputs + 4);
    const int64_t events = list_events(counts.data(), inputs, index.data(), value.data());
    for (int64_t t = 0; t < m->tiles; t += 3) {
        const int64_t end = t + 3 < m->tiles ? t + 3 : m->tiles;
        event_product(*m, index.data(), value.data(), events, t, end, events_out.data());
        dense_product(*m, counts.data(), t, end, dense_out.data());
    }
    spikelm_matrix_product(m, counts.data(), 1, out.data(), 2);
    for (int64_t o = 0; o < outputs; ++o) {
        require(events_out[o] == expected[o], "event_product", inputs, outputs, bits);
        require(dense_out[o] == expected[o], "dense_product", inputs, outputs, bits);
        require(out[o] == expected[o], "product", inputs, outputs, bits);
    }
    // Rows that fire more and more of it, side by side.
    const int64_t rows = 2 + g() % 20;
    std::vector<int8_t> many(rows * inputs);
    std::vector<int32_t> sums(rows * outputs);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < inputs; ++i)
            many[r * inputs + i] = static_cast<int64_t>(g() % rows) <= r ? counts[i] : 0;
    spikelm_matrix_product(m, many.data(), rows, sums.data(), 2);
    for (int64_t r = 0; r < rows; ++r) {
        expected.assign(outputs, 0);
        for (int64_t i = 0; i < inputs; ++i)
            for (int64_t o = 0; o < outputs; ++o)
                expected[o] += many[r * inputs + i] * weights[i * outputs + o];
        for (int64_t o = 0; o < outputs; ++o)
            require(sums[r * outputs + o] == expected[o], "products", inputs, outputs, bits);
    }
    matrix_free(m);
}

// Every part once, also when two threads ask at the same time.
void share() {
    const auto count = [](void* context, int part, int parts) {
        int* hits = static_cast<int*>(context);
        for (int p = part; p < 4; p += parts) ++hits[p];
    };
    for (int i = 0; i < 3000; ++i) {
        int hits[4] = {};
        parallel(count, hits, 1 + i % 4);
        for (const int hit : hits) require(hit == 1, "parallel");
        if (i % 1000 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));
    }
}

}  // namespace

int main() {
    std::mt19937 g(0);
    int tried = 0;
    for (const Isa each : {SCALAR, AVX2, AVX512, NEON}) {
        if (!set_isa(each)) continue;
        ++tried;
        constexpr int SILENT[] = {0, 33, 67, 90, 100};
        for (int i = 0; i < 60; ++i)
            compare(g, 1 + g() % (i % 6 ? 90 : 1500), 1 + g() % (i % 5 ? 600 : 9000),
                    i % 2 ? 4 : 8, SILENT[g() % 5]);
        compare(g, 4999, 65, 8, 90);
        compare(g, 4999, 129, 4, 90);
    }
    set_threads(4);
    std::thread other(share);
    share();
    other.join();
    std::printf("%d instruction sets and the threads: no complaint\n", tried);
}
