// The kinds of products with weights of 4 bits: linear_kinds.h. A unit is eight numbers, each + 8, the first lowest.
#pragma once

#include "linear_kinds.h"

namespace furiosa::FURIOSA_VARIANT {
namespace {

struct FloatsFromInt4 : OfFloats {
    static constexpr int steps = 8;
    static constexpr int32_t offset = 0;
    template <int step>
    static Bits weights(Bits unit) {
        const Bits highest = unit << (28 - 4 * step) ^ static_cast<int32_t>(0x80000000);  // number - 8, times 2^28
        return (Bits)__builtin_convertvector(highest >> 28, Floats);
    }
};

struct FloatsOfInt4 : FloatsFromF32 {
    static constexpr int32_t offset = 0;
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

// x is int8. Numbers are as they are stored: 8 too large.
struct FoursFromInt4 : FoursFromInt8 {
    static constexpr int steps = 2;
    static constexpr int32_t offset = 8;
    template <int step>
    static Bits weights(Bits unit) {
        constexpr int bit = 16 * step;
        return (Bits)bytes_from_bits<bit, bit + 4, bit + 8, bit + 12>(unit) & 0x0f0f0f0f;
    }
};

struct FoursOfInt4 : FoursFromInt8 {
    static constexpr int32_t offset = 8;
};
#endif

}  // namespace
}  // namespace furiosa::FURIOSA_VARIANT
