// How a KV cache lies in memory: so that attention multiplies with it as it is.
//
// A cache [slots, heads, size] is cut into groups of 16 slots, and a head's rows of a group lie together, in words of
// four bytes. A word of keys has neighbouring numbers of one slot, and those of the 16 slots lie side by side: [words]
// [16 slots]. A word of values has the numbers of neighbouring slots: [16 slots / numbers of a word][size].
//
// In a cache of 8-bit codes, of signs and magnitudes of 7 bits, a row [size + 4] has a float32 scale behind its codes: a
// number is the scale times what its code stands for. The scales of a group's 16 slots lie behind its words.
#pragma once

#include "kernels.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

using Word = uint32_t;

// What codes stand for: whole numbers, or those of float8_e4m3fn.
constexpr DType int8_codes = DType::i8, fp8_codes = DType::u8;

constexpr bool has_codes(DType dtype) { return dtype == int8_codes || dtype == fp8_codes; }

inline int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : has_codes(dtype) ? 1 : 2; }

constexpr int64_t group_slots = 16;

enum class Part { keys, values };

// Where a row is within its group: `count` pieces of `bytes` each, in order, from byte `first` on.
struct Pieces {
    int64_t first, stride, bytes, count;
};

struct Cache {
    char* data;
    DType dtype;
    Part part;
    int64_t heads, size;

    Cache(const Tensor& cache, Part which)
        : data(cache.as<char>()),
          dtype(cache.dtype),
          part(which),
          heads(cache.shape[1]),
          size(cache.shape[2] - (has_codes(cache.dtype) ? 4 : 0)) {}

    int64_t bytes() const { return bytes_of(dtype); }  // of a number
    int64_t numbers() const { return 4 / bytes(); }    // of a word
    // A group of a head is a matrix of words.
    int64_t rows() const { return part == Part::keys ? size / numbers() : group_slots / numbers(); }
    int64_t columns() const { return part == Part::keys ? group_slots : size; }
    int64_t words_bytes() const { return group_slots * size * bytes(); }
    int64_t group_bytes() const { return words_bytes() + (has_codes(dtype) ? group_slots * 4 : 0); }

    // The group that a slot is in.
    char* group(int64_t head, int64_t slot) const {
        return data + (slot / group_slots * heads + head) * group_bytes();
    }
    Pieces pieces(int64_t slot) const {
        const int64_t at = slot % group_slots;
        if (part == Part::keys) return {at * 4, group_slots * 4, 4, rows()};
        return {at / numbers() * size * 4 + at % numbers() * bytes(), 4, bytes(), size};
    }
    // Where the scale of a slot is in its group.
    int64_t scale(int64_t slot) const { return words_bytes() + slot % group_slots * 4; }
};

}  // namespace

}  // namespace furiosa::FURIOSA_VARIANT
