// rotary: x, cos, sin, out; ints: kind.
#include "rows.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

// Element i goes with element i + half.
void rotate_halves(const float* x, const float* cos, const float* sin, int64_t half, float* out) {
    for (int64_t i = 0; i < half; i++) out[i] = x[i] * cos[i] - x[i + half] * sin[i];
    for (int64_t i = half; i < 2 * half; i++) out[i] = x[i] * cos[i] + x[i - half] * sin[i];
}

// Elements 2i and 2i + 1 go together.
void rotate_pairs(const float* x, const float* cos, const float* sin, int64_t half, float* out) {
    for (int64_t i = 0; i < 2 * half; i += 2) {
        out[i] = x[i] * cos[i] - x[i + 1] * sin[i];
        out[i + 1] = x[i + 1] * cos[i + 1] + x[i] * sin[i + 1];
    }
}

void run(const Call& call, int64_t begin, int64_t end, Scratch& scratch) {
    const Tensor &x = call.tensors[0], &cos = call.tensors[1], &sin = call.tensors[2], &out = call.tensors[3];
    const int64_t size = x.shape[x.rank - 1], rotated = cos.shape[cos.rank - 1];
    const auto rotate = call.ints[0] == 0 ? rotate_halves : rotate_pairs;
    float* from = static_cast<float*>(scratch.get(static_cast<size_t>(2 * size + 2 * rotated) * sizeof(float)));
    float *to = from + size, *cosine = to + size, *sine = cosine + rotated;
    const Tensor heads[] = {head(x, 1, x), head(cos, 1, x), head(sin, 1, x), head(out, 1, x)};
    each_row(heads, size, begin, end, [&](char* const* rows) {
        load_floats(x.dtype, rows[0], 1, size, from);
        load_floats(cos.dtype, rows[1], 1, rotated, cosine);
        load_floats(sin.dtype, rows[2], 1, rotated, sine);
        rotate(from, cosine, sine, rotated / 2, to);
        std::copy(from + rotated, from + size, to + rotated);
        store_floats(out.dtype, to, size, rows[3], 1);
    });
}

}  // namespace

extern const Kernel rotary;
const Kernel rotary{jobs_of_first_operand, run};

}  // namespace furiosa::FURIOSA_VARIANT
