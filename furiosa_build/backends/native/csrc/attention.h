// A call of `paged_attention`: what its operands say, and how it is divided into jobs.
#pragma once

#include "kv_cache.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a < b ? b : a; }

// Tokens are attended to in tiles, of as many groups of a cache as there are numbers in a vector of scores.
constexpr int64_t tile_groups = 4, tile_tokens = tile_groups * group_slots;

// The part of the context that a token attends to.
struct Span {
    int64_t begin;
    int64_t end;
    // The tile of its first token.
    int64_t first_tile() const { return begin / tile_tokens * tile_tokens; }
};

// What a job is about: some tokens of a sequence, the query heads that share a KV head, and a part of the context, which
// may be empty.
struct Share {
    int64_t sequence;
    int64_t token, tokens;  // the first, and how many
    int64_t head;
    Span context;
    int64_t place;  // of the part, in `partial`
};

struct Attention {
    Tensor query, slots, lens, positions, sinks, out, partial;
    Cache keys, values;
    int64_t batch, group;  // query heads that share a KV head
    int64_t tokens, context, window, chunk;
    float scaling, softcap;

    explicit Attention(const Call& call)
        : keys(call.tensors[1], Part::keys), values(call.tensors[2], Part::values) {
        const Tensor* t = call.tensors;
        query = t[0], slots = t[3], lens = t[4], positions = t[5], sinks = t[6], out = t[7], partial = t[8];
        batch = query.shape[0], group = query.shape[1] / keys.heads, tokens = query.shape[2];
        context = slots.shape[1], window = call.ints[0], chunk = call.ints[1];
        scaling = static_cast<float>(call.floats[0]), softcap = static_cast<float>(call.floats[1]);
    }

    // A job has one KV head. Where there is `partial`, it has a chunk of the context and all tokens; else all of the
    // context and some tokens.
    int64_t tokens_of_job() const { return partial.given() ? tokens : smaller(greater(64 / group, 1), tokens); }
    int64_t jobs() const {
        const int64_t parts = partial.given() ? partial.shape[1] : (tokens + tokens_of_job() - 1) / tokens_of_job();
        return batch * keys.heads * parts;
    }

    Share share(int64_t job) const {
        const int64_t head = job % keys.heads, heads = batch * keys.heads;
        if (partial.given()) {  // the heads of a chunk lie side by side in memory
            const int64_t chunks = partial.shape[1], sequence = job / keys.heads / chunks;
            const int64_t place = job / keys.heads % chunks;
            const Span whole = attended(sequence, 0, tokens);
            const int64_t begin = greater(whole.begin, place * chunk);
            return {sequence, 0, tokens, head, {begin, smaller(whole.end, (place + 1) * chunk)}, place};
        }
        // The last tokens have the longest contexts: they go first.
        const int64_t sequence = job % heads / keys.heads, token = (jobs() / heads - 1 - job / heads) * tokens_of_job();
        const int64_t count = smaller(tokens_of_job(), tokens - token);
        return {sequence, token, count, head, attended(sequence, token, count), 0};
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
        if (lens.given()) end = lens.as<int64_t>()[sequence * lens.stride[0]];
        if (positions.given())
            end = positions.as<int64_t>()[sequence * positions.stride[0] + token * positions.stride[1]] + 1;
        const int64_t begin = window > 0 ? greater(end - window, 0) : 0;
        end = smaller(greater(end, 0), context);
        return {smaller(begin, end), end};
    }

    // The slots of a sequence's context.
    const int64_t* slots_of(int64_t sequence) const { return slots.as<int64_t>() + sequence * slots.stride[0]; }
};

}  // namespace

}  // namespace furiosa::FURIOSA_VARIANT
