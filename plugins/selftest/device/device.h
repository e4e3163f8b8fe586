// One GPU: its facts, its context, and the memory, streams and graphs that are made on it.
#pragma once

#include "device/driver.h"

#include <cstdint>
#include <string>
#include <vector>

namespace selftest {

struct DeviceFacts {
    std::string name, pciBus;
    int sm{0};
    int multiprocessors{0};  // that the work may use: fewer than the GPU has under --sms
    int allMultiprocessors{0};
    int driver{0};           // CUDA version as the driver states it: 12040 for 12.4
    size_t memoryBytes{0};
    size_t l2Bytes{0};
};

class Device {
public:
    // Opens the first GPU and makes its context current. With `multiprocessors`, a green context of at least so many.
    // Throws `Stop`: 3 without a driver or a GPU, or where the driver has no green contexts; 2 for too many multiprocessors.
    explicit Device(int multiprocessors);
    ~Device();
    Device(Device const&) = delete;
    Device& operator=(Device const&) = delete;

    Driver const& driver() const { return mDriver; }
    DeviceFacts const& facts() const { return mFacts; }
    CuStream makeStream() const;
    size_t freeBytes() const;
    void synchronize() const;

private:
    void confine(int multiprocessors);

    Driver const& mDriver;
    CuDevice mDevice{0};
    CuContext mContext{nullptr};
    CuGreenContext mGreen{nullptr};
    DeviceFacts mFacts;
};

// Device memory between two guards, so that a write outside it is seen.
class Memory {
public:
    Memory(Device const& device, size_t bytes);
    ~Memory();
    Memory(Memory&& other) noexcept;
    Memory(Memory const&) = delete;
    Memory& operator=(Memory const&) = delete;

    void* pointer() const;
    CuDevicePtr address() const { return mBase + kGuard; }
    size_t bytes() const { return mBytes; }
    void fill(unsigned char value) const;
    void upload(void const* from) const;
    void copyFrom(Memory const& other) const;
    std::vector<unsigned char> download() const;
    // Offset of the first changed guard byte relative to the memory (negative: in front); 0 if both are intact, since
    // no guard byte has that offset.
    int64_t damage() const;

private:
    static constexpr size_t kGuard = 4096;
    static constexpr unsigned char kMark = 0xA5;
    Driver const* mDriver;
    CuDevicePtr mBase{0};
    size_t mBytes;
    bool mWhole{false};
};

class Stream {
public:
    explicit Stream(Device const& device) : mDriver(&device.driver()), mStream(device.makeStream()) {}
    ~Stream() { mDriver->streamDestroy(mStream); }
    Stream(Stream const&) = delete;
    Stream& operator=(Stream const&) = delete;

    CuStream get() const { return mStream; }
    void synchronize() const { Driver::check(mDriver->streamSynchronize(mStream), "cuStreamSynchronize"); }

private:
    Driver const* mDriver;
    CuStream mStream;
};

// A CUDA graph of what `record` puts on the stream.
class Graph {
public:
    template <typename Record>
    Graph(Device const& device, Stream const& stream, Record&& record) : mDriver(&device.driver()), mStream(&stream) {
        Driver::check(mDriver->streamBeginCapture(stream.get(), 0), "cuStreamBeginCapture");
        CuGraph graph = nullptr;
        try {
            record();
        } catch (...) {
            if (mDriver->streamEndCapture(stream.get(), &graph) == moee::kCuSuccess && graph != nullptr) {
                mDriver->graphDestroy(graph);
            }
            throw;
        }
        Driver::check(mDriver->streamEndCapture(stream.get(), &graph), "cuStreamEndCapture");
        CuResult const result = mDriver->graphInstantiate(&mExec, graph, 0);
        mDriver->graphDestroy(graph);
        Driver::check(result, "cuGraphInstantiate");
    }
    ~Graph() { mDriver->graphExecDestroy(mExec); }
    Graph(Graph const&) = delete;
    Graph& operator=(Graph const&) = delete;

    void launch() const { Driver::check(mDriver->graphLaunch(mExec, mStream->get()), "cuGraphLaunch"); }

private:
    Driver const* mDriver;
    Stream const* mStream;
    CuGraphExec mExec{nullptr};
};

}  // namespace selftest
