// The library's only exports, and registration when a program merely dlopens it (trtexec --staticPlugins).
#include "plugin/creator.h"
#include "tensorrt/host_library.h"
#include "tensorrt/log.h"

#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include <atomic>

#if NV_TENSORRT_MAJOR < 10
#error "MoeeFfn needs the headers of TensorRT 10.0 or later (IPluginV3); set TENSORRT_ROOT to one"
#endif

#define MOEE_TEXT2(x) #x
#define MOEE_TEXT(x) MOEE_TEXT2(x)

namespace moee {
namespace {

// Read from the file by `plugins/library/build.py`, so that a wrong library is named before TensorRT loads it.
[[gnu::used]] char const kBuiltFor[] = "moee-plugin-headers=" MOEE_TEXT(NV_TENSORRT_MAJOR) "." MOEE_TEXT(NV_TENSORRT_MINOR);

MoeeFfnCreator& creator() {
    static MoeeFfnCreator instance;
    return instance;
}

// The registry is touched only if the headers describe it. --dynamicPlugins does not depend on this.
nvinfer1::IPluginRegistry* matchingRegistry() {
    if (hostLibraryPath().find("libnvinfer") == std::string::npos) {
        return nullptr;
    }
    if (hostInterface() != HostInterface::kHeaders) {
        logWarning("built with the headers of TensorRT " MOEE_TEXT(NV_TENSORRT_MAJOR) ", but another major version is loaded: "
                   "use --dynamicPlugins, or build the plugin with that version's headers");
        return nullptr;
    }
    auto const registry = reinterpret_cast<nvinfer1::IPluginRegistry* (*)() noexcept>(hostSymbol("getPluginRegistry"));
    return registry != nullptr ? registry() : nullptr;
}

class SelfRegistration {
public:
    SelfRegistration() noexcept {
        try {
            creator();  // constructed first, hence destroyed after this object
            mRegistry = matchingRegistry();
            if (mRegistry != nullptr && mRegistry->getCreator(kPluginName, kPluginVersion, kPluginNamespace) == nullptr) {
                mRegistered = mRegistry->registerCreator(creator(), kPluginNamespace);
            }
        } catch (...) {
            // Out of memory while the library loads: the registry then simply lacks the plugin.
        }
    }
    ~SelfRegistration() noexcept { withdraw(); }
    SelfRegistration(SelfRegistration const&) = delete;
    SelfRegistration& operator=(SelfRegistration const&) = delete;

    // Takes the creator back, so that the registry can hold it under the library's handle.
    void withdraw() noexcept {
        if (mRegistered.exchange(false)) {
            mRegistry->deregisterCreator(creator());
        }
    }

private:
    nvinfer1::IPluginRegistry* mRegistry{nullptr};
    std::atomic<bool> mRegistered{false};
};

SelfRegistration gRegistration;

}  // namespace
}  // namespace moee

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    moee::setFinder(finder);
}

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&moee::creator()};
    moee::gRegistration.withdraw();
    count = 1;
    return creators;
}
