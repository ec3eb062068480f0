// copy: x, out.
#include "numbers.h"
#include "space.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

constexpr int64_t job_elements = 16384;
constexpr int64_t tile = 512;

template <class T>
void copy_piece(const char* from, int64_t from_step, char* to, int64_t to_step, int64_t length) {
    if (from_step == 1 && to_step == 1) {
        std::memcpy(to, from, static_cast<size_t>(length) * sizeof(T));
        return;
    }
    const T* source = reinterpret_cast<const T*>(from);
    T* target = reinterpret_cast<T*>(to);
    for (int64_t i = 0; i < length; i++) target[i * to_step] = source[i * from_step];
}

void copy_numbers(const char* from, int64_t from_step, char* to, int64_t to_step, int64_t length, int64_t size) {
    switch (size) {
        case 8:
            return copy_piece<uint64_t>(from, from_step, to, to_step, length);
        case 4:
            return copy_piece<uint32_t>(from, from_step, to, to_step, length);
        case 2:
            return copy_piece<uint16_t>(from, from_step, to, to_step, length);
        default:
            return copy_piece<uint8_t>(from, from_step, to, to_step, length);
    }
}

void convert_tile(DType from, const char* source, int64_t from_step, DType to, char* target, int64_t to_step,
                  int64_t length) {
    alignas(64) float floats[tile];
    alignas(64) int64_t ints[tile];
    if (is_float(from)) {
        load_floats(from, source, from_step, length, floats);
        if (is_float(to)) return store_floats(to, floats, length, target, to_step);
        if (to == DType::boolean) {
            for (int64_t i = 0; i < length; i++) ints[i] = floats[i] != 0;
        } else {
            for (int64_t i = 0; i < length; i++) ints[i] = to_int(floats[i]);
        }
        return store_ints(to, ints, length, target, to_step);
    }
    load_ints(from, source, from_step, length, ints);
    if (!is_float(to)) return store_ints(to, ints, length, target, to_step);
    for (int64_t i = 0; i < length; i++) floats[i] = static_cast<float>(ints[i]);
    store_floats(to, floats, length, target, to_step);
}

int64_t jobs(const Call& call) { return divide_up(num_elements(call.tensors[1]), job_elements); }

void run(const Call& call, int64_t begin, int64_t end, Scratch&) {
    const Tensor &x = call.tensors[0], &out = call.tensors[1];
    const Space<2> space(call.tensors, 2);
    const int64_t first = begin * job_elements, count = std::min(space.size(), end * job_elements) - first;
    const int64_t x_step = space.step(0), out_step = space.step(1);
    space.each_piece(first, count, [&](int64_t, int64_t length, const int64_t* index) {
        const int64_t from = space.offset(0, index), to = space.offset(1, index);
        if (x.dtype == out.dtype) {
            copy_numbers(address(x, from), x_step, address(out, to), out_step, length, size_of(x.dtype));
            return;
        }
        for (int64_t i = 0; i < length; i += tile) {
            convert_tile(x.dtype, address(x, from + i * x_step), x_step, out.dtype, address(out, to + i * out_step),
                         out_step, std::min(tile, length - i));
        }
    });
}

}  // namespace

extern const Kernel copy;
const Kernel copy{jobs, run};

}  // namespace furiosa::FURIOSA_VARIANT
