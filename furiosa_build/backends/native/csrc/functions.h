// Elementary functions of float32 without branches, so that loops over them become vector instructions.
//
// The polynomials were fitted for the least relative error. What comes out is within 3 units in the last place of the
// function's value (tests/test_backends/test_native/test_pointwise.py), subnormal results and the ends of the range
// included; NaN gives NaN.
#pragma once

#include <cmath>
#include <cstdint>

#include "numbers.h"

namespace furiosa::FURIOSA_VARIANT {

constexpr float infinity = __builtin_inff();
constexpr float log2_e = 1.44269504f, ln2 = 0.693147181f, ln2_high = 0.693145752f, ln2_low = 1.42860677e-06f;

// 2^n for n from -126 to 127.
inline float power_of_2(int32_t n) { return bits_of<float>((n + 127) << 23); }

// e^r - 1 for |r| <= ln 2 / 2.
inline float expm1_near_0(float r) {
    float p = 0.00139465521f;
    p = p * r + 0.00836664438f;
    p = p * r + 0.0416662805f;
    p = p * r + 0.16666542f;
    p = p * r + 0.5f;
    return p * r * r + r;
}

// x within [low, high]; NaN stays NaN.
inline float within(float x, float low, float high) {
    const float raised = x < low ? low : x;
    return raised > high ? high : raised;
}

// A whole number; 0 for NaN.
inline int32_t whole_number(float n) { return static_cast<int32_t>(n == n ? n : 0.0f); }

// 2^n * (1 + p): in two steps, for n is from -150 to 128.
inline float scaled_by_power_of_2(float value, float n) {
    const int32_t whole = whole_number(n), half = whole >> 1;
    return value * power_of_2(half) * power_of_2(whole - half);
}

inline float exp(float x) {
    const float limited = within(x, -104.0f, 89.0f);
    const float n = __builtin_rintf(limited * log2_e);
    const float r = limited - n * ln2_high - n * ln2_low;
    return scaled_by_power_of_2(1.0f + expm1_near_0(r), n);
}

inline float exp2(float x) {
    const float limited = within(x, -150.0f, 129.0f);
    const float n = __builtin_rintf(within(limited, -150.0f, 128.0f));
    return scaled_by_power_of_2(1.0f + expm1_near_0((limited - n) * ln2), n);
}

inline float expm1(float x) {
    const float limited = within(x, -18.0f, 89.0f);
    const float n = __builtin_rintf(limited * log2_e);
    const float r = limited - n * ln2_high - n * ln2_low;
    // Half of it, for 2^128 is no float32.
    const float scale = power_of_2(whole_number(n) - 1);
    const float half = scale * expm1_near_0(r) + (scale - 0.5f);
    return n == 0.0f ? expm1_near_0(r) : half + half;
}

// A positive number as 2^exponent * (1 + fraction), with 1 + fraction from sqrt(1/2) to sqrt(2); of others something.
struct Split {
    float exponent;
    float fraction;
};

inline Split split(float x) {
    const bool subnormal = x < 1.17549435e-38f;
    const uint32_t bits = bits_of<uint32_t>(subnormal ? x * 8388608.0f : x);
    const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
    const float fraction = bits_of<float>(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
    return {static_cast<float>(exponent - (subnormal ? 23 : 0)), fraction};
}

// log(1 + f) - f
inline float log1p_rest(float f) {
    float p = 0.0692586452f;
    p = p * f + -0.118078589f;
    p = p * f + 0.118779145f;
    p = p * f + -0.123818062f;
    p = p * f + 0.14217715f;
    p = p * f + -0.166693568f;
    p = p * f + 0.200022727f;
    p = p * f + -0.249999851f;
    p = p * f + 0.333333105f;
    return (p * f - 0.5f) * f * f;
}

// The logarithm `finite` of x, where x is a positive number.
inline float with_ends_of_log(float x, float finite) {
    const float of_large = x == infinity ? infinity : finite;
    const float of_zero = x == 0.0f ? -infinity : of_large;
    return x < 0.0f || x != x ? __builtin_nanf("") : of_zero;
}

inline float log(float x) {
    const Split s = split(x);
    const float low = log1p_rest(s.fraction) + s.exponent * ln2_low;
    return with_ends_of_log(x, s.exponent * ln2_high + (s.fraction + low));
}

inline float log2(float x) {
    const Split s = split(x);
    // log2_e in two parts: the first times a fraction of few bits is exact, and so is the sum with it.
    const float rest = log1p_rest(s.fraction);
    const float low = rest * log2_e + s.fraction * (log2_e - 1.0f);
    return with_ends_of_log(x, s.exponent + (s.fraction + low));
}

inline float log1p(float x) {
    const float u = 1.0f + x;
    const float corrected = log(u) * (x / (u - 1.0f));
    return u == 1.0f || x == infinity ? x : corrected;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

inline float tanh(float x) {
    const float e = expm1(2.0f * within(__builtin_fabsf(x), 0.0f, 10.0f));
    return __builtin_copysignf(e / (e + 2.0f), x);
}

inline float erf(float x) {
    const float t = within(__builtin_fabsf(x), 0.0f, 4.0f), s = t * t;
    float near = 8.34522507e-05f;
    near = near * s + -0.00081374374f;
    near = near * s + 0.00520063424f;
    near = near * s + -0.0268592704f;
    near = near * s + 0.112836942f;
    near = near * s + -0.376126349f;
    near = near * s + 0.128379226f;
    near = near * t + t;  // 2 / sqrt(pi) = 1 + 0.128...
    float far = -1.07633514e-05f;  // log(1 - erf(t)) / t
    far = far * t + 0.000318061386f;
    far = far * t + -0.00362292537f;
    far = far * t + 0.0237201992f;
    far = far * t + -0.106187627f;
    far = far * t + -0.635181487f;
    far = far * t + -1.12864101f;
    const float value = t < 0.92f ? near : -expm1(far * t);
    return __builtin_copysignf(x != x ? x : value, x);
}

// x less the nearest multiple of pi / 2, and which of the four quarters that is. In float64: right up to 2^30.
struct Reduced {
    float rest;
    int32_t quarter;
};

inline Reduced reduced(float x) {
    const double wide = x, n = __builtin_rint(wide * 0.63661977236758134);
    const double rest = (wide - n * 1.5707963267948966) - n * 6.123233995736766e-17;
    return {static_cast<float>(rest), static_cast<int32_t>(n - 4.0 * __builtin_floor(n * 0.25))};
}

inline float sin_near_0(float r) {
    const float s = r * r;
    return r + r * s * (-0.166666552f + s * (0.00833217334f + s * -0.000195166547f));
}

inline float cos_near_0(float r) {
    const float s = r * r;
    return 1.0f + s * (-0.5f + s * (0.0416666456f + s * (-0.00138873723f + s * 2.44387575e-05f)));
}

inline float sin_of_quarter(float rest, int32_t quarter) {
    const float value = quarter & 1 ? cos_near_0(rest) : sin_near_0(rest);
    return quarter & 2 ? -value : value;
}

inline float sin(float x) {
    const Reduced r = reduced(x);
    return sin_of_quarter(r.rest, r.quarter);
}

inline float cos(float x) {
    const Reduced r = reduced(x);
    return sin_of_quarter(r.rest, r.quarter + 1);
}

}  // namespace furiosa::FURIOSA_VARIANT
