// topk: x, values, places.
#include <numeric>

#include "rows.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

// NaN counts as the largest; of equal numbers the first comes first.
struct Before {
    const float* row;

    bool operator()(int64_t a, int64_t b) const {
        const bool a_is_nan = row[a] != row[a], b_is_nan = row[b] != row[b];
        if (a_is_nan != b_is_nan) return a_is_nan;
        return row[a] > row[b] || (!(row[a] < row[b]) && a < b);
    }
};

void run(const Call& call, int64_t begin, int64_t end, Scratch& scratch) {
    const Tensor &x = call.tensors[0], &values = call.tensors[1], &places = call.tensors[2];
    const int64_t size = x.shape[x.rank - 1], count = values.shape[values.rank - 1];
    const size_t bytes = static_cast<size_t>(size) * (sizeof(int64_t) + 2 * sizeof(float));
    int64_t* order = static_cast<int64_t*>(scratch.get(bytes));
    float* row = reinterpret_cast<float*>(order + size);
    float* largest = row + size;
    const Tensor heads[] = {head(x, 1, x), head(values, 1, x), head(places, 1, x)};
    each_row(heads, size, begin, end, [&](char* const* rows) {
        load_floats(x.dtype, rows[0], x.stride[x.rank - 1], size, row);
        std::iota(order, order + size, int64_t{0});
        std::partial_sort(order, order + count, order + size, Before{row});
        for (int64_t i = 0; i < count; i++) largest[i] = row[order[i]];
        store_floats(values.dtype, largest, count, rows[1], values.stride[values.rank - 1]);
        store_ints(places.dtype, order, count, rows[2], places.stride[places.rank - 1]);
    });
}

}  // namespace

extern const Kernel topk;
const Kernel topk{jobs_of_first_operand, run};

}  // namespace furiosa::FURIOSA_VARIANT
