#include "device/device.h"

#include "device/errors.h"

#include <algorithm>
#include <array>

namespace selftest {
namespace {

int attribute(Driver const& driver, CuDevice device, int which) {
    int value = 0;
    Driver::check(driver.deviceGetAttribute(&value, which, device), "cuDeviceGetAttribute");
    return value;
}

std::string mebibytes(size_t bytes) { return std::to_string((bytes + (1U << 20) - 1) >> 20) + " MiB"; }

}  // namespace

Device::Device(int multiprocessors) : mDriver(Driver::open()) {
    CuResult const started = mDriver.init(0);
    int count = 0;
    if (started != moee::kCuSuccess || mDriver.deviceGetCount(&count) != moee::kCuSuccess || count < 1) {
        std::string why;
        moee::CudaDriver const* const names = moee::CudaDriver::open(why);
        throw Stop(kNoEnvironment, "the CUDA driver finds no GPU"
                + (started != moee::kCuSuccess && names != nullptr ? " (" + names->describe(started) + ")" : std::string())
                + "; nvidia-smi says what it sees, and CUDA_VISIBLE_DEVICES what it may");
    }
    std::array<char, 256> text{};
    Driver::check(mDriver.deviceGet(&mDevice, 0), "cuDeviceGet");
    Driver::check(mDriver.deviceGetName(text.data(), static_cast<int>(text.size()) - 1, mDevice), "cuDeviceGetName");
    mFacts.name = text.data();
    Driver::check(mDriver.deviceGetPciBusId(text.data(), static_cast<int>(text.size()) - 1, mDevice), "cuDeviceGetPCIBusId");
    mFacts.pciBus = text.data();
    mFacts.sm = 10 * attribute(mDriver, mDevice, moee::kCuComputeCapabilityMajor)
        + attribute(mDriver, mDevice, moee::kCuComputeCapabilityMinor);
    mFacts.allMultiprocessors = mFacts.multiprocessors = attribute(mDriver, mDevice, kMultiprocessors);
    mFacts.l2Bytes = static_cast<size_t>(std::max(0, attribute(mDriver, mDevice, kL2Bytes)));
    Driver::check(mDriver.driverGetVersion(&mFacts.driver), "cuDriverGetVersion");
    Driver::check(mDriver.deviceTotalMem(&mFacts.memoryBytes, mDevice), "cuDeviceTotalMem");
    Driver::check(mDriver.primaryCtxRetain(&mContext, mDevice), "cuDevicePrimaryCtxRetain");
    Driver::check(mDriver.ctxSetCurrent(mContext), "cuCtxSetCurrent");
    if (multiprocessors > 0) {
        confine(multiprocessors);
    }
}

void Device::confine(int multiprocessors) {
    if (multiprocessors > mFacts.allMultiprocessors) {
        throw Stop(kBadInput, "--sms " + std::to_string(multiprocessors) + ": this GPU has "
                + std::to_string(mFacts.allMultiprocessors) + " multiprocessors; give fewer");
    }
    if (mDriver.deviceGetDevResource == nullptr || mDriver.smResourceSplitByCount == nullptr
        || mDriver.resourceGenerateDesc == nullptr || mDriver.greenCtxCreate == nullptr || mDriver.greenCtxDestroy == nullptr
        || mDriver.ctxFromGreenCtx == nullptr || mDriver.greenCtxStreamCreate == nullptr) {
        throw Stop(kNoEnvironment, "--sms needs green contexts, which drivers of CUDA 12.4 and newer have; this one is of CUDA "
                + std::to_string(mFacts.driver / 1000) + "." + std::to_string(mFacts.driver % 1000 / 10));
    }
    DevResource all, part, rest;
    unsigned groups = 1;
    CuResourceDesc description = nullptr;
    Driver::check(mDriver.deviceGetDevResource(mDevice, &all, kResourceSm), "cuDeviceGetDevResource");
    Driver::check(mDriver.smResourceSplitByCount(&part, &groups, &all, &rest, 0, static_cast<unsigned>(multiprocessors)),
        "cuDevSmResourceSplitByCount");
    if (groups != 1 || part.smCount < static_cast<unsigned>(multiprocessors)) {
        throw Stop(kNoEnvironment, "--sms " + std::to_string(multiprocessors) + ": the driver gives no such share of this GPU");
    }
    Driver::check(mDriver.resourceGenerateDesc(&description, &part, 1), "cuDevResourceGenerateDesc");
    Driver::check(mDriver.greenCtxCreate(&mGreen, description, mDevice, 1), "cuGreenCtxCreate");
    CuContext confined = nullptr;
    Driver::check(mDriver.ctxFromGreenCtx(&confined, mGreen), "cuCtxFromGreenCtx");
    Driver::check(mDriver.ctxSetCurrent(confined), "cuCtxSetCurrent");
    mFacts.multiprocessors = static_cast<int>(part.smCount);  // the driver rounds up
}

Device::~Device() {
    mDriver.ctxSetCurrent(mContext);
    if (mGreen != nullptr) {
        mDriver.greenCtxDestroy(mGreen);
    }
    if (mContext != nullptr) {
        mDriver.primaryCtxRelease(mDevice);
    }
}

CuStream Device::makeStream() const {
    CuStream stream = nullptr;
    if (mGreen != nullptr) {
        Driver::check(mDriver.greenCtxStreamCreate(&stream, mGreen, kNonBlocking, 0), "cuGreenCtxStreamCreate");
    } else {
        Driver::check(mDriver.streamCreate(&stream, kNonBlocking), "cuStreamCreate");
    }
    return stream;
}

size_t Device::freeBytes() const {
    size_t free = 0;
    size_t total = 0;
    Driver::check(mDriver.memGetInfo(&free, &total), "cuMemGetInfo");
    return free;
}

void Device::synchronize() const { Driver::check(mDriver.ctxSynchronize(), "cuCtxSynchronize"); }

Memory::Memory(Device const& device, size_t bytes) : mDriver(&device.driver()), mBytes(bytes) {
    CuResult const result = mDriver->memAlloc(&mBase, bytes + 2 * kGuard);
    if (result == kOutOfMemory) {
        throw Stop(kNoEnvironment, "too little GPU memory: " + mebibytes(bytes) + " more are needed and "
                + mebibytes(device.freeBytes()) + " are free; end what else uses the GPU, or give smaller --batch");
    }
    Driver::check(result, "cuMemAlloc");
    mWhole = true;
    Driver::check(mDriver->memsetD8(mBase, kMark, bytes + 2 * kGuard), "cuMemsetD8");
}

Memory::Memory(Memory&& other) noexcept
    : mDriver(other.mDriver), mBase(other.mBase), mBytes(other.mBytes), mWhole(other.mWhole) {
    other.mWhole = false;
}

Memory::~Memory() {
    if (mWhole) {
        mDriver->memFree(mBase);
    }
}

void* Memory::pointer() const { return reinterpret_cast<void*>(static_cast<uintptr_t>(address())); }

// These run on the null stream, for which streams that do not block do not wait: they are done when the call returns.
void Memory::fill(unsigned char value) const {
    Driver::check(mDriver->memsetD8(address(), value, mBytes), "cuMemsetD8");
    Driver::check(mDriver->ctxSynchronize(), "cuCtxSynchronize");
}

void Memory::upload(void const* from) const {
    Driver::check(mDriver->memcpyHtoD(address(), from, mBytes), "cuMemcpyHtoD");
    Driver::check(mDriver->ctxSynchronize(), "cuCtxSynchronize");
}

void Memory::copyFrom(Memory const& other) const {
    Driver::check(mDriver->memcpyDtoD(address(), other.address(), mBytes), "cuMemcpyDtoD");
    Driver::check(mDriver->ctxSynchronize(), "cuCtxSynchronize");
}

std::vector<unsigned char> Memory::download() const {
    std::vector<unsigned char> content(mBytes);
    Driver::check(mDriver->memcpyDtoH(content.data(), address(), mBytes), "cuMemcpyDtoH");
    return content;
}

int64_t Memory::damage() const {
    std::vector<unsigned char> guard(kGuard);
    Driver::check(mDriver->memcpyDtoH(guard.data(), mBase, kGuard), "cuMemcpyDtoH");
    for (size_t i = kGuard; i-- > 0;) {
        if (guard[i] != kMark) {
            return static_cast<int64_t>(i) - static_cast<int64_t>(kGuard);
        }
    }
    Driver::check(mDriver->memcpyDtoH(guard.data(), address() + mBytes, kGuard), "cuMemcpyDtoH");
    auto const changed = std::find_if(guard.begin(), guard.end(), [](unsigned char byte) { return byte != kMark; });
    return changed == guard.end() ? 0 : static_cast<int64_t>(mBytes) + (changed - guard.begin());
}

}  // namespace selftest
