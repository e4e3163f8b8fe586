// The kernels for x86-64 with AVX-512.
#if defined(__x86_64__)
#include "kernels.h"

#define LANES 16
#define ROWS 4
#define FEWEST 15
#define BY_1 8
#define BY_2 8
#define BY_3 8
#define DOWN_ROWS 6
#define DOWN_VECTORS 4
#define TABLE avx512_kernels
#define NAME "AVX-512"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#endif
#include "kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
