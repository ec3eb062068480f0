// Products of activations with packed weights of 4 bits that have a scale, and perhaps a zero point, for each group of
// columns. Jobs are as in linear.cpp.
#include "linear_group_tiles.h"
#include "linear_jobs.h"
#include "numbers.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

constexpr int64_t most_rows = 256;             // of a job: what x is of a piece of K stays in the cache
constexpr int64_t bytes_of_a_job = 128 << 10;  // of weights, where they are read for few rows
constexpr int64_t most_blocks = 16;
constexpr int64_t numbers_of_a_unit = 8;
constexpr int64_t most_of_a_part = 64;  // numbers that are summed before they are scaled
constexpr int64_t piece = 512;          // of K, of which a panel is made at a time: whole groups
constexpr int64_t tensors_of_a_product = 6;

// How the products with an x are computed: its rows are converted to `x`; more rows than `direct` takes at a time are
// multiplied by panels that it expands.
struct Choice {
    DType x;
    const GroupMethod* direct;
    const GroupMethod* panels;
};

Choice choose([[maybe_unused]] DType x) {
#ifdef FURIOSA_HAS_DOT_PRODUCTS
    if (x == DType::i8) return {x, &group_method_of<FoursFromInt4, 8>(), &group_method_of<FoursOfInt4, 12>()};
    if (x == DType::bf16) return {x, &group_method_of<PairsFromInt4, 8>(), &group_method_of<PairsOfInt4, 12>()};
#endif
#if defined(__AVX512F__)
    return {DType::f32, &group_method_of<FloatsFromInt4, 8>(), &group_method_of<FloatsOfInt4, 12>()};
#else
    return {DType::f32, &group_method_of<FloatsFromInt4, 4>(), &group_method_of<FloatsOfInt4, 6>()};
#endif
}

// One of the products of a call, and how it is divided into jobs.
struct Product {
    const Tensor *x, *x_scale, *weight, *scale, *zero, *bias, *residual, *out;
    Choice choice;
    int64_t k, group, part;  // numbers of a row, of a group, of a part
    bool expands, converts;
    bool has_offsets;
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
          part(at_most(group, most_of_a_part)),
          expands(x->shape[0] > choice.direct->rows),
          converts(choice.x != x->dtype),
          has_offsets(zero->given() || choice.direct->zero != 0) {
        const int64_t all_rows = x->shape[0], all_blocks = weight->shape[0], tile = tiles().rows;
        rows = quotient_up(quotient_up(all_rows, quotient_up(all_rows, most_rows)), tile) * tile;
        blocks = expands ? (converts || has_offsets ? 4 : 1)
                         : at_most(quotient_up(bytes_of_a_job, k / 2 * block_rows), most_blocks);
        row_jobs = quotient_up(all_rows, rows);
        jobs = row_jobs * quotient_up(all_blocks, blocks);
    }

    const GroupMethod& tiles() const { return expands ? *choice.panels : *choice.direct; }
    int64_t groups() const { return k / group; }
    int64_t x_size() const { return size_of(choice.x); }
};

class Job {
  public:
    Job(const Product& product, int64_t number, Scratch& scratch)
        : p_(product),
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
        if (p_.converts) convert();
        if (p_.has_offsets) add_up_groups();
        for (int64_t block = 0; block < num_blocks_; block++) {
            load_groups(first_block_ + block);
            const int64_t step = p_.expands ? piece : p_.k;
            for (int64_t begin = 0; begin < p_.k; begin += step) {
                multiply(first_block_ + block, begin, at_most(step, p_.k - begin));
            }
            finish(first_block_ + block);
        }
    }

  private:
    void lay_out(Memory& memory) {
        if (p_.converts) x_ = memory.take<float>(num_rows_ * p_.k);
        if (p_.expands) panel_ = memory.take<uint8_t>(piece * block_rows * p_.x_size());
        if (p_.has_offsets) offsets_ = memory.take<float>(p_.groups() * block_rows);
        if (p_.has_offsets) x_sums_ = memory.take<float>(num_rows_ * p_.groups());
        scales_ = memory.take<float>((p_.groups() + 1) * block_rows);  // a unit of two may have one
        sums_ = memory.take<float>(num_rows_ * block_rows);
    }

    const void* given_row(int64_t row) const { return address(*p_.x, (first_row_ + row) * p_.x->stride[0]); }

    void convert() {
        for (int64_t row = 0; row < num_rows_; row++) {
            float* to = x_ + row * p_.k;
            if (p_.x->dtype == DType::i8) {
                const int8_t* from = static_cast<const int8_t*>(given_row(row));
                for (int64_t i = 0; i < p_.k; i++) to[i] = from[i];
            } else {
                load_floats(p_.x->dtype, given_row(row), 1, p_.k, to);
            }
        }
    }

    // What x sums up to in each group: in 16 lanes first, whatever the width of vectors.
    void add_up_groups() {
        float numbers[128];
        for (int64_t row = 0; row < num_rows_; row++) {
            const char* from = static_cast<const char*>(given_row(row));
            for (int64_t g = 0; g < p_.groups(); g++, from += p_.group * size_of(p_.x->dtype)) {
                float& sum = x_sums_[row * p_.groups() + g];
                if (p_.x->dtype == DType::i8) {
                    sum = static_cast<float>(sum_of(reinterpret_cast<const int8_t*>(from), p_.group));
                    continue;
                }
                load_floats(p_.x->dtype, from, 1, p_.group, numbers);
                for (int64_t count = p_.group / 2; count >= 1; count /= 2) {
                    for (int64_t i = 0; i < count; i++) numbers[i] += numbers[i + count];
                }
                sum = numbers[0];
            }
        }
    }

    // Scales of a block as floats, and with zero points what they add for each 1 of a group's x.
    void load_groups(int64_t block) {
        load_scales(block);
        if (!p_.has_offsets) return;
        const float zero_of_x = p_.choice.direct->zero;
        for (int64_t g = 0; g < p_.groups(); g++) {
            const uint8_t* zeros = zeros_of(block, g);
            for (int64_t i = 0; i < block_rows; i++) {
                const float zero = zeros == nullptr ? 0 : static_cast<float>(zeros[i / 2] >> 4 * (i % 2) & 15) - 8;
                offsets_[g * block_rows + i] = -(zero + zero_of_x) * scales_[g * block_rows + i];
            }
        }
    }

    // Packed from [N, groups] where there are several groups, as matrices are; else [N].
    void load_scales(int64_t block) {
        const Tensor& scale = *p_.scale;
        if (scale.rank == 1) {
            const int64_t first = block * block_rows, count = at_most(block_rows, scale.shape[0] - first);
            for (int64_t i = count; i < block_rows; i++) scales_[i] = 0;
            load_floats(scale.dtype, address(scale, first), 1, count, scales_);
            return;
        }
        const uint8_t* units = scale.as<uint8_t>() + block * scale.shape[1] * block_bytes;
        if (scale.dtype == DType::bf16) {
            expand<FloatsFromBf16>(units, scale.shape[1], reinterpret_cast<uint8_t*>(scales_));
        } else if (scale.dtype == DType::f16) {
            expand<FloatsFromF16>(units, scale.shape[1], reinterpret_cast<uint8_t*>(scales_));
        } else {
            std::memcpy(scales_, units, scale.shape[1] * block_bytes);
        }
    }

    // The zero points of a block: 32 times four bits. They are packed from [N / 8, groups] int32.
    const uint8_t* zeros_of(int64_t block, int64_t g) const {
        if (!p_.zero->given()) return nullptr;
        constexpr int64_t words = block_rows / numbers_of_a_unit;  // of a block
        const int64_t word = block * words, units = p_.zero->shape[1];
        return p_.zero->as<uint8_t>() + (word / block_rows * units + g) * block_bytes + word % block_rows * unit_bytes;
    }

    // The products of numbers [begin, begin + count) of K with a block.
    void multiply(int64_t block, int64_t begin, int64_t count) {
        const GroupMethod& method = p_.tiles();
        const uint8_t* weights = p_.weight->as<uint8_t>() + (block * p_.k + begin) / numbers_of_a_unit * block_bytes;
        if (p_.expands) {
            p_.choice.direct->expand(weights, count / numbers_of_a_unit, panel_);
            weights = panel_;
        }
        const int64_t steps = p_.expands ? p_.choice.direct->steps : 1;
        const int64_t tiles = quotient_up(num_rows_, method.rows), of_a_tile = quotient_up(num_rows_, tiles);
        const uint8_t* x = p_.converts ? reinterpret_cast<const uint8_t*>(x_) : static_cast<const uint8_t*>(given_row(0));
        const int64_t row_bytes = (p_.converts ? p_.k : p_.x->stride[0]) * p_.x_size();
        for (int64_t row = 0; row < num_rows_; row += of_a_tile) {
            Parts parts{};
            parts.weights = weights;
            parts.x = x + row * row_bytes + begin * p_.x_size();
            parts.row_bytes = row_bytes;
            parts.first = begin / p_.part;
            parts.count = count / p_.part;
            parts.units = p_.part / numbers_of_a_unit * steps;
            parts.parts_of_a_group = p_.group / p_.part;
            parts.scales = scales_;
            parts.offsets = offsets_;
            parts.x_sums = x_sums_ == nullptr ? nullptr : x_sums_ + row * p_.groups();
            parts.groups = p_.groups();
            parts.sums = sums_ + row * block_rows;
            method.tiles[at_most(of_a_tile, num_rows_ - row) - 1](parts);
        }
    }

    // out = sums * x_scale + bias + residual
    void finish(int64_t block) {
        const int64_t first = block * block_rows, columns = at_most(block_rows, p_.out->shape[1] - first);
        float bias[block_rows] = {}, residual[block_rows] = {};
        if (p_.bias->given()) load_floats(p_.bias->dtype, address(*p_.bias, first), 1, columns, bias);
        for (int64_t row = 0; row < num_rows_; row++) {
            const float factor = p_.x_scale->given() ? p_.x_scale->as<float>()[first_row_ + row] : 1;
            float* values = sums_ + row * block_rows;
            if (p_.residual->given()) {
                const void* from = address(*p_.residual, (first_row_ + row) * p_.residual->stride[0] + first);
                load_floats(p_.residual->dtype, from, 1, columns, residual);
            }
            for (int64_t i = 0; i < block_rows; i++) values[i] = values[i] * factor + bias[i] + residual[i];
            void* to = address(*p_.out, (first_row_ + row) * p_.out->stride[0] + first);
            store_floats(p_.out->dtype, values, columns, to, 1);
        }
    }

    const Product& p_;
    int64_t first_row_, num_rows_, first_block_, num_blocks_;
    float* x_ = nullptr;
    uint8_t* panel_ = nullptr;
    float *scales_ = nullptr, *offsets_ = nullptr, *x_sums_ = nullptr, *sums_ = nullptr;
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

extern const Kernel linear_groups;
const Kernel linear_groups = {count_jobs, run_jobs};

}  // namespace furiosa::FURIOSA_VARIANT
