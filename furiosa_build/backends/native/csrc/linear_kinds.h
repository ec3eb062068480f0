// The kinds of products that the processor has, for each format of packed weights (packing.py).
//
// A unit of weights is four bytes of K for each of the 32 rows of a block. A kind takes it in steps: each multiplies a
// vector of weights by four bytes of x, the same for all lanes.
#pragma once

#include "vectors.h"

namespace furiosa::FURIOSA_VARIANT {
namespace {

// Weights and x as float32: one number a step.
struct OfFloats {
    using Number = float;
    using Sum = Floats;
    static Sum add(Sum sum, Bits weights, Bits x) { return (Floats)weights * (Floats)x + sum; }
};

struct FloatsFromF32 : OfFloats {
    static constexpr int steps = 1;
    template <int step>
    static Bits weights(Bits unit) {
        return unit;
    }
};

struct FloatsFromBf16 : OfFloats {
    static constexpr int steps = 2;
    template <int step>
    static Bits weights(Bits unit) {
        return step == 0 ? unit << 16 : unit & static_cast<int32_t>(0xffff0000);
    }
};

struct FloatsFromF16 : OfFloats {
    static constexpr int steps = 2;
    template <int step>
    static Bits weights(Bits unit) {
        return (Bits)low_halves(unit >> 16 * step);
    }
};

struct FloatsFromInt8 : OfFloats {
    static constexpr int steps = 4;
    template <int step>
    static Bits weights(Bits unit) {
        const Bits highest = unit << (24 - 8 * step) ^ static_cast<int32_t>(0x80000000);  // byte - 128, times 2^24
        return (Bits)__builtin_convertvector(highest >> 24, Floats);
    }
};

struct FloatsFromFp8 : OfFloats {
    static constexpr int steps = 4;
    // The seven low bits are the top of a float32's exponent and mantissa, 2^120 too small; subnormals included.
    template <int step>
    static Bits weights(Bits unit) {
        const Bits highest = unit << (24 - 8 * step);
        const Bits magnitude = (highest & 0x7f000000) >> 4, sign = highest & static_cast<int32_t>(0x80000000);
        const Floats value = (Floats)(magnitude | sign) * 0x1p120f;
        return (Bits)value | (magnitude == 0x07f00000);  // all bits: NaN
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define FURIOSA_HAS_DOT_PRODUCTS 1

// Weights and x as bfloat16: two numbers a step. Given intrinsics, the compiler (GCC 12) spills sums.
struct OfPairs {
    using Number = float;
    using Sum = Floats;
    static Sum add(Sum sum, Bits weights, Bits x) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
        return sum;
    }
};

struct PairsFromBf16 : OfPairs {
    static constexpr int steps = 1;
    template <int step>
    static Bits weights(Bits unit) {
        return unit;
    }
};

// What the low seven bits of a byte stand for, as bfloat16: its high and its low byte.
struct alignas(64) Table {
    uint8_t high[128];
    uint8_t low[128];
};

// value * 2^scale, which bfloat16 must have; not negative.
constexpr int bf16_bits(int value, int scale) {
    if (value == 0) return 0;
    int exponent = 0;
    while ((value >> exponent) > 1) exponent++;
    return (127 + exponent + scale) << 7 | ((value << 7 >> exponent) & 0x7f);
}

constexpr int bf16_of_fp8(int code) {
    const int exponent = code >> 3, mantissa = code & 7;
    if (code == 127) return 0x7fc0;
    return exponent == 0 ? bf16_bits(mantissa, -9) : bf16_bits(8 + mantissa, exponent - 10);
}

constexpr Table tabulate_fp8() {
    Table table{};
    for (int code = 0; code < 128; code++) {
        table.high[code] = static_cast<uint8_t>(bf16_of_fp8(code) >> 8);
        table.low[code] = static_cast<uint8_t>(bf16_of_fp8(code) & 0xff);
    }
    return table;
}

constexpr Table of_fp8 = tabulate_fp8();

inline __m512i look_up(const uint8_t (&table)[128], __m512i codes) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + 64));
}

// Of each unit, whose bytes are in the order 0, 2, 1, 3, the two numbers of a step.
template <int step>
Bits pair(__m512i high, __m512i low) {
    const __m512i mask = _mm512_set1_epi16(0xff);
    if (step == 0) return (Bits)_mm512_ternarylogic_epi32(_mm512_slli_epi16(high, 8), low, mask, 0xf8);
    return (Bits)_mm512_ternarylogic_epi32(mask, _mm512_srli_epi16(low, 8), high, 0xca);
}

inline __m512i exchange_middle_bytes(Bits unit) {
    const __m512i order = _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200);
    return _mm512_shuffle_epi8((__m512i)unit, order);
}

// The same, of magnitudes; the highest bit of `bytes` is the sign.
template <int step>
Bits pair_with_sign(__m512i high, __m512i low, __m512i bytes) {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    return pair<step>(_mm512_ternarylogic_epi32(high, bytes, sign, 0xf8), low);
}

struct PairsFromFp8 : OfPairs {
    static constexpr int steps = 2;
    template <int step>
    static Bits weights(Bits unit) {
        const __m512i codes = exchange_middle_bytes(unit);
        return pair_with_sign<step>(look_up(of_fp8.high, codes), look_up(of_fp8.low, codes), codes);
    }
};

// Weights + 128 and x in int8: four numbers a step. Sums are too large by 128 times the sum of x.
struct FoursFromInt8 {
    using Number = int32_t;
    using Sum = Bits;
    static constexpr int steps = 1;
    template <int step>
    static Bits weights(Bits unit) {
        return unit;
    }
    static Sum add(Sum sum, Bits weights, Bits x) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
        return sum;
    }
};
#endif

inline int32_t sum_of(const int8_t* numbers, int64_t count) {
    int32_t sum = 0;
    int64_t i = 0;
#ifdef FURIOSA_HAS_DOT_PRODUCTS
    constexpr int64_t step = 4 * lanes;
    const Bits ones = Bits{} + 0x01010101;
    Bits even{}, odd{};
    for (; i + 2 * step <= count; i += 2 * step) {
        even = FoursFromInt8::add(even, ones, load<Bits>(numbers + i));
        odd = FoursFromInt8::add(odd, ones, load<Bits>(numbers + i + step));
    }
    even += odd;
    for (int64_t lane = 0; lane < lanes; lane++) sum += even[lane];
#endif
    for (; i < count; i++) sum += numbers[i];
    return sum;
}

}  // namespace
}  // namespace furiosa::FURIOSA_VARIANT
