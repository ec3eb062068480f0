// Operators that go through their tensors by rows of the last dimension: a job is some rows.
#pragma once

#include "numbers.h"
#include "space.h"

namespace furiosa::FURIOSA_VARIANT {

// How many rows of `size` numbers a job has: a function of shapes alone.
inline int64_t rows_of_a_job(int64_t size) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, size)); }

inline int64_t jobs_of_rows(int64_t rows, int64_t size) { return divide_up(rows, rows_of_a_job(size)); }

// All dimensions of a tensor but its last `count`; of one that is not given, no place in rows of `like`.
inline Tensor head(const Tensor& tensor, int64_t count, const Tensor& like) {
    Tensor part = tensor.given() ? tensor : like;
    part.rank -= count;
    if (!tensor.given()) {
        part.dtype = DType::none;
        std::fill_n(part.stride, max_rank, 0);
    }
    return part;
}

// Calls use(rows) with the row of each tensor, for every row of jobs [begin, end). `heads` have one shape; `size` is
// that of a row, by which rows are given to jobs. The row of a tensor that is not given is null.
template <int64_t count, class Use>
void each_row(const Tensor (&heads)[count], int64_t size, int64_t begin, int64_t end, Use use) {
    const Space<count> space(heads, count);
    const int64_t per_job = rows_of_a_job(size), first = begin * per_job, last = std::min(space.size(), end * per_job);
    space.each_piece(first, last - first, [&](int64_t, int64_t length, const int64_t* index) {
        char* rows[count];
        for (int64_t t = 0; t < count; t++) {
            rows[t] = heads[t].given() ? address(heads[t], space.offset(t, index)) : nullptr;
        }
        for (int64_t i = 0; i < length; i++) {
            use(static_cast<char* const*>(rows));
            for (int64_t t = 0; t < count; t++) {
                if (rows[t] != nullptr) rows[t] += space.step(t) * size_of(heads[t].dtype);
            }
        }
    });
}

// Sums and largest numbers of a row are taken in lanes, whatever the width of the processor's vectors: the same
// numbers come out on every machine.
constexpr int64_t lanes = 16;

template <class Combine>
float combine_lanes(float (&of_lane)[lanes], Combine combine) {
    for (int64_t width = lanes / 2; width > 0; width /= 2) {
        for (int64_t i = 0; i < width; i++) of_lane[i] = combine(of_lane[i], of_lane[i + width]);
    }
    return of_lane[0];
}

// The combination of take(0), take(1), ...; `start` if there is none.
template <class Take, class Combine>
float over_row(int64_t count, float start, Take take, Combine combine) {
    float of_lane[lanes];
    std::fill_n(of_lane, lanes, start);
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
        for (int64_t lane = 0; lane < lanes; lane++) of_lane[lane] = combine(of_lane[lane], take(i + lane));
    }
    for (; i < count; i++) of_lane[i % lanes] = combine(of_lane[i % lanes], take(i));
    return combine_lanes(of_lane, combine);
}

inline float sum(float x, float y) { return x + y; }
// NaN if either is.
inline float largest(float x, float y) { return x > y || x != x ? x : y; }
inline float smallest(float x, float y) { return x < y || x != x ? x : y; }

}  // namespace furiosa::FURIOSA_VARIANT
