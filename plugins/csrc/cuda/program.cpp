#include "cuda/program.h"

#include "cuda/module.h"
#include "tensorrt/log.h"

#include <algorithm>
#include <cstring>

namespace moee {
namespace {

int32_t smOf(CudaDriver const& driver, CuContext& context, std::string& why) {
    CuDevice device = 0;
    int major = 0;
    int minor = 0;
    CuResult result = driver.ctxGetCurrent(&context);
    char const* call = "cuCtxGetCurrent";
    if (result == kCuSuccess && context == nullptr) {
        why = "no CUDA context is current on this thread";
        return 0;
    }
    if (result == kCuSuccess) {
        call = "cuCtxGetDevice";
        result = driver.ctxGetDevice(&device);
    }
    if (result == kCuSuccess) {
        call = "cuDeviceGetAttribute";
        result = driver.deviceGetAttribute(&major, kCuComputeCapabilityMajor, device);
    }
    if (result == kCuSuccess) {
        result = driver.deviceGetAttribute(&minor, kCuComputeCapabilityMinor, device);
    }
    if (result != kCuSuccess) {
        why = std::string(call) + " failed: " + driver.describe(result);
        return 0;
    }
    return 10 * major + minor;
}

}  // namespace

int32_t currentSm(std::string& why) {
    CudaDriver const* const driver = CudaDriver::open(why);
    CuContext context = nullptr;
    return driver != nullptr ? smOf(*driver, context, why) : 0;
}

std::shared_ptr<Programs const> Programs::load(
    Sizes const& sizes, Attributes const& attributes, bool calibrated, std::string& why) {
    std::shared_ptr<Programs> programs(new Programs);
    return programs->build(sizes, attributes, calibrated, why) ? programs : nullptr;
}

bool Programs::build(Sizes const& sizes, Attributes const& attributes, bool calibrated, std::string& why) {
    mDriver = CudaDriver::open(why);
    if (mDriver == nullptr) {
        return false;
    }
    mSm = smOf(*mDriver, mContext, why);
    if (mSm == 0) {
        return false;
    }
    mCode = attributes.code;
    auto const tactics = validTactics(sizes.type, sizes.dim, sizes.topK, 0, mSm, mCode);
    if (tactics.empty()) {
        why = std::string("this library has no ") + typeName(sizes.type) + " kernels for sm_" + std::to_string(mSm)
            + " (it was built for " + builtSms(sizes.type) + "); build the plugin with --sm " + std::to_string(mSm);
        return false;
    }
    return (!calibrated || uploadLoad(attributes.load, why))
        && std::all_of(tactics.begin(), tactics.end(),
            [&](Tactic const* tactic) { return addTactic(*tactic, sizes, calibrated, why); });
}

bool Programs::addTactic(Tactic const& tactic, Sizes const& sizes, bool calibrated, std::string& why) {
    Program program{&tactic, kindOf(tactic), {}};
    for (int32_t i = 0; i < tactic.launchCount; ++i) {
        Launch const& launch = tactic.launches[i];
        if (!isNeeded(launch, sizes.topK)) {
            continue;
        }
        bool const routes = calibrated && std::strcmp(launch.role, "route") == 0
            && !candidates("route_load", launch.variant, sizes.type, mSm, mCode).empty();
        Step step{};
        if (!loadStep(routes ? "route_load" : launch.role, launch.variant, sizes.type, step, why)) {
            return false;
        }
        program.steps.push_back(step);
    }
    mPrograms.push_back(std::move(program));
    return true;
}

bool Programs::loadStep(char const* role, char const* variant, Type type, Step& step, std::string& why) {
    for (Kernel const* kernel : candidates(role, variant, type, mSm, mCode)) {
        std::string reason;
        bool unsuitable = false;
        if (auto module = Module::acquire(*mDriver, mContext, *kernel, unsuitable, reason)) {
            if (kernel->isPtx) {
                trace([&] { return "compiled PTX of " + std::string(kernel->symbol) + " for sm_" + std::to_string(mSm); });
            }
            step = Step{kernel, module->function()};
            mModules.push_back(std::move(module));
            return true;
        }
        why = why.empty() ? reason : why;  // the first candidate's reason tells most
        if (!unsuitable) {
            return false;
        }
        trace([&] { return reason; });
    }
    return false;
}

bool Programs::uploadLoad(std::vector<int32_t> const& load, std::string& why) {
    int64_t total = 0;
    for (int32_t const share : load) {
        total += share;
    }
    std::vector<int32_t> cdf;
    int64_t sum = 0;
    for (int32_t const share : load) {
        sum += share;
        cdf.push_back(static_cast<int32_t>(sum * 1000000 / total));
    }
    size_t const bytes = cdf.size() * sizeof(int32_t);
    CuResult result = mDriver->memAlloc(&mLoadCdf, bytes);
    if (result != kCuSuccess) {
        mLoadCdf = 0;
        why = "cuMemAlloc of the expert loads failed: " + mDriver->describe(result);
        return false;
    }
    result = mDriver->memcpyHtoD(mLoadCdf, cdf.data(), bytes);
    why = result == kCuSuccess ? why : "cuMemcpyHtoD of the expert loads failed: " + mDriver->describe(result);
    return result == kCuSuccess;
}

Programs::~Programs() {
    if (mLoadCdf != 0 && mDriver->ctxPushCurrent(mContext) == kCuSuccess) {
        mDriver->memFree(mLoadCdf);
        CuContext popped = nullptr;
        mDriver->ctxPopCurrent(&popped);
    }
}

Program const* Programs::find(int32_t tactic) const {
    auto const found = std::find_if(
        mPrograms.begin(), mPrograms.end(), [tactic](Program const& p) { return p.tactic->id == tactic; });
    return found != mPrograms.end() ? &*found : nullptr;
}

Program const* Programs::choose(int32_t tactic, Sizes const& sizes) const {
    Program const* const wanted = find(tactic);
    bool const fits = wanted != nullptr && (wanted->tactic->maxTokens == 0 || sizes.tokens <= wanted->tactic->maxTokens);
    if (fits || (wanted == nullptr && tactic != 0)) {
        return wanted;
    }
    std::vector<Tactic const*> tactics;
    for (Program const& program : mPrograms) {
        tactics.push_back(program.tactic);
    }
    Tactic const* const best = defaultTactic(tactics, sizes);
    return best != nullptr ? find(best->id) : nullptr;
}

}  // namespace moee
