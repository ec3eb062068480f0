// Packed weights, as packing.py lays them out: [N/32][K/P][32][P], where a group of P numbers has 4 bytes.
#pragma once

#include "numbers.h"

namespace furiosa::FURIOSA_VARIANT {

constexpr int64_t rows_of_a_block = 32;
constexpr int64_t bytes_of_a_group = 4;

// Whether a weight is packed; else it is [N, K].
inline bool is_packed(const Tensor& weight) { return weight.rank > 2; }

inline int64_t packed_row_bytes(const Tensor& packed) { return packed.shape[1] * bytes_of_a_group; }

// Row `row` of a packed weight: all of its numbers, those that fill its last group included.
inline void copy_packed_row(const Tensor& packed, int64_t row, void* to) {
    const int64_t groups = packed.shape[1];
    const uint32_t* from = packed.as<uint32_t>() + row / rows_of_a_block * groups * rows_of_a_block + row % rows_of_a_block;
    uint32_t* target = static_cast<uint32_t*>(to);
    for (int64_t i = 0; i < groups; i++) target[i] = from[i * rows_of_a_block];
}

}  // namespace furiosa::FURIOSA_VARIANT
