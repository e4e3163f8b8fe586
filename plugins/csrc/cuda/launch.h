// One call of the operator: the tactic's kernels, before them a memset where they count, on the caller's stream. Safe to capture in a CUDA graph.
#pragma once

#include "cuda/program.h"

namespace moee {

struct Pointers {
    void const* const* inputs;  // kInputs device pointers, in the contract's order
    void* y;
    void* workspace;
};

// Enqueues the call. False with a reason if a pointer is unusable or the driver refuses.
bool enqueueProgram(Programs const& programs, Program const& program, Sizes const& sizes, Pointers const& pointers,
    CuStream stream, std::string& why);

}  // namespace moee
