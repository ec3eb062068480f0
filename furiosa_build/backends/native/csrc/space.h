// The elements of tensors of one shape, in order: what element n is in each of them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace furiosa::FURIOSA_VARIANT {

// Dimensions that lie one after the other in all tensors are one dimension, so that rows are as long as possible.
template <int64_t most_tensors>
class Space {
  public:
    Space(const Tensor* tensors, int64_t count) {
        for (int64_t i = 0; i < tensors[0].rank; i++) add_dimension(tensors, count, i);
        if (rank_ == 0) add_row(count);
    }

    // The number of elements.
    int64_t size() const {
        int64_t size = 1;
        for (int64_t i = 0; i < rank_; i++) size *= shape_[i];
        return size;
    }

    // Calls use(done, length, index) for each piece of elements [begin, begin + count) that lies in one row: `done`
    // elements come before it, and `index` is that of its first.
    template <class Use>
    void each_piece(int64_t begin, int64_t count, Use use) const {
        if (count <= 0) return;
        int64_t index[max_rank];
        const int64_t last = rank_ - 1;
        for (int64_t i = last; i >= 0; i--) {
            index[i] = begin % shape_[i];
            begin /= shape_[i];
        }
        for (int64_t done = 0; done < count;) {
            const int64_t length = std::min(count - done, shape_[last] - index[last]);
            use(done, length, static_cast<const int64_t*>(index));
            done += length;
            index[last] += length;
            for (int64_t i = last; i > 0 && index[i] == shape_[i]; i--) {
                index[i] = 0;
                index[i - 1]++;
            }
        }
    }

    // Where an element lies in a tensor.
    int64_t offset(int64_t tensor, const int64_t* index) const {
        int64_t offset = 0;
        for (int64_t i = 0; i < rank_; i++) offset += index[i] * stride_[tensor][i];
        return offset;
    }

    // How far the elements of a piece are from each other.
    int64_t step(int64_t tensor) const { return stride_[tensor][rank_ - 1]; }

  private:
    void add_dimension(const Tensor* tensors, int64_t count, int64_t dimension) {
        const int64_t size = tensors[0].shape[dimension];
        if (size == 1) return;
        bool joins = rank_ > 0;
        for (int64_t t = 0; t < count && joins; t++) {
            joins = stride_[t][rank_ - 1] == tensors[t].stride[dimension] * size;
        }
        if (joins) {
            shape_[rank_ - 1] *= size;
        } else {
            shape_[rank_++] = size;
        }
        for (int64_t t = 0; t < count; t++) stride_[t][rank_ - 1] = tensors[t].stride[dimension];
    }

    void add_row(int64_t count) {
        shape_[rank_++] = 1;
        for (int64_t t = 0; t < count; t++) stride_[t][0] = 1;
    }

    int64_t rank_ = 0;
    int64_t shape_[max_rank];
    int64_t stride_[most_tensors][max_rank];
};

// The first or the last `count` dimensions of a tensor, as a tensor.
inline Tensor leading(const Tensor& tensor, int64_t count) {
    Tensor part = tensor;
    part.rank = count;
    return part;
}

inline Tensor trailing(const Tensor& tensor, int64_t count) {
    Tensor part = tensor;
    part.rank = count;
    std::copy_n(tensor.shape + tensor.rank - count, count, part.shape);
    std::copy_n(tensor.stride + tensor.rank - count, count, part.stride);
    return part;
}

inline int64_t num_elements(const Tensor& tensor) {
    int64_t size = 1;
    for (int64_t i = 0; i < tensor.rank; i++) size *= tensor.shape[i];
    return size;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace furiosa::FURIOSA_VARIANT
