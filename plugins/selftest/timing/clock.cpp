#include "timing/clock.h"

#include <algorithm>

namespace selftest {
namespace {

constexpr int kWarmUp = 3;

// The smallest sample that a share of all samples does not exceed.
double quantile(std::vector<double> const& sorted, double share) {
    auto const last = static_cast<double>(sorted.size() - 1);
    return sorted[static_cast<size_t>(share * last + 0.5)];
}

}  // namespace

Clock::Clock(Device const& device) : mDriver(device.driver()) {
    Driver::check(mDriver.eventCreate(&mStart, 0), "cuEventCreate");
    Driver::check(mDriver.eventCreate(&mEnd, 0), "cuEventCreate");
}

Clock::~Clock() {
    mDriver.eventDestroy(mStart);
    mDriver.eventDestroy(mEnd);
}

Times Clock::time(Graph const& graph, Stream const& stream, size_t calls, int samples) const {
    for (int i = 0; i < kWarmUp; ++i) {
        graph.launch();
    }
    std::vector<double> microseconds;
    for (int i = 0; i < samples; ++i) {
        float milliseconds = 0;
        Driver::check(mDriver.eventRecord(mStart, stream.get()), "cuEventRecord");
        graph.launch();
        Driver::check(mDriver.eventRecord(mEnd, stream.get()), "cuEventRecord");
        Driver::check(mDriver.eventSynchronize(mEnd), "cuEventSynchronize");
        Driver::check(mDriver.eventElapsedTime(&milliseconds, mStart, mEnd), "cuEventElapsedTime");
        microseconds.push_back(1000.0 * static_cast<double>(milliseconds) / static_cast<double>(calls));
    }
    std::sort(microseconds.begin(), microseconds.end());
    return {quantile(microseconds, 0.5), quantile(microseconds, 0.95)};
}

}  // namespace selftest
