// Messages to TensorRT's logger, found through the logger finder or in the loaded TensorRT library.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace moee {

using Severity = nvinfer1::ILogger::Severity;

// Set by TensorRT when it loads the library dynamically; null before.
void setFinder(nvinfer1::ILoggerFinder* finder) noexcept;

// Writes one line that starts with "[moee]". Without a logger, warnings and errors go to stderr.
void log(Severity severity, std::string const& text) noexcept;

inline void logError(std::string const& text) noexcept { log(Severity::kERROR, text); }
inline void logWarning(std::string const& text) noexcept { log(Severity::kWARNING, text); }

// Whether there is a logger. TensorRT does not say which severities it wants.
bool hasLogger() noexcept;

// A message of no consequence. Its text is made only if there is a logger.
template <typename Text>
void trace(Text const& text) {
    if (hasLogger()) {
        log(Severity::kVERBOSE, text());
    }
}

}  // namespace moee
