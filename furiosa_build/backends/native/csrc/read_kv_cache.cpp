// read_kv_cache: cache, slots, out.
#include "rows.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

int64_t row_size(const Tensor& out) { return out.shape[2] * out.shape[3]; }

// A job is some tokens.
int64_t jobs(const Call& call) {
    const Tensor &slots = call.tensors[1], &out = call.tensors[2];
    return row_size(out) == 0 ? 0 : jobs_of_rows(num_elements(slots), row_size(out));
}

void run(const Call& call, int64_t begin, int64_t end, Scratch&) {
    const Tensor &cache = call.tensors[0], &slots = call.tensors[1], &out = call.tensors[2];
    const auto bytes = static_cast<size_t>(out.shape[3] * size_of(out.dtype));
    const Tensor heads[] = {slots, head(out, 2, out)};
    each_row(heads, row_size(out), begin, end, [&](char* const* rows) {
        int64_t slot;
        load_ints(slots.dtype, rows[0], 1, 1, &slot);
        for (int64_t i = 0; i < out.shape[2]; i++) {
            const void* from = address(cache, slot * cache.stride[0] + i * cache.stride[1]);
            std::memcpy(rows[1] + i * out.stride[2] * size_of(out.dtype), from, bytes);
        }
    });
}

}  // namespace

extern const Kernel read_kv_cache;
const Kernel read_kv_cache{jobs, run};

}  // namespace furiosa::FURIOSA_VARIANT
