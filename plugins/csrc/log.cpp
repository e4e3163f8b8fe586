#include "log.h"

#include "host_library.h"

#include <atomic>
#include <cstdio>
#include <mutex>

namespace moee {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> gFinder{nullptr};

nvinfer1::ILogger* currentLogger() {
    if (nvinfer1::ILoggerFinder* finder = gFinder.load()) {
        return finder->findLogger();
    }
    // Loaded by a plain dlopen (trtexec --staticPlugins): ask the library that is already in the process.
    static nvinfer1::ILogger* (*const getLogger)() noexcept
        = reinterpret_cast<nvinfer1::ILogger* (*)() noexcept>(hostSymbol("getLogger"));
    return getLogger != nullptr ? getLogger() : nullptr;
}

}  // namespace

void setFinder(nvinfer1::ILoggerFinder* finder) noexcept { gFinder.store(finder); }

void log(Severity severity, std::string const& text) noexcept {
    try {
        std::string const line = "[moee] " + text;
        static std::mutex mutex;  // the builder may call from several threads, a user's logger need not cope
        std::lock_guard<std::mutex> const lock(mutex);
        if (nvinfer1::ILogger* logger = currentLogger()) {
            logger->log(severity, line.c_str());
        } else if (severity <= Severity::kWARNING) {
            std::fprintf(stderr, "%s\n", line.c_str());
        }
    } catch (...) {
        // A message that cannot be written must not take the process down.
    }
}

}  // namespace moee
