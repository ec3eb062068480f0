// A call of `paged_attention`: what its operands say, and how it is divided into jobs.
#pragma once

#include "kernels.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a < b ? b : a; }

inline int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// The keys or values of every sequence: rows of `size` numbers that lie side by side. Strides are in bytes.
struct Rows {
    char* data;
    DType dtype;
    int64_t size;
    int64_t sequence_stride;  // 0 in a cache, where rows are found by slot
    int64_t head_stride;
    int64_t row_stride;  // from a token or slot to the next

    static Rows of_cache(const Tensor& cache) {  // [slots, kv_heads, size]
        const int64_t bytes = bytes_of(cache.dtype);
        return {cache.as<char>(), cache.dtype, cache.shape[2], 0, cache.stride[1] * bytes, cache.stride[0] * bytes};
    }
    static Rows of_tokens(const Tensor& tokens) {  // [batch, kv_heads, tokens, size]
        const int64_t bytes = bytes_of(tokens.dtype);
        const int64_t sequence = tokens.stride[0] * bytes, head = tokens.stride[1] * bytes;
        return {tokens.as<char>(), tokens.dtype, tokens.shape[3], sequence, head, tokens.stride[2] * bytes};
    }
    char* at(int64_t sequence, int64_t head, int64_t row) const {
        return data + sequence * sequence_stride + head * head_stride + row * row_stride;
    }
};

// A number of an int64 tensor of one or two dimensions.
inline int64_t number(const Tensor& tensor, int64_t i, int64_t j = 0) {
    return tensor.as<int64_t>()[i * tensor.stride[0] + j * (tensor.rank > 1 ? tensor.stride[1] : 0)];
}

// The part of the context that a token attends to.
struct Span {
    int64_t begin;
    int64_t end;
};

// What a job is about: some tokens of a sequence, some KV heads with the query heads that share them, and a part of the
// context, which may be empty.
struct Share {
    int64_t sequence;
    int64_t token, tokens;  // the first, and how many
    int64_t head, heads;
    Span context;
    int64_t place;  // of the part, in `partial`
};

struct Attention {
    Tensor query, slots, lens, positions, sinks, out, partial;
    Rows keys, values;
    int64_t batch, kv_heads, group;  // query heads that share a KV head
    int64_t tokens, context, window, chunk;
    float scaling, softcap;

    explicit Attention(const Call& call) {
        const Tensor* t = call.tensors;
        query = t[0], slots = t[5], lens = t[6], positions = t[7], sinks = t[8], out = t[9], partial = t[10];
        keys = slots.given() ? Rows::of_cache(t[3]) : Rows::of_tokens(t[1]);
        values = slots.given() ? Rows::of_cache(t[4]) : Rows::of_tokens(t[2]);
        kv_heads = slots.given() ? t[3].shape[1] : t[1].shape[1];
        batch = query.shape[0], group = query.shape[1] / kv_heads, tokens = query.shape[2];
        context = slots.given() ? slots.shape[1] : tokens;
        window = call.ints[0], chunk = call.ints[1];
        scaling = static_cast<float>(call.floats[0]), softcap = static_cast<float>(call.floats[1]);
    }

    // Where there is `partial`, a job is a chunk of the context with all heads: it reads memory in one stream. Else it
    // is a KV head, with so many tokens that it is worth the packing of keys and values.
    int64_t tokens_of_job() const { return partial.given() ? tokens : smaller(greater(64 / group, 1), tokens); }
    int64_t jobs() const {
        if (partial.given()) return batch * partial.shape[1];
        return batch * kv_heads * ((tokens + tokens_of_job() - 1) / tokens_of_job());
    }

    Share share(int64_t job) const {
        if (partial.given()) {
            const int64_t chunks = partial.shape[1], sequence = job / chunks, place = job % chunks;
            const Span whole = attended(sequence, 0, tokens);
            const int64_t begin = greater(whole.begin, place * chunk);
            return {sequence, 0, tokens, 0, kv_heads, {begin, smaller(whole.end, (place + 1) * chunk)}, place};
        }
        // The last tokens have the longest contexts: they go first.
        const int64_t heads = batch * kv_heads, last = jobs() / heads - 1;
        const int64_t sequence = job % heads / kv_heads, token = (last - job / heads) * tokens_of_job();
        const int64_t count = smaller(tokens_of_job(), tokens - token);
        return {sequence, token, count, job % kv_heads, 1, attended(sequence, token, count), 0};
    }

    // What any of these tokens attends to.
    Span attended(int64_t sequence, int64_t token, int64_t count) const {
        Span all{context, 0};
        for (int64_t i = token; i < token + count; i++) {
            const Span own = span(sequence, i);
            if (own.begin < own.end) all = {smaller(all.begin, own.begin), greater(all.end, own.end)};
        }
        return all;
    }

    Span span(int64_t sequence, int64_t token) const {
        int64_t end = token + 1;
        if (slots.given()) end = tokens == 1 ? number(lens, sequence) : number(positions, sequence, token) + 1;
        const int64_t begin = window > 0 ? greater(end - window, 0) : 0;
        end = smaller(greater(end, 0), context);
        return {smaller(begin, end), end};
    }

    // Where row `index` of a sequence's context is.
    const char* row(const Rows& rows, int64_t sequence, int64_t head, int64_t index) const {
        return rows.at(sequence, head, slots.given() ? number(slots, sequence, index) : index);
    }
};

}  // namespace

}  // namespace furiosa::FURIOSA_VARIANT
