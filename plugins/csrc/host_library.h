// The TensorRT library that the process has loaded. The plugin links to none: it looks the symbols up.
#pragma once

#include <string>

namespace moee {

// Path of the loaded libnvinfer or libtensorrt_rtx; empty if there is none.
std::string hostLibraryPath();

// Address of an exported C function of that library, or of the program itself; null if there is none.
void* hostSymbol(char const* name);

}  // namespace moee
