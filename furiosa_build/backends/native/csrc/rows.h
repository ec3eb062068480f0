// Operators that go through their tensors by rows of the last dimension: a job is some rows.
#pragma once

#include "numbers.h"
#include "space.h"
#include "vectors.h"

namespace furiosa::FURIOSA_VARIANT {

// How many rows of `size` numbers a job has: a function of shapes alone.
inline int64_t rows_of_a_job(int64_t size) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, size)); }

inline int64_t jobs_of_rows(int64_t rows, int64_t size) { return divide_up(rows, rows_of_a_job(size)); }

// The jobs of a call that goes through the rows of its first operand.
inline int64_t jobs_of_first_operand(const Call& call) {
    const Tensor& x = call.tensors[0];
    const int64_t size = x.shape[x.rank - 1];
    return size == 0 ? 0 : jobs_of_rows(num_elements(x) / size, size);
}

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

// Sums and the like are taken in 16 lanes, whatever the width of the processor's vectors: the same numbers come out on
// every machine.
constexpr int64_t lanes_of_a_row = 16, vectors_of_a_row = lanes_of_a_row / lanes;

// What combines numbers, or vectors of them.
struct Sum {
    template <class T>
    T operator()(T x, T y) const {
        return x + y;
    }
};

// NaN if either is.
struct Largest {
    template <class T>
    T operator()(T x, T y) const {
        return x > y || x != x ? x : y;
    }
    Floats operator()(Floats x, Floats y) const { return (x > y) | (x != x) ? x : y; }
};

struct Smallest {
    template <class T>
    T operator()(T x, T y) const {
        return x < y || x != x ? x : y;
    }
    Floats operator()(Floats x, Floats y) const { return (x < y) | (x != x) ? x : y; }
};

// The combination of change(number) over a row; `start` if it is empty. Both functions take numbers and vectors.
template <class Combine, class Change>
float over_row(const float* row, int64_t count, float start, Combine combine, Change change) {
    Floats sums[vectors_of_a_row];
    for (Floats& sum : sums) sum = Floats{} + start;
    int64_t i = 0;
    for (; i + lanes_of_a_row <= count; i += lanes_of_a_row) {
#pragma GCC unroll 2
        for (int64_t v = 0; v < vectors_of_a_row; v++) {
            sums[v] = combine(sums[v], change(load<Floats>(row + i + v * lanes)));
        }
    }
    float of_lane[lanes_of_a_row];
    std::memcpy(of_lane, sums, sizeof(of_lane));
    for (int64_t lane = 0; i < count; i++, lane++) of_lane[lane] = combine(of_lane[lane], change(row[i]));
    for (int64_t width = lanes_of_a_row / 2; width > 0; width /= 2) {
        for (int64_t lane = 0; lane < width; lane++) of_lane[lane] = combine(of_lane[lane], of_lane[lane + width]);
    }
    return of_lane[0];
}

template <class Combine>
float over_row(const float* row, int64_t count, float start, Combine combine) {
    return over_row(row, count, start, combine, [](auto x) { return x; });
}

}  // namespace furiosa::FURIOSA_VARIANT
