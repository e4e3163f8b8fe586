// One embedded kernel module on one CUDA context, shared by all layers of an engine.
#pragma once

#include "cuda/driver.h"
#include "operator/tables.h"

#include <memory>
#include <string>

namespace moee {

class Module {
public:
    // Loads, or finds, the module of `kernel` on `context`, which must be current. Null with a reason on failure;
    // `unsuitable` then says that this build of the kernel does not fit the device or driver, but another one may.
    static std::shared_ptr<Module> acquire(CudaDriver const& driver, CuContext context, Kernel const& kernel,
        bool& unsuitable, std::string& why);

    Module(Module const&) = delete;
    Module& operator=(Module const&) = delete;
    ~Module();

    CuFunction function() const { return mFunction; }

private:
    Module(CudaDriver const& driver, CuContext context) : mDriver(driver), mContext(context) {}
    bool load(Kernel const& kernel, bool& unsuitable, std::string& why);

    CudaDriver const& mDriver;
    CuContext mContext;
    CuModule mModule{nullptr};
    CuFunction mFunction{nullptr};
};

}  // namespace moee
