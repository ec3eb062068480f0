// What attention reads, writes and multiplies: rows of stored numbers, and products of a few rows with packed columns.
#pragma once

#include "attention.h"
#include "attention_vectors.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

constexpr int64_t block_rows = 8;  // of queries that are multiplied at a time

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- Rows of stored numbers

// `bytes` of them, and zeros up to a whole vector.
template <class Vector>
inline Vector load_part(const char* from, int64_t bytes) {
    if (bytes >= static_cast<int64_t>(sizeof(Vector))) return load<Vector>(from);
    char part[sizeof(Vector)] = {};
    __builtin_memcpy(part, from, static_cast<size_t>(bytes));
    return load<Vector>(part);
}

template <class Vector>
inline void store_part(char* to, int64_t bytes, Vector vector) {
    if (bytes >= static_cast<int64_t>(sizeof(Vector))) return store(to, vector);
    char part[sizeof(Vector)];
    store(part, vector);
    __builtin_memcpy(to, part, static_cast<size_t>(bytes));
}

// The numbers of a row from number `from` on; beyond its end they are 0.
inline Floats read(const char* row, DType dtype, int64_t size, int64_t from) {
    if (dtype == DType::f32) return load_part<Floats>(row + from * 4, (size - from) * 4);
    const Numbers numbers = load_part<Numbers>(row + from * 2, (size - from) * 2);
    return dtype == DType::f16 ? from_half(numbers) : from_bf16(numbers);
}

inline void write(char* row, DType dtype, int64_t size, int64_t from, Floats numbers) {
    if (dtype == DType::f32) return store_part(row + from * 4, (size - from) * 4, numbers);
    store_part(row + from * 2, (size - from) * 2, dtype == DType::f16 ? to_half(numbers) : to_bf16(numbers));
}

// ---- Products

// What is read next comes from memory while there is something to multiply: some lines at each step. Groups lie anywhere,
// and the processor does not guess where the next ones are.
class Ahead {
  public:
    void add(const char* group, int64_t bytes) { groups_[count_++] = {group, group + bytes}; }

    // The compiler deletes loops that do nothing but prefetch, unless it cannot know. To the second level: the first one
    // has what is computed with.
    void fetch() {
        for (int64_t lines = 0; lines < lines_of_step && next_ < count_; lines++) {
            Group& group = groups_[next_];
            asm volatile("prefetcht1 %0" : : "m"(*group.at));
            group.at += 64;
            if (group.at >= group.end) next_++;
        }
    }

  private:
    static constexpr int64_t lines_of_step = 4;
    struct Group {
        const char *at, *end;
    };
    Group groups_[2 * tile_groups];
    int64_t count_ = 0, next_ = 0;
};

// Scores [M][N vectors] of queries [M][words] against keys: N columns of vectors, each [words], `stride` from one to the
// next.
template <class Arithmetic, int M, int N>
inline void score(const Word* queries, int64_t words, const Word* const* keys, int64_t stride, float* scores,
                  Ahead& ahead) {
    Floats sums[M][N] = {};
    for (int64_t word = 0; word < words; word++) {
        Words columns[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) columns[n] = load<Words>(keys[n] + word * stride);
        ahead.fetch();
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const Word factor = queries[m * words + word];
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) sums[m][n] = Arithmetic::multiply_add(sums[m][n], factor, columns[n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) store(scores + m * tile_tokens + n * lanes, sums[m][n]);
}

// Adds to outputs [M][N vectors] the shares [M][groups * rows] times values: `groups` of them, each [rows][N vectors].
template <class Arithmetic, int M, int N>
inline void add_values(const Word* shares, int64_t share_stride, const Word* const* values, int64_t groups, int64_t rows,
                       int64_t at, int64_t stride, float* outputs, Ahead& ahead) {
    Floats sums[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) sums[m][n] = load<Floats>(outputs + m * stride + n * lanes);
    for (int64_t group = 0; group < groups; group++) {
        for (int64_t row = 0; row < rows; row++) {
            Words columns[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) columns[n] = load<Words>(values[group] + row * stride + at + n * lanes);
            ahead.fetch();
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const Word factor = shares[m * share_stride + group * rows + row];
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) sums[m][n] = Arithmetic::multiply_add(sums[m][n], factor, columns[n]);
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) store(outputs + m * stride + n * lanes, sums[m][n]);
}

// The two products of M queries with a tile, as many vectors at a time as the registers hold.
template <class Arithmetic, int M>
struct Product {
    static constexpr int N = (M <= 4 ? 4 : 2) * lanes / 16;

    static void scores(const Word* queries, int64_t words, const Word* const* groups, int64_t count, float* to,
                       Ahead& ahead) {
        const Word* keys[tile_tokens / lanes];
        const int64_t vectors = count * group_slots / lanes;
        for (int64_t i = 0; i < vectors; i++) keys[i] = groups[i * lanes / group_slots] + i * lanes % group_slots;
        int64_t i = 0;
        for (; i + N <= vectors; i += N)
            score<Arithmetic, M, N>(queries, words, keys + i, group_slots, to + i * lanes, ahead);
        for (; i < vectors; i++)
            score<Arithmetic, M, 1>(queries, words, keys + i, group_slots, to + i * lanes, ahead);
    }

    static void outputs(const Word* shares, int64_t share_stride, const Word* const* groups, int64_t count, int64_t rows,
                        int64_t stride, float* to, Ahead& ahead) {
        int64_t at = 0;
        const auto add = [&](auto function) {
            function(shares, share_stride, groups, count, rows, at, stride, to + at, ahead);
        };
        for (; at + N * lanes <= stride; at += N * lanes) add(add_values<Arithmetic, M, N>);
        for (; at < stride; at += lanes) add(add_values<Arithmetic, M, 1>);
    }
};

template <class Arithmetic>
struct Products {
    decltype(&Product<Arithmetic, 1>::scores) scores;
    decltype(&Product<Arithmetic, 1>::outputs) outputs;
};

template <class A, int M>
constexpr Products<A> products_of{Product<A, M>::scores, Product<A, M>::outputs};
template <class A>
constexpr Products<A> products_of_rows[block_rows] = {products_of<A, 1>, products_of<A, 2>, products_of<A, 3>,
                                                      products_of<A, 4>, products_of<A, 5>, products_of<A, 6>,
                                                      products_of<A, 7>, products_of<A, 8>};

}  // namespace

}  // namespace furiosa::FURIOSA_VARIANT
