// Integer matrices whose rows are read only where a neuron fired: int8 or int4 weights times int8
// spike counts, exact in int32.
//
// Layout. Weights are unsigned (w + 128, or w + 8 with two in a byte) and input-major in panels of
// at most 4096 bytes: [panel][input][bytes], the last panel as narrow as 64-byte blocks allow. The
// bytes an active input reads lie together, as many as a page has. Threads own tiles, which are
// outputs side by side in a panel, so nothing is summed between threads. In a block of 64 bytes the
// weights are in the order in which interleaving the bytes of four rows, 128 bits at a time, sorts
// them again; an int4 block holds outputs 0..63 in the low and 64..127 in the high halves of bytes.
#pragma once

#include <cstdint>

struct Matrix {
    std::int64_t inputs, outputs;
    int bits;
    std::int64_t tile, tiles;  // outputs per tile (the last may have fewer), number of tiles
    std::uint8_t* data;
    std::int64_t bytes;  // inputs times the bytes of a row
};

// The sums would overflow int32 beyond it: 127 * 128 * 2^17 > 2^31 > 127 * 128 * MAX_INPUTS.
constexpr std::int64_t MAX_INPUTS = 132104;

// Instruction sets in rising order; `isa` is the one in use, the best of the machine's unless
// SPIKELM_ISA (scalar, avx2, avx512, neon) names another, and UNKNOWN if that cannot run here.
enum Isa { UNKNOWN = -1, SCALAR, AVX2, AVX512, NEON };
Isa isa();
bool set_isa(Isa wanted);  // false, and nothing changes, if the machine lacks it

// weights [inputs, outputs] row-major; 4-bit ones are -8..7. Null for sizes or bits out of range,
// if memory is short, and if SPIKELM_ISA cannot run here.
Matrix* matrix_new(std::int64_t inputs, std::int64_t outputs, int bits, const std::int8_t* weights);
void matrix_free(Matrix* matrix);

// The weights as they were given to matrix_new: outputs of tiles [tile_begin, tile_end).
void matrix_unpack(const Matrix& matrix, std::int64_t tile_begin, std::int64_t tile_end,
                   std::int8_t* weights);

// The active of n inputs and their counts, padded to a multiple of 4 with counts of 0 (the arrays
// have room for n + 4). Returns how many fired.
std::int64_t list_events(const std::int8_t* counts, std::int64_t n, std::int32_t* index,
                         std::int8_t* value);

// out [outputs] int32 = counts x weights for the outputs of tiles [tile_begin, tile_end), counts
// in -127..127. The event form reads the rows in the list, the dense form all of them in order;
// `product` takes the one that is faster for so many events: the dense one if it `reads_all`.
bool reads_all(const Matrix& matrix, std::int64_t events);
void event_product(const Matrix& matrix, const std::int32_t* index, const std::int8_t* value,
                   std::int64_t events, std::int64_t tile_begin, std::int64_t tile_end,
                   std::int32_t* out);
void dense_product(const Matrix& matrix, const std::int8_t* counts, std::int64_t tile_begin,
                   std::int64_t tile_end, std::int32_t* out);
void product(const Matrix& matrix, const std::int8_t* counts, const std::int32_t* index,
             const std::int8_t* value, std::int64_t events, std::int64_t tile_begin,
             std::int64_t tile_end, std::int32_t* out);

// Rows that are multiplied together list the events of every SPAN inputs apart.
constexpr std::int64_t SPAN = 512;

// Of n inputs: how many stretches they are, and what the lists need room for.
inline std::int64_t num_spans(std::int64_t n) { return (n + SPAN - 1) / SPAN; }
inline std::int64_t list_room(std::int64_t n) { return n + 4 * num_spans(n); }

// As `list_events`, the inputs counted from the start of their stretch; each stretch is padded on
// its own to `quads` times four.
std::int64_t list_spans(const std::int8_t* counts, std::int64_t n, std::int32_t* index,
                        std::int8_t* value, std::int32_t* quads);

// A row of counts, the list of its events, and where its sums go.
struct Sent {
    const std::int8_t* counts;
    const std::int32_t* index;
    const std::int8_t* value;
    const std::int32_t* quads;  // null: of `list_events`
    std::int64_t events;
    std::int32_t* out;
};

// Up to so many rows are best listed by `list_events`, more by `list_spans`.
constexpr std::int64_t FEW_ROWS = 7;

// `product` for several rows, which are listed alike. With `list_events`, what one row reads is
// still in the second cache for the others. With `list_spans`, all rows pass over a tile of SPAN
// inputs before the next is read, and every weight is. A row's sums do not depend on the others.
void products(const Matrix& matrix, const Sent* rows, std::int64_t num_rows,
              std::int64_t tile_begin, std::int64_t tile_end);
