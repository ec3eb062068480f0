// Tiles for weights whose columns are in groups: the sums of a group are multiplied by its scales, then added up.
//
// A part is a group, or half of a large one: what is summed before it is scaled. Each product waits for the one before
// it, but parts do not wait for each other. A row gives the same in every tile.
#pragma once

#include <utility>

#include "linear_int4.h"
#include "linear_tiles.h"

namespace furiosa::FURIOSA_VARIANT {
namespace {

// What a tile multiplies: parts [first, first + count) of K, for one block of 32 rows of weights.
struct Parts {
    const uint8_t* weights;  // of the first part
    const uint8_t* x;
    int64_t row_bytes;        // from one row of x to the next
    int64_t first, count;
    int64_t units;            // of weights, of each part
    int64_t parts_of_a_group;
    const float* scales;      // [groups][32]
    const float* offsets;     // [groups][32]: what is added for each 1 in the sum of a group of x; or null
    const float* x_sums;      // [rows of x][groups]
    int64_t groups;
    float* sums;              // [rows of x][32]; the first part of K sets them
};

using GroupTile = void (*)(const Parts& parts);

// Sums in registers, by the macros of linear_tiles.h.
#define FURIOSA_NAME(m) [[maybe_unused]] Sum left##m{}, right##m{};
#define FURIOSA_END(m) \
    if constexpr (rows > m) scale_sums(p, part, m, column, left##m, right##m);

inline Floats as_floats(Floats x) { return x; }
inline Floats as_floats(Bits x) { return __builtin_convertvector(x, Floats); }

// Adds what two vectors of columns have summed of a part, times its scales.
template <class Sum>
void scale_sums(const Parts& p, int64_t part, int64_t row, int64_t column, Sum left, Sum right) {
    const int64_t group = part / p.parts_of_a_group, at = group * block_rows + column;
    float* sums = p.sums + row * block_rows + column;
    Floats first{}, second{};
    if (part > 0) first = load<Floats>(sums), second = load<Floats>(sums + lanes);
    if (p.offsets != nullptr && part % p.parts_of_a_group == 0) {
        const float of_x = p.x_sums[row * p.groups + group];
        first = load<Floats>(p.offsets + at) * of_x + first;
        second = load<Floats>(p.offsets + at + lanes) * of_x + second;
    }
    store(sums, as_floats(left) * load<Floats>(p.scales + at) + first);
    store(sums + lanes, as_floats(right) * load<Floats>(p.scales + at + lanes) + second);
}

// One part, of 2 * lanes rows of weights.
template <class Kind, int rows>
void part_of_columns(const Parts& p, int64_t part, int64_t column) {
    using Sum = typename Kind::Sum;
    constexpr int64_t vector_bytes = lanes * unit_bytes, ahead = 4096;
    const int64_t row_bytes = p.row_bytes, number = part - p.first;
    const uint8_t* weights = p.weights + number * p.units * block_bytes + column * unit_bytes;
    const uint8_t* x = p.x + number * p.units * Kind::steps * unit_bytes;
    const uint8_t *x0 = x, *x3 = x + 3 * row_bytes, *x6 = x + 6 * row_bytes, *x9 = x + 9 * row_bytes;
    FURIOSA_EACH_ROW(FURIOSA_NAME)
    for (const uint8_t* end = weights + p.units * block_bytes; weights != end; weights += block_bytes) {
        const Bits left_unit = load<Bits>(weights), right_unit = load<Bits>(weights + vector_bytes);
        __builtin_prefetch(weights + ahead);
        __builtin_prefetch(weights + ahead + vector_bytes);
        FURIOSA_STEP(0) FURIOSA_STEP(1) FURIOSA_STEP(2) FURIOSA_STEP(3)
        FURIOSA_STEP(4) FURIOSA_STEP(5) FURIOSA_STEP(6) FURIOSA_STEP(7)
        x0 += Kind::steps * unit_bytes;
        x3 += Kind::steps * unit_bytes;
        x6 += Kind::steps * unit_bytes;
        x9 += Kind::steps * unit_bytes;
    }
    FURIOSA_EACH_ROW(FURIOSA_END)
}

#undef FURIOSA_NAME
#undef FURIOSA_END

template <class Kind, int rows>
void group_tile(const Parts& p) {
    for (int64_t part = p.first; part < p.first + p.count; part++) {
        for (int64_t column = 0; column < block_rows; column += 2 * lanes) part_of_columns<Kind, rows>(p, part, column);
    }
}

// How products of one kind are computed: tiles of 1 to `rows` rows.
struct GroupMethod {
    int64_t steps;
    int64_t rows;
    float zero;  // what numbers are too large by
    const GroupTile* tiles;
    Expand expand;
};

template <class Kind, int... rows>
const GroupMethod& group_method_of(std::integer_sequence<int, rows...>) {
    static const GroupTile tiles[] = {group_tile<Kind, rows + 1>...};
    static const GroupMethod method = {Kind::steps, sizeof...(rows), Kind::zero, tiles,
                                       Kind::steps > 1 ? expand<Kind> : nullptr};
    return method;
}

template <class Kind, int rows>
const GroupMethod& group_method_of() {
    return group_method_of<Kind>(std::make_integer_sequence<int, rows>());
}

}  // namespace
}  // namespace furiosa::FURIOSA_VARIANT
