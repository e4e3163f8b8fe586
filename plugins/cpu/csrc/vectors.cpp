// The kernels for any processor: vectors of four, which are NEON's on aarch64 and SSE2's on x86-64.
#include "kernels.h"

#define LANES 4
#define ROWS 4
#define FEWEST 3
#define BY_1 8
#define BY_2 8
#define BY_3 6
#define DOWN_ROWS 4
#define DOWN_VECTORS 4
#define TABLE vectors_kernels
#define NAME "vectors of four"
#include "kernels.inc"
