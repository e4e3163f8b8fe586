// The kernels for x86-64 with AVX2 and FMA.
#if defined(__x86_64__)
#include "kernels.h"

#define LANES 8
#define ROWS 3
#define FEWEST 6
#define BY_1 8
#define BY_2 6
#define BY_3 4
#define DOWN_ROWS 4
#define DOWN_VECTORS 2
#define TABLE avx2_kernels
#define NAME "AVX2"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
