// reduce: x, out; ints: kind, num_dims.
#include "functions.h"
#include "rows.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

constexpr int64_t tile = 512;

enum Kind : int64_t { sum_kind, mean_kind, largest_kind, smallest_kind, place_kind };

// What is reduced to one number of the result.
class Part {
  public:
    Part(const Tensor& x, int64_t num_dims) : dtype_(x.dtype), tail_(trailing(x, num_dims)), space_(&tail_, 1) {}

    int64_t size() const { return space_.size(); }

    // Calls use(numbers, count) for each tile of the part that begins at `from`.
    template <class Use>
    void each_float_tile(const char* from, Use use) const {
        alignas(64) float numbers[tile];
        each_tile(from, [&](const char* first, int64_t step, int64_t count) {
            load_floats(dtype_, first, step, count, numbers);
            use(static_cast<const float*>(numbers), count);
        });
    }

    template <class Use>
    void each_int_tile(const char* from, Use use) const {
        alignas(64) int64_t numbers[tile];
        each_tile(from, [&](const char* first, int64_t step, int64_t count) {
            load_ints(dtype_, first, step, count, numbers);
            use(static_cast<const int64_t*>(numbers), count);
        });
    }

  private:
    template <class Use>
    void each_tile(const char* from, Use use) const {
        const int64_t bytes = size_of(dtype_), step = space_.step(0);
        space_.each_piece(0, space_.size(), [&](int64_t, int64_t length, const int64_t* index) {
            const char* first = from + space_.offset(0, index) * bytes;
            for (int64_t i = 0; i < length; i += tile) use(first + i * step * bytes, step, std::min(tile, length - i));
        });
    }

    DType dtype_;
    Tensor tail_;
    Space<1> space_;
};

template <class Combine>
float reduce_floats(const Part& part, const char* from, float start, Combine combine) {
    float result = start;
    part.each_float_tile(from, [&](const float* numbers, int64_t count) {
        result = combine(result, over_row(numbers, count, start, combine));
    });
    return result;
}

float reduce_floats(const Part& part, const char* from, int64_t kind) {
    switch (kind) {
        case sum_kind:
            return reduce_floats(part, from, 0.0f, Sum());
        case mean_kind:
            return reduce_floats(part, from, 0.0f, Sum()) / static_cast<float>(part.size());
        case largest_kind:
            return reduce_floats(part, from, -infinity, Largest());
        default:
            return reduce_floats(part, from, infinity, Smallest());
    }
}

template <class Combine>
int64_t reduce_ints(const Part& part, const char* from, int64_t start, Combine combine) {
    int64_t result = start;
    part.each_int_tile(from, [&](const int64_t* numbers, int64_t count) {
        for (int64_t i = 0; i < count; i++) result = combine(result, numbers[i]);
    });
    return result;
}

int64_t reduce_ints(const Part& part, const char* from, int64_t kind) {
    switch (kind) {
        case sum_kind:
            return reduce_ints(part, from, 0, Sum());
        case largest_kind:
            return reduce_ints(part, from, INT64_MIN, Largest());
        default:
            return reduce_ints(part, from, INT64_MAX, Smallest());
    }
}

// The first place of the largest number; NaN counts as the largest.
int64_t place_of_largest(const Part& part, const char* from) {
    int64_t best = 0, place = 0;
    float top = -infinity;
    part.each_float_tile(from, [&](const float* numbers, int64_t count) {
        for (int64_t i = 0; i < count; i++, place++) {
            if (top == top && (numbers[i] > top || numbers[i] != numbers[i])) {
                top = numbers[i];
                best = place;
            }
        }
    });
    return best;
}

int64_t jobs(const Call& call) {
    const int64_t rows = num_elements(call.tensors[1]);
    return rows == 0 ? 0 : jobs_of_rows(rows, num_elements(call.tensors[0]) / rows);
}

void run(const Call& call, int64_t begin, int64_t end, Scratch&) {
    const Tensor &x = call.tensors[0], &out = call.tensors[1];
    const int64_t kind = call.ints[0], num_dims = call.ints[1];
    const Part part(x, num_dims);
    const Tensor heads[] = {head(x, num_dims, x), out};
    each_row(heads, part.size(), begin, end, [&](char* const* rows) {
        if (kind == place_kind || !is_float(x.dtype)) {
            const int64_t result = kind == place_kind ? place_of_largest(part, rows[0]) : reduce_ints(part, rows[0], kind);
            store_ints(out.dtype, &result, 1, rows[1], 1);
        } else {
            const float result = reduce_floats(part, rows[0], kind);
            store_floats(out.dtype, &result, 1, rows[1], 1);
        }
    });
}

}  // namespace

extern const Kernel reduce;
const Kernel reduce{jobs, run};

}  // namespace furiosa::FURIOSA_VARIANT
