// Rounds the rows of x to 8-bit numbers, with a scale for each row: as quant/int8.py and quant/fp8.py do.
#include <cmath>

#include "numbers.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

constexpr int64_t int8_format = 3;

// Rounds to what a dtype has.
void round_to(DType dtype, float* row, int64_t count, void* scratch) {
    if (dtype == DType::f32) return;
    store_floats(dtype, row, count, scratch, 1);
    load_floats(dtype, scratch, 1, count, row);
}

float epsilon_of(DType dtype) { return dtype == DType::bf16 ? 0x1p-7f : dtype == DType::f16 ? 0x1p-10f : 0x1p-23f; }

float clamp(float x, float low, float high) { return x > low ? (x < high ? x : high) : low; }

void round_to_int8(const float* row, int64_t count, int8_t* to) {
    for (int64_t i = 0; i < count; i++) to[i] = static_cast<int8_t>(__builtin_rintf(clamp(row[i], -128, 127)));
}

// To float8_e4m3fn, to nearest, ties to even: three bits behind the first, but no finer than 2^-9.
void round_to_fp8(float* row, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const float x = clamp(row[i], -448, 448);
        const uint32_t bits = bits_of<uint32_t>(x), sign = bits & 0x80000000, magnitude = bits & 0x7fffffff;
        const uint32_t coarse = (magnitude + 0x7ffff + ((magnitude >> 20) & 1)) & 0xfff00000;
        const float fine = (bits_of<float>(magnitude) + 0x1p14f) - 0x1p14f;
        row[i] = bits_of<float>((magnitude < 0x3c800000 ? bits_of<uint32_t>(fine) : coarse) | sign);  // 2^-6
    }
}

// One row of x.
void round_row(const Call& call, int64_t number, Scratch& scratch) {
    const Tensor &x = call.tensors[0], &all_largest = call.tensors[1], &rows = call.tensors[2], &scales = call.tensors[3];
    const int64_t count = x.shape[1];
    const bool is_int8 = call.ints[0] == int8_format;
    float* row = static_cast<float*>(scratch.get(2 * count * sizeof(float)));
    void* rounded = row + count;
    load_floats(x.dtype, address(x, number * x.stride[0]), 1, count, row);
    const float own = largest_of(row, count);
    float largest = own;
    if (all_largest.given() && own == own) {
        load_floats(all_largest.dtype, address(all_largest, number * all_largest.stride[0]), 1, 1, &largest);
    }
    float scale = largest / (is_int8 ? 127.5f : 448.0f);
    round_to(x.dtype, &scale, 1, rounded);
    if (scale == 0) scale = epsilon_of(x.dtype);
    for (int64_t i = 0; i < count; i++) row[i] /= scale;
    round_to(x.dtype, row, count, rounded);
    void* to = address(rows, number * rows.stride[0]);
    if (is_int8) {
        round_to_int8(row, count, static_cast<int8_t*>(to));
    } else {
        round_to_fp8(row, count);
        store_floats(rows.dtype, row, count, to, 1);
    }
    scales.as<float>()[number * scales.stride[0]] = scale;
}

int64_t count_rows(const Call& call) { return call.tensors[0].shape[0]; }

void round_rows_of(const Call& call, int64_t begin, int64_t end, Scratch& scratch) {
    for (int64_t row = begin; row < end; row++) round_row(call, row, scratch);
}

}  // namespace

extern const Kernel round_rows;
const Kernel round_rows = {count_rows, round_rows_of};

}  // namespace furiosa::FURIOSA_VARIANT
