#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernels.h"
#include "program.h"

namespace furiosa {

namespace {

// Whether the system keeps the registers of AMX for this process, which it must be asked for: threads that begin later
// may use them then. Needs XGETBV, which processors with AVX-512 have.
bool has_amx() {
    constexpr unsigned bf16 = 1u << 22, tiles = 1u << 24, int8 = 1u << 25;  // of EDX
    constexpr unsigned kept_by_system = 3u << 17;                           // of XCR0: their configuration and content
    constexpr long request_permission = 0x1023, tile_data = 18;             // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
    if ((edx & bf16) == 0 || (edx & tiles) == 0 || (edx & int8) == 0) return false;
    asm("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return (eax & kept_by_system) == kept_by_system && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

Cpu found_by_cpuid() {
    Cpu found;
    found.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl");
    found.vnni = found.avx512 && __builtin_cpu_supports("avx512vnni");
    found.bf16 = found.avx512 && __builtin_cpu_supports("avx512bf16");
    found.vbmi = found.avx512 && __builtin_cpu_supports("avx512vbmi");
    found.amx = found.vnni && found.bf16 && found.vbmi && has_amx();
    return found;
}

Cpu limited = found_by_cpuid();

}  // namespace

const Cpu& cpu() { return limited; }

}  // namespace furiosa

void furiosa_limit_cpu(int64_t limit) {
    furiosa::Cpu left = furiosa::found_by_cpuid();
    if (limit >= 1) left.amx = false;
    if (limit >= 2) left.vnni = left.bf16 = left.vbmi = false;
    if (limit >= 3) left.avx512 = false;
    furiosa::limited = left;
}
