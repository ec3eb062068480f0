// One job of attention, by tiles of the context.
//
// Flash attention: for a few rows of queries at a time, the scores against the keys of a tile, their softmax as far as it
// is known, and their share of the output. A row's numbers do not depend on the rows that are computed with it, nor on
// where its context lies: tiles begin at the same places of the context for all, and what a row does not attend to adds
// exact zeros.
#pragma once

#include "attention_groups.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

// ---- The end of a softmax

// What the output of a query head has to be multiplied by, once all of its scores are known. Where there was nothing to
// attend to it becomes 0.
class Normalizer {
  public:
    Normalizer(const Tensor& sinks, int64_t head, float largest, float sum) : is_nothing_(sum == 0) {
        float factor = 1;
        if (sinks.given()) {  // one more score
            const char* own = sinks.as<char>() + head * sinks.stride[0] * bytes_of(sinks.dtype);
            const float sink = read(own, sinks.dtype, 1, 0)[0] * 1.44269504f;
            const float most = largest > sink ? largest : sink, zero = most == -infinity ? 0 : most;
            factor = power_of_two(largest - zero);
            sum = sum * factor + power_of_two(sink - zero);
        }
        factor_ = factor / sum;
    }
    Floats applied(Floats output) const { return is_nothing_ ? Floats{} : output * factor_; }

  private:
    bool is_nothing_;
    float factor_;
};

// ---- A job

template <class Arithmetic>
class Job {
  public:
    Job(const Attention& attention, const Share& share, Scratch& scratch);
    // `next` is what the thread does after this.
    void run(const Share& next);

  private:
    static constexpr bool in_pairs = Arithmetic::in_pairs;
    static constexpr int64_t share_words = tile_tokens / Arithmetic::numbers;  // of a row

    void lay_out(Scratch& scratch);
    void begin();
    void look_ahead(const Share& share, int64_t tile, Ahead& ahead) const;
    int64_t find_groups(int64_t tile);
    void attend(int64_t first, int64_t rows, int64_t tile, int64_t groups, Ahead& ahead);
    float prepare(float* scores, Span own, int64_t tile, int64_t count) const;
    void soften(int64_t row, int64_t in_block, int64_t tile, int64_t count);
    void finish(int64_t row);
    void finish_part(int64_t row);

    int64_t query_head(int64_t row) const { return share_.head * attention_.group + row % attention_.group; }
    int64_t token(int64_t row) const { return share_.token + row / attention_.group; }

    const Attention& attention_;
    const Share share_;
    const int64_t rows_;  // row = token * group + head of the group
    const Groups<Arithmetic> key_groups_, value_groups_;

    Word* queries_;   // [rows][words]
    Span* spans_;     // [rows]
    Word *copied_keys_, *unpacked_keys_, *copied_values_, *unpacked_values_;
    float* scores_;   // [block_rows][tile_tokens]
    Word* shares_;    // [block_rows][share_words]
    float* output_;   // [rows][stride of values]
    Floats* sums_;    // [rows]: of the shares, by lane
    float* largest_;  // [rows]: the largest score, times log2(e)
    const Word *keys_[tile_groups], *values_[tile_groups];
    // Of keys and values that are codes.
    alignas(64) float key_scales_[tile_tokens];
    alignas(64) float value_scales_[tile_tokens];
};

template <class Arithmetic>
Job<Arithmetic>::Job(const Attention& attention, const Share& share, Scratch& scratch)
    : attention_(attention),
      share_(share),
      rows_(share.tokens * attention.group),
      key_groups_(attention.keys),
      value_groups_(attention.values) {
    lay_out(scratch);
}

// A part of the memory that begins at `next`, which it moves on.
template <class T>
inline T* take(uintptr_t& next, int64_t count) {
    T* part = reinterpret_cast<T*>(next);
    next += static_cast<uintptr_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return part;
}

template <class Arithmetic>
void Job<Arithmetic>::lay_out(Scratch& scratch) {
    uintptr_t begin = 0;
    for (int pass = 0; pass < 2; pass++) {  // the first one only measures
        uintptr_t next = begin;
        queries_ = take<Word>(next, rows_ * key_groups_.rows() + lanes);
        spans_ = take<Span>(next, rows_);
        copied_keys_ = take<Word>(next, key_groups_.copied_words());
        unpacked_keys_ = take<Word>(next, key_groups_.unpacked_words());
        copied_values_ = take<Word>(next, value_groups_.copied_words());
        unpacked_values_ = take<Word>(next, value_groups_.unpacked_words());
        scores_ = take<float>(next, block_rows * tile_tokens);
        shares_ = take<Word>(next, block_rows * share_words);
        output_ = take<float>(next, rows_ * value_groups_.stride());
        sums_ = take<Floats>(next, rows_);
        largest_ = take<float>(next, rows_);
        if (pass == 0) begin = reinterpret_cast<uintptr_t>(scratch.get(next));
    }
}

template <class Arithmetic>
void Job<Arithmetic>::run(const Share& next) {
    const int64_t end = share_.context.end;
    if (share_.context.begin < end) begin();
    for (int64_t row = 0; row < rows_; row++) largest_[row] = -infinity, sums_[row] = Floats{};
    for (int64_t tile = share_.context.first_tile(); tile < end; tile += tile_tokens) {
        const int64_t groups = find_groups(tile), after = tile + tile_tokens;
        Ahead ahead;
        after < end ? look_ahead(share_, after, ahead) : look_ahead(next, next.context.first_tile(), ahead);
        for (int64_t row = 0; row < rows_; row += block_rows)
            attend(row, smaller(block_rows, rows_ - row), tile, groups, ahead);
    }
    for (int64_t row = 0; row < rows_; row++) attention_.partial.given() ? finish_part(row) : finish(row);
}

template <class Arithmetic>
void Job<Arithmetic>::begin() {
    const int64_t words = key_groups_.rows();
    __builtin_memset(output_, 0, static_cast<size_t>(rows_ * value_groups_.stride()) * sizeof(float));
    const Tensor& query = attention_.query;
    for (int64_t row = 0; row < rows_; row++) {
        spans_[row] = attention_.span(share_.sequence, token(row));
        const int64_t offset = share_.sequence * query.stride[0] + query_head(row) * query.stride[1];
        const char* from = query.as<char>() + (offset + token(row) * query.stride[2]) * bytes_of(query.dtype);
        for (int64_t word = 0; word < words; word += lanes) {  // what is too much is overwritten by the next row
            Words numbers;
            if constexpr (in_pairs)
                numbers = load_part<Words>(from + word * 4, (words - word) * 4);
            else
                numbers = (Words)read(from, query.dtype, words, word);
            store(queries_ + row * words + word, numbers);
        }
    }
}

// The groups that a tile begins with, where it has any.
template <class Arithmetic>
void Job<Arithmetic>::look_ahead(const Share& share, int64_t tile, Ahead& ahead) const {
    const int64_t begin = greater(tile, share.context.begin), end = smaller(tile + tile_tokens, share.context.end);
    for (const Cache* cache : {&attention_.keys, &attention_.values})
        for (int64_t token = begin; token < end; token = (token / group_slots + 1) * group_slots)
            ahead.add(cache->group(share.head, attention_.slots_of(share.sequence)[token]), cache->group_bytes());
}

// The keys and values of a tile; returns how many groups it has.
template <class Arithmetic>
int64_t Job<Arithmetic>::find_groups(int64_t tile) {
    const int64_t* slots = attention_.slots_of(share_.sequence);
    int64_t number = 0;
    for (int64_t token = tile; number < tile_groups && token < share_.context.end; number++, token += group_slots) {
        const int64_t begin = smaller(greater(share_.context.begin - token, 0), group_slots);
        const GroupTokens tokens{slots + token, begin, smaller(share_.context.end - token, group_slots)};
        keys_[number] = key_groups_.get(share_.head, tokens, number, copied_keys_, unpacked_keys_, key_scales_);
        values_[number] = value_groups_.get(share_.head, tokens, number, copied_values_, unpacked_values_, value_scales_);
    }
    return number;
}

// Some rows against a tile.
template <class Arithmetic>
void Job<Arithmetic>::attend(int64_t first, int64_t rows, int64_t tile, int64_t groups, Ahead& ahead) {
    const int64_t count = groups * group_slots, stride = value_groups_.stride();
    bool any = false;
    for (int64_t row = first; row < first + rows; row++) any |= spans_[row].begin < tile + count && tile < spans_[row].end;
    if (!any) return;
    const Products<Arithmetic>& multiply = products_of_rows<Arithmetic>[rows - 1];
    const int64_t words = key_groups_.rows();
    multiply.scores(queries_ + first * words, words, keys_, groups, scores_, ahead);
    for (int64_t row = 0; row < rows; row++) soften(first + row, row, tile, count);
    multiply.outputs(shares_, share_words, values_, groups, value_groups_.rows(), stride, output_ + first * stride,
                     ahead);
}

// Makes of scores against a tile what only has to be multiplied by the result.
template <class Arithmetic>
float Job<Arithmetic>::prepare(float* scores, Span own, int64_t tile, int64_t count) const {
    constexpr float log2_e = 1.44269504f;
    const bool is_whole = own.begin <= tile && tile + count <= own.end;
    if (is_whole && attention_.softcap == 0 && attention_.scaling > 0) return attention_.scaling * log2_e;
    const Floats begin = splat(static_cast<float>(own.begin - tile)), end = splat(static_cast<float>(own.end - tile));
    Floats index;
    for (int lane = 0; lane < lanes; lane++) index[lane] = static_cast<float>(lane);
    for (int64_t token = 0; token < count; token += lanes, index += static_cast<float>(lanes)) {
        Floats score = load<Floats>(scores + token) * attention_.scaling;
        if (attention_.softcap != 0) score = capped(score, attention_.softcap);
        store(scores + token, (index >= begin) & (index < end) ? score * log2_e : splat(-infinity));
    }
    return 1;
}

// The scores of a row become its shares, and what it has so far is brought to their scale.
template <class Arithmetic>
void Job<Arithmetic>::soften(int64_t row, int64_t in_block, int64_t tile, int64_t count) {
    const int64_t stride = value_groups_.stride();
    float* scores = scores_ + in_block * tile_tokens;
    Word* shares = shares_ + in_block * share_words;
    if (has_codes(attention_.keys.dtype))
        for (int64_t token = 0; token < count; token += lanes)
            store(scores + token, load<Floats>(scores + token) * load<Floats>(key_scales_ + token));
    const float factor = prepare(scores, spans_[row], tile, count);
    Floats most = splat(-infinity);
    for (int64_t token = 0; token < count; token += lanes) most = larger(load<Floats>(scores + token), most);
    const float before = largest_[row], here = largest_of(most) * factor, now = here > before ? here : before;
    const float zero = now == -infinity ? 0 : now;
    if (now != before) {
        const float change = power_of_two(before - zero);
        largest_[row] = now;
        sums_[row] *= change;
        float* output = output_ + row * stride;
        for (int64_t at = 0; at < stride; at += lanes) store(output + at, load<Floats>(output + at) * change);
    }
    Floats sum = sums_[row];
    for (int64_t token = 0; token < count; token += lanes) {
        Floats share = power_of_two(load<Floats>(scores + token) * factor - zero);
        sum += share;
        if (has_codes(attention_.values.dtype)) share *= load<Floats>(value_scales_ + token);
        if constexpr (in_pairs)
            store(shares + token / 2, Arithmetic::rounded(share));
        else
            store(shares + token, share);
    }
    sums_[row] = sum;
}

template <class Arithmetic>
void Job<Arithmetic>::finish(int64_t row) {
    const Tensor& out = attention_.out;
    const int64_t stride = value_groups_.stride();
    const Normalizer normalizer(attention_.sinks, query_head(row), largest_[row], total(sums_[row]));
    const int64_t offset = share_.sequence * out.stride[0] + token(row) * out.stride[1] + query_head(row) * out.stride[2];
    char* to = out.as<char>() + offset * bytes_of(out.dtype);
    const float* output = output_ + row * stride;
    for (int64_t at = 0; at < stride; at += lanes)
        write(to, out.dtype, attention_.values.size, at, normalizer.applied(load<Floats>(output + at)));
}

// A row of `partial`: the output so far, the largest score and the sum of the shares.
template <class Arithmetic>
void Job<Arithmetic>::finish_part(int64_t row) {
    const Tensor& partial = attention_.partial;
    const int64_t size = attention_.values.size;
    const int64_t offset = share_.sequence * partial.stride[0] + share_.place * partial.stride[1];
    float* to = partial.as<float>() + offset + token(row) * partial.stride[2] + query_head(row) * partial.stride[3];
    to[size] = largest_[row], to[size + 1] = total(sums_[row]);
    if (largest_[row] != -infinity || to[size + 1] != 0)
        __builtin_memcpy(to, output_ + row * value_groups_.stride(), static_cast<size_t>(size) * sizeof(float));
}

}  // namespace

}  // namespace furiosa::FURIOSA_VARIANT
