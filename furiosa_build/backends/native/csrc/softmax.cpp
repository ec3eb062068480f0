// softmax: x, out; ints: logarithm.
#include "functions.h"
#include "rows.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

// `room` is for as many numbers.
void softmax_of(float* row, int64_t size, bool logarithm, float* room) {
    const float top = over_row(row, size, -infinity, Largest());
    for (int64_t i = 0; i < size; i++) room[i] = exp(row[i] - top);
    const float total = over_row(room, size, 0.0f, Sum());
    if (logarithm) {
        const float shift = log(total);
        for (int64_t i = 0; i < size; i++) row[i] = row[i] - top - shift;
    } else {
        const float scale = 1.0f / total;
        for (int64_t i = 0; i < size; i++) row[i] = room[i] * scale;
    }
}

void run(const Call& call, int64_t begin, int64_t end, Scratch& scratch) {
    const Tensor &x = call.tensors[0], &out = call.tensors[1];
    const int64_t size = x.shape[x.rank - 1];
    float* row = static_cast<float*>(scratch.get(static_cast<size_t>(2 * size) * sizeof(float)));
    const Tensor heads[] = {head(x, 1, x), head(out, 1, x)};
    each_row(heads, size, begin, end, [&](char* const* rows) {
        load_floats(x.dtype, rows[0], x.stride[x.rank - 1], size, row);
        softmax_of(row, size, call.ints[0] == 1, row + size);
        store_floats(out.dtype, row, size, rows[1], out.stride[out.rank - 1]);
    });
}

}  // namespace

extern const Kernel softmax;
const Kernel softmax{jobs_of_first_operand, run};

}  // namespace furiosa::FURIOSA_VARIANT
