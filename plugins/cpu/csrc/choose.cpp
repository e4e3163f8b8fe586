#include "kernels.h"

#ifndef MOEE_WIDEST
#define MOEE_WIDEST 16  // floats of a vector; tests compile with less
#endif

namespace moee {

extern const Kernels vectors_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
#endif

const Kernels& kernels() {
#if defined(__x86_64__)
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl");
    if (MOEE_WIDEST >= 16 && avx512) return avx512_kernels;
    if (MOEE_WIDEST >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_kernels;
#endif
    return vectors_kernels;
}

}  // namespace moee
