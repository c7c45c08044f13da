// Integer matrices of which only the outputs that somebody wants are computed: output-major int8 or
// int4 weights times int8 spike counts, exact in int32.
//
// An output's weights lie together, unsigned (w + 128, or w + 8 with two in a byte), in blocks of 64
// bytes; an int4 block holds inputs 0..63 in the low and 64..127 in the high halves of its bytes.
#pragma once

#include <cstdint>

struct Outputs {
    std::int64_t inputs, outputs;
    int bits;
    std::int64_t stride;  // bytes of an output
    std::uint8_t* data;
    std::int64_t bytes;
};

// Counts are read beyond the inputs, up to a whole block: so many more must be there, and be 0.
constexpr std::int64_t OUTPUTS_PADDING = 128;

// weights [inputs, outputs] row-major; 4-bit ones are -8..7. Null for sizes or bits out of range and
// if memory is short.
Outputs* outputs_new(std::int64_t inputs, std::int64_t outputs, int bits,
                     const std::int8_t* weights);
void outputs_free(Outputs* matrix);

// The weights as they were given to outputs_new: all inputs of outputs [begin, end).
void outputs_unpack(const Outputs& matrix, std::int64_t begin, std::int64_t end,
                    std::int8_t* weights);

// out[wanted[i]] = counts x weights for the n outputs wanted; total is the sum of the counts.
void outputs_product(const Outputs& matrix, const std::int8_t* counts, std::int32_t total,
                     const std::int32_t* wanted, std::int64_t n, std::int32_t* out);
