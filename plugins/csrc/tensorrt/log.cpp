#include "tensorrt/log.h"

#include "tensorrt/host_library.h"

#include <atomic>
#include <cstdio>
#include <mutex>

namespace moee {

// TensorRT-RTX 1.7 derives both interfaces from IVersionedInterface, which shifts their virtual tables against the
// headers of TensorRT 10. Not in the unnamed namespace: the compiler would conclude that nothing implements them.
class VersionedLogger : public nvinfer1::IVersionedInterface {
public:
    virtual void log(Severity severity, char const* text) noexcept = 0;
};
class VersionedFinder : public nvinfer1::IVersionedInterface {
public:
    virtual VersionedLogger* findLogger() = 0;
};

namespace {

using nvinfer1::ILogger;
using nvinfer1::ILoggerFinder;

std::atomic<ILoggerFinder*> gFinder{nullptr};

template <typename Logger, typename Finder>
Logger* findLogger() {
    auto* const finder = reinterpret_cast<Finder*>(gFinder.load());
    if (Logger* const logger = finder != nullptr ? finder->findLogger() : nullptr) {
        return logger;
    }
    // Loaded by a plain dlopen (trtexec --staticPlugins), or a finder that finds nothing outside an engine.
    static auto* const getLogger = reinterpret_cast<Logger* (*)() noexcept>(hostSymbol("getLogger"));
    return getLogger != nullptr ? getLogger() : nullptr;
}

// Calls `use` with the logger, whose class depends on the TensorRT that is loaded. False without one.
template <typename Use>
bool withLogger(Use const& use) {
    auto const call = [&use](auto* logger) { return logger != nullptr && (use(*logger), true); };
    switch (hostInterface()) {
    case HostInterface::kHeaders: return call(findLogger<ILogger, ILoggerFinder>());
    case HostInterface::kVersioned: return call(findLogger<VersionedLogger, VersionedFinder>());
    case HostInterface::kUnknown: return false;
    }
    return false;
}

}  // namespace

void setFinder(ILoggerFinder* finder) noexcept { gFinder.store(finder); }

bool hasLogger() noexcept {
    return withLogger([](auto&) {});
}

void log(Severity severity, std::string const& text) noexcept {
    try {
        std::string const line = "[moee] " + text;
        static std::mutex mutex;  // the builder may call from several threads, a user's logger need not cope
        std::lock_guard<std::mutex> const lock(mutex);
        bool const written = withLogger([&](auto& logger) { logger.log(severity, line.c_str()); });
        if (!written && severity <= Severity::kWARNING) {
            std::fprintf(stderr, "%s\n", line.c_str());
        }
    } catch (...) {
        // A message that cannot be written must not take the process down.
    }
}

}  // namespace moee
