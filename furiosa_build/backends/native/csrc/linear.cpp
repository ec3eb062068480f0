// Products of activations with packed weights.
//
// A job is some blocks of 32 columns of one of the outputs, for some rows. Every output is one sum over K in order,
// whatever the number of rows: what a row of x gives does not depend on the other rows.
#include "linear_amx.h"
#include "linear_jobs.h"
#include "linear_rows.h"
#include "linear_tiles.h"
#include "numbers.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

// Numbers of a packed weight, as emit_linear.py has them.
enum class Format : int64_t { f32 = 0, bf16 = 1, f16 = 2, int8 = 3, fp8 = 4 };

constexpr int64_t most_lines = 96;             // of a job: what x is of a piece of K stays in the cache
constexpr int64_t bytes_of_a_job = 256 << 10;  // of weights, where they are read for few rows
constexpr int64_t most_blocks = 16;
constexpr int64_t least_blocks_of_tall = 4, most_blocks_of_tall = 32;
constexpr int64_t enough_jobs = 64;   // tall jobs have fewer blocks where there would be fewer jobs
constexpr int64_t piece_units = 512;  // of K: 64 KB of weights
constexpr int64_t ways = 8;           // so many rows that share lines of the cache stay in it: of a tile, where x is taken as it is
constexpr int64_t ahead = 4096;       // bytes from what is read to what is prefetched, where all of K is one piece

// How the products of a format with an x are computed.
struct Choice {
    DType x;               // what rows of x are converted to
    const Method* method;  // takes the weights as they are
    const Method* panels;  // for more rows than `method` takes: reads panels that `method` expands. May be null.
    int32_t offset = 0;    // what stored weights are too large by
    int64_t planes = 1;    // lines that a row of x becomes
};

#if defined(__AVX512F__)
constexpr int float_rows = 12, converted_rows = 8;
#else
constexpr int float_rows = 6, converted_rows = 4;
#endif

Choice choose(Format format, [[maybe_unused]] DType x, [[maybe_unused]] int64_t k) {
    [[maybe_unused]] const bool fits_int32 = k <= 1 << 16;
#if defined(FURIOSA_HAS_TILES)
    const Method &pairs = registers_of<RegistersOfPairs>(), &fours = registers_of<RegistersOfFours>();
    const Method& from_fp8 = expansion_of<PairsFromFp8>();
#elif defined(FURIOSA_HAS_DOT_PRODUCTS)
    const Method &pairs = method_of<PairsFromBf16, 12>(), &fours = method_of<FoursFromInt8, 12>();
    const Method& from_fp8 = method_of<PairsFromFp8, 8>();
#endif
#ifdef FURIOSA_HAS_DOT_PRODUCTS
    if (x == DType::i8 && fits_int32) return {DType::i8, &fours, nullptr, 128};
    if (x == DType::bf16 && format == Format::bf16) return {DType::bf16, &pairs, nullptr};
    if (x == DType::bf16 && format == Format::int8) return {DType::i8, &fours, nullptr, 128, 2};
    if (x == DType::bf16 && format == Format::fp8) return {DType::bf16, &from_fp8, &pairs};
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

// One of the products of a call, and how it is divided into jobs. A line is what tiles take for a row: a row of x as it
// is, or of its form.
struct Product {
    const Tensor *x, *x_scale, *weight, *scale, *bias, *residual, *out;
    Choice choice;
    bool expands;       // weights are expanded to panels
    bool is_tall;       // there are more lines than a tile has, so that weights are read several times: by pieces
    bool has_form;      // x is laid out: to convert it, to fill it up to whole units, or to have its pieces in the cache
    int64_t units;      // of K
    int64_t piece;      // units that are done at a time
    int64_t tile;       // lines of one, at most
    int64_t lines;      // of a job
    int64_t blocks;     // of a job
    int64_t line_jobs;
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
          is_tall(all_lines() > (expands ? at_most(tiles().rows, ways) : tiles().rows)),
          has_form(choice.x != x->dtype || x->shape[1] * size_of(x->dtype) % step_bytes() != 0 ||
                   (is_tall && all_lines() > 2 * ways)),
          units(weight->shape[1]),
          piece(expands ? piece_units / choice.method->steps : is_tall || choice.planes > 1 ? piece_units : units) {
        const int64_t all_blocks = weight->shape[0];
        tile = is_tall && !has_form ? at_most(tiles().rows, ways) : tiles().rows;
        lines = quotient_up(quotient_up(all_lines(), quotient_up(all_lines(), most_lines)), tile) * tile;
        line_jobs = quotient_up(all_lines(), lines);
        if (!is_tall) {
            blocks = at_most(quotient_up(bytes_of_a_job, units * block_bytes), most_blocks);
        } else if (!has_form) {
            blocks = 1;
        } else {
            blocks = at_most(all_blocks * line_jobs / enough_jobs, most_blocks_of_tall);
            if (blocks < least_blocks_of_tall) blocks = least_blocks_of_tall;
        }
        jobs = line_jobs * quotient_up(all_blocks, blocks);
    }

    // What computes: from the weights, or from panels.
    const Method& tiles() const { return expands ? *choice.panels : *choice.method; }
    // Of x, for a unit of weights.
    int64_t step_bytes() const { return choice.method->steps * unit_bytes; }
    int64_t all_lines() const { return x->shape[0] * choice.planes; }

    Form form() const {
        const int64_t numbers = step_bytes() / size_of(choice.x);  // of a unit
        const int64_t last = (units - 1) % piece + 1;
        return {choice.x, choice.planes, x->shape[0], x->shape[1], piece * numbers, last * numbers,
                choice.planes > 1 ? choice.offset : 0, false};
    }
};

class Job {
  public:
    Job(const Product& product, const Form& form, const Lines& x, int64_t number, Scratch& scratch)
        : p_(product),
          form_(form),
          x_(x),
          first_line_(number % p_.line_jobs * p_.lines),
          num_lines_(at_most(p_.lines, p_.all_lines() - first_line_)),
          first_row_(first_line_ / p_.choice.planes),
          num_rows_(num_lines_ / p_.choice.planes),
          first_block_(number / p_.line_jobs * p_.blocks),
          num_blocks_(at_most(p_.blocks, p_.weight->shape[0] - first_block_)),
          line_bytes_(p_.has_form ? form.line_bytes() : p_.x->stride[0] * size_of(p_.x->dtype)) {
        Memory counted;
        lay_out(counted);
        Memory memory(scratch.get(counted.used()));
        lay_out(memory);
    }

    void run() {
        if (p_.choice.offset != 0 && p_.choice.planes == 1) add_up_rows();
        const int64_t pieces = quotient_up(p_.units, p_.piece);
        if (p_.is_tall) {
            for (int64_t piece = 0; piece < pieces; piece++) {
                for (int64_t block = 0; block < num_blocks_; block++) add_products(block, piece);
            }
        } else {
            for (int64_t block = 0; block < num_blocks_; block++) {
                for (int64_t piece = 0; piece < pieces; piece++) add_products(block, piece);
            }
        }
        for (int64_t block = 0; block < num_blocks_; block++) finish(block);
    }

  private:
    void lay_out(Memory& memory) {
        if (p_.expands) panel_ = memory.take<uint8_t>(p_.piece * p_.choice.method->steps * block_bytes);
        sums_ = memory.take<float>(num_blocks_ * num_rows_ * block_rows);
        if (p_.choice.planes > 1) sums_of_lines_ = memory.take<int32_t>(num_lines_ * block_rows);
        row_sums_ = memory.take<int32_t>(num_rows_);
    }

    // The products of a piece of K with a block.
    void add_products(int64_t block, int64_t piece) {
        const Method& method = p_.tiles();
        const int64_t unit = piece * p_.piece, count = at_most(p_.piece, p_.units - unit);
        const uint8_t* weights = weights_of(block, unit);
        const int64_t tiles = quotient_up(num_lines_, p_.tile), group = quotient_up(num_lines_, tiles);
        // While one piece is multiplied, the next one comes from memory: a share of it during each tile.
        const int64_t steps = p_.expands ? p_.choice.method->steps : 1;
        const uint8_t* next = weights + (p_.expands ? count * block_bytes : ahead);
        if (p_.is_tall) next = block + 1 < num_blocks_ ? weights + p_.units * block_bytes : weights_of(0, unit + count);
        const int64_t next_step = block_bytes / (tiles * steps);
        if (p_.expands) {
            p_.choice.method->expand(weights, count, panel_);
            weights = panel_;
        }
        const bool planes = p_.choice.planes > 1;
        float* sums = sums_ + block * num_rows_ * block_rows;
        for (int64_t line = 0; line < num_lines_; line += group) {
            void* of_lines = planes ? static_cast<void*>(sums_of_lines_ + line * block_rows) : sums + line * block_rows;
            const uint8_t* x = p_.has_form ? x_.line(form_, piece, first_line_ + line) : x_line(line, unit);
            method.tiles[at_most(group, num_lines_ - line) - 1](weights, x, line_bytes_, count * steps, next, next_step,
                                                               planes || unit == 0, of_lines);
            next += count * steps * next_step;
        }
        if (planes) add_planes(piece, sums);
    }

    const uint8_t* weights_of(int64_t block, int64_t unit) const {
        return p_.weight->as<uint8_t>() + ((first_block_ + block) * p_.units + unit) * block_bytes;
    }

    // x as it is, from unit `unit` on.
    const uint8_t* x_line(int64_t line, int64_t unit) const {
        return p_.x->as<uint8_t>() + (first_line_ + line) * line_bytes_ + unit * p_.step_bytes();
    }

    // Adds what a piece of K gives: of each row 256 times the sums of one line, and those of the next.
    void add_planes(int64_t piece, float* sums) {
        const int32_t* excess = x_.excess + piece * form_.lines() + first_line_;
        const float* units = x_.units + piece * form_.rows + first_row_;
        for (int64_t row = 0; row < num_rows_; row++) {
            const int32_t *high = sums_of_lines_ + 2 * row * block_rows, *low = high + block_rows;
            float* to = sums + row * block_rows;
            for (int64_t i = 0; i < block_rows; i += lanes) {
                const Floats upper = __builtin_convertvector(load<Bits>(high + i) - excess[2 * row], Floats);
                const Floats lower = __builtin_convertvector(load<Bits>(low + i) - excess[2 * row + 1], Floats);
                const Floats value = (upper * 256 + lower) * units[row];
                store(to + i, piece == 0 ? value : load<Floats>(to + i) + value);
            }
        }
    }

    void add_up_rows() {
        for (int64_t row = 0; row < num_rows_; row++) {
            row_sums_[row] = sum_of(p_.x->as<int8_t>() + (first_row_ + row) * p_.x->stride[0], p_.x->shape[1]);
        }
    }

    // out = sums * x_scale * scale + bias + residual
    void finish(int64_t block) {
        const int64_t first = (first_block_ + block) * block_rows;
        const int64_t columns = at_most(block_rows, p_.out->shape[1] - first);
        const bool has_excess = p_.choice.offset != 0 && p_.choice.planes == 1;
        float scale[block_rows], bias[block_rows];
        load_columns(*p_.scale, first, columns, 1, scale);
        load_columns(*p_.bias, first, columns, 0, bias);
        const float* sums = sums_ + block * num_rows_ * block_rows;
        for (int64_t row = 0; row < num_rows_; row++, sums += block_rows) {
            const float factor = p_.x_scale->given() ? p_.x_scale->as<float>()[first_row_ + row] : 1;
            const int32_t excess = has_excess ? p_.choice.offset * row_sums_[row] : 0;
            const char* residual = nullptr;
            if (p_.residual->given()) residual = address(*p_.residual, (first_row_ + row) * p_.residual->stride[0] + first);
            char* to = address(*p_.out, (first_row_ + row) * p_.out->stride[0] + first);
#pragma GCC unroll 4
            for (int64_t i = 0; i < block_rows; i += lanes) {
                Floats values = load<Floats>(sums + i);
                if (has_excess) values = __builtin_convertvector((Bits)values - excess, Floats);
                values = values * (factor * load<Floats>(scale + i)) + load<Floats>(bias + i);
                if (residual != nullptr) values += floats_at(p_.residual->dtype, residual, i, columns);
                store_at(p_.out->dtype, to, i, columns, values);
            }
        }
    }

    // What a vector has for each column of a block, or one number for all.
    static void load_columns(const Tensor& vector, int64_t first, int64_t columns, float otherwise, float* to) {
        for (int64_t i = 0; i < block_rows; i++) to[i] = otherwise;
        if (!vector.given()) return;
        const bool is_one = vector.shape[0] == 1;
        load_floats(vector.dtype, address(vector, is_one ? 0 : first), is_one ? 0 : 1, columns, to);
    }

    const Product& p_;
    const Form& form_;
    const Lines& x_;
    int64_t first_line_, num_lines_, first_row_, num_rows_, first_block_, num_blocks_;
    int64_t line_bytes_;  // from one line to the next
    uint8_t* panel_ = nullptr;
    float* sums_ = nullptr;
    int32_t *sums_of_lines_ = nullptr, *row_sums_ = nullptr;
};

int64_t count_jobs(const Call& call) {
    int64_t jobs = 0;
    for (int64_t i = 0; i < call.num_ints; i++) jobs += Product(call, i).jobs;
    return jobs;
}

void run_jobs(const Call& call, int64_t begin, int64_t end, Scratch& scratch) {
    for (int64_t i = 0; i < call.num_ints && begin < end; i++) {
        const Product product(call, i);
        const Form form = product.form();
        const Lines x = Shared<Product>::Place(call, i).lines(call, form);
        for (; begin < at_most(end, product.jobs); begin++) Job(product, form, x, begin, scratch).run();
        begin -= product.jobs;
        end -= product.jobs;
    }
}

}  // namespace

extern const Kernel linear;
const Kernel linear = {count_jobs, run_jobs, &Shared<Product>::kernel, Shared<Product>::count_bytes};

}  // namespace furiosa::FURIOSA_VARIANT
