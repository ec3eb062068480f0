// Tiles for weights whose columns are in groups: the sums of a group are multiplied by its scales, then added up.
//
// A part is what is summed before it is scaled: a group, or of floating-point numbers half of a large one. Each product
// waits for the one before it, but parts do not wait for each other. A row gives the same in every tile.
#pragma once

#include <utility>

#include "linear_int4.h"
#include "linear_rows.h"
#include "linear_tiles.h"

namespace furiosa::FURIOSA_VARIANT {
namespace {

// What a tile multiplies: parts [first, first + count) of K, for one block of 32 rows of weights.
struct Parts {
    const uint8_t* weights;  // of the first part
    const Form* form;        // of x: a piece is a part
    const Lines* x;
    int64_t row;  // of x: the first
    int64_t first, count;
    int64_t units;  // of weights, of each part
    int64_t parts_of_a_group;
    const uint8_t* next;  // the weights that come next; they are prefetched, `next_step` bytes further for each unit
    int64_t next_step;
    int64_t first_group;   // that the next two have
    const float* scales;   // [groups][32]
    const float* offsets;  // [groups][32]: what is added for each 1 that a part of x sums up to; or null
    float* sums;           // [rows of x][32]; the first part of K sets them
};

using GroupTile = void (*)(const Parts& parts);

// Sums in registers, by the macros of linear_tiles.h: `rows` of them are lines.
#define FURIOSA_BEGIN(m)                                                       \
    [[maybe_unused]] Sum left##m{}, right##m{};                                \
    if constexpr (Kind::offset != 0 && rows > m) left##m = right##m -= excess[m];
#define FURIOSA_END_LINE(m) \
    if constexpr (planes == 1 && rows > m) add_part<Kind, planes>(p, part, m, column, left##m, right##m);
#define FURIOSA_END_LINES(m, n)                                                                                      \
    if constexpr (planes == 2 && rows > n) {                                                                         \
        add_part<Kind, planes>(p, part, m / 2, column, join(left##m, left##n), join(right##m, right##n));            \
    }

inline Floats as_floats(Floats x) { return x; }
inline Floats as_floats(Bits x) { return __builtin_convertvector(x, Floats); }

// What two lines give together.
inline Floats join(Floats high, Floats low) { return high * 256 + low; }
inline Bits join(Bits high, Bits low) { return (high << 8) + low; }

// What a part of a row sums up to.
template <class Kind, int planes>
float total_of(const Lines& x, int64_t place) {
    if constexpr (Kind::offset == 0) return x.totals[place];
    const int32_t* excess = x.excess + place * planes;
    return static_cast<float>(planes == 2 ? 256 * excess[0] + excess[1] : excess[0]) / Kind::offset;
}

// Adds what two vectors of columns have summed of a part, times its scales.
template <class Kind, int planes, class Sum>
void add_part(const Parts& p, int64_t part, int64_t row, int64_t column, Sum left, Sum right) {
    const int64_t at = (part / p.parts_of_a_group - p.first_group) * block_rows + column;
    const int64_t place = part * p.form->rows + p.row + row;
    float* sums = p.sums + row * block_rows + column;
    Floats first{}, second{}, scale = load<Floats>(p.scales + at), second_scale = load<Floats>(p.scales + at + lanes);
    if (part > 0) first = load<Floats>(sums), second = load<Floats>(sums + lanes);
    [[maybe_unused]] float unit = 1;
    if constexpr (planes == 2) {
        unit = p.x->units[place];
        scale *= unit;
        second_scale *= unit;
    }
    if (p.offsets != nullptr) {
        const float total = unit * total_of<Kind, planes>(*p.x, place);
        first += load<Floats>(p.offsets + at) * total;
        second += load<Floats>(p.offsets + at + lanes) * total;
    }
    store(sums, as_floats(left) * scale + first);
    store(sums + lanes, as_floats(right) * second_scale + second);
}

// One part, of 2 * lanes rows of weights.
template <class Kind, int rows, int planes>
void part_of_columns(const Parts& p, int64_t part, int64_t column) {
    using Sum = typename Kind::Sum;
    constexpr int64_t vector_bytes = lanes * unit_bytes;
    const int64_t number = part - p.first, row_bytes = p.form->line_bytes();
    const uint8_t* weights = p.weights + number * p.units * block_bytes + column * unit_bytes;
    const uint8_t* next = p.next + number * p.units * p.next_step + column * unit_bytes;
    const uint8_t* x = p.x->line(*p.form, part, p.row * planes);
    [[maybe_unused]] const int32_t* excess = p.x->excess + (part * p.form->rows + p.row) * planes;
    const uint8_t *x0 = x, *x3 = x + 3 * row_bytes, *x6 = x + 6 * row_bytes, *x9 = x + 9 * row_bytes;
    FURIOSA_EACH_ROW(FURIOSA_BEGIN)
    for (const uint8_t* end = weights + p.units * block_bytes; weights != end; weights += block_bytes) {
        const Bits left_unit = load<Bits>(weights), right_unit = load<Bits>(weights + vector_bytes);
        __builtin_prefetch(next);
        __builtin_prefetch(next + vector_bytes);
        next += p.next_step;
        FURIOSA_STEP(0) FURIOSA_STEP(1) FURIOSA_STEP(2) FURIOSA_STEP(3)
        FURIOSA_STEP(4) FURIOSA_STEP(5) FURIOSA_STEP(6) FURIOSA_STEP(7)
        x0 += Kind::steps * unit_bytes;
        x3 += Kind::steps * unit_bytes;
        x6 += Kind::steps * unit_bytes;
        x9 += Kind::steps * unit_bytes;
    }
    FURIOSA_EACH_ROW(FURIOSA_END_LINE)
    FURIOSA_END_LINES(0, 1) FURIOSA_END_LINES(2, 3) FURIOSA_END_LINES(4, 5)
    FURIOSA_END_LINES(6, 7) FURIOSA_END_LINES(8, 9) FURIOSA_END_LINES(10, 11)
}

#undef FURIOSA_BEGIN
#undef FURIOSA_END_LINE
#undef FURIOSA_END_LINES

template <class Kind, int rows, int planes>
void group_tile(const Parts& p) {
    for (int64_t part = p.first; part < p.first + p.count; part++) {
        for (int64_t column = 0; column < block_rows; column += 2 * lanes) {
            part_of_columns<Kind, rows, planes>(p, part, column);
        }
    }
}

// How products of one kind are computed: tiles of 1 to `rows` rows of x.
struct GroupMethod {
    int64_t steps;
    int64_t rows;
    const GroupTile* tiles;
    Expand expand;
};

template <class Kind, int planes, int... rows>
const GroupMethod& group_method_of(std::integer_sequence<int, rows...>) {
    static const GroupTile tiles[] = {group_tile<Kind, (rows + 1) * planes, planes>...};
    static const GroupMethod method = {Kind::steps, sizeof...(rows), tiles, Kind::steps > 1 ? expand<Kind> : nullptr};
    return method;
}

// The method of a kind that computes at most `lines` lines at a time.
template <class Kind, int lines, int planes = 1>
const GroupMethod& group_method_of() {
    return group_method_of<Kind, planes>(std::make_integer_sequence<int, lines / planes>());
}

}  // namespace
}  // namespace furiosa::FURIOSA_VARIANT
