// Vectors as wide as the instruction set that the including file is compiled for, for attention.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // g++ 12 says it of its own header
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <utility>

#include "kernels.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

#ifdef __AVX512F__
constexpr int lanes = 16;
#else
constexpr int lanes = 8;
#endif
constexpr float infinity = __builtin_inff();

using Word = uint32_t;
typedef float Floats __attribute__((vector_size(4 * lanes)));
typedef uint32_t Words __attribute__((vector_size(4 * lanes)));
typedef int32_t SignedWords __attribute__((vector_size(4 * lanes)));
typedef uint16_t Numbers __attribute__((vector_size(2 * lanes)));  // bf16 or f16

template <class Vector>
inline Vector load(const void* from) {
    Vector vector;
    __builtin_memcpy(&vector, from, sizeof vector);
    return vector;
}

template <class Vector>
inline void store(void* to, Vector vector) {
    __builtin_memcpy(to, &vector, sizeof vector);
}

inline Floats splat(float number) { return number - Floats{}; }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }  // b where one is NaN

// The words of `a` and `b` at these lanes; those of b are counted from `lanes` on.
template <int... lane>
inline Words pick(Words a, Words b) {
    return __builtin_shuffle(a, b, Words{static_cast<Word>(lane)...});
}

template <int distance, int... lane>
inline Floats neighbours(Floats numbers, std::integer_sequence<int, lane...>) {
    return (Floats)pick<(lane ^ distance)...>((Words)numbers, (Words)numbers);
}

// The numbers of all lanes combined, in every lane.
template <class Combine>
inline Floats combined(Floats numbers, Combine combine) {
    constexpr std::make_integer_sequence<int, lanes> all{};
    if constexpr (lanes == 16) numbers = combine(numbers, neighbours<8>(numbers, all));
    numbers = combine(numbers, neighbours<4>(numbers, all));
    numbers = combine(numbers, neighbours<2>(numbers, all));
    return combine(numbers, neighbours<1>(numbers, all));
}

inline float total(Floats numbers) {
    const auto sum = [](Floats a, Floats b) { return a + b; };
    return combined(numbers, sum)[0];
}

inline float largest_of(Floats numbers) { return combined(numbers, larger)[0]; }

template <int distance, int... lane>
inline void exchange(Words* rows, std::integer_sequence<int, lane...>) {
#pragma GCC unroll 16
    for (int row = 0; row < lanes; row++) {
        if (row & distance) continue;
        const Words a = rows[row], b = rows[row + distance];
        rows[row] = pick<(lane & distance ? lanes + lane - distance : lane)...>(a, b);
        rows[row + distance] = pick<(lane & distance ? lanes + lane : lane + distance)...>(a, b);
    }
}

// Of `lanes` vectors: word i of vector j becomes word j of vector i.
inline void transpose(Words* rows) {
    constexpr std::make_integer_sequence<int, lanes> all{};
    exchange<1>(rows, all);
    exchange<2>(rows, all);
    exchange<4>(rows, all);
    if constexpr (lanes == 16) exchange<8>(rows, all);
}

// 2 ** x to 2e-7 of it, for x < 128; 0 for x < -126. NaN goes through.
inline Floats power_of_two(Floats x) {
    const Floats lowest = splat(-127.0f);
    x = lowest > x ? lowest : x;
#ifdef __AVX512F__
    const Floats whole = (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Floats whole = (Floats)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
    const Floats part = x - whole;
    Floats sum = splat(1.3276471783e-3f);  // the polynomial of degree 5 with the least relative error
    sum = sum * part + 9.6755413328e-3f;
    sum = sum * part + 5.5507132741e-2f;
    sum = sum * part + 2.4022119724e-1f;
    sum = sum * part + 6.9314696706e-1f;
    sum = sum * part + 1.0f;
    const SignedWords scale = (__builtin_convertvector(whole, SignedWords) + 127) << 23;  // 0 for -127
    return sum * (Floats)scale;
}

inline float power_of_two(float x) { return power_of_two(splat(x))[0]; }

// cap * tanh(x / cap)
inline Floats capped(Floats x, float cap) {
    const Floats most = splat(60.0f);  // tanh is 1 in float32 long before
    Floats twice = x * (2.0f * 1.44269504f / cap);
    twice = twice > most ? most : twice;
    return (1.0f - 2.0f / (power_of_two(twice) + 1.0f)) * cap;
}

inline Words widened(Numbers numbers) {
#ifdef __AVX512F__
    return (Words)_mm512_cvtepu16_epi32((__m256i)numbers);
#else
    return (Words)_mm256_cvtepu16_epi32((__m128i)numbers);
#endif
}

inline Floats from_bf16(Numbers numbers) { return (Floats)(widened(numbers) << 16); }

// Rounds to nearest, ties to even; NaN stays one.
inline Numbers to_bf16(Floats numbers) {
    const Words bits = (Words)numbers;
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(numbers == numbers ? rounded : (bits >> 16) | 0x40, Numbers);
}

inline Floats from_half(Numbers numbers) {
#ifdef __AVX512F__
    return (Floats)_mm512_cvtph_ps((__m256i)numbers);
#else
    return (Floats)_mm256_cvtph_ps((__m128i)numbers);
#endif
}

inline Numbers to_half(Floats numbers) {
#ifdef __AVX512F__
    return (Numbers)_mm512_cvtps_ph((__m512)numbers, _MM_FROUND_TO_NEAREST_INT);
#else
    return (Numbers)_mm256_cvtps_ph((__m256)numbers, _MM_FROUND_TO_NEAREST_INT);
#endif
}

// How words are multiplied that are float32 numbers.
struct Single {
    static constexpr bool in_pairs = false;
    static Floats multiply_add(Floats sum, Word word, Words words) {
#ifdef __AVX512F__
        const __m512 factor = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(word)));
        return (Floats)_mm512_fmadd_ps(factor, (__m512)words, (__m512)sum);
#else
        const __m256 factor = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(word)));
        return (Floats)_mm256_fmadd_ps(factor, (__m256)words, (__m256)sum);
#endif
    }
};

#ifdef __AVX512BF16__
// How words are multiplied that are two bf16 numbers each.
struct Pairs {
    static constexpr bool in_pairs = true;
    static Floats multiply_add(Floats sum, Word word, Words words) {
        const __m512bh factor = (__m512bh)_mm512_set1_epi32(static_cast<int>(word));
        return (Floats)_mm512_dpbf16_ps((__m512)sum, factor, (__m512bh)words);
    }
    static Numbers rounded(Floats numbers) { return (Numbers)_mm512_cvtneps_pbh((__m512)numbers); }
    // The numbers of two rows, by turns: 2 * lanes of each.
    static void interleave(const char* a, const char* b, Word* to) {
        const __m512i first = _mm512_loadu_si512(a), second = _mm512_loadu_si512(b);
        const __m512i numbers = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
                                                 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(first, numbers, second));
        const __m512i others = _mm512_add_epi16(numbers, _mm512_set1_epi16(lanes));
        _mm512_storeu_si512(to + lanes, _mm512_permutex2var_epi16(first, others, second));
    }
};
#endif

}  // namespace

}  // namespace furiosa::FURIOSA_VARIANT
