// Rows of x as tiles take them, laid out once for all jobs of a call.
//
// A row of bfloat16 becomes two lines of int8 where it meets weights of integers: unit * (256 * high + low), with one
// unit, a power of two, for the numbers of each piece of K. Those down to a 128th of the largest are kept exactly.
#pragma once

#include <algorithm>

#include "linear_jobs.h"
#include "linear_kinds.h"
#include "numbers.h"

namespace furiosa::FURIOSA_VARIANT {
namespace {

constexpr int64_t gap = 64;  // bytes between lines: at powers of two they would share lines of the cache

// How x lies: by pieces of K, the last filled up with zeros; in each, all lines one behind the other.
struct Form {
    DType dtype;     // of the numbers
    int64_t planes;  // lines of a row: 1 or 2
    int64_t rows;    // of x
    int64_t k;       // numbers of a row, before it is filled up
    int64_t piece;   // numbers
    int64_t last;    // of the last piece

    int64_t lines() const { return planes * rows; }
    int64_t pieces() const { return quotient_up(k, piece); }
    int64_t line_bytes() const { return piece * size_of(dtype) + gap; }
    int64_t numbers_of(int64_t number) const { return number + 1 < pieces() ? piece : last; }
    bool operator==(const Form& other) const {
        return dtype == other.dtype && planes == other.planes && piece == other.piece && last == other.last;
    }
};

// Rows in their form.
struct Lines {
    uint8_t* numbers;  // [pieces][lines][line_bytes]
    float* units;      // [pieces][rows]: of rows that are two lines
    int32_t* sums;     // [pieces][lines]: what their lines sum up to

    Lines(const Form& form, Memory& memory)
        : numbers(memory.take<uint8_t>(form.pieces() * form.lines() * form.line_bytes())),
          units(memory.take<float>(form.planes == 1 ? 0 : form.pieces() * form.rows)),
          sums(memory.take<int32_t>(form.planes == 1 ? 0 : form.pieces() * form.lines())) {}

    uint8_t* line(const Form& form, int64_t piece, int64_t line) const {
        return numbers + (piece * form.lines() + line) * form.line_bytes();
    }
};

inline int64_t bytes_of(const Form& form) {
    Memory counted;
    const Lines lines(form, counted);
    return static_cast<int64_t>(counted.used());
}

// What a number of the largest magnitude is at most 2^15 times: a power of two, or NaN.
inline float unit_of(const float* numbers, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; i++) largest = std::max(largest, bits_of<uint32_t>(numbers[i]) & 0x7fffffff);
    const uint32_t exponent = largest >> 23;
    if (exponent == 255) return bits_of<float>(0x7fc00000u);
    return bits_of<float>((std::max<uint32_t>(exponent, 15) - 14) << 23);
}

// Numbers as two planes; the unit.
inline float split(const float* numbers, int64_t count, int8_t* high, int8_t* low) {
    constexpr int32_t most = 127 * 256 + 127;
    const float unit = unit_of(numbers, count), factor = 1 / unit;
    if (unit != unit) {
        std::fill_n(high, count, 0);
        std::fill_n(low, count, 0);
        return unit;
    }
    for (int64_t i = 0; i < count; i++) {
        const int32_t value = std::min(static_cast<int32_t>(__builtin_rintf(numbers[i] * factor)), most);
        const int32_t upper = (value + 128) >> 8;
        high[i] = static_cast<int8_t>(upper);
        low[i] = static_cast<int8_t>(value - upper * 256);
    }
    return unit;
}

// Lays out a piece of a row of x.
inline void lay_out(const Tensor& x, const Form& form, const Lines& lines, int64_t piece, int64_t row, Scratch& scratch) {
    const int64_t begin = piece * form.piece, size = size_of(form.dtype);
    const int64_t padded = form.numbers_of(piece), count = at_most(padded, form.k - begin);
    const char* from = address(x, row * x.stride[0] + begin);
    if (form.planes == 2) {
        float* numbers = static_cast<float*>(scratch.get(padded * sizeof(float)));
        load_floats(x.dtype, from, 1, count, numbers);
        std::fill(numbers + count, numbers + padded, 0.0f);
        int8_t* planes[2];
        for (int64_t i = 0; i < 2; i++) planes[i] = reinterpret_cast<int8_t*>(lines.line(form, piece, 2 * row + i));
        lines.units[piece * form.rows + row] = split(numbers, padded, planes[0], planes[1]);
        for (int64_t i = 0; i < 2; i++) lines.sums[piece * form.lines() + 2 * row + i] = sum_of(planes[i], padded);
        return;
    }
    uint8_t* to = lines.line(form, piece, row);
    if (form.dtype == x.dtype) {
        std::memcpy(to, from, count * size);
    } else if (x.dtype == DType::i8) {
        for (int64_t i = 0; i < count; i++) reinterpret_cast<float*>(to)[i] = reinterpret_cast<const int8_t*>(from)[i];
    } else {
        load_floats(x.dtype, from, 1, count, reinterpret_cast<float*>(to));
    }
    std::memset(to + count * size, 0, (padded - count) * size);
}

}  // namespace
}  // namespace furiosa::FURIOSA_VARIANT
