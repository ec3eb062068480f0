// write_kv_cache and read_kv_cache: rows to their slots, and back.
#include "kv_cache.h"

#include <cmath>
#include <cstring>

#include "numbers.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

template <size_t bytes>
void copy_pieces(const char* from, int64_t from_stride, char* to, int64_t to_stride, int64_t count) {
    for (int64_t i = 0; i < count; i++) std::memcpy(to + i * to_stride, from + i * from_stride, bytes);
}

void copy_pieces(const char* from, int64_t from_stride, char* to, int64_t to_stride, const Pieces& pieces) {
    const auto copy = pieces.bytes == 4 ? copy_pieces<4> : pieces.bytes == 2 ? copy_pieces<2> : copy_pieces<1>;
    copy(from, from_stride, to, to_stride, pieces.count);
}

int64_t slot_of(const Tensor& slots, int64_t sequence, int64_t token) {
    return slots.as<int64_t>()[sequence * slots.stride[0] + token * slots.stride[1]];
}

// ---- write_kv_cache: key, value, key_cache, value_cache, slot_mapping

// To nearest, ties to even; `magnitude` is at most what the largest code stands for.
uint32_t int8_code(float magnitude) { return static_cast<uint32_t>(std::rint(magnitude)); }

// Three bits behind the first, but no finer than 2^-9.
uint32_t fp8_code(float magnitude) {
    const uint32_t bits = bits_of<uint32_t>(magnitude);
    const uint32_t normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
    return magnitude < 0x1p-6f ? static_cast<uint32_t>(std::rint(magnitude * 0x1p9f)) : normal;
}

template <uint32_t (*code)(float)>
void encode(const float* row, int64_t count, float scale, float most, uint8_t* codes) {
    for (int64_t i = 0; i < count; i++) {
        const float x = row[i] / scale;
        const float magnitude = std::fabs(x) < most ? std::fabs(x) : most;  // where the scale is 0 or NaN too
        codes[i] = static_cast<uint8_t>(code(magnitude) | (x < 0 ? 0x80 : 0));
    }
}

// The codes of a row, from its numbers; returns the scale.
float encode(DType dtype, const float* row, int64_t count, uint8_t* codes) {
    const float most = dtype == int8_codes ? 127 : 448, scale = largest_of(row, count) / most;
    (dtype == int8_codes ? encode<int8_code> : encode<fp8_code>)(row, count, scale, most, codes);
    return scale;
}

// tokens [batch, heads, tokens, size], whose last dimension is contiguous.
void write(const Tensor& tokens, const Cache& cache, const Tensor& slots, int64_t head, Scratch& scratch) {
    float* const numbers = static_cast<float*>(scratch.get(static_cast<size_t>(cache.size) * 5));
    uint8_t* const codes = reinterpret_cast<uint8_t*>(numbers + cache.size);
    for (int64_t sequence = 0; sequence < tokens.shape[0]; sequence++) {
        for (int64_t token = 0; token < tokens.shape[2]; token++) {
            const int64_t slot = slot_of(slots, sequence, token);
            const int64_t row = sequence * tokens.stride[0] + head * tokens.stride[1] + token * tokens.stride[2];
            const Pieces pieces = cache.pieces(slot);
            char* const group = cache.group(head, slot);
            const char* from = address(tokens, row);
            if (has_codes(cache.dtype)) {
                load_floats(tokens.dtype, from, 1, cache.size, numbers);
                const float scale = encode(cache.dtype, numbers, cache.size, codes);
                std::memcpy(group + cache.scale(slot), &scale, sizeof scale);
                from = reinterpret_cast<const char*>(codes);
            }
            copy_pieces(from, pieces.bytes, group + pieces.first, pieces.stride, pieces);
        }
    }
}

// A job is a KV head: where several tokens have one slot, as those of padding do, the last one stays.
int64_t write_jobs(const Call& call) { return call.tensors[0].shape[1]; }

void run_write(const Call& call, int64_t begin, int64_t end, Scratch& scratch) {
    const Tensor* t = call.tensors;
    for (int64_t head = begin; head < end; head++) {
        write(t[0], Cache(t[2], Part::keys), t[4], head, scratch);
        write(t[1], Cache(t[3], Part::values), t[4], head, scratch);
    }
}

// ---- read_kv_cache: cache, slots, out

// A job is a sequence: out [batch, context, heads, size].
int64_t read_jobs(const Call& call) { return call.tensors[2].shape[0]; }

void run_read(const Call& call, int64_t begin, int64_t end, Scratch&) {
    const Cache cache(call.tensors[0], call.ints[0] == 0 ? Part::keys : Part::values);
    const Tensor &slots = call.tensors[1], &out = call.tensors[2];
    for (int64_t sequence = begin; sequence < end; sequence++) {
        for (int64_t token = 0; token < out.shape[1]; token++) {
            const int64_t slot = slot_of(slots, sequence, token);
            const Pieces pieces = cache.pieces(slot);
            for (int64_t head = 0; head < cache.heads; head++) {
                const int64_t row = sequence * out.stride[0] + token * out.stride[1] + head * out.stride[2];
                const char* from = cache.group(head, slot) + pieces.first;
                copy_pieces(from, pieces.stride, out.as<char>() + row * cache.bytes(), pieces.bytes, pieces);
            }
        }
    }
}

}  // namespace

extern const Kernel write_kv_cache{write_jobs, run_write};
extern const Kernel read_kv_cache{read_jobs, run_read};

}  // namespace furiosa::FURIOSA_VARIANT
