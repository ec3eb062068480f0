// The groups of keys or of values that attention multiplies with: those of a cache where they lie there just so, else
// copies of them.
#pragma once

#include "attention.h"
#include "attention_products.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

// The tokens of a group of the context: their slots, and which of them are attended to.
struct GroupTokens {
    const int64_t* slots;
    int64_t begin, end;

    bool has(int64_t token) const { return begin <= token && token < end; }
    bool is_whole() const { return begin == 0 && end == group_slots; }
    // Whether the slots are those of one group of a cache, in order. Only slots that are attended to are looked at.
    bool is_group() const {
        if (begin >= end) return false;
        bool same = slots[begin] % group_slots == begin;
        for (int64_t i = begin; i < end; i++) same &= slots[i] == slots[begin] + (i - begin);
        return same;
    }
};

// ---- Copies of words as they are stored

// Columns of tokens that are not attended to stay as they are: their scores are not used.
inline void gather_keys(const Cache& cache, int64_t head, const GroupTokens& tokens, Word* to) {
    struct Run {  // of tokens whose slots are neighbours in one group
        int64_t begin, end;
        const Word* from;
    } runs[group_slots];
    int64_t count = 0;
    for (int64_t begin = tokens.begin, end; begin < tokens.end; begin = end) {
        const int64_t slot = tokens.slots[begin];
        end = begin + 1;
        while (end < tokens.end && tokens.slots[end] == slot + (end - begin) && tokens.slots[end] % group_slots != 0) end++;
        runs[count++] = {begin, end, reinterpret_cast<const Word*>(cache.group(head, slot)) + (slot % group_slots - begin)};
    }
    for (int64_t row = 0; row < cache.rows(); row++, to += group_slots) {
#ifdef __AVX512F__
        __m512i words = _mm512_setzero_si512();
        for (int64_t i = 0; i < count; i++) {
            const auto mask = static_cast<__mmask16>((1u << runs[i].end) - (1u << runs[i].begin));
            words = _mm512_mask_loadu_epi32(words, mask, runs[i].from + row * group_slots);
        }
        _mm512_store_si512(to, words);
#else
        for (int64_t i = 0; i < count; i++)
            for (int64_t n = runs[i].begin; n < runs[i].end; n++) to[n] = runs[i].from[row * group_slots + n];
#endif
    }
}

// Values of tokens that are not attended to are zeros: their shares are, and NaN times zero is NaN.
template <int64_t numbers>
void gather_values(const Cache& cache, int64_t head, const GroupTokens& tokens, Word* __restrict to) {
    constexpr int64_t bits = 32 / numbers;
    constexpr Word ones = static_cast<Word>((uint64_t{1} << bits) - 1);
    for (int64_t token = 0; token < group_slots; token += numbers, to += cache.size) {
        const Word* from[numbers];  // of one of the numbers of each word
        Word down[numbers], kept[numbers];
        for (int64_t i = 0; i < numbers; i++) {
            const bool is_attended = tokens.has(token + i);
            const int64_t slot = tokens.slots[is_attended ? token + i : tokens.begin], at = slot % group_slots;
            from[i] = reinterpret_cast<const Word*>(cache.group(head, slot)) + at / numbers * cache.size;
            down[i] = static_cast<Word>(at % numbers * bits), kept[i] = is_attended ? ones : 0;
        }
        for (int64_t n = 0; n < cache.size; n++) {
            Word word = 0;
#pragma GCC unroll 4
            for (int64_t i = 0; i < numbers; i++) word |= (from[i][n] >> down[i] & kept[i]) << i * bits;
            to[n] = word;
        }
    }
}

inline void gather_scales(const Cache& cache, int64_t head, const GroupTokens& tokens, Word* to) {
    for (int64_t token = 0; token < group_slots; token++) {
        const int64_t slot = tokens.slots[tokens.has(token) ? token : tokens.begin];
        const Word* scale = reinterpret_cast<const Word*>(cache.group(head, slot) + cache.scale(slot));
        to[token] = tokens.has(token) ? *scale : 0;
    }
}

// ---- Words as they are multiplied

// Rows of words become rows of words of `Arithmetic`: as many of each as have the numbers of one.
template <class Arithmetic, DType dtype>
void unpack_rows(const Word* from, int64_t rows, int64_t columns, Word* to, int64_t to_stride) {
    constexpr int64_t parts = Arithmetic::template words_in<dtype>;
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t at = 0; at < columns; at += lanes) {
            const char* words = reinterpret_cast<const char*>(from + row * columns + at);
            Words unpacked[parts];
            Arithmetic::template unpack<dtype>(load_part<Words>(words, (columns - at) * 4), unpacked);
            for (int64_t part = 0; part < parts; part++) store(to + (row * parts + part) * to_stride + at, unpacked[part]);
        }
    }
}

// ---- Groups

template <class Arithmetic>
class Groups {
  public:
    explicit Groups(const Cache& cache)
        : cache_(cache),
          rows_(cache.part == Part::keys ? cache.size / Arithmetic::numbers : group_slots / Arithmetic::numbers),
          stride_(round_up(cache.columns(), lanes)),
          is_direct_(Arithmetic::takes(cache.dtype) && stride_ == cache.columns()) {}

    int64_t rows() const { return rows_; }      // of a group, in words of `Arithmetic`
    int64_t stride() const { return stride_; }  // from a row to the next
    // Words of memory that `get` needs for a tile.
    int64_t copied_words() const { return tile_groups * cache_.group_bytes() / 4; }
    int64_t unpacked_words() const { return is_direct_ ? 0 : tile_groups * rows_ * stride_; }

    // Group `number` of a tile: [rows][stride], and the scales of its tokens where there are any. `copied`, `unpacked`
    // and `scales` are memory of the tile.
    const Word* get(int64_t head, const GroupTokens& tokens, int64_t number, Word* copied, Word* unpacked,
                    float* scales) const {
        const Word* stored;
        if (tokens.is_group() && (cache_.part == Part::keys || tokens.is_whole())) {
            stored = reinterpret_cast<const Word*>(cache_.group(head, tokens.slots[tokens.begin]));
        } else {
            copied += number * cache_.group_bytes() / 4;
            gather_of(cache_)(cache_, head, tokens, copied);
            if (has_codes(cache_.dtype)) gather_scales(cache_, head, tokens, copied + cache_.words_bytes() / 4);
            stored = copied;
        }
        if (has_codes(cache_.dtype))
            __builtin_memcpy(scales + number * group_slots, stored + cache_.words_bytes() / 4, group_slots * 4);
        if (is_direct_) return stored;
        unpacked += number * rows_ * stride_;
        unpack_of(cache_.dtype)(stored, cache_.rows(), cache_.columns(), unpacked, stride_);
        return unpacked;
    }

  private:
    static auto gather_of(const Cache& cache) {
        if (cache.part == Part::keys) return gather_keys;
        return cache.numbers() == 1 ? gather_values<1> : cache.numbers() == 2 ? gather_values<2> : gather_values<4>;
    }
    static auto unpack_of(DType dtype) {
        if (dtype == int8_codes) return unpack_rows<Arithmetic, int8_codes>;
        if (dtype == fp8_codes) return unpack_rows<Arithmetic, fp8_codes>;
        if constexpr (!Arithmetic::in_pairs) {
            if (dtype == DType::f32) return unpack_rows<Arithmetic, DType::f32>;
            if (dtype == DType::f16) return unpack_rows<Arithmetic, DType::f16>;
        }
        return unpack_rows<Arithmetic, DType::bf16>;
    }

    Cache cache_;
    int64_t rows_, stride_;
    bool is_direct_;
};

}  // namespace

}  // namespace furiosa::FURIOSA_VARIANT
