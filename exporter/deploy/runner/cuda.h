// Device memory and one stream through the CUDA driver, opened with dlopen: the runner needs no toolkit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

struct CUstream_st;

namespace moee {

// The primary context of one device (TensorRT's CUDA runtime shares it) and a stream. Throws std::runtime_error.
class Device {
public:
    explicit Device(int ordinal);
    ~Device();
    Device(Device const&) = delete;
    Device& operator=(Device const&) = delete;

    CUstream_st* stream() const { return mStream; }
    std::string const& name() const { return mName; }
    void upload(uint64_t device, void const* host, size_t bytes);
    void download(void* host, uint64_t device, size_t bytes);
    void synchronise();

private:
    int mDevice{0};
    CUstream_st* mStream{nullptr};
    std::string mName;
};

// Device memory that is freed with the object.
class Buffer {
public:
    explicit Buffer(size_t bytes);
    ~Buffer();
    Buffer(Buffer const&) = delete;
    Buffer& operator=(Buffer const&) = delete;
    uint64_t address() const { return mAddress; }
    void* pointer() const { return reinterpret_cast<void*>(mAddress); }

private:
    uint64_t mAddress{0};
};

}  // namespace moee
