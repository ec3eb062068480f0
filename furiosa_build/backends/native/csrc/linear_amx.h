// Tiles of AMX: products of up to 32 rows of x with a block of 32 rows of weights, in the eight registers of 16 rows by
// 64 bytes that the processor has. Packed weights lie as these take them: of 16 columns, every 128 bytes 64.
//
// The processor sums bfloat16 16 units of K at a time: first of each unit its even and its odd numbers, then both, which
// it adds to the sum. A row gives the same in every tile if K is cut at multiples of 16 units, but not the same as with
// dot products of vectors: either all of a format's tiles are of AMX, or none. Integers are exact in any order.
#pragma once

#include "linear_tiles.h"

#ifdef __AMX_TILE__
#define FURIOSA_HAS_TILES 1

namespace furiosa::FURIOSA_VARIANT {
namespace {

constexpr int64_t rows_of_a_register = 16, bytes_of_a_register_row = 64;
constexpr int64_t units_of_a_register = bytes_of_a_register_row / unit_bytes;
constexpr int rows_of_registers = 32;  // of x: two registers

// What the processor is told about its registers.
struct Configuration {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(Configuration) == 64, "as the processor reads it");

// Registers 0 and 1 sum the upper rows, 2 and 3 the lower ones; 4 and 5 have x, 6 and 7 weights.
inline Configuration configuration_for(int64_t rows, int64_t units) {
    const int64_t upper = rows < rows_of_a_register ? rows : rows_of_a_register, lower = rows - upper;
    Configuration configuration;
    const auto set = [&](int number, int64_t register_rows, int64_t row_bytes) {
        configuration.rows[number] = static_cast<uint8_t>(register_rows);
        configuration.row_bytes[number] = static_cast<uint16_t>(register_rows > 0 ? row_bytes : 0);
    };
    for (int column = 0; column < 2; column++) {
        set(column, upper, bytes_of_a_register_row);
        set(2 + column, lower, bytes_of_a_register_row);
        set(6 + column, units, bytes_of_a_register_row);
    }
    set(4, upper, units * unit_bytes);
    set(5, lower, units * unit_bytes);
    return configuration;
}

// Weights and x as bfloat16.
struct RegistersOfPairs {
    static constexpr int steps = 1;
    static void multiply_upper() {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    static void multiply_lower() {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
};

// Weights + 128 and x in int8: sums are too large by 128 times the sum of x.
struct RegistersOfFours {
    static constexpr int steps = 1;
    static void multiply_upper() {
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
    }
    static void multiply_lower() {
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
};

// Of `count` times `units` units of K.
template <class Kind>
void multiply_registers(const uint8_t* weights, const uint8_t* x, int64_t row_bytes, int64_t rows, int64_t count,
                        int64_t units, const uint8_t* next, int64_t next_step, bool begin, char* sums) {
    constexpr int64_t sums_bytes = block_bytes, half = bytes_of_a_register_row, line = 64;
    const bool has_lower = rows > rows_of_a_register;
    char* const lower_sums = sums + rows_of_a_register * sums_bytes;
    const Configuration configuration = configuration_for(rows, units);
    // The compiler (GCC 12) does not know that a register is loaded from memory.
    asm volatile("" : : "r"(&configuration) : "memory");
    _tile_loadconfig(&configuration);  // which sets registers to zero
    if (!begin) {
        _tile_loadd(0, sums, sums_bytes);
        _tile_loadd(1, sums + half, sums_bytes);
    }
    if (!begin && has_lower) {
        _tile_loadd(2, lower_sums, sums_bytes);
        _tile_loadd(3, lower_sums + half, sums_bytes);
    }
    for (; count > 0; count--) {
        for (int64_t i = 0; i < units * next_step; i += line) __builtin_prefetch(next + i);
        _tile_loadd(6, weights, block_bytes);
        _tile_loadd(7, weights + half, block_bytes);
        _tile_loadd(4, x, row_bytes);
        Kind::multiply_upper();
        if (has_lower) {
            _tile_loadd(5, x + rows_of_a_register * row_bytes, row_bytes);
            Kind::multiply_lower();
        }
        weights += units * block_bytes;
        x += units * unit_bytes;
        next += units * next_step;
    }
    _tile_stored(0, sums, sums_bytes);
    _tile_stored(1, sums + half, sums_bytes);
    if (has_lower) {
        _tile_stored(2, lower_sums, sums_bytes);
        _tile_stored(3, lower_sums + half, sums_bytes);
    }
}

template <class Kind, int rows>
void tile_of_registers(const uint8_t* weights, const uint8_t* x, int64_t row_bytes, int64_t units, const uint8_t* next,
                       int64_t next_step, bool begin, void* sums) {
    const int64_t count = units / units_of_a_register, done = count * units_of_a_register;
    char* const to = static_cast<char*>(sums);
    if (done > 0) {
        multiply_registers<Kind>(weights, x, row_bytes, rows, count, units_of_a_register, next, next_step, begin, to);
    }
    if (done < units) {
        multiply_registers<Kind>(weights + done * block_bytes, x + done * unit_bytes, row_bytes, rows, 1, units - done,
                                 next + done * next_step, next_step, begin && done == 0, to);
    }
    _tile_release();
}

template <class Kind, int... rows>
const Method& registers_of(std::integer_sequence<int, rows...>) {
    static const Tile tiles[] = {tile_of_registers<Kind, rows + 1>...};
    static const Method method = {Kind::steps, sizeof...(rows), tiles, nullptr};
    return method;
}

template <class Kind>
const Method& registers_of() {
    return registers_of<Kind>(std::make_integer_sequence<int, rows_of_registers>());
}

// Weights are expanded for any number of rows.
template <class Kind>
const Method& expansion_of() {
    static const Method method = {Kind::steps, 0, nullptr, expand<Kind>};
    return method;
}

}  // namespace
}  // namespace furiosa::FURIOSA_VARIANT
#endif
