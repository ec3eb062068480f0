// Numbers of every dtype as float32 or int64, the two kinds that kernels compute with, and back.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace furiosa::FURIOSA_VARIANT {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

inline bool is_float(DType dtype) {
    return dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16 || dtype == DType::f64;
}

inline int64_t size_of(DType dtype) {
    switch (dtype) {
        case DType::f64:
        case DType::i64:
            return 8;
        case DType::f32:
        case DType::i32:
            return 4;
        case DType::bf16:
        case DType::f16:
            return 2;
        default:
            return 1;
    }
}

template <class To, class From>
To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From), "of one size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline float to_float(float x) { return x; }
inline float to_float(double x) { return static_cast<float>(x); }
inline float to_float(bf16 x) { return bits_of<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) { return _cvtsh_ss(x.bits); }

// Rounds to nearest, ties to even.
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline double from_float<double>(float x) {
    return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
    const uint32_t bits = bits_of<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>(x != x ? 0x7fc0 : rounded)};
}
template <>
inline f16 from_float<f16>(float x) {
    return {_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)};
}

// `count` numbers, `stride` elements apart, into a row. The dtype is a floating one (floats), an integer or bool (ints).
void load_floats(DType dtype, const void* from, int64_t stride, int64_t count, float* to);
void load_ints(DType dtype, const void* from, int64_t stride, int64_t count, int64_t* to);
void store_floats(DType dtype, const float* from, int64_t count, void* to, int64_t stride);
// Keeps the low bits; of a bool, whether the number is not 0.
void store_ints(DType dtype, const int64_t* from, int64_t count, void* to, int64_t stride);

// Where element `index` of a tensor lies, counted in elements of its dtype.
inline char* address(const Tensor& tensor, int64_t index) { return tensor.as<char>() + index * size_of(tensor.dtype); }

// The largest magnitude; NaN if there is one.
inline float largest_of(const float* row, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t magnitude = bits_of<uint32_t>(row[i]) & 0x7fffffff;  // in the order of the numbers, NaN last
        largest = magnitude > largest ? magnitude : largest;
    }
    return bits_of<float>(largest);
}

inline int64_t to_int(float x) { return static_cast<int64_t>(x); }

}  // namespace furiosa::FURIOSA_VARIANT
