// Which kernel runs an operator, by what the processor has: a fixed table, so that results do not depend on timings.
#include <cstdlib>

#include "kernels.h"

// A kernel that is compiled for AVX2 and for AVX-512.
#define DECLARE(name)             \
    namespace v3 {                \
    extern const Kernel name;     \
    }                             \
    namespace v4 {                \
    extern const Kernel name;     \
    }
// A kernel that is compiled for the processor's dot products too.
#define DECLARE_DOT(name)         \
    DECLARE(name)                 \
    namespace dot {               \
    extern const Kernel name;     \
    }
// And for its matrix registers.
#define DECLARE_AMX(name)         \
    DECLARE_DOT(name)             \
    namespace amx {               \
    extern const Kernel name;     \
    }
#define BEST(name) (cpu().avx512 ? v4::name : v3::name)
#define BEST_DOT(name) (cpu().vnni && cpu().bf16 && cpu().vbmi ? dot::name : BEST(name))
#define CHOOSE(name) \
    case Op::name:   \
        return BEST(name)
#define CHOOSE_DOT(name) \
    case Op::name:       \
        return BEST_DOT(name)
#define CHOOSE_AMX(name) \
    case Op::name:       \
        return cpu().amx ? amx::name : BEST_DOT(name)

namespace furiosa {

DECLARE(pointwise)
DECLARE(copy)
DECLARE(reduce)
DECLARE(softmax)
DECLARE(topk)
DECLARE(scatter)
DECLARE(embedding)
DECLARE(norm)
DECLARE(rotary)
DECLARE_AMX(linear)
DECLARE_DOT(linear_groups)
DECLARE(round_rows)
DECLARE(unpack)
DECLARE(write_kv_cache)
DECLARE_DOT(paged_attention)
DECLARE_DOT(join_attention)
DECLARE(gather)
DECLARE(matmul)
DECLARE(read_kv_cache)

const Kernel& find_kernel(Op op) {
    switch (op) {
        CHOOSE(pointwise);
        CHOOSE(copy);
        CHOOSE(reduce);
        CHOOSE(softmax);
        CHOOSE(topk);
        CHOOSE(scatter);
        CHOOSE(embedding);
        CHOOSE(norm);
        CHOOSE(rotary);
        CHOOSE_AMX(linear);
        CHOOSE_DOT(linear_groups);
        CHOOSE(round_rows);
        CHOOSE(unpack);
        CHOOSE(write_kv_cache);
        CHOOSE_DOT(paged_attention);
        CHOOSE_DOT(join_attention);
        CHOOSE(gather);
        CHOOSE(matmul);
        CHOOSE(read_kv_cache);
        default:
            std::abort();  // plan.py refuses it before
    }
}

}  // namespace furiosa
