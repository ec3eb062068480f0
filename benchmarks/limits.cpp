// What a core can do at most: read memory, and multiply and add. Compiled by benchmarks/kernels.py for this machine.
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int bytes = 64;
#else
constexpr int bytes = 32;
#endif
using Vector [[gnu::vector_size(bytes)]] = int64_t;

namespace {

// Twelve independent chains of an instruction: enough for its latency.
#define CHAINS(instruction)                                                                                          \
    const Vector x = Vector{} + 0x0101010101010101;                                                                  \
    Vector c0{}, c1{}, c2{}, c3{}, c4{}, c5{}, c6{}, c7{}, c8{}, c9{}, c10{}, c11{};                                  \
    for (int64_t i = 0; i < rounds; i++) {                                                                           \
        asm volatile(instruction " %12, %12, %0\n" instruction " %12, %12, %1\n" instruction " %12, %12, %2\n"       \
                     instruction " %12, %12, %3\n" instruction " %12, %12, %4\n" instruction " %12, %12, %5\n"       \
                     instruction " %12, %12, %6\n" instruction " %12, %12, %7\n" instruction " %12, %12, %8\n"       \
                     instruction " %12, %12, %9\n" instruction " %12, %12, %10\n" instruction " %12, %12, %11\n"     \
                     : "+v"(c0), "+v"(c1), "+v"(c2), "+v"(c3), "+v"(c4), "+v"(c5), "+v"(c6), "+v"(c7), "+v"(c8),      \
                       "+v"(c9), "+v"(c10), "+v"(c11)                                                                \
                     : "v"(x));                                                                                      \
    }

}  // namespace

extern "C" {

int64_t read_all(const uint8_t* from, int64_t size) {
    Vector sums[4] = {};
    for (int64_t i = 0; i + 4 * bytes <= size; i += 4 * bytes) {
        for (int k = 0; k < 4; k++) {
            Vector vector;
            std::memcpy(&vector, from + i + k * bytes, bytes);
            sums[k] ^= vector;
            __builtin_prefetch(from + i + k * bytes + 4096);
        }
    }
    return (sums[0] ^ sums[1] ^ sums[2] ^ sums[3])[0];
}

// Each does 12 instructions a round and returns how many numbers an instruction multiplies and adds; 0: there is none.
int64_t multiply_floats(int64_t rounds) {
    CHAINS("vfmadd231ps")
    return bytes / 4;
}

int64_t multiply_bfloats([[maybe_unused]] int64_t rounds) {
#if defined(__AVX512BF16__)
    CHAINS("vdpbf16ps")
    return bytes / 2;
#else
    return 0;
#endif
}

int64_t multiply_int8([[maybe_unused]] int64_t rounds) {
#if defined(__AVX512VNNI__)
    CHAINS("vpdpbusd")
    return bytes;
#else
    return 0;
#endif
}
}
