// Vectors of four-byte lanes, as wide as the variant has them, with the compiler's own operators.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace furiosa::FURIOSA_VARIANT {
namespace {

#if defined(__AVX512F__)
constexpr int64_t lanes = 16;
#else
constexpr int64_t lanes = 8;
#endif

using Bits [[gnu::vector_size(4 * lanes)]] = int32_t;
using UnsignedBits [[gnu::vector_size(4 * lanes)]] = uint32_t;
using Halves [[gnu::vector_size(2 * lanes)]] = int16_t;
using Bytes [[gnu::vector_size(lanes)]] = int8_t;
using Floats [[gnu::vector_size(4 * lanes)]] = float;

template <class Vector>
Vector load(const void* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
}

template <class Vector>
void store(void* to, Vector vector) {
    std::memcpy(to, &vector, sizeof(vector));
}

// Every lane is the four bytes.
inline Bits repeat(const void* four_bytes) {
    int32_t bits;
    std::memcpy(&bits, four_bytes, sizeof(bits));
    return Bits{} + bits;
}

// bfloat16, and rounded to it: to nearest, ties to even.
inline Floats from_bf16(Halves x) { return (Floats)(__builtin_convertvector(x, Bits) << 16); }

inline Halves to_bf16(Floats x) {
    const UnsignedBits bits = (UnsignedBits)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : UnsignedBits{} + 0x7fc0, Halves);
}

// The low byte of each lane.
inline Bytes low_bytes(Bits x) {
#if defined(__AVX512F__)
    return (Bytes)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)x);  // the compiler (GCC 12) goes through lanes one by one
#else
    return __builtin_convertvector(x, Bytes);
#endif
}

// The float16 in the low half of each lane.
inline Floats low_halves(Bits x) {
    const Halves halves = __builtin_convertvector(x, Halves);
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)halves);
#else
    return (Floats)_mm256_cvtph_ps((__m128i)halves);
#endif
}

}  // namespace
}  // namespace furiosa::FURIOSA_VARIANT
