// gather: x, index, out; ints: kind, dim.
#include "rows.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

enum Kind : int64_t { select_kind, gather_kind };

// The elements that one index chooses lie in the dimensions of x behind `dim` (select), or there is but one (gather).
// The index goes over the dimensions before those: of x, of the index and of out, all as tensors of one shape.
struct Heads {
    Tensor x, index, out;
    int64_t tail_dims;
};

Heads heads_of(const Call& call) {
    const Tensor &x = call.tensors[0], &index = call.tensors[1], &out = call.tensors[2];
    const int64_t kind = call.ints[0], dim = call.ints[1];
    const int64_t tail_dims = kind == select_kind ? x.rank - dim - 1 : 0;
    Heads heads{head(out, tail_dims, out), head(out, tail_dims, out), head(out, tail_dims, out), tail_dims};
    heads.x.data = x.data;
    heads.x.dtype = x.dtype;
    heads.index.data = index.data;
    heads.index.dtype = index.dtype;
    for (int64_t i = 0; i < heads.out.rank; i++) {
        const bool indexed = kind == select_kind ? i >= dim && i < dim + index.rank : i == dim;
        heads.x.stride[i] = indexed ? 0 : x.stride[i];
        heads.index.stride[i] = kind == gather_kind ? index.stride[i] : indexed ? index.stride[i - dim] : 0;
    }
    return heads;
}

int64_t jobs(const Call& call) {
    const Heads heads = heads_of(call);
    const int64_t rows = num_elements(heads.out);
    return rows == 0 ? 0 : jobs_of_rows(rows, num_elements(call.tensors[2]) / rows);
}

void run(const Call& call, int64_t begin, int64_t end, Scratch&) {
    const Tensor &x = call.tensors[0], &out = call.tensors[2];
    const Heads heads = heads_of(call);
    const int64_t dim = call.ints[1], size = x.shape[dim], bytes = size_of(x.dtype);
    const Tensor tails[] = {trailing(x, heads.tail_dims), trailing(out, heads.tail_dims)};
    const Space<2> tail(tails, 2);
    const size_t step = static_cast<size_t>(bytes);
    const bool contiguous = tail.step(0) == 1 && tail.step(1) == 1;
    const Tensor each[] = {heads.x, heads.index, heads.out};
    each_row(each, tail.size(), begin, end, [&](char* const* rows) {
        int64_t place;
        load_ints(heads.index.dtype, rows[1], 1, 1, &place);
        if (place < 0) place += size;
        const bool found = place >= 0 && place < size;
        if (!found) place = 0;
        tail.each_piece(0, tail.size(), [&](int64_t, int64_t length, const int64_t* index) {
            const char* from = rows[0] + (place * x.stride[dim] + tail.offset(0, index)) * bytes;
            char* to = rows[2] + tail.offset(1, index) * bytes;
            if (found && contiguous) {
                std::memcpy(to, from, static_cast<size_t>(length) * step);
                return;
            }
            for (int64_t i = 0; i < length; i++) {
                char* target = to + i * tail.step(1) * bytes;
                if (found) {
                    std::memcpy(target, from + i * tail.step(0) * bytes, step);
                } else {
                    std::memset(target, out.dtype == DType::boolean ? 1 : 0xff, step);
                }
            }
        });
    });
}

}  // namespace

extern const Kernel gather;
const Kernel gather{jobs, run};

}  // namespace furiosa::FURIOSA_VARIANT
