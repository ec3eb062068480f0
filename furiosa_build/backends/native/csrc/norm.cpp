// norm: x, residual?, weight?, bias?, out, sum?; ints: kind, rounds; floats: eps, offset.
// Each row is kept in float32 from the first addition to the last rounding.
#include <cmath>

#include "rows.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

enum Operand : int64_t { x_operand, residual_operand, weight_operand, bias_operand, out_operand, sum_operand };

// The numbers of the last dimension of a vector or a row, which are contiguous.
void load_row(const Tensor& tensor, const char* row, int64_t size, float* to) {
    load_floats(tensor.dtype, row, 1, size, to);
}

void add(float* row, const float* summand, int64_t size) {
#pragma GCC ivdep
    for (int64_t i = 0; i < size; i++) row[i] += summand[i];
}

void multiply(float* row, const float* factor, int64_t size) {
#pragma GCC ivdep
    for (int64_t i = 0; i < size; i++) row[i] *= factor[i];
}

// To the dtype and back. `room` is for as many numbers.
void round_row(DType dtype, int64_t size, float* row, float* room) {
    if (size_of(dtype) >= 4) return;  // it holds every float32
    store_floats(dtype, row, size, room, 1);
    load_floats(dtype, room, 1, size, row);
}

// row = (row - mean) * scale, as the kind of norm has them.
void normalize(bool subtracts_mean, float eps, int64_t size, float* row) {
    const float count = static_cast<float>(size);
    float mean = 0.0f;
    if (subtracts_mean) mean = over_row(row, size, 0.0f, Sum()) / count;
    const auto squared = [mean](auto x) { return (x - mean) * (x - mean); };
    const float scale = 1.0f / std::sqrt(over_row(row, size, 0.0f, Sum(), squared) / count + eps);
    for (int64_t i = 0; i < size; i++) row[i] = (row[i] - mean) * scale;
}

int64_t jobs(const Call& call) {
    const Tensor& x = call.tensors[x_operand];
    const int64_t size = x.shape[x.rank - 1];
    return size == 0 ? 0 : jobs_of_rows(num_elements(x) / size, size);
}

void run(const Call& call, int64_t begin, int64_t end, Scratch& scratch) {
    const Tensor* tensors = call.tensors;
    const Tensor &x = tensors[x_operand], &residual = tensors[residual_operand], &weight = tensors[weight_operand];
    const Tensor &bias = tensors[bias_operand], &out = tensors[out_operand], &total = tensors[sum_operand];
    const int64_t size = x.shape[x.rank - 1];
    const bool layer_norm = call.ints[0] == 1, rounds = call.ints[1] == 1;
    const float eps = static_cast<float>(call.floats[0]), offset = static_cast<float>(call.floats[1]);

    float* row = static_cast<float*>(scratch.get(static_cast<size_t>(4 * size) * sizeof(float)));
    float *other = row + size, *factor = other + size, *summand = factor + size;
    if (weight.given()) {
        load_row(weight, weight.as<char>(), size, factor);
        for (int64_t i = 0; i < size; i++) factor[i] += offset;
    }
    if (bias.given()) load_row(bias, bias.as<char>(), size, summand);

    const Tensor heads[] = {head(x, 1, x), head(residual, 1, x), head(out, 1, x), head(total, 1, x)};
    each_row(heads, size, begin, end, [&](char* const* rows) {
        load_row(x, rows[0], size, row);
        if (residual.given()) {
            load_row(residual, rows[1], size, other);
            add(row, other, size);
        }
        if (total.given()) {
            store_floats(total.dtype, row, size, rows[3], 1);
            round_row(total.dtype, size, row, other);
        }
        normalize(layer_norm, eps, size, row);
        if (rounds) round_row(x.dtype, size, row, other);
        if (weight.given()) multiply(row, factor, size);
        if (bias.given()) add(row, summand, size);
        store_floats(out.dtype, row, size, rows[2], 1);
    });
}

}  // namespace

extern const Kernel norm;
const Kernel norm{jobs, run};

}  // namespace furiosa::FURIOSA_VARIANT
