// Shape of the kernel tables that `plugins/library/embed.py` generates from the kernel manifest (schema moee.kernels/1).
#pragma once

#include <cstdint>

namespace moee {

enum class Type : uint8_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// How one grid axis follows from the shapes; `m`, `n` are the kernel's block sizes.
enum class Axis : uint8_t {
    kOne,          // 1
    kTokenTiles,   // ceil(T / m)
    kSlotTiles,    // ceil(T * top_k / m)
    kExpertTiles,  // ceil(T * top_k / m) + K: every expert may leave one tile partly filled
    kWidthTiles,   // ceil(max_width / n)
    kUnionTiles,   // ceil(U / n)
    kDimTiles,     // ceil(D / n)
};

// Kernel arguments by meaning. Up to kLoadCdf and kScratch they are device pointers, from kTokens on 32-bit integers.
enum class Arg : uint8_t {
    kX, kRouter, kRouterBias, kWUp, kBUp, kWDown, kBOut, kNeurons, kOffsets, kY,
    kCounts, kMember, kBuckets, kRoutes, kHidden, kPartial, kLoadCdf,
    kScratch,  // hidden Triton scratch pointer, always null
    kTokens, kDim, kExperts, kUnionSize, kMaxWidth, kTopK, kActivation, kByLoad,
};

struct Kernel {
    char const* role;     // route, route_load, expert_up, ...
    char const* variant;  // tells apart the builds of one role
    char const* symbol;   // entry point in the module
    Type type;
    int32_t sm;   // 10 * major + minor
    bool isPtx;   // text for the driver's own compiler rather than a cubin
    int32_t warps;
    int32_t sharedBytes;
    int32_t m, n, k;
    Axis grid[3];
    Arg const* args;
    int32_t argCount;
    int32_t module;  // for moduleImage()
};

struct Launch {
    char const* role;
    char const* variant;
};

struct Tactic {
    int32_t id;  // positive, unique, stable across versions
    char const* name;
    bool onlyTopOne;    // valid for top_k = 1 alone
    int32_t maxDim;     // largest D, 0 for no limit
    int32_t maxTokens;  // largest T, 0 for no limit
    Launch const* launches;
    int32_t launchCount;
};

struct Tables {
    Kernel const* kernels;
    int32_t kernelCount;
    Tactic const* tactics;
    int32_t tacticCount;
    char const* sourceHash;  // of the kernels' sources: part of the timing cache id
};

// Both are generated: tables.cpp and modules.cpp.
Tables const& tables();
// A cubin or PTX file as it is, in the library's read-only data: on a 16-byte boundary, with a zero byte behind it.
unsigned char const* moduleImage(int32_t module);

}  // namespace moee
