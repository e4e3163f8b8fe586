// A case in one type on the device: its inputs, the layer, and runs of it whose output and workspace lie between guards.
#pragma once

#include "cases/cases.h"
#include "device/device.h"
#include "plugin/library.h"

#include <array>
#include <memory>
#include <vector>

namespace selftest {

// The nine inputs on the device. `tokens` of them: more than the case has are its own again from the first on.
class Inputs {
public:
    Inputs(Device const& device, Case const& c, moee::Type type, int64_t tokens);
    // The same in other memory.
    Inputs(Device const& device, Inputs const& like);
    void const* const* pointers() const { return mPointers.data(); }
    // Index of the first input that is not what was uploaded; -1 if all are.
    int changed() const;
    size_t bytes() const;

private:
    void add(Device const& device, std::vector<unsigned char> content);
    std::vector<Memory> mMemory;
    std::vector<std::shared_ptr<std::vector<unsigned char> const>> mContent;
    std::array<void const*, kInputs> mPointers{};
};

// What one run gave.
struct Output {
    std::vector<unsigned char> y, workspace;
    int64_t yDamage{0}, workspaceDamage{0};  // as `Memory::damage`
};

// Output and workspace of one execution context.
class Place {
public:
    Place(Device const& device, Layer const& layer, Case const& c, moee::Type type);
    void poison(unsigned char value) const;
    void poisonOutput(unsigned char value) const { mY.fill(value); }
    void* y() const { return mY.pointer(); }
    void* workspace() const { return mWorkspace.pointer(); }
    Output download() const;

private:
    Memory mY, mWorkspace;
};

struct Subject {
    Subject(Device const& onDevice, Library const& library, Case const& of, moee::Type in, int32_t code);

    Device const& device;
    Case const& c;
    moee::Type type;
    Layer layer;
    Inputs inputs;
    Stream stream;

    // Enqueues without waiting.
    void enqueue(IPluginV3& attached, int64_t tokens, Place const& place, Stream const& on) const;
    // Fills output and workspace with `poison`, runs and waits.
    Output run(IPluginV3& attached, int64_t tokens, Place const& place, unsigned char poison) const;
    // Offset of the routes in the workspace of `tactic`.
    size_t routesAt(int32_t tactic, int64_t tokens) const;
    size_t rowBytes() const { return static_cast<size_t>(c.sizes.dim) * moee::typeBytes(type); }
};

}  // namespace selftest
