// The tile instructions of AMX in plain C++, as Intel's manual specifies them: included before the kernels, for machines
// that have none. What the processor would refuse ends the process.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated_amx {
namespace {

struct Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// Of one thread.
struct State {
    Configuration configuration;
    uint8_t tiles[8][16][64];
};
thread_local State state{};

inline void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "AMX would fault: %s\n", what);
    std::abort();
}

inline int rows(int tile) { return state.configuration.rows[tile]; }
inline int row_bytes(int tile) { return state.configuration.row_bytes[tile]; }

inline void require_tile(int tile) { require(state.configuration.palette == 1 && rows(tile) > 0, "a tile that is not configured"); }

inline void load_configuration(const void* from) {
    Configuration given;
    std::memcpy(&given, from, sizeof(given));
    require(given.palette == 1 && given.start_row == 0, "palette or first row");
    for (const uint8_t byte : given.reserved) require(byte == 0, "a reserved byte");
    for (int tile = 0; tile < 16; tile++) {
        require((given.rows[tile] == 0) == (given.row_bytes[tile] == 0), "rows without bytes, or bytes without rows");
        require(given.rows[tile] <= (tile < 8 ? 16 : 0) && given.row_bytes[tile] <= 64, "a tile that is too large");
    }
    state = State{};
    state.configuration = given;
}

inline void release() { state = State{}; }

inline void zero(int tile) {
    require_tile(tile);
    std::memset(state.tiles[tile], 0, sizeof(state.tiles[tile]));
}

inline void load(int tile, const void* from, int64_t stride) {
    zero(tile);
    for (int row = 0; row < rows(tile); row++) {
        std::memcpy(state.tiles[tile][row], static_cast<const uint8_t*>(from) + row * stride, row_bytes(tile));
    }
}

inline void store(int tile, void* to, int64_t stride) {
    require_tile(tile);
    for (int row = 0; row < rows(tile); row++) {
        std::memcpy(static_cast<uint8_t*>(to) + row * stride, state.tiles[tile][row], row_bytes(tile));
    }
}

inline void require_shapes(int sums, int a, int b) {
    require_tile(sums), require_tile(a), require_tile(b);
    require(sums != a && sums != b && a != b, "one tile twice");
    require(rows(sums) == rows(a) && row_bytes(sums) == row_bytes(b), "sums of other shapes than the product");
    require(row_bytes(a) == 4 * rows(b) && row_bytes(sums) % 4 == 0, "tiles that cannot be multiplied");
}

template <class Number>
Number number(int tile, int row, int index) {
    Number number;
    std::memcpy(&number, state.tiles[tile][row] + index * sizeof(number), sizeof(number));
    return number;
}

// Subnormal numbers are zero.
inline float flush(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x; }

inline float from_bf16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof(x));
    return flush(x);
}

// Each product is added with one rounding: first those of even numbers of K and of odd ones, then both to the sum.
inline void multiply_bf16(int sums, int a, int b) {
    require_shapes(sums, a, b);
    for (int row = 0; row < rows(sums); row++) {
        for (int column = 0; column < row_bytes(sums) / 4; column++) {
            float of_parity[2] = {0, 0};
            for (int k = 0; k < rows(b); k++) {
                for (int parity = 0; parity < 2; parity++) {
                    const float x = from_bf16(number<uint16_t>(a, row, 2 * k + parity));
                    const float weight = from_bf16(number<uint16_t>(b, k, 2 * column + parity));
                    of_parity[parity] = flush(__builtin_fmaf(x, weight, of_parity[parity]));
                }
            }
            const float product = flush(of_parity[0] + of_parity[1]);
            const float sum = flush(flush(number<float>(sums, row, column)) + product);
            std::memcpy(state.tiles[sums][row] + column * sizeof(sum), &sum, sizeof(sum));
        }
    }
}

// Signed times unsigned; sums wrap around.
inline void multiply_int8(int sums, int a, int b) {
    require_shapes(sums, a, b);
    for (int row = 0; row < rows(sums); row++) {
        for (int column = 0; column < row_bytes(sums) / 4; column++) {
            uint32_t sum = number<uint32_t>(sums, row, column);
            for (int k = 0; k < rows(b); k++) {
                for (int i = 0; i < 4; i++) {
                    sum += static_cast<uint32_t>(number<int8_t>(a, row, 4 * k + i) * number<uint8_t>(b, k, 4 * column + i));
                }
            }
            std::memcpy(state.tiles[sums][row] + column * sizeof(sum), &sum, sizeof(sum));
        }
    }
}

}  // namespace
}  // namespace emulated_amx

#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig(from) emulated_amx::load_configuration(from)
#define _tile_release() emulated_amx::release()
#define _tile_loadd(tile, from, stride) emulated_amx::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated_amx::store(tile, to, stride)
#define _tile_dpbf16ps(sums, a, b) emulated_amx::multiply_bf16(sums, a, b)
#define _tile_dpbsud(sums, a, b) emulated_amx::multiply_int8(sums, a, b)
