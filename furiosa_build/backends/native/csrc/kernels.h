// What every kernel is: a function of tensors that does a share of an operation's work.
//
// A program is a list of calls (program.h). The threads of a pool go through the list together: of each call they take
// jobs, and none begins the next call before all jobs of this one are done.
#pragma once

#include <cstddef>
#include <cstdint>

namespace furiosa {

enum class DType : int64_t { none = -1, f32 = 0, bf16 = 1, f16 = 2, f64 = 3, i64 = 4, i32 = 5, i8 = 6, u8 = 7, boolean = 8 };

constexpr int max_rank = 8;

// A view of a buffer. Strides are in elements, and 0 where a dimension is repeated. An operand that is not given has
// dtype `none`. `data` is where the first element is, in this run.
struct Tensor {
    void* data;
    DType dtype;
    int64_t rank;
    int64_t shape[max_rank];
    int64_t stride[max_rank];

    template <class T> T* as() const { return static_cast<T*>(data); }
    bool given() const { return dtype != DType::none; }
};

// The operands of one call, in the order that its operator's description in operators.py has them.
struct Call {
    const Tensor* tensors;
    int64_t num_tensors;
    const int64_t* ints;
    int64_t num_ints;
    const double* floats;
    int64_t num_floats;
    void* shared = nullptr;  // memory of all jobs of the call in this run: Kernel::shared_bytes
};

// Memory of one thread, for the duration of a job: 64-byte aligned, of any content.
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch();
    // What an earlier `get` of the same job gave is no longer valid.
    void* get(size_t bytes);

  private:
    void* memory_ = nullptr;
    size_t bytes_ = 0;
};

// An operator's implementation. Jobs are numbered from 0 and may be done in any order and by any thread; what a job
// computes does not depend on the number of threads.
//
// `jobs` is asked once, when a program is made: where the tensors lie (`data`) is not known then.
struct Kernel {
    int64_t (*jobs)(const Call&);
    void (*run)(const Call&, int64_t begin, int64_t end, Scratch&);
    // What all jobs need is computed once, by the jobs of another kernel, which are done before. Null: there is nothing.
    const Kernel* preparation = nullptr;
    size_t (*shared_bytes)(const Call&) = nullptr;  // of what it is kept in, aligned to 64 bytes
};

// Numbers of operators, as operators.py has them.
enum class Op : int64_t {
    pointwise = 0,
    copy = 1,
    reduce = 2,
    softmax = 3,
    embedding = 4,
    norm = 5,
    rotary = 6,
    linear = 7,
    round_rows = 8,
    unpack = 9,
    write_kv_cache = 10,
    paged_attention = 11,
    gather = 12,
    matmul = 13,
    join_attention = 14,
    topk = 15,
    scatter = 16,
    read_kv_cache = 17,
    linear_groups = 20,
};

// The kernel of an operator on this machine's processor: registry.cpp.
//
// A source file with kernels is compiled once for each variant that build_library.py lists for it, and all that it
// defines is in a namespace of the variant's name (or static): code of one variant must not be linked into another.
const Kernel& find_kernel(Op op);

// What the processor can run, found by CPUID: what kernels were chosen by when a program was made.
struct Cpu {
    bool avx512 = false;  // F, BW, CD, DQ, VL: x86-64-v4
    bool vnni = false;
    bool bf16 = false;
    bool vbmi = false;
    bool amx = false;  // tiles of int8 and bf16, which the system lets this process use
};
const Cpu& cpu();

}  // namespace furiosa
