// A C interface to a built plugin library, for ctypes.
#include "host.h"

#include <dlfcn.h>

#include <cstring>

namespace {

HostLogger gLogger;
IPluginCreatorV3One* gCreator = nullptr;

IPluginV3* plugin(void* handle) { return static_cast<IPluginV3*>(handle); }

}  // namespace

extern "C" {

// Loads the library as TensorRT does. Returns 0, or 1 with a line in the log.
int harness_open(char const* path) {
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        gLogger.lines += dlerror();
        return 1;
    }
    auto const setFinder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    auto const getCreators
        = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    if (setFinder == nullptr || getCreators == nullptr) {
        return 1;
    }
    setFinder(&gLogger);
    int32_t count = 0;
    IPluginCreatorInterface* const* const creators = getCreators(count);
    if (count != 1 || std::strcmp(creators[0]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) {
        return 1;
    }
    gCreator = static_cast<IPluginCreatorV3One*>(creators[0]);
    return 0;
}

char const* harness_log() { return gLogger.lines.c_str(); }
void harness_clear_log() { gLogger.lines.clear(); }

// "name/version/namespace field:type field:type ..."
char const* harness_creator() {
    static std::string text;
    text = std::string(gCreator->getPluginName()) + "/" + gCreator->getPluginVersion() + "/"
        + gCreator->getPluginNamespace();
    PluginFieldCollection const* const fields = gCreator->getFieldNames();
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        text += std::string(" ") + fields->fields[i].name + ":" + std::to_string(static_cast<int>(fields->fields[i].type));
    }
    return text.c_str();
}

void* harness_create(char const* activation, int32_t topK, int32_t maxWidth, int32_t const* load, int32_t loads) {
    PluginField const fields[] = {
        {"activation", activation, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(activation))},
        {"top_k", &topK, PluginFieldType::kINT32, 1},
        {"max_width", &maxWidth, PluginFieldType::kINT32, 1},
        {"load", load, PluginFieldType::kINT32, loads},
    };
    PluginFieldCollection const collection{4, fields};
    return gCreator->createPlugin("layer", &collection, TensorRTPhase::kBUILD);
}

int harness_configure(void* handle, Case const* low, Case const* opt, Case const* high) {
    auto const d = describe(*low, *opt, *high);
    return buildPart(plugin(handle))->configurePlugin(d.data(), kInputs, d.data() + kInputs, 1);
}

size_t harness_workspace(void* handle, Case const* c) {
    auto const d = describe(*c, *c, *c);
    return buildPart(plugin(handle))->getWorkspaceSize(d.data(), kInputs, d.data() + kInputs, 1);
}

int harness_tactics(void* handle, int32_t* out, int32_t capacity) {
    int32_t const count = buildPart(plugin(handle))->getNbTactics();
    return count <= capacity && buildPart(plugin(handle))->getValidTactics(out, count) == 0 ? count : -1;
}

char const* harness_timing_id(void* handle) { return buildPart(plugin(handle))->getTimingCacheID(); }
void* harness_recreate(void* handle) { return recreate(gCreator, plugin(handle)); }
void* harness_attach(void* handle) { return runtimePart(plugin(handle))->attachToContext(nullptr); }
int harness_set_tactic(void* handle, int32_t id) { return runtimePart(plugin(handle))->setTactic(id); }
void harness_destroy(void* handle) { delete plugin(handle); }

int harness_shape_change(void* handle, Case const* c) {
    auto const d = describe(*c);
    return runtimePart(plugin(handle))->onShapeChange(d.data(), kInputs, d.data() + kInputs, 1);
}

int harness_enqueue(void* handle, Case const* c, void const* const* inputs, void* y, void* workspace,
    void* stream) {
    auto const d = describe(*c);
    void* const outputs[] = {y};
    return runtimePart(plugin(handle))->enqueue(d.data(), d.data() + kInputs, inputs, outputs, workspace, static_cast<cudaStream_t>(stream));
}

}  // extern "C"
