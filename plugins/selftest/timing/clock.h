// Times of a CUDA graph by events.
#pragma once

#include "device/device.h"

#include <vector>

namespace selftest {

// Microseconds of one call: over all launches of a graph of calls.
struct Times {
    double p50Us{0};
    double p95Us{0};
};

class Clock {
public:
    explicit Clock(Device const& device);
    ~Clock();
    Clock(Clock const&) = delete;
    Clock& operator=(Clock const&) = delete;

    // Launches `graph`, which holds `calls` calls, for warm-up and then `samples` times.
    Times time(Graph const& graph, Stream const& stream, size_t calls, int samples) const;

private:
    Driver const& mDriver;
    CuEvent mStart{nullptr};
    CuEvent mEnd{nullptr};
};

}  // namespace selftest
