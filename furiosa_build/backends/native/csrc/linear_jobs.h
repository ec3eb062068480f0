// What products of both kinds of weights have in common: how they divide their memory, and what they read and write.
#pragma once

#include <cstddef>
#include <cstdint>

#include "numbers.h"
#include "vectors.h"

namespace furiosa::FURIOSA_VARIANT {
namespace {

inline int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }
inline int64_t quotient_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

// Hands out parts of one piece of memory, each at a line of the cache; of none, only counts.
class Memory {
  public:
    explicit Memory(void* memory = nullptr) : memory_(static_cast<uint8_t*>(memory)) {}

    template <class T>
    T* take(int64_t count) {
        constexpr int64_t line = 64;
        uint8_t* part = memory_ == nullptr ? nullptr : memory_ + used_;
        used_ += quotient_up(count * static_cast<int64_t>(sizeof(T)), line) * line;
        return reinterpret_cast<T*>(part);
    }
    size_t used() const { return static_cast<size_t>(used_); }

  private:
    uint8_t* memory_;
    int64_t used_ = 0;
};

// A vector of a block's columns of a row, from `first` on: of any value where there are no columns.
inline Floats floats_at(DType dtype, const char* row, int64_t first, int64_t columns) {
    const void* from = row + first * size_of(dtype);
    if (first + lanes <= columns) {
        if (dtype == DType::bf16) return from_bf16(load<Halves>(from));
        if (dtype == DType::f32) return load<Floats>(from);
    }
    float numbers[lanes] = {};
    if (first < columns) load_floats(dtype, from, 1, at_most(lanes, columns - first), numbers);
    return load<Floats>(numbers);
}

inline void store_at(DType dtype, char* row, int64_t first, int64_t columns, Floats values) {
    void* to = row + first * size_of(dtype);
    if (first + lanes <= columns) {
        if (dtype == DType::bf16) return store(to, to_bf16(values));
        if (dtype == DType::f32) return store(to, values);
    }
    float numbers[lanes];
    store(numbers, values);
    if (first < columns) store_floats(dtype, numbers, at_most(lanes, columns - first), to, 1);
}

}  // namespace
}  // namespace furiosa::FURIOSA_VARIANT
