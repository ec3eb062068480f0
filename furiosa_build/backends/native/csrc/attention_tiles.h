// One job of attention, by tiles of the context.
//
// Flash attention: keys and values of a tile of tokens are packed so that the words of a column are neighbours; then,
// for a few rows of queries at a time, come the scores against the tile, their softmax as far as it is known, and
// their share of the output. A row's numbers do not depend on the rows that are computed with it: tiles begin at the
// same places of the context for all, and what a row does not attend to adds exact zeros.
#pragma once

#include "attention.h"
#include "attention_products.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

constexpr int64_t tile_tokens = 64;

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
    Job(const Attention& attention, int64_t job, Scratch& scratch);
    void run();

  private:
    static constexpr bool in_pairs = Arithmetic::in_pairs;
    static int64_t words_of(int64_t size) { return in_pairs ? (size + 1) / 2 : size; }
    static Words read_words(const char* row, DType dtype, int64_t size, int64_t from) {
        if constexpr (in_pairs) return load_part<Words>(row + from * 4, size * 2 - from * 4);
        return (Words)read(row, dtype, size, from);
    }

    void lay_out(Scratch& scratch);
    void begin();
    void look_up(int64_t tile);
    void prefetch(int64_t done, int64_t of);
    const char* row_of_head(const Rows& rows, const char* first, int64_t head) const {
        return first == zeros_ ? first : first + head * rows.head_stride;
    }
    void pack_keys(int64_t head, int64_t count);
    void pack_values(int64_t head, int64_t count);
    void attend(int64_t first, int64_t rows, int64_t tile, int64_t count);
    float prepare(float* scores, Span own, int64_t tile, int64_t count) const;
    void soften(int64_t row, int64_t in_block, int64_t tile, int64_t count);
    void finish(int64_t row);
    void finish_part(int64_t row);

    int64_t query_head(int64_t row) const {
        return (share_.head + row / rows_of_head_) * attention_.group + row % attention_.group;
    }
    int64_t token(int64_t row) const { return share_.token + row % rows_of_head_ / attention_.group; }

    const Attention& attention_;
    const Share share_;
    const int64_t rows_of_head_, rows_;  // row = (KV head * tokens + token) * group + head of the group
    const int64_t words_, value_stride_;

    Word* queries_;   // [rows][words]
    Span* spans_;     // [rows of a head]
    Word* keys_;      // [words][tile_tokens]
    Word* values_;    // [tile_tokens, or pairs of them][value_stride]
    float* scores_;   // [block_rows][tile_tokens]
    Word* shares_;    // [block_rows][tile_tokens, or pairs of them]
    float* output_;   // [rows][value_stride]
    Floats* sums_;    // [rows]: of the shares, by lane
    float* largest_;  // [rows]: the largest score, times log2(e)
    char* zeros_;     // a row, in place of one that is not there
    const char** here_;  // [keys and values][tile_tokens]: the rows of a tile, of the first head; zeros_ where it has none
    const char** next_;  // of the next tile
    int64_t to_fetch_ = 0, fetched_ = 0;  // rows of the next tile
};

template <class Arithmetic>
Job<Arithmetic>::Job(const Attention& attention, int64_t job, Scratch& scratch)
    : attention_(attention),
      share_(attention.share(job)),
      rows_of_head_(share_.tokens * attention.group),
      rows_(share_.heads * rows_of_head_),
      words_(words_of(attention.keys.size)),
      value_stride_(round_up(attention.values.size, lanes)) {
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
        queries_ = take<Word>(next, rows_ * words_ + lanes);
        spans_ = take<Span>(next, rows_of_head_);
        keys_ = take<Word>(next, round_up(words_, lanes) * tile_tokens);
        values_ = take<Word>(next, tile_tokens * value_stride_);
        scores_ = take<float>(next, block_rows * tile_tokens);
        shares_ = take<Word>(next, block_rows * tile_tokens);
        output_ = take<float>(next, rows_ * value_stride_);
        sums_ = take<Floats>(next, rows_);
        largest_ = take<float>(next, rows_);
        zeros_ = take<char>(next, 4 * (attention_.keys.size + value_stride_));
        here_ = take<const char*>(next, 2 * tile_tokens);
        next_ = take<const char*>(next, 2 * tile_tokens);
        if (pass == 0) begin = reinterpret_cast<uintptr_t>(scratch.get(next));
    }
}

template <class Arithmetic>
void Job<Arithmetic>::run() {
    const int64_t end = share_.context.end;
    if (share_.context.begin < end) begin();
    for (int64_t row = 0; row < rows_; row++) largest_[row] = -infinity, sums_[row] = Floats{};
    int64_t tile = share_.context.begin / tile_tokens * tile_tokens;
    look_up(tile);
    for (; tile < end; tile += tile_tokens) {
        const int64_t count = smaller(tile_tokens, end - tile);
        prefetch(1, 1);
        look_up(tile + tile_tokens);
        for (int64_t head = 0; head < share_.heads; head++) {
            pack_keys(head, count);
            pack_values(head, count);
            for (int64_t row = 0; row < rows_of_head_; row += block_rows)
                attend(head * rows_of_head_ + row, smaller(block_rows, rows_of_head_ - row), tile, count);
        }
    }
    for (int64_t row = 0; row < rows_; row++) attention_.partial.given() ? finish_part(row) : finish(row);
}

template <class Arithmetic>
void Job<Arithmetic>::begin() {
    __builtin_memset(zeros_, 0, static_cast<size_t>(4 * (attention_.keys.size + value_stride_)));
    __builtin_memset(output_, 0, static_cast<size_t>(rows_ * value_stride_) * sizeof(float));
    for (int64_t row = 0; row < rows_of_head_; row++) spans_[row] = attention_.span(share_.sequence, token(row));
    const Tensor& query = attention_.query;
    for (int64_t row = 0; row < rows_; row++) {
        const int64_t offset = share_.sequence * query.stride[0] + query_head(row) * query.stride[1];
        const char* from = query.as<char>() + (offset + token(row) * query.stride[2]) * bytes_of(query.dtype);
        for (int64_t word = 0; word < words_; word += lanes)  // what is too much is overwritten by the next row
            store(queries_ + row * words_ + word, read_words(from, query.dtype, attention_.keys.size, word));
    }
}

// The tile that was the next one is the one at hand, and this is the next.
template <class Arithmetic>
void Job<Arithmetic>::look_up(int64_t tile) {
    std::swap(here_, next_);
    to_fetch_ = 2 * greater(0, smaller(tile_tokens, share_.context.end - tile));
    fetched_ = 0;
    for (int64_t index = 0; index < tile_tokens; index++) {
        const bool is_read = share_.context.begin <= tile + index && tile + index < share_.context.end;
        const auto row = [&](const Rows& rows) {
            return is_read ? attention_.row(rows, share_.sequence, share_.head, tile + index) : zeros_;
        };
        next_[index] = row(attention_.keys);
        next_[tile_tokens + index] = row(attention_.values);
    }
}

// A share of the next tile comes from memory: while `done` of all is done. Slots lie anywhere: the processor does not
// guess where the next ones are. To the second level, for rows at a power of two from each other leave much of the first
// one unused.
template <class Arithmetic>
void Job<Arithmetic>::prefetch(int64_t done, int64_t of) {
    for (const int64_t until = to_fetch_ * done / of; fetched_ < until; fetched_++) {
        const Rows& rows = fetched_ % 2 == 0 ? attention_.keys : attention_.values;
        const char* row = next_[fetched_ % 2 * tile_tokens + fetched_ / 2];
        if (row == zeros_) continue;
        const int64_t bytes = rows.size * bytes_of(rows.dtype);
        for (int64_t head = 0; head < share_.heads; head++, row += rows.head_stride)
            for (int64_t at = 0; at < bytes; at += 64) asm volatile("prefetcht1 %0" : : "m"(row[at]));
    }
}

// Tokens become columns. Beyond the last token the columns are of any content: their scores are not used.
template <class Arithmetic>
void Job<Arithmetic>::pack_keys(int64_t head, int64_t count) {
    const Rows& keys = attention_.keys;
    const bool are_words = in_pairs || keys.dtype == DType::f32;
    for (int64_t token = 0; token < count; token += lanes) {
        const auto row = [&](int64_t lane) { return row_of_head(keys, here_[token + lane], head); };
        for (int64_t word = 0; word < words_; word += lanes) {
            prefetch((2 * head * tile_tokens + token) * words_ + word * lanes, 2 * share_.heads * tile_tokens * words_);
            Words square[lanes];
            if (are_words && (word + lanes) * 4 <= keys.size * bytes_of(keys.dtype)) {
#pragma GCC unroll 16
                for (int lane = 0; lane < lanes; lane++) square[lane] = load<Words>(row(lane) + word * 4);
            } else {
                for (int lane = 0; lane < lanes; lane++)
                    square[lane] = read_words(row(lane), keys.dtype, keys.size, word);
            }
            transpose(square);
#pragma GCC unroll 16
            for (int lane = 0; lane < lanes; lane++)
                store(keys_ + (word + lane) * tile_tokens + token, square[lane]);
        }
    }
}

template <class Arithmetic>
void Job<Arithmetic>::pack_values(int64_t head, int64_t count) {
    const Rows& values = attention_.values;
    constexpr int64_t step = in_pairs ? 2 : 1, between_prefetches = 8;
    for (int64_t token = 0; token < count; token += step) {
        if (token % between_prefetches == 0)
            prefetch((2 * head + 1) * tile_tokens + token, 2 * share_.heads * tile_tokens);
        const char* first = row_of_head(values, here_[tile_tokens + token], head);
        Word* packed = values_ + token / step * value_stride_;
        int64_t at = 0;
        if constexpr (in_pairs) {
            const char* second = row_of_head(values, here_[tile_tokens + token + 1], head);
            for (; at + 2 * lanes <= values.size; at += 2 * lanes)
                Arithmetic::interleave(first + at * 2, second + at * 2, packed + at);
            for (; at < value_stride_; at += lanes) {
                const int64_t bytes = (values.size - at) * 2;
                const Words low = widened(load_part<Numbers>(first + at * 2, bytes));
                store(packed + at, low | widened(load_part<Numbers>(second + at * 2, bytes)) << 16);
            }
        } else {
            for (; at < value_stride_; at += lanes) store(packed + at, read(first, values.dtype, values.size, at));
        }
    }
}

// Some rows of one head against a tile.
template <class Arithmetic>
void Job<Arithmetic>::attend(int64_t first, int64_t rows, int64_t tile, int64_t count) {
    const Span* spans = spans_ + first % rows_of_head_;
    bool any = false;
    for (int64_t row = 0; row < rows; row++) any |= spans[row].begin < tile + count && tile < spans[row].end;
    if (!any) return;
    const Products multiply = products_of_rows<Arithmetic>[rows - 1];
    multiply(queries_ + first * words_, words_, keys_, tile_tokens, words_, scores_, tile_tokens,
             round_up(count, lanes) / lanes, false);
    for (int64_t row = 0; row < rows; row++) soften(first + row, row, tile, count);
    multiply(shares_, words_of(tile_tokens), values_, value_stride_, words_of(count), output_ + first * value_stride_,
             value_stride_, value_stride_ / lanes, true);
}

// Makes of scores against a tile what only has to be multiplied by the result.
template <class Arithmetic>
float Job<Arithmetic>::prepare(float* scores, Span own, int64_t tile, int64_t count) const {
    constexpr float log2_e = 1.44269504f;
    const bool is_whole = own.begin <= tile && tile + round_up(count, lanes) <= own.end;
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
    float* scores = scores_ + in_block * tile_tokens;
    Word* shares = shares_ + in_block * words_of(tile_tokens);
    const float factor = prepare(scores, spans_[row % rows_of_head_], tile, count);
    Floats most = splat(-infinity);
    for (int64_t token = 0; token < count; token += lanes) most = larger(load<Floats>(scores + token), most);
    const float before = largest_[row], here = largest_of(most) * factor, now = here > before ? here : before;
    const float zero = now == -infinity ? 0 : now;
    if (now != before) {
        const float change = power_of_two(before - zero);
        largest_[row] = now;
        sums_[row] *= change;
        float* output = output_ + row * value_stride_;
        for (int64_t at = 0; at < value_stride_; at += lanes) store(output + at, load<Floats>(output + at) * change);
    }
    Floats sum = sums_[row];
    for (int64_t token = 0; token < count; token += lanes) {
        const Floats share = power_of_two(load<Floats>(scores + token) * factor - zero);
        sum += share;
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
    const Normalizer normalizer(attention_.sinks, query_head(row), largest_[row], total(sums_[row]));
    const int64_t offset = share_.sequence * out.stride[0] + token(row) * out.stride[1] + query_head(row) * out.stride[2];
    char* to = out.as<char>() + offset * bytes_of(out.dtype);
    const float* output = output_ + row * value_stride_;
    for (int64_t at = 0; at < value_stride_; at += lanes)
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
        __builtin_memcpy(to, output_ + row * value_stride_, static_cast<size_t>(size) * sizeof(float));
}

}  // namespace

}  // namespace furiosa::FURIOSA_VARIANT
