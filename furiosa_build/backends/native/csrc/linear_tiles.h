// Tiles: products of a few rows of x with a block of 32 rows of weights, with all sums in registers.
#pragma once

#include <utility>

#include "linear_kinds.h"

namespace furiosa::FURIOSA_VARIANT {
namespace {

constexpr int64_t block_rows = 32;
constexpr int64_t unit_bytes = 4;
constexpr int64_t block_bytes = block_rows * unit_bytes;  // of one unit of K

// Adds the products of `units` units of K to sums [rows of x][32], or, where `begin`, sets the sums to them.
//   row_bytes: from one row of x to the next
//   next: the weights that come next; they are prefetched, `next_step` bytes further for each unit
using Tile = void (*)(const uint8_t* weights, const uint8_t* x, int64_t row_bytes, int64_t units, const uint8_t* next,
                      int64_t next_step, bool begin, void* sums);

// Weights as the steps of a kind take them, to a panel: what tiles of a kind with one step read.
using Expand = void (*)(const uint8_t* weights, int64_t units, uint8_t* panel);

// The compiler (GCC 12) keeps sums in registers only if each has a name: left0, right0, left1 ...
#define FURIOSA_EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define FURIOSA_BEGIN(m)                                              \
    [[maybe_unused]] Sum left##m{}, right##m{};                       \
    if constexpr (rows > m) {                                         \
        if (!begin) {                                                 \
            left##m = load<Sum>(sums + m * block_rows);                \
            right##m = load<Sum>(sums + m * block_rows + lanes);       \
        }                                                             \
    }
#define FURIOSA_ADD(m)                                                                                          \
    if constexpr (rows > m) {                                                                                   \
        const uint8_t* row = (m < 3 ? x0 : m < 6 ? x3 : m < 9 ? x6 : x9) + m % 3 * row_bytes + step * unit_bytes; \
        const Bits four = repeat(row);                                                         \
        left##m = Kind::add(left##m, left, four);                                                               \
        right##m = Kind::add(right##m, right, four);                                                            \
    }
#define FURIOSA_STEP(s)                                                            \
    if constexpr (Kind::steps > s) {                                               \
        constexpr int step = s;                                                    \
        const Bits left = Kind::template weights<step>(left_unit);                 \
        const Bits right = Kind::template weights<step>(right_unit);               \
        FURIOSA_EACH_ROW(FURIOSA_ADD)                                              \
    }
#define FURIOSA_END(m)                                       \
    if constexpr (rows > m) {                                \
        store(sums + m * block_rows, left##m);               \
        store(sums + m * block_rows + lanes, right##m);      \
    }

// Of 2 * lanes rows of weights.
template <class Kind, int rows>
void tile_of_columns(const uint8_t* weights, const uint8_t* x, int64_t row_bytes, int64_t units,
                     const uint8_t* next, int64_t next_step, bool begin, typename Kind::Number* sums) {
    using Sum = typename Kind::Sum;
    const uint8_t *x0 = x, *x3 = x + 3 * row_bytes, *x6 = x + 6 * row_bytes, *x9 = x + 9 * row_bytes;
    FURIOSA_EACH_ROW(FURIOSA_BEGIN)
    for (const uint8_t* end = weights + units * block_bytes; weights != end; weights += block_bytes) {
        const Bits left_unit = load<Bits>(weights), right_unit = load<Bits>(weights + lanes * unit_bytes);
        __builtin_prefetch(next);
        __builtin_prefetch(next + lanes * unit_bytes);
        next += next_step;
        FURIOSA_STEP(0) FURIOSA_STEP(1) FURIOSA_STEP(2) FURIOSA_STEP(3)
        x0 += Kind::steps * unit_bytes;
        x3 += Kind::steps * unit_bytes;
        x6 += Kind::steps * unit_bytes;
        x9 += Kind::steps * unit_bytes;
    }
    FURIOSA_EACH_ROW(FURIOSA_END)
}

#undef FURIOSA_BEGIN
#undef FURIOSA_END

// Where a block is wider than two vectors, its parts go together through pieces of K that the cache holds.
template <class Kind, int rows>
void tile(const uint8_t* weights, const uint8_t* x, int64_t row_bytes, int64_t units, const uint8_t* next,
          int64_t next_step, bool begin, void* sums) {
    constexpr int64_t columns = 2 * lanes;
    const int64_t piece = columns == block_rows ? units : 64;
    for (int64_t first = 0; first < units; first += piece) {
        const int64_t count = units - first < piece ? units - first : piece;
        for (int64_t column = 0; column < block_rows; column += columns) {
            tile_of_columns<Kind, rows>(weights + first * block_bytes + column * unit_bytes,
                                        x + first * Kind::steps * unit_bytes, row_bytes, count,
                                        next + first * next_step + column * unit_bytes, next_step, begin && first == 0, static_cast<typename Kind::Number*>(sums) + column);
        }
    }
}

template <class Kind, int... steps>
void expand_unit(Bits unit, uint8_t* to, std::integer_sequence<int, steps...>) {
    (store(to + steps * block_bytes, Kind::template weights<steps>(unit)), ...);
}

template <class Kind>
void expand(const uint8_t* weights, int64_t units, uint8_t* panel) {
    for (const uint8_t* end = weights + units * block_bytes; weights != end; weights += block_bytes) {
        for (int64_t i = 0; i < block_bytes; i += lanes * unit_bytes) {
            expand_unit<Kind>(load<Bits>(weights + i), panel + i, std::make_integer_sequence<int, Kind::steps>());
        }
        panel += Kind::steps * block_bytes;
    }
}

// How products of one kind are computed: tiles of 1 to `rows` rows.
struct Method {
    int64_t steps;
    int64_t rows;
    const Tile* tiles;
    Expand expand;
};

template <class Kind, int... rows>
const Method& method_of(std::integer_sequence<int, rows...>) {
    static const Tile tiles[] = {tile<Kind, rows + 1>...};
    static const Method method = {Kind::steps, sizeof...(rows), tiles, Kind::steps > 1 ? expand<Kind> : nullptr};
    return method;
}

// The method of a kind that computes at most `rows` rows at a time.
template <class Kind, int rows>
const Method& method_of() {
    return method_of<Kind>(std::make_integer_sequence<int, rows>());
}

}  // namespace
}  // namespace furiosa::FURIOSA_VARIANT
