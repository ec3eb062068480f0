// pointwise: outputs, inputs; ints: number of outputs, instructions; floats: constants. pointwise.py describes the
// machine. It works through tiles of elements: an instruction is a loop over registers of a tile each.
#include <cmath>
#include <limits>

#include "functions.h"
#include "numbers.h"
#include "space.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

constexpr int64_t tile = 256;
constexpr int64_t job_elements = 16 * tile;
constexpr int64_t most_tensors = 32;  // as pointwise.MOST_TENSORS
constexpr int64_t numbers_of_an_instruction = 5;

// A register has room for a tile of either kind; so has a constant.
struct alignas(64) Register {
    float floats[tile];
    int64_t ints[tile];
};

template <class T>
T* tile_of(Register& r);
template <>
float* tile_of<float>(Register& r) {
    return r.floats;
}
template <>
int64_t* tile_of<int64_t>(Register& r) {
    return r.ints;
}

using Step = void (*)(Register& d, Register& a, Register& b, Register& c);

// The loop of an instruction. The result may be in the place of an argument.
template <class D, class A, D (*f)(A)>
void unary(Register& d, Register& a, Register&, Register&) {
    D* to = tile_of<D>(d);
    const A* x = tile_of<A>(a);
#pragma GCC ivdep
    for (int64_t i = 0; i < tile; i++) to[i] = f(x[i]);
}

template <class D, class A, D (*f)(A, A)>
void binary(Register& d, Register& a, Register& b, Register&) {
    D* to = tile_of<D>(d);
    const A *x = tile_of<A>(a), *y = tile_of<A>(b);
#pragma GCC ivdep
    for (int64_t i = 0; i < tile; i++) to[i] = f(x[i], y[i]);
}

template <class D>
void where(Register& d, Register& a, Register& b, Register& c) {
    D* to = tile_of<D>(d);
    const int64_t* condition = a.ints;
    const D *x = tile_of<D>(b), *y = tile_of<D>(c);
#pragma GCC ivdep
    for (int64_t i = 0; i < tile; i++) to[i] = condition[i] != 0 ? x[i] : y[i];
}

#define FLOAT1(name, expression) \
    inline float name(float x) { return expression; }
#define FLOAT2(name, expression) \
    inline float name(float x, float y) { return expression; }
#define TEST1(name, expression) \
    inline int64_t name(float x) { return expression; }
#define TEST2(name, expression) \
    inline int64_t name(float x, float y) { return expression; }
#define INT1(name, expression) \
    inline int64_t name(int64_t x) { return expression; }
#define INT2(name, expression) \
    inline int64_t name(int64_t x, int64_t y) { return expression; }

namespace f {
FLOAT1(neg, -x)
FLOAT1(abs, __builtin_fabsf(x))
FLOAT1(reciprocal, 1.0f / x)
FLOAT1(rsqrt, 1.0f / __builtin_sqrtf(x))
FLOAT1(sqrt, __builtin_sqrtf(x))
FLOAT1(floor, __builtin_floorf(x))
FLOAT1(ceil, __builtin_ceilf(x))
FLOAT1(round, __builtin_rintf(x))
FLOAT1(trunc, __builtin_truncf(x))
FLOAT1(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f)  // of NaN 0, as torch has it
FLOAT1(round_bf16, to_float(from_float<bf16>(x)))
FLOAT2(add, x + y)
FLOAT2(sub, x - y)
FLOAT2(mul, x* y)
FLOAT2(div, x / y)
FLOAT2(maximum, x > y || x != x ? x : y)
FLOAT2(minimum, x < y || x != x ? x : y)
FLOAT2(pow, std::pow(x, y))
FLOAT2(fmod, std::fmod(x, y))

// Of the sign of y, as Python's %.
inline float remainder(float x, float y) {
    const float rest = std::fmod(x, y);
    return rest != 0.0f && (rest < 0.0f) != (y < 0.0f) ? rest + y : rest;
}

TEST2(eq, x == y)
TEST2(ne, x != y)
TEST2(lt, x < y)
TEST2(le, x <= y)
TEST2(gt, x > y)
TEST2(ge, x >= y)
TEST1(isnan, x != x)
TEST1(isinf, __builtin_fabsf(x) == infinity)
TEST1(to_int, static_cast<int64_t>(x))
TEST1(to_bool, x != 0.0f)
}  // namespace f

namespace i {
inline float to_float(int64_t x) { return static_cast<float>(x); }

INT1(neg, static_cast<int64_t>(-static_cast<uint64_t>(x)))
INT1(abs, x < 0 ? neg(x) : x)
INT1(bit_not, ~x)
INT1(sign, (x > 0) - (x < 0))
INT1(to_bool, x != 0)
INT1(to_int32, static_cast<int32_t>(x))
INT1(to_int16, static_cast<int16_t>(x))
INT1(to_int8, static_cast<int8_t>(x))
INT1(to_uint8, static_cast<uint8_t>(x))
INT2(add, static_cast<int64_t>(static_cast<uint64_t>(x) + static_cast<uint64_t>(y)))
INT2(sub, static_cast<int64_t>(static_cast<uint64_t>(x) - static_cast<uint64_t>(y)))
INT2(mul, static_cast<int64_t>(static_cast<uint64_t>(x) * static_cast<uint64_t>(y)))
INT2(truncate_divide, y == 0 ? 0 : y == -1 ? neg(x) : x / y)
INT2(fmod, y == 0 || y == -1 ? 0 : x % y)
INT2(floor_divide, sub(truncate_divide(x, y), fmod(x, y) != 0 && (x < 0) != (y < 0)))
INT2(remainder, fmod(x, y) != 0 && (x < 0) != (y < 0) ? fmod(x, y) + y : fmod(x, y))
INT2(maximum, x > y ? x : y)
INT2(minimum, x < y ? x : y)
INT2(bit_and, x& y)
INT2(bit_or, x | y)
INT2(bit_xor, x ^ y)
INT2(shift_left, y < 0 || y > 63 ? 0 : static_cast<int64_t>(static_cast<uint64_t>(x) << y))
INT2(shift_right, x >> (y < 0 || y > 63 ? 63 : y))
INT2(eq, x == y)
INT2(ne, x != y)
INT2(lt, x < y)
INT2(le, x <= y)
INT2(gt, x > y)
INT2(ge, x >= y)
}  // namespace i

// The compiler does not vectorise it by itself.
void round_f16(Register& d, Register& a, Register&, Register&) {
    for (int64_t i = 0; i < tile; i += 8) {
        const __m128i rounded = _mm256_cvtps_ph(_mm256_load_ps(a.floats + i), _MM_FROUND_TO_NEAREST_INT);
        _mm256_store_ps(d.floats + i, _mm256_cvtph_ps(rounded));
    }
}

#define F1(name) unary<float, float, name>
#define F2(name) binary<float, float, name>
#define T1(name) unary<int64_t, float, name>
#define T2(name) binary<int64_t, float, name>
#define I1(name) unary<int64_t, int64_t, name>
#define I2(name) binary<int64_t, int64_t, name>

// In the order of pointwise.INSTRUCTIONS; load and store, the first two, are not steps.
constexpr int64_t load_code = 0, store_code = 1;
const Step steps[] = {
    nullptr,           nullptr,
    F1(f::neg),        F1(f::abs),          F1(f::reciprocal),   F1(f::rsqrt),      F1(f::sqrt),
    F1(exp),           F1(exp2),            F1(expm1),           F1(log),           F1(log2),
    F1(log1p),         F1(sigmoid),         F1(tanh),            F1(erf),           F1(f::floor),
    F1(f::ceil),       F1(f::round),        F1(f::trunc),        F1(cos),           F1(sin),
    F1(f::sign),       F1(f::round_bf16),   round_f16,
    F2(f::add),        F2(f::sub),          F2(f::mul),          F2(f::div),        F2(f::maximum),
    F2(f::minimum),    F2(f::pow),          F2(f::fmod),         F2(f::remainder),
    T2(f::eq),         T2(f::ne),           T2(f::lt),           T2(f::le),         T2(f::gt),
    T2(f::ge),         T1(f::isnan),        T1(f::isinf),        T1(f::to_int),     T1(f::to_bool),
    unary<float, int64_t, i::to_float>,     where<float>,
    I1(i::neg),        I1(i::abs),          I1(i::bit_not),      I1(i::sign),       I1(i::to_bool),
    I1(i::to_int32),   I1(i::to_int16),     I1(i::to_int8),      I1(i::to_uint8),
    I2(i::add),        I2(i::sub),          I2(i::mul),          I2(i::floor_divide),
    I2(i::truncate_divide),                 I2(i::remainder),    I2(i::fmod),       I2(i::maximum),
    I2(i::minimum),    I2(i::bit_and),      I2(i::bit_or),       I2(i::bit_xor),    I2(i::shift_left),
    I2(i::shift_right),                     I2(i::eq),           I2(i::ne),         I2(i::lt),
    I2(i::le),         I2(i::gt),           I2(i::ge),           where<int64_t>,
};

int64_t saturated(double x) {
    if (x != x) return 0;
    if (x >= 9223372036854775808.0) return std::numeric_limits<int64_t>::max();
    if (x <= -9223372036854775808.0) return std::numeric_limits<int64_t>::min();
    return static_cast<int64_t>(x);
}

// A call's program, and the registers that it runs on.
class Machine {
  public:
    Machine(const Call& call, Scratch& scratch)
        : call_(call), space_(call.tensors, call.num_tensors), end_(call.ints + call.num_ints) {
        int64_t count = 1;
        for (const int64_t* code = first(); code < end_; code += numbers_of_an_instruction) {
            if (code[0] != store_code) count = std::max(count, code[1] + 1);
        }
        const size_t size = static_cast<size_t>(call.num_floats + count) * sizeof(Register);
        registers_ = static_cast<Register*>(scratch.get(size)) + call.num_floats;
        for (int64_t i = 0; i < call.num_floats; i++) {
            std::fill_n(at(-1 - i).floats, tile, static_cast<float>(call.floats[i]));
            std::fill_n(at(-1 - i).ints, tile, saturated(call.floats[i]));
        }
    }

    int64_t size() const { return space_.size(); }

    // Elements [begin, begin + count), at most a tile.
    void run(int64_t begin, int64_t count) {
        for (const int64_t* code = first(); code < end_; code += numbers_of_an_instruction) {
            if (code[0] == load_code) {
                load(at(code[1]), code[2], begin, count);
            } else if (code[0] == store_code) {
                store(code[1], at(code[2]), begin, count);
            } else {
                steps[code[0]](at(code[1]), at(code[2]), at(code[3]), at(code[4]));
            }
        }
    }

  private:
    const int64_t* first() const { return call_.ints + 1; }
    Register& at(int64_t number) { return registers_[number]; }

    void load(Register& to, int64_t tensor, int64_t begin, int64_t count) {
        const Tensor& from = call_.tensors[tensor];
        const int64_t step = space_.step(tensor);
        space_.each_piece(begin, count, [&](int64_t done, int64_t length, const int64_t* index) {
            const char* first = address(from, space_.offset(tensor, index));
            if (is_float(from.dtype)) {
                load_floats(from.dtype, first, step, length, to.floats + done);
            } else {
                load_ints(from.dtype, first, step, length, to.ints + done);
            }
        });
    }

    void store(int64_t tensor, const Register& from, int64_t begin, int64_t count) {
        const Tensor& to = call_.tensors[tensor];
        const int64_t step = space_.step(tensor);
        space_.each_piece(begin, count, [&](int64_t done, int64_t length, const int64_t* index) {
            char* first = address(to, space_.offset(tensor, index));
            if (is_float(to.dtype)) {
                store_floats(to.dtype, from.floats + done, length, first, step);
            } else {
                store_ints(to.dtype, from.ints + done, length, first, step);
            }
        });
    }

    const Call& call_;
    const Space<most_tensors> space_;
    const int64_t* end_;
    Register* registers_;  // constants are before them: number n is -1 - n
};

int64_t jobs(const Call& call) { return divide_up(num_elements(call.tensors[0]), job_elements); }

void run(const Call& call, int64_t begin, int64_t end, Scratch& scratch) {
    Machine machine(call, scratch);
    const int64_t last = std::min(machine.size(), end * job_elements);
    for (int64_t i = begin * job_elements; i < last; i += tile) machine.run(i, std::min(tile, last - i));
}

}  // namespace

extern const Kernel pointwise;
const Kernel pointwise{jobs, run};

}  // namespace furiosa::FURIOSA_VARIANT
