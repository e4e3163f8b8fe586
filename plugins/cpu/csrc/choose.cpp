// Which kernels this processor takes. The processor is asked here, by cpuid: not every compiler's __builtin_cpu_supports knows it
// (Zig's answers no to everything).
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include <initializer_list>
#endif

#ifndef MOEE_WIDEST
#define MOEE_WIDEST 16  // floats of a vector; tests compile with less
#endif

namespace moee {

extern const Kernels vectors_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
#endif

#if defined(__x86_64__)
namespace {

constexpr unsigned bits(std::initializer_list<int> places) {
    unsigned all = 0;
    for (int place : places) all |= 1u << place;
    return all;
}

// Intel's manual, volume 2, CPUID: leaf 1 in ECX, leaf 7 in EBX; volume 1, 13.3: what the system saves, in XCR0.
constexpr unsigned kFma = bits({12, 27, 28});                // FMA, OSXSAVE, AVX
constexpr unsigned kAvx2 = bits({5});                        // AVX2
constexpr unsigned kAvx512 = bits({16, 17, 30, 31});         // F, DQ, BW, VL
constexpr unsigned kYmm = bits({1, 2});                      // XMM, YMM
constexpr unsigned kZmm = kYmm | bits({5, 6, 7});            // masks, both parts of ZMM

int widest() {
    unsigned a, b, c, d, leaf1, saved, high;
    if (!__get_cpuid(1, &a, &b, &leaf1, &d) || (leaf1 & kFma) != kFma || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 4;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((b & kAvx512) == kAvx512 && (saved & kZmm) == kZmm) return 16;
    return (b & kAvx2) == kAvx2 && (saved & kYmm) == kYmm ? 8 : 4;
}

}  // namespace
#endif

const Kernels& kernels() {
#if defined(__x86_64__)
    static const int lanes = widest();
    if (MOEE_WIDEST >= 16 && lanes >= 16) return avx512_kernels;
    if (MOEE_WIDEST >= 8 && lanes >= 8) return avx2_kernels;
#endif
    return vectors_kernels;
}

}  // namespace moee
