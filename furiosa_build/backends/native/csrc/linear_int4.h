// The kinds of products with weights of 4 bits: linear_kinds.h. A unit is eight numbers, each + 8, the first lowest.
#pragma once

#include "linear_kinds.h"

namespace furiosa::FURIOSA_VARIANT {
namespace {

struct FloatsFromInt4 : OfFloats {
    static constexpr int steps = 8;
    static constexpr float zero = 0;
    template <int step>
    static Bits weights(Bits unit) {
        const Bits highest = unit << (28 - 4 * step) ^ static_cast<int32_t>(0x80000000);  // number - 8, times 2^28
        return (Bits)__builtin_convertvector(highest >> 28, Floats);
    }
};

struct FloatsOfInt4 : FloatsFromF32 {
    static constexpr float zero = 0;
};

#ifdef FURIOSA_HAS_DOT_PRODUCTS

// Of each unit, bytes that begin at the bits of `first` and so on.
template <int first, int second, int third, int fourth>
__m512i bytes_from_bits(Bits unit) {
    constexpr uint64_t low = first | second << 8 | third << 16 | static_cast<uint64_t>(fourth) << 24;
    constexpr uint64_t high = (low + 0x20202020) << 32;
    // With a mask of ones: what there is without one makes the compiler (GCC 12) warn.
    return _mm512_maskz_multishift_epi64_epi8(~0ull, _mm512_set1_epi64(static_cast<int64_t>(high | low)), (__m512i)unit);
}

struct alignas(64) NumbersOfInt4 {
    uint16_t bf16[32];
};

constexpr NumbersOfInt4 tabulate_int4() {
    NumbersOfInt4 table{};
    for (int code = 0; code < 32; code++) {  // the fifth bit is the next number's
        const int value = code % 16 - 8;
        table.bf16[code] = static_cast<uint16_t>(value < 0 ? 0x8000 | bf16_bits(-value, 0) : bf16_bits(value, 0));
    }
    return table;
}

constexpr NumbersOfInt4 of_int4 = tabulate_int4();

struct PairsFromInt4 : OfPairs {
    static constexpr int steps = 4;
    static constexpr float zero = 0;
    template <int step>
    static Bits weights(Bits unit) {
        constexpr int bit = 8 * step;
        const __m512i codes = bytes_from_bits<bit, bit, bit + 4, bit + 4>(unit);
        return (Bits)_mm512_maskz_permutexvar_epi16(~0u, codes, _mm512_load_si512(of_int4.bf16));
    }
};

struct PairsOfInt4 : PairsFromBf16 {
    static constexpr float zero = 0;
};

// x is int8. Numbers are as they are stored: 8 too large.
struct FoursFromInt4 : FoursFromInt8 {
    static constexpr int steps = 2;
    static constexpr float zero = 8;
    template <int step>
    static Bits weights(Bits unit) {
        constexpr int bit = 16 * step;
        return (Bits)bytes_from_bits<bit, bit + 4, bit + 8, bit + 12>(unit) & 0x0f0f0f0f;
    }
};

struct FoursOfInt4 : FoursFromInt8 {
    static constexpr float zero = 8;
};
#endif

}  // namespace
}  // namespace furiosa::FURIOSA_VARIANT
