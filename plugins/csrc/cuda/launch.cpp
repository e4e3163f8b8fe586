#include "cuda/launch.h"

#include <array>
#include <cstdint>

namespace moee {
namespace {

constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridYZ = 65535;
constexpr size_t kMaxArgs = 32;
constexpr uintptr_t kPointerAlignment = 16;  // the kernels were compiled for it

int64_t ceilDiv(int64_t value, int64_t by) { return (value + by - 1) / by; }

int64_t axisSize(Axis axis, Kernel const& kernel, Sizes const& s) {
    int64_t const slots = s.tokens * s.topK;
    switch (axis) {
    case Axis::kOne: return 1;
    case Axis::kTokenTiles: return ceilDiv(s.tokens, kernel.m);
    case Axis::kSlotTiles: return ceilDiv(slots, kernel.m);
    case Axis::kExpertTiles: return ceilDiv(slots, kernel.m) + s.experts;
    case Axis::kWidthTiles: return ceilDiv(s.maxWidth, kernel.n);
    case Axis::kUnionTiles: return ceilDiv(s.unionSize, kernel.n);
    case Axis::kDimTiles: return ceilDiv(s.dim, kernel.n);
    }
    return 0;
}

// Argument values by meaning; the driver reads each through a pointer.
struct Values {
    std::array<CuDevicePtr, static_cast<size_t>(Arg::kScratch) + 1> pointers{};
    std::array<int32_t, static_cast<size_t>(Arg::kByLoad) + 1> integers{};

    void* at(Arg arg) {
        auto const i = static_cast<size_t>(arg);
        return arg <= Arg::kScratch ? static_cast<void*>(&pointers[i]) : static_cast<void*>(&integers[i]);
    }
    void set(Arg arg, CuDevicePtr value) { pointers[static_cast<size_t>(arg)] = value; }
    void set(Arg arg, int32_t value) { integers[static_cast<size_t>(arg)] = value; }
};

CuDevicePtr address(void const* pointer) { return static_cast<CuDevicePtr>(reinterpret_cast<uintptr_t>(pointer)); }

bool fill(Values& values, Workspace const& w, Sizes const& s, Pointers const& p, CuDevicePtr loadCdf, std::string& why) {
    constexpr std::array<Arg, kInputs> kOrder{Arg::kX, Arg::kRouter, Arg::kRouterBias, Arg::kWUp, Arg::kBUp, Arg::kWDown,
        Arg::kBOut, Arg::kNeurons, Arg::kOffsets};
    for (size_t i = 0; i < kOrder.size(); ++i) {
        values.set(kOrder[i], address(p.inputs[i]));
    }
    values.set(Arg::kY, address(p.y));
    CuDevicePtr const base = address(p.workspace);
    for (auto const pointer : {values.pointers[0], values.pointers[1], values.pointers[2], values.pointers[3],
             values.pointers[4], values.pointers[5], values.pointers[6], values.pointers[7], values.pointers[8],
             values.pointers[9], base}) {
        if (pointer == 0 || pointer % kPointerAlignment != 0) {
            why = "an input, output or workspace pointer is null or not aligned to 16 bytes";
            return false;
        }
    }
    auto const at = [base](size_t offset) { return offset == kAbsent ? CuDevicePtr{0} : base + offset; };
    values.set(Arg::kCounts, at(w.counts));
    values.set(Arg::kMember, at(w.member));
    values.set(Arg::kBuckets, at(w.buckets));
    values.set(Arg::kRoutes, at(w.routes));
    values.set(Arg::kHidden, at(w.hidden));
    values.set(Arg::kPartial, at(w.partial));
    values.set(Arg::kLoadCdf, loadCdf);
    values.set(Arg::kByLoad, static_cast<int32_t>(loadCdf != 0));
    values.set(Arg::kTokens, static_cast<int32_t>(s.tokens));
    values.set(Arg::kDim, s.dim);
    values.set(Arg::kExperts, s.experts);
    values.set(Arg::kUnionSize, s.unionSize);
    values.set(Arg::kMaxWidth, s.maxWidth);
    values.set(Arg::kTopK, s.topK);
    values.set(Arg::kActivation, s.activation);
    return true;
}

bool launch(CudaDriver const& driver, Step const& step, Sizes const& sizes, Values& values, CuStream stream,
    std::string& why) {
    Kernel const& kernel = *step.kernel;
    std::array<int64_t, 3> grid{};
    for (size_t i = 0; i < grid.size(); ++i) {
        grid[i] = axisSize(kernel.grid[i], kernel, sizes);
    }
    if (grid[0] < 1 || grid[1] < 1 || grid[2] < 1 || grid[0] > kMaxGridX || grid[1] > kMaxGridYZ || grid[2] > kMaxGridYZ
        || static_cast<size_t>(kernel.argCount) > kMaxArgs) {
        why = std::string("the grid of ") + kernel.symbol + " is out of range: " + std::to_string(grid[0]) + " x "
            + std::to_string(grid[1]) + " x " + std::to_string(grid[2]) + "; lower the batch size";
        return false;
    }
    std::array<void*, kMaxArgs> arguments{};
    for (int32_t i = 0; i < kernel.argCount; ++i) {
        arguments[static_cast<size_t>(i)] = values.at(kernel.args[i]);
    }
    CuResult const result = driver.launchKernel(step.function, static_cast<unsigned>(grid[0]),
        static_cast<unsigned>(grid[1]), static_cast<unsigned>(grid[2]), static_cast<unsigned>(kernel.warps) * 32U, 1U, 1U,
        static_cast<unsigned>(kernel.sharedBytes), stream, arguments.data(), nullptr);
    if (result != kCuSuccess) {
        why = std::string("cuLaunchKernel of ") + kernel.symbol + " failed: " + driver.describe(result);
    }
    return result == kCuSuccess;
}

}  // namespace

bool enqueueProgram(Programs const& programs, Program const& program, Sizes const& sizes, Pointers const& pointers,
    CuStream stream, std::string& why) {
    CudaDriver const& driver = programs.driver();
    Workspace const workspace = layOut(sizes, program.kind);
    Values values;
    if (!fill(values, workspace, sizes, pointers, programs.loadCdf(), why)) {
        return false;
    }
    if (workspace.zeroed > 0) {
        CuResult const result = driver.memsetD32Async(
            address(pointers.workspace) + workspace.counts, 0, workspace.zeroed / sizeof(int32_t), stream);
        if (result != kCuSuccess) {
            why = "cuMemsetD32Async of the expert counters failed: " + driver.describe(result);
            return false;
        }
    }
    for (Step const& step : program.steps) {
        if (!launch(driver, step, sizes, values, stream, why)) {
            return false;
        }
    }
    return true;
}

}  // namespace moee
