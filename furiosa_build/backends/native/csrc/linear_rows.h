// Rows of x as tiles take them, laid out once for all jobs of a call: lines.
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

constexpr int64_t gap = 64;  // bytes between long lines: at powers of two they would share lines of the cache
constexpr int64_t bytes_of_a_long_line = 512;
constexpr int64_t numbers_of_a_job = 2048;  // at least, of a row
constexpr int64_t rows_of_a_job = 4;  // they lie together in every piece; of many, x or lines would share lines of the cache

// How x lies: by pieces of K, the last filled up with zeros; in each, all lines one behind the other.
struct Form {
    DType dtype;     // of the numbers
    int64_t planes;  // lines of a row: 1 or 2
    int64_t rows;    // of x
    int64_t k;       // numbers of a row, before it is filled up
    int64_t piece;   // numbers
    int64_t last;    // of the last piece
    int32_t offset;  // what weights of integers are too large by
    bool adds_up;    // what lines of float32 sum up to is needed

    int64_t lines() const { return planes * rows; }
    int64_t pieces() const { return quotient_up(k, piece); }
    int64_t line_bytes() const {
        const int64_t bytes = piece * size_of(dtype);
        return bytes < bytes_of_a_long_line ? bytes : bytes + gap;
    }
    int64_t numbers_of(int64_t number) const { return number + 1 < pieces() ? piece : last; }
    bool operator==(const Form& other) const {
        return dtype == other.dtype && planes == other.planes && piece == other.piece && last == other.last &&
               offset == other.offset && adds_up == other.adds_up;
    }
};

// Rows in their form.
struct Lines {
    uint8_t* numbers;  // [pieces][lines][line_bytes]
    float* units;      // [pieces][rows]: of rows that are two lines
    int32_t* excess;   // [pieces][lines]: what products of a line are too large by
    float* totals;     // [pieces][lines]: what lines of float32 sum up to

    Lines(const Form& form, Memory& memory)
        : numbers(memory.take<uint8_t>(form.pieces() * form.lines() * form.line_bytes())),
          units(memory.take<float>(form.planes == 1 ? 0 : form.pieces() * form.rows)),
          excess(memory.take<int32_t>(form.offset != 0 ? form.pieces() * form.lines() : 0)),
          totals(memory.take<float>(form.adds_up ? form.pieces() * form.lines() : 0)) {}

    uint8_t* line(const Form& form, int64_t piece, int64_t line) const {
        return numbers + (piece * form.lines() + line) * form.line_bytes();
    }
};

inline int64_t bytes_of(const Form& form) {
    Memory counted;
    const Lines lines(form, counted);
    return static_cast<int64_t>(counted.used());
}

// The power of two of which every number of a magnitude up to `largest` is at most 2^15 times; NaN, where one is none.
inline float unit_of(uint32_t largest) {
    const uint32_t exponent = largest >> 23;
    return bits_of<float>(exponent == 255 ? 0x7fc00000u : (std::max<uint32_t>(exponent, 15) - 14) << 23);
}

template <class Vector, class Combine>
auto over_lanes(Vector vector, Combine combine) {
    auto result = vector[0];
#pragma GCC unroll 16
    for (int64_t lane = 1; lane < lanes; lane++) result = combine(result, vector[lane]);
    return result;
}

// Numbers as unit * (256 * high + low).
struct Split {
    float unit;
    int32_t high_sum, low_sum;
};

// `count` numbers of bfloat16: a multiple of `lanes`.
inline Split split(const uint8_t* numbers, int64_t count, uint8_t* high, uint8_t* low) {
    constexpr int32_t most = 127 * 256 + 127, least = -127 * 256 - 128;
    constexpr float to_int = 0x1.8p23f;  // a float of this size has its integer in the low bits, rounded
    const auto load_numbers = [&](int64_t i) { return from_bf16(load<Halves>(numbers + 2 * i)); };
    UnsignedBits largest{};
    for (int64_t i = 0; i < count; i += lanes) {
        const UnsignedBits magnitude = (UnsignedBits)load_numbers(i) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    const float unit = unit_of(over_lanes(largest, [](uint32_t x, uint32_t y) { return std::max(x, y); }));
    const float factor = unit == unit ? 1 / unit : 0;
    Bits high_sums{}, low_sums{};
    for (int64_t i = 0; i < count; i += lanes) {
        Bits value = (Bits)(load_numbers(i) * factor + to_int) - bits_of<int32_t>(to_int);
        value = value < most ? value : Bits{} + most;
        value = value > least ? value : Bits{} + least;  // of NaN, too
        const Bits upper = (value + 128) >> 8, lower = value - (upper << 8);
        high_sums += upper;
        low_sums += lower;
        store(high + i, low_bytes(upper));
        store(low + i, low_bytes(lower));
    }
    const auto sum = [](int32_t x, int32_t y) { return x + y; };
    return {unit, over_lanes(high_sums, sum), over_lanes(low_sums, sum)};
}

// A piece of a row as two lines.
inline void lay_out_planes(const char* from, int64_t count, const Form& form, const Lines& lines, int64_t piece,
                           int64_t row, Scratch& scratch) {
    const int64_t padded = quotient_up(count, lanes) * lanes, place = piece * form.lines() + 2 * row;
    const uint8_t* numbers = reinterpret_cast<const uint8_t*>(from);
    if (padded != count) {
        uint8_t* const copy = static_cast<uint8_t*>(scratch.get(padded * 2));
        std::memcpy(copy, from, count * 2);
        std::memset(copy + count * 2, 0, (padded - count) * 2);
        numbers = copy;
    }
    const Split found = split(numbers, padded, lines.line(form, piece, 2 * row), lines.line(form, piece, 2 * row + 1));
    lines.units[piece * form.rows + row] = found.unit;
    lines.excess[place] = form.offset * found.high_sum;
    lines.excess[place + 1] = form.offset * found.low_sum;
}

// In 16 lanes first, whatever the width of vectors.
inline float sum_of(const float* numbers, int64_t count) {
    constexpr int64_t width = 16;
    float sums[width] = {};
    for (int64_t i = 0; i < count; i++) sums[i % width] += numbers[i];
    for (int64_t half = width / 2; half >= 1; half /= 2) {
        for (int64_t i = 0; i < half; i++) sums[i] += sums[i + half];
    }
    return sums[0];
}

// Lays out a piece of a row of x.
inline void lay_out(const Tensor& x, const Form& form, const Lines& lines, int64_t piece, int64_t row, Scratch& scratch) {
    const int64_t begin = piece * form.piece, size = size_of(form.dtype), place = piece * form.lines() + row;
    const int64_t padded = form.numbers_of(piece), count = at_most(padded, form.k - begin);
    const char* from = address(x, row * x.stride[0] + begin);
    if (form.planes == 2) return lay_out_planes(from, count, form, lines, piece, row, scratch);
    uint8_t* const to = lines.line(form, piece, row);
    float* const floats = reinterpret_cast<float*>(to);
    if (form.dtype == x.dtype) {
        std::memcpy(to, from, count * size);
    } else if (x.dtype == DType::i8) {
        for (int64_t i = 0; i < count; i++) floats[i] = reinterpret_cast<const int8_t*>(from)[i];
    } else {
        load_floats(x.dtype, from, 1, count, floats);
    }
    std::memset(to + count * size, 0, (padded - count) * size);
    if (form.offset != 0) lines.excess[place] = form.offset * sum_of(reinterpret_cast<const int8_t*>(to), padded);
    if (form.adds_up) lines.totals[place] = sum_of(floats, padded);
}

// What the products of a call share: the rows of x, in each form that one of them takes. A product has `x`, says whether
// it takes a form of it (has_form) and which (form).
template <class Product>
struct Shared {
    // Where product `index` finds its lines.
    struct Place {
        int64_t offset = 0;
        bool is_first = true;  // of those that take one form

        Place(const Call& call, int64_t index) {
            const Form form = Product(call, index).form();
            for (int64_t i = 0; i < index && is_first; i++) {
                const Product other(call, i);
                if (!other.has_form) continue;
                is_first = !(other.form() == form);
                if (is_first) offset += bytes_of(other.form());
            }
        }
        Lines lines(const Call& call, const Form& form) const {
            Memory memory(static_cast<char*>(call.shared) + offset);
            return Lines(form, memory);
        }
    };

    static size_t count_bytes(const Call& call) {
        int64_t bytes = 0;
        for (int64_t i = 0; i < call.num_ints; i++) {
            const Product product(call, i);
            if (product.has_form) bytes = std::max(bytes, Place(call, i).offset + bytes_of(product.form()));
        }
        return static_cast<size_t>(bytes);
    }

    static int64_t pieces_of_a_job(const Form& form) { return quotient_up(numbers_of_a_job, form.piece); }
    static int64_t jobs_of_a_row(const Form& form) { return quotient_up(form.pieces(), pieces_of_a_job(form)); }
    static int64_t jobs_of(const Form& form) { return quotient_up(form.rows, rows_of_a_job) * jobs_of_a_row(form); }

    static int64_t count_jobs(const Call& call) {
        int64_t jobs = 0;
        for (int64_t i = 0; i < call.num_ints; i++) {
            const Product product(call, i);
            if (product.has_form && Place(call, i).is_first) jobs += jobs_of(product.form());
        }
        return jobs;
    }

    static void run_job(const Tensor& x, const Form& form, const Lines& lines, int64_t number, Scratch& scratch) {
        const int64_t row = number / jobs_of_a_row(form) * rows_of_a_job, end_row = at_most(form.rows, row + rows_of_a_job);
        const int64_t piece = number % jobs_of_a_row(form) * pieces_of_a_job(form);
        const int64_t end_piece = at_most(form.pieces(), piece + pieces_of_a_job(form));
        for (int64_t p = piece; p < end_piece; p++) {
            for (int64_t r = row; r < end_row; r++) lay_out(x, form, lines, p, r, scratch);
        }
    }

    static void run_jobs(const Call& call, int64_t begin, int64_t end, Scratch& scratch) {
        for (int64_t i = 0; i < call.num_ints && begin < end; i++) {
            const Product product(call, i);
            const Place place(call, i);
            if (!product.has_form || !place.is_first) continue;
            const Form form = product.form();
            const Lines lines = place.lines(call, form);
            const int64_t jobs = jobs_of(form);
            for (; begin < at_most(end, jobs); begin++) run_job(*product.x, form, lines, begin, scratch);
            begin -= jobs;
            end -= jobs;
        }
    }

    static constexpr Kernel kernel = {count_jobs, run_jobs};
};

}  // namespace
}  // namespace furiosa::FURIOSA_VARIANT
