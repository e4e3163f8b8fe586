// The plugin library as TensorRT loads it, and one layer of an engine.
#pragma once

#include "cases/cases.h"
#include "plugin/host.h"

#include <memory>
#include <string>
#include <vector>

namespace selftest {

using Plugin = std::unique_ptr<IPluginV3>;

class Library {
public:
    // Throws `Stop` with code 2 for a file that is no plugin of this project's.
    explicit Library(std::string const& path);
    Library(Library const&) = delete;
    Library& operator=(Library const&) = delete;

    IPluginCreatorV3One& creator() const { return *mCreator; }
    HostLogger& logger() const { return *mLogger; }
    // The last error that the plugin logged, without its prefix.
    std::string lastError() const;
    // Symbols and SMs of the PTX that the driver had to compile so far, each once.
    std::vector<std::string> compiledPtx() const;

private:
    std::unique_ptr<HostLogger> mLogger{std::make_unique<HostLogger>()};
    IPluginCreatorV3One* mCreator{nullptr};
};

// A case as one layer of an engine: built, serialised, and made again as an engine file does. `code` as in `recreate`.
class Layer {
public:
    // A profile of 1 to `maxTokens` tokens. Throws `PluginError` where the plugin refuses.
    Layer(Library const& library, Case const& c, moee::Type type, int64_t maxTokens, int32_t code);

    std::vector<int32_t> const& tactics() const { return mTactics; }
    size_t workspaceBytes() const { return mWorkspaceBytes; }
    moee::Sizes sizes(int64_t tokens) const;
    int64_t maxTokens() const { return mMaxTokens; }
    // Throws `PluginError` where the plugin finds no kernels.
    Plugin attach() const;
    void setTactic(IPluginV3& attached, int32_t tactic) const;
    void setTokens(IPluginV3& attached, int64_t tokens) const;
    // Enqueues one call. `inputs` are the nine device pointers.
    void enqueue(IPluginV3& attached, int64_t tokens, void const* const* inputs, void* y, void* workspace, void* stream) const;
    // The hash of the kernels' sources that the plugin serialised.
    std::string kernelsHash() const;

private:
    LayerShape shapes(int64_t tokens) const;
    void require(bool ok, char const* call) const;

    Library const& mLibrary;
    Case const& mCase;
    moee::Type mType;
    int64_t mMaxTokens;
    Plugin mBuilt, mRuntime;
    std::vector<int32_t> mTactics;
    size_t mWorkspaceBytes{0};
};

char const* tacticName(int32_t tactic);

}  // namespace selftest
