// Vectors as wide as the instruction set that the including file is compiled for, for attention.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // g++ 12 says it of its own header
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <utility>

#include "kv_cache.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

#ifdef __AVX512F__
constexpr int lanes = 16;
#else
constexpr int lanes = 8;
#endif
constexpr float infinity = __builtin_inff();

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

inline Numbers narrowed(Words words) { return __builtin_convertvector(words, Numbers); }

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

// What the low 8 bits of words stand for, as the bits of float32.
template <DType dtype>
inline Words decoded(Words codes) {
    const Words magnitude = codes & 0x7f;
    const Floats numbers = dtype == int8_codes ? __builtin_convertvector((SignedWords)magnitude, Floats)
                                               : (Floats)(magnitude << 20) * 0x1p120f;
    return (Words)numbers | (codes & 0x80) << 24;
}

// How words are multiplied that are float32 numbers.
struct Single {
    static constexpr bool in_pairs = false;
    static constexpr int numbers = 1;  // of a word
    static bool takes(DType dtype) { return dtype == DType::f32; }

    // How many words have the numbers of one that is stored, and which.
    template <DType dtype>
    static constexpr int words_in = dtype == DType::f32 ? 1 : dtype == DType::bf16 || dtype == DType::f16 ? 2 : 4;
    template <DType dtype>
    static void unpack(Words stored, Words* to) {
        if constexpr (dtype == DType::f32) {
            to[0] = stored;
        } else if constexpr (dtype == DType::bf16) {
            to[0] = stored << 16, to[1] = stored & 0xffff0000;
        } else if constexpr (has_codes(dtype)) {
            for (int i = 0; i < 4; i++) to[i] = decoded<dtype>(stored >> 8 * i);
        } else {
            to[0] = (Words)from_half(narrowed(stored & 0xffff)), to[1] = (Words)from_half(narrowed(stored >> 16));
        }
    }
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
// The bytes of the bf16 number that each code without a sign stands for.
template <DType dtype>
struct Magnitudes {
    uint8_t low[128] = {}, high[128] = {};
    constexpr Magnitudes() {
        for (int code = 0; code < 128; code++) {
            // number = mantissa * 2 ** exponent, brought to a mantissa of 8 bits
            int mantissa = code, exponent = 0;
            if (dtype == fp8_codes) {
                const int e = code >> 3;
                mantissa = e > 0 ? 8 + code % 8 : code % 8, exponent = (e > 0 ? e : 1) - 10;
            }
            if (mantissa == 0) continue;
            for (; mantissa < 128; mantissa *= 2) exponent--;
            const int bits = (exponent + 7 + 127) << 7 | (mantissa - 128);
            low[code] = static_cast<uint8_t>(bits), high[code] = static_cast<uint8_t>(bits >> 8);
        }
    }
};

// Of each byte, without its highest bit.
inline __m512i look_up(const uint8_t (&table)[128], __m512i bytes) {
    return _mm512_permutex2var_epi8(_mm512_loadu_si512(table), bytes, _mm512_loadu_si512(table + 64));
}

// How words are multiplied that are two bf16 numbers each.
struct Pairs {
    static constexpr bool in_pairs = true;
    static constexpr int numbers = 2;
    static bool takes(DType dtype) { return dtype == DType::bf16; }

    template <DType dtype>
    static constexpr int words_in = dtype == DType::bf16 ? 1 : 2;
    template <DType dtype>
    static void unpack(Words stored, Words* to) {
        if constexpr (dtype == DType::bf16) {
            to[0] = stored;
        } else {
            static constexpr Magnitudes<dtype> table;
            const __m512i codes = (__m512i)stored, sign = _mm512_set1_epi8(static_cast<char>(0x80));
            const __m512i low = look_up(table.low, codes);
            const __m512i high = _mm512_or_si512(look_up(table.high, codes), _mm512_and_si512(codes, sign));
            const __m512 first = (__m512)_mm512_unpacklo_epi8(low, high), last = (__m512)_mm512_unpackhi_epi8(low, high);
            to[0] = (Words)_mm512_shuffle_ps(first, last, 0x88), to[1] = (Words)_mm512_shuffle_ps(first, last, 0xdd);
        }
    }
    static Floats multiply_add(Floats sum, Word word, Words words) {
        const __m512bh factor = (__m512bh)_mm512_set1_epi32(static_cast<int>(word));
        return (Floats)_mm512_dpbf16_ps((__m512)sum, factor, (__m512bh)words);
    }
    static Numbers rounded(Floats numbers) { return (Numbers)_mm512_cvtneps_pbh((__m512)numbers); }
};
#endif

}  // namespace

}  // namespace furiosa::FURIOSA_VARIANT
