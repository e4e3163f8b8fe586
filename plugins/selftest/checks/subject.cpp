#include "checks/subject.h"

#include "cases/numbers.h"
#include "operator/tactics.h"

#include <algorithm>
#include <cstring>

namespace selftest {
namespace {

template <typename T>
std::vector<unsigned char> bytesOf(std::vector<T> const& values) {
    std::vector<unsigned char> out(values.size() * sizeof(T));
    std::memcpy(out.data(), values.data(), out.size());
    return out;
}

}  // namespace

Inputs::Inputs(Device const& device, Case const& c, moee::Type type, int64_t tokens) {
    auto const typed = [type](std::vector<float> const& values) { return toBytes(values.data(), values.size(), type); };
    std::vector<unsigned char> const own = typed(c.x);
    std::vector<unsigned char> x;
    size_t const needed = own.size() / static_cast<size_t>(c.sizes.tokens) * static_cast<size_t>(tokens);
    while (x.size() < needed) {
        x.insert(x.end(), own.begin(), own.begin() + static_cast<std::ptrdiff_t>(std::min(own.size(), needed - x.size())));
    }
    mMemory.reserve(kInputs);
    add(device, std::move(x));
    add(device, typed(c.router));
    add(device, bytesOf(c.routerBias));
    add(device, typed(c.wUp));
    add(device, typed(c.bUp));
    add(device, typed(c.wDown));
    add(device, typed(c.bOut));
    add(device, bytesOf(c.neurons));
    add(device, bytesOf(c.offsets));
}

void Inputs::add(Device const& device, std::vector<unsigned char> content) {
    mMemory.emplace_back(device, content.size());
    mMemory.back().upload(content.data());
    mPointers[mMemory.size() - 1] = mMemory.back().pointer();
    mContent.push_back(std::make_shared<std::vector<unsigned char> const>(std::move(content)));
}

Inputs::Inputs(Device const& device, Inputs const& like) : mContent(like.mContent) {
    mMemory.reserve(kInputs);
    for (Memory const& memory : like.mMemory) {
        mMemory.emplace_back(device, memory.bytes());
        mMemory.back().copyFrom(memory);
        mPointers[mMemory.size() - 1] = mMemory.back().pointer();
    }
}

int Inputs::changed() const {
    for (size_t i = 0; i < mMemory.size(); ++i) {
        if (mMemory[i].damage() != 0 || mMemory[i].download() != *mContent[i]) {
            return static_cast<int>(i);
        }
    }
    return -1;
}

size_t Inputs::bytes() const {
    size_t sum = 0;
    for (Memory const& memory : mMemory) {
        sum += memory.bytes();
    }
    return sum;
}

Place::Place(Device const& device, Layer const& layer, Case const& c, moee::Type type)
    : mY(device, static_cast<size_t>(layer.maxTokens() * c.sizes.dim) * moee::typeBytes(type)),
      mWorkspace(device, layer.workspaceBytes()) {}

void Place::poison(unsigned char value) const {
    mY.fill(value);
    mWorkspace.fill(value);
}

Output Place::download() const { return {mY.download(), mWorkspace.download(), mY.damage(), mWorkspace.damage()}; }

Subject::Subject(Device const& onDevice, Library const& library, Case const& of, moee::Type in, int32_t code)
    : device(onDevice), c(of), type(in), layer(library, of, in, of.sizes.tokens, code),
      inputs(onDevice, of, in, of.sizes.tokens), stream(onDevice) {}

void Subject::enqueue(IPluginV3& attached, int64_t tokens, Place const& place, Stream const& on) const {
    layer.enqueue(attached, tokens, inputs.pointers(), place.y(), place.workspace(), on.get());
}

Output Subject::run(IPluginV3& attached, int64_t tokens, Place const& place, unsigned char poison) const {
    place.poison(poison);
    enqueue(attached, tokens, place, stream);
    stream.synchronize();
    return place.download();
}

size_t Subject::routesAt(int32_t tactic, int64_t tokens) const {
    return moee::layOut(layer.sizes(tokens), moee::kindOf(*moee::findTactic(tactic))).routes;
}

}  // namespace selftest
