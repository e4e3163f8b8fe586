// The TensorRT library that the process has loaded. The plugin links to none: it looks the symbols up.
#pragma once

#include <string>

namespace moee {

// Path of the loaded libnvinfer or libtensorrt_rtx; empty if there is none.
std::string hostLibraryPath();

// Address of an exported C function of that library, or of the program itself; null if there is none.
void* hostSymbol(char const* name);

// How the library's own C++ interfaces (logger, registry) are laid out. Those that the plugin implements are the same
// everywhere; these are not.
enum class HostInterface {
    kHeaders,    // as in the headers that the plugin was built with
    kVersioned,  // TensorRT-RTX from 1.7 on
    kUnknown,    // another major version: call nothing
};
HostInterface hostInterface();

}  // namespace moee
