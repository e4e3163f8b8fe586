#include "plugin/library.h"

#include "device/errors.h"
#include "operator/tactics.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <set>

namespace selftest {
namespace {

constexpr char const* kErrorPrefix = "ERROR [moee] ";
constexpr char const* kPtxPrefix = "VERBOSE [moee] compiled PTX of ";

template <typename Visit>
void eachLine(std::string const& text, Visit&& visit) {
    for (size_t at = 0; at < text.size();) {
        size_t const end = std::min(text.find('\n', at), text.size());
        visit(text.substr(at, end - at));
        at = end + 1;
    }
}

DataType dataType(moee::Type type) {
    return type == moee::Type::kFloat32 ? DataType::kFLOAT : type == moee::Type::kFloat16 ? DataType::kHALF : DataType::kBF16;
}

}  // namespace

Library::Library(std::string const& path) {
    std::string const cure = "; give the bundle's plugin/build/libmoee_plugin.so with --plugin";
    // A path without a slash would be looked for among the system's libraries.
    std::string const file = path.find('/') == std::string::npos ? "./" + path : path;
    void* const library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        char const* const reason = dlerror();
        throw Stop(kBadInput, "plugin " + path + " cannot be loaded: " + (reason != nullptr ? reason : "no reason given") + cure);
    }
    auto const setFinder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    auto const getCreators
        = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    if (setFinder == nullptr || getCreators == nullptr) {
        throw Stop(kBadInput, path + " is no TensorRT plugin library" + cure);
    }
    setFinder(mLogger.get());
    int32_t count = 0;
    IPluginCreatorInterface* const* const creators = getCreators(count);
    if (count != 1 || std::strcmp(creators[0]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) {
        throw Stop(kBadInput, path + " is another plugin library" + cure);
    }
    mCreator = static_cast<IPluginCreatorV3One*>(creators[0]);
    if (std::strcmp(mCreator->getPluginName(), moee::kPluginName) != 0
        || std::strcmp(mCreator->getPluginVersion(), moee::kPluginVersion) != 0) {
        throw Stop(kBadInput, path + " holds " + mCreator->getPluginName() + " version " + mCreator->getPluginVersion()
                + ", and this program tests " + moee::kPluginName + " version " + moee::kPluginVersion + cure);
    }
}

std::string Library::lastError() const {
    std::string last;
    eachLine(mLogger->lines, [&](std::string const& line) {
        last = line.rfind(kErrorPrefix, 0) == 0 ? line.substr(std::strlen(kErrorPrefix)) : last;
    });
    return last;
}

std::vector<std::string> Library::compiledPtx() const {
    std::set<std::string> found;
    eachLine(mLogger->lines, [&](std::string const& line) {
        if (line.rfind(kPtxPrefix, 0) == 0) {
            found.insert(line.substr(std::strlen(kPtxPrefix)));
        }
    });
    return {found.begin(), found.end()};
}

Layer::Layer(Library const& library, Case const& c, moee::Type type, int64_t maxTokens, int32_t code)
    : mLibrary(library), mCase(c), mType(type), mMaxTokens(maxTokens) {
    char const* const activation = moee::kActivations[static_cast<size_t>(c.sizes.activation)];
    std::vector<PluginField> const fields{
        {"activation", activation, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(activation))},
        {"top_k", &c.sizes.topK, PluginFieldType::kINT32, 1},
        {"max_width", &c.sizes.maxWidth, PluginFieldType::kINT32, 1},
    };
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    mBuilt.reset(library.creator().createPlugin("selftest", &collection, TensorRTPhase::kBUILD));
    require(mBuilt != nullptr, "createPlugin");
    IPluginV3OneBuild* const build = buildPart(mBuilt.get());
    auto const d = describe(shapes(1), shapes(maxTokens), shapes(maxTokens));
    for (int32_t pos = 0; pos < kTensors; ++pos) {
        require(build->supportsFormatCombination(pos, d.data(), kInputs, 1), "supportsFormatCombination");
    }
    require(build->configurePlugin(d.data(), kInputs, d.data() + kInputs, 1) == 0, "configurePlugin");
    mWorkspaceBytes = build->getWorkspaceSize(d.data(), kInputs, d.data() + kInputs, 1);
    require(mWorkspaceBytes > 0, "getWorkspaceSize");
    mTactics.resize(static_cast<size_t>(std::max(0, build->getNbTactics())));
    require(!mTactics.empty() && build->getValidTactics(mTactics.data(), static_cast<int32_t>(mTactics.size())) == 0,
        "getValidTactics");
    mRuntime.reset(recreate(&library.creator(), mBuilt.get(), code));
    require(mRuntime != nullptr, "createPlugin from the serialised fields");
}

LayerShape Layer::shapes(int64_t tokens) const {
    moee::Sizes const& s = mCase.sizes;
    return {2, {tokens, 1, 0, 0}, s.dim, s.experts, s.unionSize, mCase.neuronCount, static_cast<int32_t>(dataType(mType))};
}

moee::Sizes Layer::sizes(int64_t tokens) const {
    moee::Sizes sizes = mCase.sizes;
    sizes.tokens = tokens;
    sizes.type = mType;
    return sizes;
}

void Layer::require(bool ok, char const* call) const {
    if (!ok) {
        throw PluginError(std::string(call) + " failed: " + mLibrary.lastError());
    }
}

Plugin Layer::attach() const {
    Plugin attached(runtimePart(mRuntime.get())->attachToContext(nullptr));
    require(attached != nullptr, "attachToContext");
    return attached;
}

void Layer::setTactic(IPluginV3& attached, int32_t tactic) const {
    require(runtimePart(&attached)->setTactic(tactic) == 0, "setTactic");
}

void Layer::setTokens(IPluginV3& attached, int64_t tokens) const {
    auto const d = describe(shapes(tokens));
    require(runtimePart(&attached)->onShapeChange(d.data(), kInputs, d.data() + kInputs, 1) == 0, "onShapeChange");
}

void Layer::enqueue(
    IPluginV3& attached, int64_t tokens, void const* const* inputs, void* y, void* workspace, void* stream) const {
    auto const d = describe(shapes(tokens));
    void* const outputs[] = {y};
    require(runtimePart(&attached)->enqueue(d.data(), d.data() + kInputs, inputs, outputs, workspace,
                static_cast<cudaStream_t>(stream)) == 0, "enqueue");
}

std::string Layer::kernelsHash() const {
    PluginFieldCollection const* const fields = runtimePart(mBuilt.get())->getFieldsToSerialize();
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
        PluginField const& field = fields->fields[i];
        if (std::strcmp(field.name, "kernels") == 0) {
            return {static_cast<char const*>(field.data), static_cast<size_t>(field.length)};
        }
    }
    return {};
}

char const* tacticName(int32_t tactic) {
    moee::Tactic const* const found = moee::findTactic(tactic);
    return found != nullptr ? found->name : "default";
}

}  // namespace selftest
