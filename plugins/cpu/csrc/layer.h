// A routed FFN as the contract (plugins/contract.py) has it, and its forward pass.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace moee {

// Tensors of the node, which outlive the layer.
struct Weights {
    const float *router, *router_bias, *w_up, *b_up, *w_down, *b_out;
    const int32_t *neurons, *offsets;
    size_t dim, experts, neuron_rows, listed;  // D, K, U, N
};

// Runs task(0) ... task(count - 1), on other threads too.
class Threads {
public:
    virtual ~Threads() = default;
    virtual void run(size_t count, void (*task)(void*, size_t), void* argument) = 0;
};

class Layer {
public:
    // Why the tables or attributes break the contract; empty if they do not.
    static std::string refusal(const Weights& weights, const std::string& activation, int64_t top_k, int64_t max_width);

    Layer(const Weights& weights, const std::string& activation, size_t top_k);

    size_t scratch_bytes(size_t tokens) const;

    // y[tokens, D] of x[tokens, D]; scratch holds scratch_bytes(tokens), aligned to 64.
    void forward(const float* x, size_t tokens, float* y, void* scratch, Threads& threads) const;

    size_t dim() const { return weights_.dim; }

private:
    struct Work;
    void route(Work& work, size_t begin, size_t end) const;
    void sort(Work& work) const;
    void products(Work& work, size_t begin, size_t end, Threads& threads) const;
    size_t slots_at_a_time(size_t slots) const;
    size_t rows(size_t slots) const;

    Weights weights_;
    Activation activation_;
    size_t top_k_, width_, chunks_;
    std::vector<int32_t> starts_;  // [experts, chunks + 1]: where in `neurons` each chunk of the stores begins
    const Kernels& kernels_;
};

}  // namespace moee
