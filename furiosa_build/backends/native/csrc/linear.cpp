// Products of activations with packed weights.
//
// A job is some blocks of 32 columns of one of the outputs, for some rows. Every output is one sum over K in order,
// whatever the number of rows: what a row of x gives does not depend on the other rows.
#include "linear_amx.h"
#include "linear_jobs.h"
#include "linear_tiles.h"
#include "numbers.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

// Numbers of a packed weight, as emit_linear.py has them.
enum class Format : int64_t { f32 = 0, bf16 = 1, f16 = 2, int8 = 3, fp8 = 4 };

constexpr int64_t most_rows = 48;              // of a job: what x is of a piece of K stays in the cache
constexpr int64_t rows_of_a_panel = 96;        // the same, where it expands weights
constexpr int64_t bytes_of_a_job = 256 << 10;  // of weights, where they are read for few rows
constexpr int64_t most_blocks = 16;
constexpr int64_t least_blocks_of_a_copy = 8, most_blocks_of_a_copy = 32;  // of a job that copies x: then it costs little
constexpr int64_t enough_jobs = 16;   // such a job has fewer blocks where there would be fewer jobs
constexpr int64_t piece_units = 256;  // of K: 32 KB of weights
constexpr int64_t gap = 64;           // bytes between rows of a copy: at powers of two they would share lines of the cache
constexpr int64_t ways = 8;           // so many rows that do share lines stay in the cache: of a tile, where x is not copied
constexpr int64_t ahead = 4096;  // bytes from what is read to what is prefetched, where all of K is one piece

// How the products of a format with an x are computed.
struct Choice {
    DType x;               // what rows of x are converted to
    const Method* method;  // takes the weights as they are
    const Method* panels;  // for more rows than `method` takes: reads panels that `method` expands. May be null.
    int64_t offset = 0;    // what stored weights are too large by
};

#if defined(__AVX512F__)
constexpr int float_rows = 12, converted_rows = 8;
#else
constexpr int float_rows = 6, converted_rows = 4;
#endif

Choice choose(Format format, [[maybe_unused]] DType x, [[maybe_unused]] int64_t k) {
    [[maybe_unused]] const bool fits_int32 = k <= 1 << 16;
#if defined(FURIOSA_HAS_TILES)
    const Method& pairs = registers_of<RegistersOfPairs>();
    if (x == DType::i8 && fits_int32) return {DType::i8, &registers_of<RegistersOfFours>(), nullptr, 128};
    if (x == DType::bf16 && format == Format::bf16) return {DType::bf16, &pairs, nullptr};
    if (x == DType::bf16 && format == Format::int8) return {DType::bf16, &expansion_of<PairsFromInt8>(), &pairs};
    if (x == DType::bf16 && format == Format::fp8) return {DType::bf16, &expansion_of<PairsFromFp8>(), &pairs};
#elif defined(FURIOSA_HAS_DOT_PRODUCTS)
    const Method& pairs = method_of<PairsFromBf16, 12>();
    if (x == DType::i8 && fits_int32) return {DType::i8, &method_of<FoursFromInt8, 12>(), nullptr, 128};
    if (x == DType::bf16 && format == Format::bf16) return {DType::bf16, &pairs, nullptr};
    if (x == DType::bf16 && format == Format::int8) return {DType::bf16, &method_of<PairsFromInt8, 8>(), &pairs};
    if (x == DType::bf16 && format == Format::fp8) return {DType::bf16, &method_of<PairsFromFp8, 8>(), &pairs};
#endif
    const Method& floats = method_of<FloatsFromF32, float_rows>();
    switch (format) {
        case Format::bf16:
            return {DType::f32, &method_of<FloatsFromBf16, converted_rows>(), &floats};
        case Format::f16:
            return {DType::f32, &method_of<FloatsFromF16, converted_rows>(), &floats};
        case Format::int8:
            return {DType::f32, &method_of<FloatsFromInt8, converted_rows>(), &floats};
        case Format::fp8:
            return {DType::f32, &method_of<FloatsFromFp8, converted_rows>(), &floats};
        default:
            return {DType::f32, &floats, nullptr};
    }
}

// One of the products of a call, and how it is divided into jobs.
struct Product {
    const Tensor *x, *x_scale, *weight, *scale, *bias, *residual, *out;
    Choice choice;
    bool expands;         // weights are expanded to panels
    bool is_tall;         // there are more rows than a tile has, so that weights are read several times: by pieces
    bool copies;          // a piece of x at a time: to convert it, to fill it up to whole units, or to have it in the cache
    int64_t units;        // of K
    int64_t tile;         // rows of one, at most
    int64_t rows;         // of a job
    int64_t blocks;       // of a job
    int64_t row_jobs;
    int64_t jobs;

    Product(const Call& call, int64_t index)
        : x(call.tensors),
          x_scale(call.tensors + 1),
          weight(call.tensors + 2 + 5 * index),
          scale(weight + 1),
          bias(weight + 2),
          residual(weight + 3),
          out(weight + 4),
          choice(choose(static_cast<Format>(call.ints[index]), x->dtype, x->shape[1])),
          expands(choice.panels != nullptr && x->shape[0] > choice.method->rows),
          is_tall(x->shape[0] > (expands ? at_most(tiles().rows, ways) : tiles().rows)),
          copies(choice.x != x->dtype || x->shape[1] * size_of(x->dtype) % step_bytes() != 0 ||
                 (is_tall && x->shape[0] > 2 * ways)),
          units(weight->shape[1]) {
        const int64_t all_rows = x->shape[0], all_blocks = weight->shape[0];
        tile = is_tall && !copies ? at_most(tiles().rows, ways) : tiles().rows;
        rows = quotient_up(quotient_up(all_rows, quotient_up(all_rows, expands ? rows_of_a_panel : most_rows)), tile) * tile;
        row_jobs = quotient_up(all_rows, rows);
        if (!is_tall) {
            blocks = at_most(quotient_up(bytes_of_a_job, units * block_bytes), most_blocks);
        } else if (!copies) {
            blocks = 1;
        } else {
            blocks = at_most(all_blocks * row_jobs / enough_jobs, most_blocks_of_a_copy);
            if (blocks < least_blocks_of_a_copy) blocks = least_blocks_of_a_copy;
        }
        jobs = row_jobs * quotient_up(all_blocks, blocks);
    }

    // What computes: from the weights, or from panels.
    const Method& tiles() const { return expands ? *choice.panels : *choice.method; }
    // Of x, for a unit of weights.
    int64_t step_bytes() const { return choice.method->steps * unit_bytes; }
};

class Job {
  public:
    Job(const Product& product, int64_t number, Scratch& scratch)
        : p_(product),
          first_row_(number % p_.row_jobs * p_.rows),
          num_rows_(at_most(p_.rows, p_.x->shape[0] - first_row_)),
          first_block_(number / p_.row_jobs * p_.blocks),
          num_blocks_(at_most(p_.blocks, p_.weight->shape[0] - first_block_)),
          piece_(piece()),
          row_bytes_(p_.copies ? piece_ * p_.step_bytes() + gap : p_.x->stride[0] * x_size()) {
        Memory counted;
        lay_out(counted);
        Memory memory(scratch.get(counted.used()));
        lay_out(memory);
    }

    void run() {
        for (int64_t unit = 0; unit < p_.units; unit += piece_) {
            const int64_t count = at_most(piece_, p_.units - unit);
            if (p_.copies) copy(unit, count);
            if (p_.choice.offset != 0) add_up_rows(unit, count);
            for (int64_t block = 0; block < num_blocks_; block++) add_products(block, unit, count);
        }
        for (int64_t block = 0; block < num_blocks_; block++) finish(block);
    }

  private:
    // Units of K that are done at a time: all, if one tile has all rows of the job.
    int64_t piece() const {
        if (p_.expands) return piece_units / p_.choice.method->steps;
        return p_.is_tall ? piece_units : p_.units;
    }

    void lay_out(Memory& memory) {
        if (p_.copies) x_ = memory.take<uint8_t>(num_rows_ * row_bytes_);
        if (p_.expands) panel_ = memory.take<uint8_t>(piece_ * p_.choice.method->steps * block_bytes);
        sums_ = memory.take<float>(num_blocks_ * num_rows_ * block_rows);
        row_sums_ = memory.take<int32_t>(num_rows_);
    }

    const void* x_row(int64_t row, int64_t number) const {
        return address(*p_.x, (first_row_ + row) * p_.x->stride[0] + number);
    }

    // A piece of x, with zeros for the numbers beyond K.
    void copy(int64_t unit, int64_t count) {
        const int64_t size = size_of(p_.choice.x), padded = count * p_.step_bytes() / size;
        const int64_t begin = unit * p_.step_bytes() / size;
        const int64_t given = at_most(padded, p_.x->shape[1] - begin);
        for (int64_t row = 0; row < num_rows_; row++) {
            uint8_t* to = x_ + row * row_bytes_;
            if (p_.choice.x == p_.x->dtype) {
                std::memcpy(to, x_row(row, begin), given * size);
            } else if (p_.x->dtype == DType::i8) {
                const int8_t* from = static_cast<const int8_t*>(x_row(row, begin));
                for (int64_t i = 0; i < given; i++) reinterpret_cast<float*>(to)[i] = from[i];
            } else {
                load_floats(p_.x->dtype, x_row(row, begin), 1, given, reinterpret_cast<float*>(to));
            }
            std::memset(to + given * size, 0, (padded - given) * size);
        }
    }

    // The products of a piece of K with a block.
    void add_products(int64_t block, int64_t unit, int64_t count) {
        const Method& method = p_.tiles();
        const uint8_t* weights = weights_of(block, unit);
        const int64_t tiles = quotient_up(num_rows_, p_.tile), group = quotient_up(num_rows_, tiles);
        // While one piece is multiplied, the next one comes from memory: a share of it during each tile.
        const int64_t steps = p_.expands ? p_.choice.method->steps : 1;
        const uint8_t* next = weights + (piece_ < p_.units ? count * block_bytes : ahead);
        if (p_.is_tall) next = block + 1 < num_blocks_ ? weights + p_.units * block_bytes : weights_of(0, unit + count);
        const int64_t next_step = block_bytes / (tiles * steps);
        if (p_.expands) {
            p_.choice.method->expand(weights, count, panel_);
            weights = panel_;
        }
        const uint8_t* x = piece_of_x(0, unit);
        for (int64_t row = 0; row < num_rows_; row += group) {
            const int64_t rows = at_most(group, num_rows_ - row);
            method.tiles[rows - 1](weights, x + row * row_bytes_, row_bytes_, count * steps, next, next_step, unit == 0,
                                   sums_ + (block * num_rows_ + row) * block_rows);
            next += count * steps * next_step;
        }
    }

    const uint8_t* weights_of(int64_t block, int64_t unit) const {
        return p_.weight->as<uint8_t>() + ((first_block_ + block) * p_.units + unit) * block_bytes;
    }

    // Numbers of x from unit `unit` on, as tiles read them.
    const uint8_t* piece_of_x(int64_t row, int64_t unit) const {
        if (p_.copies) return x_ + row * row_bytes_;
        return static_cast<const uint8_t*>(x_row(row, unit * p_.step_bytes() / x_size()));
    }

    int64_t x_size() const { return size_of(p_.x->dtype); }

    void add_up_rows(int64_t unit, int64_t count) {
        for (int64_t row = 0; row < num_rows_; row++) {
            const int8_t* piece = reinterpret_cast<const int8_t*>(piece_of_x(row, unit));
            row_sums_[row] = (unit == 0 ? 0 : row_sums_[row]) + sum_of(piece, count * unit_bytes);
        }
    }

    // out = sums * x_scale * scale + bias + residual
    void finish(int64_t block) {
        const int64_t first = (first_block_ + block) * block_rows;
        const int64_t columns = at_most(block_rows, p_.out->shape[1] - first);
        float scale[block_rows], bias[block_rows];
        load_columns(*p_.scale, first, columns, 1, scale);
        load_columns(*p_.bias, first, columns, 0, bias);
        const float* sums = sums_ + block * num_rows_ * block_rows;
        for (int64_t row = 0; row < num_rows_; row++, sums += block_rows) {
            const float factor = p_.x_scale->given() ? p_.x_scale->as<float>()[first_row_ + row] : 1;
            const int32_t excess = p_.choice.offset == 0 ? 0 : static_cast<int32_t>(p_.choice.offset) * row_sums_[row];
            const char* residual = nullptr;
            if (p_.residual->given()) residual = address(*p_.residual, (first_row_ + row) * p_.residual->stride[0] + first);
            char* to = address(*p_.out, (first_row_ + row) * p_.out->stride[0] + first);
#pragma GCC unroll 4
            for (int64_t i = 0; i < block_rows; i += lanes) {
                Floats values = load<Floats>(sums + i);
                if (p_.choice.offset != 0) values = __builtin_convertvector((Bits)values - excess, Floats);
                values = values * (factor * load<Floats>(scale + i)) + load<Floats>(bias + i);
                if (residual != nullptr) values += floats_at(p_.residual->dtype, residual, i, columns);
                store_at(p_.out->dtype, to, i, columns, values);
            }
        }
    }

    // The numbers of a row from `first` on; of any value where there are none.
    static Floats floats_at(DType dtype, const char* row, int64_t first, int64_t columns) {
        const void* from = row + first * size_of(dtype);
        if (first + lanes <= columns) {
            if (dtype == DType::bf16) return from_bf16(load<Halves>(from));
            if (dtype == DType::f32) return load<Floats>(from);
        }
        float numbers[lanes] = {};
        if (first < columns) load_floats(dtype, from, 1, at_most(lanes, columns - first), numbers);
        return load<Floats>(numbers);
    }

    static void store_at(DType dtype, char* row, int64_t first, int64_t columns, Floats values) {
        void* to = row + first * size_of(dtype);
        if (first + lanes <= columns) {
            if (dtype == DType::bf16) return store(to, to_bf16(values));
            if (dtype == DType::f32) return store(to, values);
        }
        float numbers[lanes];
        store(numbers, values);
        if (first < columns) store_floats(dtype, numbers, at_most(lanes, columns - first), to, 1);
    }

    // What a vector has for each column of a block, or one number for all.
    static void load_columns(const Tensor& vector, int64_t first, int64_t columns, float otherwise, float* to) {
        for (int64_t i = 0; i < block_rows; i++) to[i] = otherwise;
        if (!vector.given()) return;
        const bool is_one = vector.shape[0] == 1;
        load_floats(vector.dtype, address(vector, is_one ? 0 : first), is_one ? 0 : 1, columns, to);
    }

    const Product& p_;
    int64_t first_row_, num_rows_, first_block_, num_blocks_;
    int64_t piece_;
    int64_t row_bytes_;  // from one row of x to the next, as tiles read them
    uint8_t *x_ = nullptr, *panel_ = nullptr;
    float* sums_ = nullptr;
    int32_t* row_sums_ = nullptr;
};

int64_t count_jobs(const Call& call) {
    int64_t jobs = 0;
    for (int64_t i = 0; i < call.num_ints; i++) jobs += Product(call, i).jobs;
    return jobs;
}

void run_jobs(const Call& call, int64_t begin, int64_t end, Scratch& scratch) {
    for (int64_t i = 0; i < call.num_ints && begin < end; i++) {
        const Product product(call, i);
        for (; begin < at_most(end, product.jobs); begin++) Job(product, begin, scratch).run();
        begin -= product.jobs;
        end -= product.jobs;
    }
}

}  // namespace

extern const Kernel linear;
const Kernel linear = {count_jobs, run_jobs};

}  // namespace furiosa::FURIOSA_VARIANT
