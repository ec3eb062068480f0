// matmul: a, b, out. Blocks of both operands are copied as float32 into scratch, then multiplied a few rows at a time.
#include "numbers.h"
#include "space.h"
#include "vectors.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

constexpr int64_t tile_rows = 4, tile_vectors = 2, tile_columns = tile_vectors * lanes;
constexpr int64_t block_rows = 32, block_columns = 64, block_depth = 256;

// A matrix of a stack.
struct Matrix {
    const char* data;
    DType dtype;
    int64_t rows, columns, row_stride, column_stride;
};

Matrix matrix(const Tensor& tensor, int64_t offset) {
    const int64_t r = tensor.rank - 2, c = tensor.rank - 1;
    return {address(tensor, offset), tensor.dtype, tensor.shape[r], tensor.shape[c], tensor.stride[r], tensor.stride[c]};
}

// A block of a matrix as float32, `columns` numbers a row; zeros beyond the matrix.
void load_block(const Matrix& from, int64_t row, int64_t column, int64_t rows, int64_t columns, float* to) {
    const int64_t valid_rows = std::min(rows, from.rows - row), valid_columns = std::min(columns, from.columns - column);
    if (valid_rows < rows || valid_columns < columns) std::fill_n(to, rows * columns, 0.0f);
    const char* first = from.data + (row * from.row_stride + column * from.column_stride) * size_of(from.dtype);
    if (from.column_stride != 1 && from.row_stride == 1) {
        float numbers[block_depth];
        for (int64_t c = 0; c < valid_columns; c++) {
            load_floats(from.dtype, first + c * from.column_stride * size_of(from.dtype), 1, valid_rows, numbers);
            for (int64_t r = 0; r < valid_rows; r++) to[r * columns + c] = numbers[r];
        }
        return;
    }
    for (int64_t r = 0; r < valid_rows; r++) {
        const char* numbers = first + r * from.row_stride * size_of(from.dtype);
        load_floats(from.dtype, numbers, from.column_stride, valid_columns, to + r * columns);
    }
}

// out[tile_rows][block_columns] += a[tile_rows][block_depth] * b[block_depth][block_columns], for one tile's columns.
void multiply_tile(const float* a, const float* b, int64_t depth, float* out) {
    Floats sums[tile_rows][tile_vectors];
#pragma GCC unroll 4
    for (int64_t r = 0; r < tile_rows; r++) {
#pragma GCC unroll 2
        for (int64_t v = 0; v < tile_vectors; v++) sums[r][v] = load<Floats>(out + r * block_columns + v * lanes);
    }
    for (int64_t k = 0; k < depth; k++) {
        Floats columns[tile_vectors];
#pragma GCC unroll 2
        for (int64_t v = 0; v < tile_vectors; v++) columns[v] = load<Floats>(b + k * block_columns + v * lanes);
#pragma GCC unroll 4
        for (int64_t r = 0; r < tile_rows; r++) {
#pragma GCC unroll 2
            for (int64_t v = 0; v < tile_vectors; v++) sums[r][v] += a[r * block_depth + k] * columns[v];
        }
    }
#pragma GCC unroll 4
    for (int64_t r = 0; r < tile_rows; r++) {
#pragma GCC unroll 2
        for (int64_t v = 0; v < tile_vectors; v++) store(out + r * block_columns + v * lanes, sums[r][v]);
    }
}

// A stack of products, in blocks of the result.
class Product {
  public:
    explicit Product(const Call& call)
        : call_(call),
          heads_{leading(call.tensors[2], call.tensors[2].rank - 2), leading(call.tensors[0], call.tensors[0].rank - 2),
                 leading(call.tensors[1], call.tensors[1].rank - 2)},
          stack_(heads_, 3) {
        const Tensor& out = call.tensors[2];
        row_blocks_ = divide_up(out.shape[out.rank - 2], block_rows);
        column_blocks_ = divide_up(out.shape[out.rank - 1], block_columns);
    }

    int64_t num_blocks() const { return stack_.size() * row_blocks_ * column_blocks_; }

    void run_block(int64_t block, Scratch& scratch) const {
        const int64_t column = block % column_blocks_ * block_columns;
        const int64_t row = block / column_blocks_ % row_blocks_ * block_rows;
        stack_.each_piece(block / column_blocks_ / row_blocks_, 1, [&](int64_t, int64_t, const int64_t* index) {
            const Matrix a = matrix(call_.tensors[0], stack_.offset(1, index));
            const Matrix b = matrix(call_.tensors[1], stack_.offset(2, index));
            multiply(a, b, row, column, scratch);
            const float* sums = static_cast<const float*>(scratch.get(scratch_bytes));
            store_block(call_.tensors[2], stack_.offset(0, index), row, column, sums);
        });
    }

  private:
    static constexpr int64_t size_of_sums = block_rows * block_columns, size_of_a = block_rows * block_depth;
    static constexpr size_t scratch_bytes =
        static_cast<size_t>(size_of_sums + size_of_a + block_depth * block_columns) * sizeof(float);

    // Leaves the sums at the beginning of the scratch.
    static void multiply(const Matrix& a, const Matrix& b, int64_t row, int64_t column, Scratch& scratch) {
        float* sums = static_cast<float*>(scratch.get(scratch_bytes));
        float *block_of_a = sums + size_of_sums, *block_of_b = block_of_a + size_of_a;
        const int64_t rows = divide_up(std::min(block_rows, a.rows - row), tile_rows) * tile_rows;
        std::fill_n(sums, size_of_sums, 0.0f);
        for (int64_t k = 0; k < a.columns; k += block_depth) {
            load_block(a, row, k, rows, block_depth, block_of_a);
            load_block(b, k, column, block_depth, block_columns, block_of_b);
            const int64_t depth = std::min(block_depth, a.columns - k);
            for (int64_t r = 0; r < rows; r += tile_rows) {
                for (int64_t c = 0; c < block_columns; c += tile_columns) {
                    multiply_tile(block_of_a + r * block_depth, block_of_b + c, depth, sums + r * block_columns + c);
                }
            }
        }
    }

    static void store_block(const Tensor& out, int64_t offset, int64_t row, int64_t column, const float* sums) {
        const int64_t row_dim = out.rank - 2, column_dim = out.rank - 1;
        const int64_t rows = std::min(block_rows, out.shape[row_dim] - row);
        const int64_t columns = std::min(block_columns, out.shape[column_dim] - column);
        for (int64_t r = 0; r < rows; r++) {
            const int64_t first = offset + (row + r) * out.stride[row_dim] + column * out.stride[column_dim];
            store_floats(out.dtype, sums + r * block_columns, columns, address(out, first), out.stride[column_dim]);
        }
    }

    const Call& call_;
    const Tensor heads_[3];
    const Space<3> stack_;
    int64_t row_blocks_, column_blocks_;
};

int64_t jobs(const Call& call) { return Product(call).num_blocks(); }

void run(const Call& call, int64_t begin, int64_t end, Scratch& scratch) {
    const Product product(call);
    for (int64_t block = begin; block < end; block++) product.run_block(block, scratch);
}

}  // namespace

extern const Kernel matmul;
const Kernel matmul{jobs, run};

}  // namespace furiosa::FURIOSA_VARIANT
