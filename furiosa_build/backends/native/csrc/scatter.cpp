// scatter: x, index, out; floats: value.
#include "rows.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

void run(const Call& call, int64_t begin, int64_t end, Scratch& scratch) {
    const Tensor &x = call.tensors[0], &index = call.tensors[1], &out = call.tensors[2];
    const int64_t last = x.rank - 1, size = x.shape[last], count = index.shape[last];
    const float value = static_cast<float>(call.floats[0]);
    const size_t bytes = static_cast<size_t>(count) * sizeof(int64_t) + static_cast<size_t>(size) * sizeof(float);
    int64_t* places = static_cast<int64_t*>(scratch.get(bytes));
    float* row = reinterpret_cast<float*>(places + count);
    const Tensor heads[] = {head(x, 1, x), head(index, 1, x), head(out, 1, x)};
    each_row(heads, size, begin, end, [&](char* const* rows) {
        load_floats(x.dtype, rows[0], x.stride[last], size, row);
        load_ints(index.dtype, rows[1], index.stride[last], count, places);
        for (int64_t i = 0; i < count; i++) {
            if (places[i] >= 0 && places[i] < size) row[places[i]] = value;
        }
        store_floats(out.dtype, row, size, rows[2], out.stride[last]);
    });
}

}  // namespace

extern const Kernel scatter;
const Kernel scatter{jobs_of_first_operand, run};

}  // namespace furiosa::FURIOSA_VARIANT
