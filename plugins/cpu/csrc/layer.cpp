#include "layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace moee {
namespace {

constexpr size_t CHUNK = 128;             // neurons of the stores that a task of the first product goes through
constexpr size_t ROUTED_TOKENS = 16;     // tokens that a task routes
constexpr size_t HIDDEN_BYTES = 4 << 20;  // of hidden activations that are kept at a time
const char* const ACTIVATIONS[] = {"gelu", "gelu_tanh", "relu", "silu", "quick_gelu"};

size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

template <typename Body>
void each(Threads& threads, size_t count, Body& body) {
    if (count == 0) return;
    threads.run(count, [](void* argument, size_t i) { (*static_cast<Body*>(argument))(i); }, &body);
}

}  // namespace

// `slots`: a token and one of its experts, sorted by expert. order[s] is the slot's token, place[s] its row of the result.
struct Layer::Work {
    const float* x;
    size_t tokens, slots;
    int32_t *chosen, *order, *place;
    size_t* first;  // [experts + 1]: slots of each expert
    size_t* row;    // [experts + 1]: where each expert's rows of `panels` and `hidden` begin
    float *hidden, *panels, *parts, *scores;
};

std::string Layer::refusal(const Weights& w, const std::string& activation, int64_t top_k, int64_t max_width) {
    if (std::find(std::begin(ACTIVATIONS), std::end(ACTIVATIONS), activation) == std::end(ACTIVATIONS))
        return "unknown activation " + activation;
    if (w.dim == 0 || w.experts == 0) return "no experts or tokens without values";
    if (top_k < 1 || static_cast<size_t>(top_k) > w.experts) return "top_k is not between 1 and the number of experts";
    if (w.offsets[0] != 0 || static_cast<size_t>(w.offsets[w.experts]) != w.listed) return "offsets do not span the neurons";
    for (size_t e = 0; e < w.experts; ++e)
        if (w.offsets[e] > w.offsets[e + 1]) return "offsets descend";
    int64_t widest = 0;
    for (size_t e = 0; e < w.experts; ++e) {
        widest = std::max<int64_t>(widest, w.offsets[e + 1] - w.offsets[e]);
        for (int32_t i = w.offsets[e]; i < w.offsets[e + 1]; ++i) {
            if (w.neurons[i] < 0 || static_cast<size_t>(w.neurons[i]) >= w.neuron_rows) return "a neuron lies outside the stores";
            if (i > w.offsets[e] && w.neurons[i] <= w.neurons[i - 1]) return "neurons of an expert do not ascend";
        }
    }
    if (widest != max_width) return "max_width is not the width of the widest expert";
    return "";
}

Layer::Layer(const Weights& weights, const std::string& activation, size_t top_k)
    : weights_(weights), top_k_(top_k), width_(0), chunks_((weights.neuron_rows + CHUNK - 1) / CHUNK), kernels_(kernels()) {
    activation_ = static_cast<Activation>(std::find(std::begin(ACTIVATIONS), std::end(ACTIVATIONS), activation) - ACTIVATIONS);
    starts_.resize(weights.experts * (chunks_ + 1));
    for (size_t e = 0; e < weights.experts; ++e) {
        const int32_t *begin = weights.neurons + weights.offsets[e], *end = weights.neurons + weights.offsets[e + 1];
        width_ = std::max<size_t>(width_, end - begin);
        for (size_t c = 0; c <= chunks_; ++c)
            starts_[e * (chunks_ + 1) + c] =
                static_cast<int32_t>(std::lower_bound(begin, end, static_cast<int32_t>(c * CHUNK)) - begin);
    }
}

// Tokens of one expert: those of whole panels first, then few that need none.
struct Split {
    size_t panels, panelled;  // panels, and the tokens in them
};

static Split split(const Kernels& kernels, size_t count) {
    size_t panels = count / kernels.lanes;
    if (count % kernels.lanes >= kernels.fewest) return {panels + 1, count};
    return {panels, panels * kernels.lanes};
}

size_t Layer::slots_at_a_time(size_t slots) const {
    return std::min(slots, std::max<size_t>(256, HIDDEN_BYTES / (sizeof(float) * std::max<size_t>(width_, 1))));
}

// Rows of hidden activations or of panels for so many slots: every expert's last panel may be padded.
size_t Layer::rows(size_t slots) const { return slots + weights_.experts * (kernels_.lanes - kernels_.fewest); }

size_t Layer::scratch_bytes(size_t tokens) const {
    const size_t slots = tokens * top_k_, some = rows(slots_at_a_time(slots));
    return 3 * padded(slots * sizeof(int32_t)) + 2 * padded((weights_.experts + 1) * sizeof(size_t)) +
           padded(some * width_ * sizeof(float)) + padded(some * weights_.dim * sizeof(float)) +
           padded(tokens * weights_.experts * sizeof(float)) + (top_k_ > 1 ? padded(slots * weights_.dim * sizeof(float)) : 0);
}

// The experts of the tokens [begin, end): the best first, the lowest id of equals; a token whose scores are not all finite gets
// the lowest ids.
void Layer::route(Work& work, size_t begin, size_t end) const {
    size_t experts = weights_.experts;
    float* scores = work.scores + begin * experts;
    kernels_.scores(work.x + begin * weights_.dim, end - begin, weights_.dim, weights_.router, weights_.router_bias, experts,
                    scores);
    for (size_t t = begin; t < end; ++t, scores += experts) {
        if (!std::all_of(scores, scores + experts, [](float score) { return std::isfinite(score); }))
            std::fill(scores, scores + experts, 0.0f);
        int32_t* chosen = work.chosen + t * top_k_;
        for (size_t k = 0; k < top_k_; ++k) {
            size_t best = experts;
            for (size_t e = 0; e < experts; ++e) {
                bool taken = std::find(chosen, chosen + k, static_cast<int32_t>(e)) != chosen + k;
                if (!taken && (best == experts || scores[e] > scores[best])) best = e;
            }
            chosen[k] = static_cast<int32_t>(best);
        }
    }
}

void Layer::sort(Work& work) const {
    size_t experts = weights_.experts;
    std::fill(work.first, work.first + experts + 1, size_t{0});
    for (size_t s = 0; s < work.slots; ++s) ++work.first[work.chosen[s] + 1];
    for (size_t e = 0; e < experts; ++e) work.first[e + 1] += work.first[e];
    for (size_t s = 0; s < work.slots; ++s) {
        size_t at = work.first[work.chosen[s]]++;
        work.order[at] = static_cast<int32_t>(s / top_k_);
        work.place[at] = static_cast<int32_t>(s);
    }
    for (size_t e = experts; e > 0; --e) work.first[e] = work.first[e - 1];
    work.first[0] = 0;
}

// Both products of the slots [begin, end).
void Layer::products(Work& work, size_t begin, size_t end, Threads& threads) const {
    const Weights& w = weights_;
    auto slots_of = [&](size_t e, size_t& from) {
        from = std::max(work.first[e], begin);
        size_t to = std::min(work.first[e + 1], end);
        return to > from ? to - from : 0;
    };
    size_t lanes = kernels_.lanes, panels = 0;
    work.row[0] = 0;
    for (size_t e = 0; e < w.experts; ++e) {
        size_t from, count = slots_of(e, from);
        Split parts = split(kernels_, count);
        work.row[e + 1] = work.row[e] + parts.panels * lanes + (count - parts.panelled);
        panels += parts.panels;
    }
    auto packing = [&](size_t e) {
        size_t from, count = slots_of(e, from);
        Split parts = split(kernels_, count);
        for (size_t b = 0; b < parts.panels; ++b)
            kernels_.pack(work.x, work.order + from + b * lanes, std::min(lanes, count - b * lanes), w.dim,
                          work.panels + (work.row[e] + b * lanes) * w.dim);
    };
    auto first_product = [&](size_t i) {
        size_t c = i / w.experts, e = i % w.experts, from, count = slots_of(e, from);
        const int32_t* starts = starts_.data() + e * (chunks_ + 1) + c;
        size_t width = static_cast<size_t>(starts[1] - starts[0]);
        if (!count || !width) return;
        Split parts = split(kernels_, count);
        const Neurons neurons{w.w_up, w.neurons + w.offsets[e] + starts[0], width, w.dim};
        float* hidden = work.hidden + work.row[e] * width_;
        kernels_.up(work.panels + work.row[e] * w.dim, parts.panels, neurons, w.b_up, activation_, hidden + starts[0] * lanes,
                    width_);
        kernels_.up_few(work.x, work.order + from + parts.panelled, count - parts.panelled, neurons, w.b_up, activation_,
                        hidden + parts.panels * lanes * width_ + starts[0], width_);
    };
    auto second_product = [&](size_t i) {
        size_t c = i / w.experts, e = i % w.experts, from, count = slots_of(e, from);
        if (!count) return;
        Split parts = split(kernels_, count);
        size_t first = c * kernels_.columns, last = std::min(w.dim, first + kernels_.columns);
        const Neurons neurons{w.w_down, w.neurons + w.offsets[e], static_cast<size_t>(w.offsets[e + 1] - w.offsets[e]), w.dim};
        const float *hidden = work.hidden + work.row[e] * width_, *bias = w.b_out + e * w.dim;
        const int32_t* places = work.place + from;
        for (size_t b = 0; b < parts.panels; ++b) {
            const Hidden panel{hidden + b * lanes * width_, 1, lanes, std::min(lanes, count - b * lanes)};
            kernels_.down(panel, neurons, bias, work.parts, places + b * lanes, first, last);
        }
        const Hidden few{hidden + parts.panels * lanes * width_, width_, 1, count - parts.panelled};
        kernels_.down(few, neurons, bias, work.parts, places + parts.panelled, first, last);
    };
    if (panels > 0) each(threads, w.experts, packing);
    each(threads, chunks_ * w.experts, first_product);
    each(threads, (w.dim + kernels_.columns - 1) / kernels_.columns * w.experts, second_product);
}

void Layer::forward(const float* x, size_t tokens, float* y, void* scratch, Threads& threads) const {
    const Weights& w = weights_;
    auto take = [&](size_t bytes) {
        void* part = scratch;
        scratch = static_cast<char*>(scratch) + padded(bytes);
        return part;
    };
    Work work{};
    work.x = x;
    work.tokens = tokens;
    work.slots = tokens * top_k_;
    size_t most = slots_at_a_time(work.slots);
    work.chosen = static_cast<int32_t*>(take(work.slots * sizeof(int32_t)));
    work.order = static_cast<int32_t*>(take(work.slots * sizeof(int32_t)));
    work.place = static_cast<int32_t*>(take(work.slots * sizeof(int32_t)));
    work.first = static_cast<size_t*>(take((w.experts + 1) * sizeof(size_t)));
    work.row = static_cast<size_t*>(take((w.experts + 1) * sizeof(size_t)));
    work.hidden = static_cast<float*>(take(rows(most) * width_ * sizeof(float)));
    work.panels = static_cast<float*>(take(rows(most) * w.dim * sizeof(float)));
    work.scores = static_cast<float*>(take(tokens * w.experts * sizeof(float)));
    work.parts = top_k_ > 1 ? static_cast<float*>(take(work.slots * w.dim * sizeof(float))) : y;

    size_t parts = (tokens + ROUTED_TOKENS - 1) / ROUTED_TOKENS;
    auto routing = [&](size_t i) { route(work, i * ROUTED_TOKENS, std::min(tokens, (i + 1) * ROUTED_TOKENS)); };
    each(threads, parts, routing);
    sort(work);
    for (size_t begin = 0; begin < work.slots; begin += most) products(work, begin, std::min(begin + most, work.slots), threads);
    if (top_k_ == 1) return;
    for (size_t t = 0; t < tokens; ++t)
        for (size_t d = 0; d < w.dim; ++d) {
            float total = 0.0f;
            for (size_t k = 0; k < top_k_; ++k) total += work.parts[(t * top_k_ + k) * w.dim + d];
            y[t * w.dim + d] = total;
        }
}

}  // namespace moee
