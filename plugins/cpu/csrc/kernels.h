// The products of the routed FFN on blocks of tokens, by vectors of a processor's width. kernels.inc holds them; a file a width
// compiles it. All arrays are float32; rows of tokens, weights and results are `dim` apart.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moee {

enum class Activation : int { gelu, gelu_tanh, relu, silu, quick_gelu };  // in the order of plugins/contract.py

// Some neurons of a store of rows [U, dim]: the i-th is rows[ids[i]].
struct Neurons {
    const float* rows;
    const int32_t* ids;
    size_t count, dim;

    const float* row(size_t i) const { return rows + static_cast<size_t>(ids[i]) * dim; }
};

// Hidden activations: that of token r and neuron i is at[r * row_step + i * step].
struct Hidden {
    const float* at;
    size_t row_step, step, rows;
};

struct Kernels {
    const char* name;
    size_t lanes;    // tokens of a panel
    size_t fewest;   // tokens from which a panel that is not full is faster than `up_few`
    size_t columns;  // of y that `down` likes to do at a time

    // panel[d * lanes + r] = x[tokens[r]][d] for r < rows <= lanes, else 0.
    void (*pack)(const float* x, const int32_t* tokens, size_t rows, size_t dim, float* panel);

    // out[b][i * lanes + r] = act(dot(token r of panel b, neuron i) + bias[ids[i]]).
    // A panel is dim * lanes large, a block of `out` width * lanes.
    void (*up)(const float* panels, size_t blocks, Neurons neurons, const float* bias, Activation activation, float* out,
               size_t width);

    // The same of few tokens, which need no panel: out[r * width + i].
    void (*up_few)(const float* x, const int32_t* tokens, size_t rows, Neurons neurons, const float* bias, Activation activation,
                   float* out, size_t width);

    // y[targets[r]][c] = bias[c] + sum over i of hidden(r, i) * neuron i [c] for begin <= c < end, i ascending.
    void (*down)(Hidden hidden, Neurons neurons, const float* bias, float* y, const int32_t* targets, size_t begin, size_t end);

    // out[r * experts + e] = dot(x[r], router[e]) + bias[e]
    void (*scores)(const float* x, size_t rows, size_t dim, const float* router, const float* bias, size_t experts, float* out);
};

// The fastest that this processor has.
const Kernels& kernels();

}  // namespace moee
