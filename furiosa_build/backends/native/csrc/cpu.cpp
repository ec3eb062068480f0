#include "kernels.h"
#include "program.h"

namespace furiosa {

namespace {

Cpu found_by_cpuid() {
    Cpu found;
    found.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl");
    found.vnni = found.avx512 && __builtin_cpu_supports("avx512vnni");
    found.bf16 = found.avx512 && __builtin_cpu_supports("avx512bf16");
    found.vbmi = found.avx512 && __builtin_cpu_supports("avx512vbmi");
    return found;
}

Cpu limited = found_by_cpuid();

}  // namespace

const Cpu& cpu() { return limited; }

}  // namespace furiosa

void furiosa_limit_cpu(int64_t limit) {
    furiosa::Cpu left = furiosa::found_by_cpuid();
    if (limit >= 1) left.vnni = left.bf16 = left.vbmi = false;
    if (limit >= 2) left.avx512 = false;
    furiosa::limited = left;
}
