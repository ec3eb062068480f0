// What products of both kinds of weights divide their work and their memory with.
#pragma once

#include <cstddef>
#include <cstdint>

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

}  // namespace
}  // namespace furiosa::FURIOSA_VARIANT
