// embedding: weight, ids, out. unpack: packed, out.
#include "packed.h"
#include "rows.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

// Row `row` of a weight as numbers beside each other: in place, or copied to `room`.
const void* weight_row(const Tensor& weight, int64_t row, void* room) {
    if (!is_packed(weight)) return address(weight, row * weight.stride[0]);
    copy_packed_row(weight, row, room);
    return room;
}

size_t room_for_row(const Tensor& weight) {
    return is_packed(weight) ? static_cast<size_t>(packed_row_bytes(weight)) : 0;
}

void put_row(const Tensor& weight, const void* row, int64_t size, const Tensor& out, char* to, float* floats) {
    if (weight.dtype == out.dtype && out.stride[out.rank - 1] == 1) {
        std::memcpy(to, row, static_cast<size_t>(size * size_of(out.dtype)));
        return;
    }
    load_floats(weight.dtype, row, 1, size, floats);
    store_floats(out.dtype, floats, size, to, out.stride[out.rank - 1]);
}

int64_t rows_of_weight(const Tensor& weight) {
    return is_packed(weight) ? weight.shape[0] * rows_of_a_block : weight.shape[0];
}

int64_t embedding_jobs(const Call& call) {
    const Tensor& out = call.tensors[2];
    return jobs_of_rows(num_elements(call.tensors[1]), out.shape[out.rank - 1]);
}

void run_embedding(const Call& call, int64_t begin, int64_t end, Scratch& scratch) {
    const Tensor &weight = call.tensors[0], &ids = call.tensors[1], &out = call.tensors[2];
    const int64_t size = out.shape[out.rank - 1], num_rows = rows_of_weight(weight);
    float* floats = static_cast<float*>(scratch.get(static_cast<size_t>(size) * sizeof(float) + room_for_row(weight)));
    void* room = floats + size;
    const Tensor heads[] = {ids, head(out, 1, out)};
    each_row(heads, size, begin, end, [&](char* const* rows) {
        int64_t id;
        load_ints(ids.dtype, rows[0], 1, 1, &id);
        if (id >= 0 && id < num_rows) {
            put_row(weight, weight_row(weight, id, room), size, out, rows[1], floats);
        } else if (out.dtype == DType::u8) {
            std::memset(rows[1], 0, static_cast<size_t>(size));
        } else {
            std::fill_n(floats, size, __builtin_nanf(""));
            store_floats(out.dtype, floats, size, rows[1], out.stride[out.rank - 1]);
        }
    });
}

int64_t unpack_jobs(const Call& call) { return jobs_of_rows(call.tensors[1].shape[0], call.tensors[1].shape[1]); }

void run_unpack(const Call& call, int64_t begin, int64_t end, Scratch& scratch) {
    const Tensor &packed = call.tensors[0], &out = call.tensors[1];
    const int64_t per_job = rows_of_a_job(out.shape[1]), last = std::min(out.shape[0], end * per_job);
    const size_t bytes = static_cast<size_t>(out.shape[1] * size_of(out.dtype));
    void* room = scratch.get(room_for_row(packed));
    for (int64_t row = begin * per_job; row < last; row++) {
        copy_packed_row(packed, row, room);
        std::memcpy(address(out, row * out.stride[0]), room, bytes);
    }
}

}  // namespace

extern const Kernel embedding, unpack;
const Kernel embedding{embedding_jobs, run_embedding};
const Kernel unpack{unpack_jobs, run_unpack};

}  // namespace furiosa::FURIOSA_VARIANT
