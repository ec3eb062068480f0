// Products of activations with packed weights of 4 bits that have a scale, and perhaps a zero point, for each group of
// columns. Jobs are as in linear.cpp.
#include "linear_group_tiles.h"
#include "linear_jobs.h"
#include "linear_rows.h"
#include "numbers.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

constexpr int64_t most_lines = 192;            // of a job: what x is of a piece of K stays in the cache
constexpr int64_t bytes_of_a_job = 128 << 10;  // of weights, where they are read for few rows
constexpr int64_t most_blocks = 16;
constexpr int64_t enough_jobs = 64, least_blocks = 4;  // where there are many rows
constexpr int64_t numbers_of_a_unit = 8;
constexpr int64_t most_of_a_float_part = 64;  // numbers that are summed before they are scaled
constexpr int64_t most_direct_tiles = 2;      // for more rows weights are expanded to panels
constexpr int64_t piece = 512;                // of K, that tiles go through one after the other: whole groups
constexpr int64_t tensors_of_a_product = 6;
constexpr int64_t ahead = 4096;  // bytes from what is read to what is prefetched, where all of K is one piece

// How the products with an x are computed: its rows become lines of `x`; many rows are multiplied by panels that `direct`
// expands.
struct Choice {
    DType x;
    const GroupMethod* direct;
    const GroupMethod* panels;
    int64_t planes = 1;
    int32_t offset = 0;  // what stored weights are too large by
};

Choice choose([[maybe_unused]] DType x) {
#ifdef FURIOSA_HAS_DOT_PRODUCTS
    if (x == DType::i8) return {x, &group_method_of<FoursFromInt4, 12>(), &group_method_of<FoursOfInt4, 12>(), 1, 8};
    if (x == DType::bf16) {
        return {DType::i8, &group_method_of<FoursFromInt4, 12, 2>(), &group_method_of<FoursOfInt4, 12, 2>(), 2, 8};
    }
#endif
#if defined(__AVX512F__)
    return {DType::f32, &group_method_of<FloatsFromInt4, 8>(), &group_method_of<FloatsOfInt4, 12>()};
#else
    return {DType::f32, &group_method_of<FloatsFromInt4, 4>(), &group_method_of<FloatsOfInt4, 6>()};
#endif
}

// One of the products of a call, and how it is divided into jobs.
struct Product {
    static constexpr bool has_form = true;

    const Tensor *x, *x_scale, *weight, *scale, *zero, *bias, *residual, *out;
    Choice choice;
    int64_t k, group, part;  // numbers of a row, of a group, of a part
    bool expands;
    bool is_tall;          // there are more rows than a tile has, so that weights are read several times: by pieces
    int64_t rows, blocks;  // of a job
    int64_t row_jobs, jobs;

    Product(const Call& call, int64_t index)
        : x(call.tensors),
          x_scale(call.tensors + 1),
          weight(call.tensors + 2 + tensors_of_a_product * index),
          scale(weight + 1),
          zero(weight + 2),
          bias(weight + 3),
          residual(weight + 4),
          out(weight + 5),
          choice(choose(x->dtype)),
          k(x->shape[1]),
          group(call.ints[index]),
          part(choice.x == DType::i8 ? group : at_most(group, most_of_a_float_part)),
          expands(x->shape[0] > most_direct_tiles * choice.direct->rows),
          is_tall(x->shape[0] > tiles().rows) {
        const int64_t all_rows = x->shape[0], all_blocks = weight->shape[0], tile = tiles().rows;
        rows = quotient_up(quotient_up(all_rows, quotient_up(all_rows, most_lines / choice.planes)), tile) * tile;
        row_jobs = quotient_up(all_rows, rows);
        if (is_tall) {
            blocks = at_most(all_blocks * row_jobs / enough_jobs, most_blocks);
            if (blocks < least_blocks) blocks = least_blocks;
        } else {
            blocks = at_most(quotient_up(bytes_of_a_job, k / 2 * block_rows), most_blocks);
        }
        jobs = row_jobs * quotient_up(all_blocks, blocks);
    }

    const GroupMethod& tiles() const { return expands ? *choice.panels : *choice.direct; }
    int64_t piece_of_k() const { return is_tall ? at_most(piece, k) : k; }
    Form form() const {
        return {choice.x, choice.planes, x->shape[0], k, part, part, choice.offset,
                choice.offset == 0 && zero->given()};
    }
};

class Job {
  public:
    Job(const Product& product, const Form& form, const Lines& x, int64_t number, Scratch& scratch)
        : p_(product),
          form_(form),
          x_(x),
          first_row_(number % p_.row_jobs * p_.rows),
          num_rows_(at_most(p_.rows, p_.x->shape[0] - first_row_)),
          first_block_(number / p_.row_jobs * p_.blocks),
          num_blocks_(at_most(p_.blocks, p_.weight->shape[0] - first_block_)) {
        Memory counted;
        lay_out(counted);
        Memory memory(scratch.get(counted.used()));
        lay_out(memory);
    }

    void run() {
        for (int64_t begin = 0; begin < p_.k; begin += p_.piece_of_k()) {
            const int64_t count = at_most(p_.piece_of_k(), p_.k - begin);
            for (int64_t block = 0; block < num_blocks_; block++) {
                load_groups(first_block_ + block, begin / p_.group, quotient_up(count, p_.group));
                multiply(block, begin, count);
            }
        }
        for (int64_t block = 0; block < num_blocks_; block++) finish(block);
    }

  private:
    void lay_out(Memory& memory) {
        const int64_t groups = p_.piece_of_k() / p_.group + 1;  // of the units of two that scales are packed in
        if (p_.expands) panel_ = memory.take<uint8_t>(p_.piece_of_k() * block_rows * size_of(p_.choice.x));
        if (p_.zero->given()) offsets_ = memory.take<float>(groups * block_rows);
        scales_ = memory.take<float>(groups * block_rows);
        sums_ = memory.take<float>(num_blocks_ * num_rows_ * block_rows);
    }

    // Scales of a block as floats, and with zero points what they add for each 1 of a group's x.
    void load_groups(int64_t block, int64_t first, int64_t count) {
        load_scales(block, first, count);
        if (!p_.zero->given()) return;
        for (int64_t g = 0; g < count; g++) {
            const uint8_t* zeros = zeros_of(block, first + g);
            for (int64_t i = 0; i < block_rows; i++) {
                const float zero = static_cast<float>(zeros[i / 2] >> 4 * (i % 2) & 15) - 8;
                offsets_[g * block_rows + i] = -zero * scales_[g * block_rows + i];
            }
        }
    }

    // Packed from [N, groups] where there are several groups, as matrices are; else [N]. `first` is even.
    void load_scales(int64_t block, int64_t first, int64_t count) {
        const Tensor& scale = *p_.scale;
        if (scale.rank == 1) {
            const int64_t column = block * block_rows, columns = at_most(block_rows, scale.shape[0] - column);
            for (int64_t i = columns; i < block_rows; i++) scales_[i] = 0;
            load_floats(scale.dtype, address(scale, column), 1, columns, scales_);
            return;
        }
        const int64_t of_a_unit = unit_bytes / size_of(scale.dtype), units = quotient_up(count, of_a_unit);
        const uint8_t* from = scale.as<uint8_t>() + (block * scale.shape[1] + first / of_a_unit) * block_bytes;
        for (int64_t i = 0; i < units * block_bytes; i += 64) {  // those of the next block; GCC 12 would drop a builtin
            asm volatile("prefetcht0 %0" : : "m"(from[scale.shape[1] * block_bytes + i]));
        }
        if (scale.dtype == DType::bf16) {
            expand<FloatsFromBf16>(from, units, reinterpret_cast<uint8_t*>(scales_));
        } else if (scale.dtype == DType::f16) {
            expand<FloatsFromF16>(from, units, reinterpret_cast<uint8_t*>(scales_));
        } else {
            std::memcpy(scales_, from, units * block_bytes);
        }
    }

    // The zero points of a block: 32 times four bits. They are packed from [N / 8, groups] int32.
    const uint8_t* zeros_of(int64_t block, int64_t g) const {
        constexpr int64_t words = block_rows / numbers_of_a_unit;  // of a block
        const int64_t word = block * words, units = p_.zero->shape[1];
        return p_.zero->as<uint8_t>() + (word / block_rows * units + g) * block_bytes + word % block_rows * unit_bytes;
    }

    // The products of numbers [begin, begin + count) of K with a block.
    void multiply(int64_t block, int64_t begin, int64_t count) {
        const GroupMethod& method = p_.tiles();
        const uint8_t* weights = weights_of(block, begin);
        const uint8_t* next = weights + ahead;
        if (p_.is_tall) next = block + 1 < num_blocks_ ? weights_of(block + 1, begin) : weights_of(0, begin + count);
        if (p_.expands) {
            p_.choice.direct->expand(weights, count / numbers_of_a_unit, panel_);
            weights = panel_;
        }
        const int64_t steps = p_.expands ? p_.choice.direct->steps : 1;
        const int64_t tiles = quotient_up(num_rows_, method.rows), of_a_tile = quotient_up(num_rows_, tiles);
        Parts parts{};
        parts.weights = weights;
        parts.form = &form_;
        parts.x = &x_;
        parts.first = begin / p_.part;
        parts.count = count / p_.part;
        parts.units = p_.part / numbers_of_a_unit * steps;
        parts.parts_of_a_group = p_.group / p_.part;
        parts.first_group = begin / p_.group;
        parts.scales = scales_;
        parts.offsets = offsets_;
        // While one piece is multiplied, the next one comes from memory: a share of it during each tile.
        parts.next = next;
        parts.next_step = block_bytes / (tiles * steps);
        for (int64_t row = 0; row < num_rows_; row += of_a_tile) {
            parts.row = first_row_ + row;
            parts.sums = sums_ + (block * num_rows_ + row) * block_rows;
            method.tiles[at_most(of_a_tile, num_rows_ - row) - 1](parts);
            parts.next += parts.count * parts.units * parts.next_step;
        }
    }

    const uint8_t* weights_of(int64_t block, int64_t begin) const {
        return p_.weight->as<uint8_t>() + ((first_block_ + block) * p_.k + begin) / numbers_of_a_unit * block_bytes;
    }

    // out = sums * x_scale + bias + residual
    void finish(int64_t block) {
        const int64_t first = (first_block_ + block) * block_rows;
        const int64_t columns = at_most(block_rows, p_.out->shape[1] - first);
        float bias[block_rows] = {};
        if (p_.bias->given()) load_floats(p_.bias->dtype, address(*p_.bias, first), 1, columns, bias);
        const float* sums = sums_ + block * num_rows_ * block_rows;
        for (int64_t row = first_row_; row < first_row_ + num_rows_; row++, sums += block_rows) {
            const float factor = p_.x_scale->given() ? p_.x_scale->as<float>()[row] : 1;
            const char* residual = nullptr;
            if (p_.residual->given()) residual = address(*p_.residual, row * p_.residual->stride[0] + first);
            char* to = address(*p_.out, row * p_.out->stride[0] + first);
            for (int64_t i = 0; i < block_rows; i += lanes) {
                Floats values = load<Floats>(sums + i) * factor + load<Floats>(bias + i);
                if (residual != nullptr) values += floats_at(p_.residual->dtype, residual, i, columns);
                store_at(p_.out->dtype, to, i, columns, values);
            }
        }
    }

    const Product& p_;
    const Form& form_;
    const Lines& x_;
    int64_t first_row_, num_rows_, first_block_, num_blocks_;
    uint8_t* panel_ = nullptr;
    float *scales_ = nullptr, *offsets_ = nullptr, *sums_ = nullptr;
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

extern const Kernel linear_groups;
const Kernel linear_groups = {count_jobs, run_jobs, &Shared<Product>::kernel, Shared<Product>::count_bytes};

}  // namespace furiosa::FURIOSA_VARIANT
