#include "tensorrt/host_library.h"

#include <dlfcn.h>
#include <link.h>

#include <NvInferVersion.h>

#include <atomic>
#include <cstdint>
#include <cstring>

namespace moee {
namespace {

bool startsWith(char const* text, char const* prefix) { return std::strncmp(text, prefix, std::strlen(prefix)) == 0; }

// Lists the loaded objects rather than trying names: versions differ, and programs load TensorRT with local scope.
int visit(dl_phdr_info* info, size_t, void* result) {
    char const* const path = info->dlpi_name;
    char const* const slash = path != nullptr ? std::strrchr(path, '/') : nullptr;
    char const* const base = slash != nullptr ? slash + 1 : path;
    if (base == nullptr || !(startsWith(base, "libnvinfer.so") || startsWith(base, "libtensorrt_rtx.so"))) {
        return 0;
    }
    *static_cast<std::string*>(result) = path;
    return 1;
}

}  // namespace

std::string hostLibraryPath() {
    std::string path;
    dl_iterate_phdr(visit, &path);
    return path;
}

void* hostSymbol(char const* name) {
    if (void* symbol = dlsym(RTLD_DEFAULT, name)) {
        return symbol;
    }
    std::string const path = hostLibraryPath();
    if (path.empty()) {
        return nullptr;
    }
    void* const library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) {
        return nullptr;
    }
    void* const symbol = dlsym(library, name);
    dlclose(library);  // gives back our reference only: the program still holds the library
    return symbol;
}

static HostInterface findHostInterface(std::string const& path) {
    using Version = int32_t (*)() noexcept;
    auto const major = reinterpret_cast<Version>(hostSymbol("getInferLibMajorVersion"));
    auto const minor = reinterpret_cast<Version>(hostSymbol("getInferLibMinorVersion"));
    if (major == nullptr || minor == nullptr) {
        return HostInterface::kUnknown;
    }
    if (path.find("libtensorrt_rtx") != std::string::npos) {
        return major() == 1 && minor() >= 7 ? HostInterface::kVersioned : HostInterface::kUnknown;
    }
    return major() == NV_TENSORRT_MAJOR ? HostInterface::kHeaders : HostInterface::kUnknown;
}

HostInterface hostInterface() {
    static std::atomic<int> known{-1};
    if (known.load() < 0) {
        std::string const path = hostLibraryPath();
        if (path.empty()) {
            return HostInterface::kHeaders;  // linked into the program, which was built with the same headers
        }
        known.store(static_cast<int>(findHostInterface(path)));
    }
    return static_cast<HostInterface>(known.load());
}

}  // namespace moee
