#include "timing/dense.h"

#include "cases/numbers.h"
#include "device/errors.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>

namespace selftest {
namespace {

constexpr double kClose = 0.01;  // of a token's scale: layouts and biases are right; the epilogue's GELU is the tanh form
constexpr int kTrials = 5;       // samples an algorithm

std::vector<float> repeated(std::vector<float> const& values, size_t count) {
    std::vector<float> out(count);
    for (size_t i = 0; i < count; ++i) {
        out[i] = values[i % values.size()];
    }
    return out;
}

double activated(double v, Epilogue epilogue) {
    switch (epilogue) {
    case Epilogue::kGeluBias: return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
    case Epilogue::kReluBias: return std::max(v, 0.0);
    case Epilogue::kBias: return v;
    }
    return v;
}

Epilogue epilogueOf(int32_t activation, std::string& note) {
    std::string const name = moee::kActivations[static_cast<size_t>(activation)];
    if (name == "relu") {
        return Epilogue::kReluBias;
    }
    if (name == "gelu" || name == "gelu_tanh") {
        note = name == "gelu" ? "cuBLASLt's GELU is the tanh form" : "";
        return Epilogue::kGeluBias;
    }
    note = "without " + name + ", which is no epilogue of cuBLASLt: in truth dense takes longer";
    return Epilogue::kBias;
}

// Weights of the dense FFN on the device, and on the host in the type's precision.
struct Weights {
    std::vector<unsigned char> up, upBias, down, downBias;
    Weights(Case const& c, moee::Type type) {
        auto const width = static_cast<size_t>(c.denseWidth);
        auto const dim = static_cast<size_t>(c.sizes.dim);
        auto const typed = [type](std::vector<float> const& v) { return toBytes(v.data(), v.size(), type); };
        up = typed(repeated(c.wUp, width * dim));
        upBias = typed(repeated(c.bUp, width));
        down = typed(repeated(c.wDown, dim * width));
        downBias = typed(repeated(c.bOut, dim));
    }
};

struct DeviceWeights {
    Memory up, upBias, down, downBias, y;
    DeviceWeights(Device const& device, Weights const& w, size_t outBytes)
        : up(device, w.up.size()), upBias(device, w.upBias.size()), down(device, w.down.size()), downBias(device, w.downBias.size()),
          y(device, outBytes) {
        up.upload(w.up.data());
        upBias.upload(w.upBias.data());
        down.upload(w.down.data());
        downBias.upload(w.downBias.data());
    }
};

// Nothing is timed that is not right: one token is computed here.
void verifyToken(Case const& c, moee::Type type, int64_t token, Weights const& w, Epilogue epilogue, Memory const& y) {
    int64_t const dim = c.sizes.dim;
    int64_t const width = c.denseWidth;
    auto const at = [type](std::vector<unsigned char> const& bytes, int64_t i) {
        return static_cast<double>(valueAt(bytes.data(), static_cast<size_t>(i), type));
    };
    int64_t const row = token % c.sizes.tokens * dim;
    std::vector<double> hidden(static_cast<size_t>(width));
    for (int64_t n = 0; n < width; ++n) {
        double sum = at(w.upBias, n);
        for (int64_t d = 0; d < dim; ++d) {
            sum += static_cast<double>(c.x[static_cast<size_t>(row + d)]) * at(w.up, n * dim + d);
        }
        hidden[static_cast<size_t>(n)] = activated(sum, epilogue);
    }
    auto const got = y.download();
    for (int64_t d = 0; d < dim; ++d) {
        double sum = at(w.downBias, d);
        double squares = 0;
        for (int64_t n = 0; n < width; ++n) {
            double const term = hidden[static_cast<size_t>(n)] * at(w.down, d * width + n);
            sum += term;
            squares += term * term;
        }
        double const error = std::abs(static_cast<double>(valueAt(got.data(), static_cast<size_t>(token * dim + d), type)) - sum);
        if (!(error <= kClose * (std::abs(sum) + 3 * std::sqrt(squares)))) {
            throw CudaError("the dense FFN by cuBLASLt is wrong at token " + std::to_string(token) + ", channel " + std::to_string(d));
        }
    }
}

template <typename Call>
Times timed(Device const& device, Stream const& stream, size_t sets, int samples, Call const& call) {
    Graph const graph(device, stream, [&] {
        for (size_t set = 0; set < sets; ++set) {
            call(set);
        }
    });
    return Clock(device).time(graph, stream, sets, samples);
}

DenseTime byLibrary(Device const& device, BlasLt const& library, Case const& c, moee::Type type, int64_t tokens,
    Rounds const& rounds) {
    DenseTime result{"cuBLASLt " + library.version(), "", {}};
    Epilogue const epilogue = epilogueOf(c.sizes.activation, result.note);
    DeviceFacts const& facts = device.facts();
    int const share = facts.multiprocessors < facts.allMultiprocessors ? facts.multiprocessors : 0;
    Product up(library, type, tokens, c.denseWidth, c.sizes.dim, epilogue, share);
    Product down(library, type, tokens, c.sizes.dim, c.denseWidth, Epilogue::kBias, share);
    Weights const weights(c, type);
    size_t const item = moee::typeBytes(type);
    Memory const hidden(device, static_cast<size_t>(tokens * c.denseWidth) * item);
    Memory const scratch(device, Product::kWorkspaceBytes);
    std::vector<std::unique_ptr<Inputs>> inputs;
    std::vector<std::unique_ptr<DeviceWeights>> sets;
    for (size_t i = 0; i < rounds.sets; ++i) {
        inputs.push_back(i == 0 ? std::make_unique<Inputs>(device, c, type, tokens) : std::make_unique<Inputs>(device, *inputs[0]));
        sets.push_back(std::make_unique<DeviceWeights>(device, weights, static_cast<size_t>(tokens * c.sizes.dim) * item));
    }
    Stream const stream(device);
    auto const callUp = [&](size_t i) {
        up.enqueue(inputs[i]->pointers()[0], sets[i]->up.pointer(), sets[i]->upBias.pointer(), hidden.pointer(), scratch, stream.get());
    };
    auto const callDown = [&](size_t i) {
        down.enqueue(hidden.pointer(), sets[i]->down.pointer(), sets[i]->downBias.pointer(), sets[i]->y.pointer(), scratch, stream.get());
    };
    auto const best = [&](Product& product, auto const& call) {
        size_t fastest = 0;
        double least = 0;
        for (size_t i = 0; i < product.algorithms(); ++i) {
            product.select(i);
            double const time = timed(device, stream, rounds.sets, kTrials, call).p50Us;
            if (i == 0 || time < least) {
                fastest = i;
                least = time;
            }
        }
        product.select(fastest);
    };
    best(up, callUp);
    best(down, callDown);
    result.times = timed(device, stream, rounds.sets, rounds.samples, [&](size_t i) {
        callUp(i);
        callDown(i);
    });
    for (int64_t const token : {int64_t{0}, tokens - 1}) {
        verifyToken(c, type, token, weights, epilogue, sets.front()->y);
    }
    return result;
}

// The dense FFN as the plugin knows it: one expert that keeps every neuron.
Case asOneExpert(Case const& c) {
    Case dense = c;
    auto const width = static_cast<size_t>(c.denseWidth);
    auto const dim = static_cast<size_t>(c.sizes.dim);
    dense.sizes.experts = dense.sizes.topK = 1;
    dense.sizes.unionSize = dense.sizes.maxWidth = c.denseWidth;
    dense.neuronCount = c.denseWidth;
    dense.router.assign(dim, 0.0F);
    dense.routerBias.assign(1, 0.0F);
    dense.wUp = repeated(c.wUp, width * dim);
    dense.bUp = repeated(c.bUp, width);
    dense.wDown = repeated(c.wDown, width * dim);
    dense.bOut = repeated(c.bOut, dim);
    dense.neurons.resize(width);
    std::iota(dense.neurons.begin(), dense.neurons.end(), 0);
    dense.offsets = {0, c.denseWidth};
    return dense;
}

}  // namespace

TacticTimes timeTactics(Device const& device, Library const& plugin, Case const& c, moee::Type type, int64_t tokens,
    Rounds const& rounds, int32_t code, Results* results) {
    Layer const layer(plugin, c, type, tokens, code);
    Plugin const attached = layer.attach();
    layer.setTokens(*attached, tokens);
    std::vector<std::unique_ptr<Inputs>> inputs;
    std::vector<std::unique_ptr<Memory>> outputs;
    size_t const outBytes = static_cast<size_t>(tokens * c.sizes.dim) * moee::typeBytes(type);
    for (size_t i = 0; i < rounds.sets; ++i) {
        inputs.push_back(i == 0 ? std::make_unique<Inputs>(device, c, type, tokens) : std::make_unique<Inputs>(device, *inputs[0]));
        outputs.push_back(std::make_unique<Memory>(device, outBytes));
    }
    Memory const workspace(device, layer.workspaceBytes());
    Stream const stream(device);
    TacticTimes result;
    for (int32_t const tactic : layer.tactics()) {
        layer.setTactic(*attached, tactic);
        Times const times = timed(device, stream, rounds.sets, rounds.samples, [&](size_t i) {
            layer.enqueue(*attached, tokens, inputs[i]->pointers(), outputs[i]->pointer(), workspace.pointer(), stream.get());
        });
        result.all.emplace_back(tactic, times);
        if (results != nullptr) {
            Where const where{c.name, type, std::string(tacticName(tactic)) + ", " + std::to_string(tokens) + " tokens"};
            compare(c, outputs.back()->download(), tokens, where, *results, Check::kTimed);
        }
        if (times.p50Us < result.all[result.best].second.p50Us) {
            result.best = result.all.size() - 1;
        }
    }
    return result;
}

DenseTime timeDense(Device const& device, Library const& plugin, BlasLt const* library, std::string const& why, Case const& c,
    moee::Type type, int64_t tokens, Rounds const& rounds, int32_t code) {
    std::string reason = why;
    if (library != nullptr) {
        try {
            return byLibrary(device, *library, c, type, tokens, rounds);
        } catch (CudaError const& error) {
            reason = error.what();
        }
    }
    TacticTimes const own = timeTactics(device, plugin, asOneExpert(c), type, tokens, rounds, code, nullptr);
    return {std::string("our own kernels, ") + tacticName(own.all[own.best].first), reason, own.all[own.best].second};
}

}  // namespace selftest
