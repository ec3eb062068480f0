#include "numbers.h"

#include <algorithm>

namespace furiosa::FURIOSA_VARIANT {

namespace {

template <class T>
void load(const void* from, int64_t stride, int64_t count, float* to) {
    const T* numbers = static_cast<const T*>(from);
    if (stride == 0) {
        std::fill(to, to + count, to_float(*numbers));
    } else if (stride == 1) {
#pragma GCC ivdep
        for (int64_t i = 0; i < count; i++) to[i] = to_float(numbers[i]);
    } else {
        for (int64_t i = 0; i < count; i++) to[i] = to_float(numbers[i * stride]);
    }
}

// The compiler does not vectorise these conversions by itself.
void load_f16(const void* from, int64_t count, float* to) {
    const uint16_t* numbers = static_cast<const uint16_t*>(from);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers + i))));
    }
    for (; i < count; i++) to[i] = _cvtsh_ss(numbers[i]);
}

void store_f16(const float* from, int64_t count, void* to) {
    uint16_t* numbers = static_cast<uint16_t*>(to);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m128i rounded = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(numbers + i), rounded);
    }
    for (; i < count; i++) numbers[i] = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}

template <class T>
void store(const float* from, int64_t count, void* to, int64_t stride) {
    T* numbers = static_cast<T*>(to);
    if (stride == 1) {
#pragma GCC ivdep
        for (int64_t i = 0; i < count; i++) numbers[i] = from_float<T>(from[i]);
    } else {
        for (int64_t i = 0; i < count; i++) numbers[i * stride] = from_float<T>(from[i]);
    }
}

template <class T>
void load_int(const void* from, int64_t stride, int64_t count, int64_t* to) {
    const T* numbers = static_cast<const T*>(from);
    if (stride == 1) {
#pragma GCC ivdep
        for (int64_t i = 0; i < count; i++) to[i] = numbers[i];
    } else {
        for (int64_t i = 0; i < count; i++) to[i] = numbers[i * stride];
    }
}

template <class T>
void store_int(const int64_t* from, int64_t count, void* to, int64_t stride) {
    T* numbers = static_cast<T*>(to);
    for (int64_t i = 0; i < count; i++) numbers[i * stride] = static_cast<T>(from[i]);
}

}  // namespace

void load_floats(DType dtype, const void* from, int64_t stride, int64_t count, float* to) {
    switch (dtype) {
        case DType::bf16:
            return load<bf16>(from, stride, count, to);
        case DType::f16:
            return stride == 1 ? load_f16(from, count, to) : load<f16>(from, stride, count, to);
        case DType::f64:
            return load<double>(from, stride, count, to);
        default:
            return load<float>(from, stride, count, to);
    }
}

void store_floats(DType dtype, const float* from, int64_t count, void* to, int64_t stride) {
    switch (dtype) {
        case DType::bf16:
            return store<bf16>(from, count, to, stride);
        case DType::f16:
            return stride == 1 ? store_f16(from, count, to) : store<f16>(from, count, to, stride);
        case DType::f64:
            return store<double>(from, count, to, stride);
        default:
            return store<float>(from, count, to, stride);
    }
}

void load_ints(DType dtype, const void* from, int64_t stride, int64_t count, int64_t* to) {
    switch (dtype) {
        case DType::i64:
            return load_int<int64_t>(from, stride, count, to);
        case DType::i32:
            return load_int<int32_t>(from, stride, count, to);
        case DType::i8:
            return load_int<int8_t>(from, stride, count, to);
        default:
            return load_int<uint8_t>(from, stride, count, to);
    }
}

void store_ints(DType dtype, const int64_t* from, int64_t count, void* to, int64_t stride) {
    switch (dtype) {
        case DType::i64:
            return store_int<int64_t>(from, count, to, stride);
        case DType::i32:
            return store_int<int32_t>(from, count, to, stride);
        case DType::boolean:
            return store_int<bool>(from, count, to, stride);
        default:
            return store_int<uint8_t>(from, count, to, stride);
    }
}

}  // namespace furiosa::FURIOSA_VARIANT
