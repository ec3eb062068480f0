// What attention reads, writes and multiplies: rows of stored numbers, and products of a few rows with packed columns.
#pragma once

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

// c[M][N vectors] = a[M][words] * b[words][N vectors], on top of what c is if `add`.
template <class Arithmetic, int M, int N>
inline void product(const Word* a, int64_t a_stride, const Word* b, int64_t b_stride, int64_t words, float* c,
                    int64_t c_stride, bool add) {
    Floats sums[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) sums[m][n] = add ? load<Floats>(c + m * c_stride + n * lanes) : Floats{};
    for (int64_t word = 0; word < words; word++) {
        Words columns[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) columns[n] = load<Words>(b + word * b_stride + n * lanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const Word factor = a[m * a_stride + word];
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) sums[m][n] = Arithmetic::multiply_add(sums[m][n], factor, columns[n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) store(c + m * c_stride + n * lanes, sums[m][n]);
}

// The same for any number of vectors, as many at a time as the registers hold.
template <class Arithmetic, int M>
void products(const Word* a, int64_t a_stride, const Word* b, int64_t b_stride, int64_t words, float* c,
              int64_t c_stride, int64_t vectors, bool add) {
    constexpr int N = (M <= 4 ? 4 : 2) * lanes / 16;
    int64_t vector = 0;
    for (; vector + N <= vectors; vector += N)
        product<Arithmetic, M, N>(a, a_stride, b + vector * lanes, b_stride, words, c + vector * lanes, c_stride, add);
    for (; vector < vectors; vector++)
        product<Arithmetic, M, 1>(a, a_stride, b + vector * lanes, b_stride, words, c + vector * lanes, c_stride, add);
}

using Products = void (*)(const Word*, int64_t, const Word*, int64_t, int64_t, float*, int64_t, int64_t, bool);
template <class A>
constexpr Products products_of_rows[block_rows] = {products<A, 1>, products<A, 2>, products<A, 3>, products<A, 4>,
                                                   products<A, 5>, products<A, 6>, products<A, 7>, products<A, 8>};

}  // namespace

}  // namespace furiosa::FURIOSA_VARIANT
