// A stand-in for libnvinfer: a registry that behaves as TensorRT's does (a library whose creator's name is taken is
// refused), a logger, and a version. For the plugin's self-registration under --staticPlugins.
#include <NvInferRuntime.h>

#include <dlfcn.h>

#include <cstring>
#include <string>
#include <vector>

using namespace nvinfer1;

#ifndef FAKE_MAJOR
#define FAKE_MAJOR NV_TENSORRT_MAJOR
#endif

#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

namespace {

class Logger final : public ILogger {
public:
    void log(Severity, char const* text) noexcept override { lines += std::string(text) + "\n"; }
    std::string lines;
};
Logger gLogger;

class Registry final : public IPluginRegistry {
public:
    bool registerCreator(IPluginCreator&, AsciiChar const* const) noexcept override { return false; }
    IPluginCreator* const* getPluginCreatorList(int32_t* const) const noexcept override { return nullptr; }
    IPluginCreator* getPluginCreator(AsciiChar const* const, AsciiChar const* const, AsciiChar const* const) noexcept override {
        return nullptr;
    }
    void setErrorRecorder(IErrorRecorder* const) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool deregisterCreator(IPluginCreator const&) noexcept override { return false; }
    bool isParentSearchEnabled() const override { return false; }
    void setParentSearchEnabled(bool const) override {}
    PluginLibraryHandle loadLibrary(AsciiChar const* path) noexcept override {
        void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            return nullptr;
        }
        auto const get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
        int32_t count = 0;
        IPluginCreatorInterface* const* const found = get(count);
        for (int32_t i = 0; i < count; ++i) {
            if (!registerCreator(*found[i], "")) {
                return nullptr;
            }
        }
        return library;
    }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}
    bool registerCreator(IPluginCreatorInterface& creator, AsciiChar const* const) noexcept override {
        if (!creators.empty()) {
            return false;
        }
        creators.push_back(&creator);
        return true;
    }
    IPluginCreatorInterface* const* getAllCreators(int32_t* const) const noexcept override { return nullptr; }
    IPluginCreatorInterface* getCreator(AsciiChar const* const name, AsciiChar const* const, AsciiChar const* const) noexcept override {
        return !creators.empty() && std::strcmp(name, "MoeeFfn") == 0 ? creators[0] : nullptr;
    }
    bool deregisterCreator(IPluginCreatorInterface const& creator) noexcept override {
        bool const held = !creators.empty() && creators[0] == &creator;
        creators.clear();
        return held;
    }
    IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override { return nullptr; }
    int32_t releasePluginResource(AsciiChar const*) noexcept override { return 0; }
    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* const) noexcept override { return nullptr; }
    std::vector<IPluginCreatorInterface*> creators;
};
Registry gRegistry;

}  // namespace

extern "C" {
int32_t getInferLibMajorVersion() noexcept { return FAKE_MAJOR; }
int32_t getInferLibMinorVersion() noexcept { return 0; }
IPluginRegistry* getPluginRegistry() noexcept { return &gRegistry; }
ILogger* getLogger() noexcept { return &gLogger; }

// Control, for tests.
int fake_creators() { return static_cast<int>(gRegistry.creators.size()); }
int fake_load_library(char const* path) { return gRegistry.loadLibrary(path) != nullptr; }
char const* fake_lines() { return gLogger.lines.c_str(); }
}
