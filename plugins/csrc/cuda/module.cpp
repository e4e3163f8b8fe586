#include "cuda/module.h"

#include <array>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace moee {

std::shared_ptr<Module> Module::acquire(CudaDriver const& driver, CuContext context, Kernel const& kernel,
    bool& unsuitable, std::string& why) {
    static std::mutex mutex;
    static auto& cache = *new std::map<std::pair<CuContext, int32_t>, std::weak_ptr<Module>>;  // outlives all users
    std::lock_guard<std::mutex> const lock(mutex);
    auto& slot = cache[{context, kernel.module}];
    if (auto module = slot.lock()) {
        return module;
    }
    std::shared_ptr<Module> module(new Module(driver, context));
    if (!module->load(kernel, unsuitable, why)) {
        return nullptr;
    }
    slot = module;
    return module;
}

bool Module::load(Kernel const& kernel, bool& unsuitable, std::string& why) {
    unsuitable = false;
    std::array<char, 2048> errors{};
    std::array<int, 2> options{kCuJitErrorLogBuffer, kCuJitErrorLogBufferBytes};
    std::array<void*, 2> values{errors.data(), reinterpret_cast<void*>(static_cast<uintptr_t>(errors.size() - 1))};
    CuResult result = mDriver.moduleLoadDataEx(
        &mModule, moduleImage(kernel.module), kernel.isPtx ? 2U : 0U, options.data(), values.data());
    std::string const name = std::string(kernel.symbol) + " (sm_" + std::to_string(kernel.sm)
        + (kernel.isPtx ? " PTX)" : " cubin)");
    if (result != kCuSuccess) {
        mModule = nullptr;
        unsuitable = result == kCuInvalidImage || result == kCuNoBinary || result == kCuUnsupportedPtx;
        why = "cuModuleLoadDataEx of " + name + " failed: " + mDriver.describe(result)
            + (errors[0] != 0 ? std::string(": ") + errors.data() : "");
        return false;
    }
    result = mDriver.moduleGetFunction(&mFunction, mModule, kernel.symbol);
    if (result != kCuSuccess) {
        why = "cuModuleGetFunction of " + name + " failed: " + mDriver.describe(result);
        return false;
    }
    if (kernel.sharedBytes > 0) {
        result = mDriver.funcSetAttribute(mFunction, kCuMaxDynamicSharedBytes, kernel.sharedBytes);
        if (result != kCuSuccess) {
            why = "cuFuncSetAttribute of " + name + " (" + std::to_string(kernel.sharedBytes)
                + " bytes of shared memory) failed: " + mDriver.describe(result);
            return false;
        }
    }
    return true;
}

Module::~Module() {
    if (mModule == nullptr) {
        return;
    }
    // The thread that deletes an engine may have another context, or none. Errors mean that the context is gone, and
    // the module with it.
    if (mDriver.ctxPushCurrent(mContext) == kCuSuccess) {
        mDriver.moduleUnload(mModule);
        CuContext popped = nullptr;
        mDriver.ctxPopCurrent(&popped);
    }
}

}  // namespace moee
