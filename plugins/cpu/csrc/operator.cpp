// moee::MoeeFfn for ONNX Runtime on the CPU, float32: what SessionOptions.register_custom_ops_library loads.

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "layer.h"
#include "ort.h"

namespace moee {
namespace {

// What plugins/cpu/build.py reads of a built library.
__attribute__((used)) const char MARK[] = "moee-onnxruntime-api=18";
static_assert(ort::VERSION == 18, "MARK says another version");

constexpr size_t INPUTS = 9;
const char* const NAMES[INPUTS] = {"x", "router", "router_bias", "w_up", "b_up", "w_down", "b_out", "neurons", "offsets"};
bool integers(size_t input) { return input >= 7; }

// An error of the runtime or of the node; `status` is null for one of ours.
struct Failure {
    ort::Status* status;
    std::string text;
};

struct Runtime {
    ort::Api api;

    void check(ort::Status* status) const {
        if (status != nullptr) throw Failure{status, ""};
    }
    std::vector<int64_t> shape(const ort::Value* value, ort::ElementType wanted, const char* name) const {
        ort::Info* info = nullptr;
        check(api.info(value, &info));
        ort::ElementType type{};
        size_t rank = 0;
        ort::Status* status = api.element_type(info, &type);
        if (status == nullptr) status = api.rank(info, &rank);
        std::vector<int64_t> dims(rank);
        if (status == nullptr) status = api.dimensions(info, dims.data(), rank);
        api.release(info);
        check(status);
        if (type != wanted) throw Failure{nullptr, std::string(name) + " has a type that the operator does not take"};
        return dims;
    }
    const void* data(const ort::Value* value) const {
        void* out = nullptr;
        check(api.data(value, &out));
        return out;
    }
    std::string text(const ort::KernelInfo* info, const char* name) const {
        char buffer[64];
        size_t size = sizeof buffer;
        check(api.attribute(info, name, buffer, &size));
        return buffer;
    }
};

// Runs the body; a failure becomes the runtime's error, and nothing is thrown.
template <typename Body>
ort::Status* guarded(const ort::Api& api, Body body) noexcept {
    try {
        body();
        return nullptr;
    } catch (const Failure& failure) {
        if (failure.status != nullptr) return failure.status;
        return api.status(ort::INVALID_ARGUMENT, ("MoeeFfn: " + failure.text).c_str());
    } catch (const std::bad_alloc&) {
        return api.status(ort::FAIL, "MoeeFfn: out of memory");
    } catch (...) {
        return api.status(ort::FAIL, "MoeeFfn failed");
    }
}

class Pool : public Threads {
public:
    Pool(const Runtime& runtime, const ort::KernelContext* context) : runtime_(runtime), context_(context) {}
    void run(size_t count, void (*task)(void*, size_t), void* argument) override {
        runtime_.check(runtime_.api.parallel(context_, task, count, argument));
    }

private:
    const Runtime& runtime_;
    const ort::KernelContext* context_;
};

// Memory from the runtime's allocator until the end of a run.
class Scratch {
public:
    Scratch(const Runtime& runtime, const ort::KernelContext* context, const ort::MemoryInfo* memory, size_t bytes)
        : runtime_(runtime) {
        runtime.check(runtime.api.allocator(context, memory, &allocator_));
        memory_ = allocator_->alloc(allocator_, bytes + 64);
        if (memory_ == nullptr) {
            runtime.api.release(allocator_);
            throw std::bad_alloc();
        }
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() {
        allocator_->free(allocator_, memory_);
        runtime_.api.release(allocator_);
    }
    void* aligned() const { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_) + 63) / 64 * 64); }

private:
    const Runtime& runtime_;
    ort::Allocator* allocator_ = nullptr;
    void* memory_ = nullptr;
};

class Kernel {
public:
    Kernel(ort::Api api, const ort::KernelInfo* info) : runtime_{api} {
        std::vector<int64_t> dims[INPUTS];
        const void* data[INPUTS] = {};
        for (size_t i = 1; i < INPUTS; ++i) {
            int constant = 0;
            const ort::Value* value = nullptr;
            runtime_.check(api.constant(info, i, &constant, &value));
            if (!constant) throw Failure{nullptr, std::string(NAMES[i]) + " is not an initialiser"};
            dims[i] = runtime_.shape(value, integers(i) ? ort::INT32 : ort::FLOAT, NAMES[i]);
            data[i] = runtime_.data(value);
        }
        auto size = [&](size_t input, size_t axis) { return axis < dims[input].size() ? dims[input][axis] : -1; };
        const int64_t K = size(1, 0), D = size(1, 1), U = size(3, 0), N = size(7, 0);
        const std::vector<int64_t> wanted[INPUTS] = {{}, {K, D}, {K}, {U, D}, {U}, {U, D}, {K, D}, {N}, {K + 1}};
        for (size_t i = 1; i < INPUTS; ++i)
            if (dims[i] != wanted[i])
                throw Failure{nullptr, std::string("the shape of ") + NAMES[i] + " does not fit the others"};
        auto floats = [&](size_t i) { return static_cast<const float*>(data[i]); };
        auto ints = [&](size_t i) { return static_cast<const int32_t*>(data[i]); };
        Weights weights{floats(1), floats(2), floats(3), floats(4), floats(5), floats(6), ints(7), ints(8),
                        static_cast<size_t>(D), static_cast<size_t>(K), static_cast<size_t>(U), static_cast<size_t>(N)};
        int64_t top_k = 0, max_width = 0;
        runtime_.check(api.attribute(info, "top_k", &top_k));
        runtime_.check(api.attribute(info, "max_width", &max_width));
        std::string activation = runtime_.text(info, "activation");
        std::string reason = Layer::refusal(weights, activation, top_k, max_width);
        if (!reason.empty()) throw Failure{nullptr, reason};
        layer_ = std::make_unique<Layer>(weights, activation, static_cast<size_t>(top_k));
        runtime_.check(api.cpu_memory(1, 0, &memory_));  // the arena, the default memory
    }
    Kernel(const Kernel&) = delete;
    ~Kernel() { runtime_.api.release(memory_); }

    void compute(ort::KernelContext* context) const {
        const ort::Value* x = nullptr;
        ort::Value* y = nullptr;
        runtime_.check(runtime_.api.input(context, 0, &x));
        std::vector<int64_t> dims = runtime_.shape(x, ort::FLOAT, "x");
        if (dims.empty() || dims.back() != static_cast<int64_t>(layer_->dim()))
            throw Failure{nullptr, "the last axis of x is not the width of the experts"};
        runtime_.check(runtime_.api.output(context, 0, dims.data(), dims.size(), &y));
        size_t tokens = 1;
        for (size_t i = 0; i + 1 < dims.size(); ++i) tokens *= static_cast<size_t>(dims[i]);
        if (tokens == 0) return;
        Scratch scratch(runtime_, context, memory_, layer_->scratch_bytes(tokens));
        Pool pool(runtime_, context);
        auto* result = static_cast<float*>(const_cast<void*>(runtime_.data(y)));
        layer_->forward(static_cast<const float*>(runtime_.data(x)), tokens, result, scratch.aligned(), pool);
    }
    const ort::Api& api() const { return runtime_.api; }

private:
    Runtime runtime_;
    std::unique_ptr<Layer> layer_;
    ort::MemoryInfo* memory_ = nullptr;
};

ort::Operator make_operator() {
    ort::Operator op{};
    op.version = ort::VERSION;
    op.name = [](const ort::Operator*) { return "MoeeFfn"; };
    op.provider = [](const ort::Operator*) -> const char* { return "CPUExecutionProvider"; };
    op.input_type = [](const ort::Operator*, size_t i) { return integers(i) ? ort::INT32 : ort::FLOAT; };
    op.inputs = [](const ort::Operator*) { return INPUTS; };
    op.output_type = [](const ort::Operator*, size_t) { return ort::FLOAT; };
    op.outputs = [](const ort::Operator*) { return size_t{1}; };
    op.input_kind = [](const ort::Operator*, size_t) { return 0; };
    op.output_kind = [](const ort::Operator*, size_t) { return 0; };
    op.input_memory = [](const ort::Operator*, size_t) { return 0; };
    for (auto& entry : op.variadic) entry = [](const ort::Operator*) { return 1; };
    op.start_version = [](const ort::Operator*) { return 1; };
    op.end_version = [](const ort::Operator*) { return 1; };
    op.create_checked = [](const ort::Operator*, const void* const* table, const ort::KernelInfo* info, void** out) {
        const ort::Api api{table};
        return guarded(api, [&] { *out = new Kernel(api, info); });
    };
    op.compute_checked = [](void* kernel, ort::KernelContext* context) {
        auto* self = static_cast<Kernel*>(kernel);
        return guarded(self->api(), [&] { self->compute(context); });
    };
    op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return op;
}

const ort::Operator OPERATOR = make_operator();

}  // namespace
}  // namespace moee

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                 const ort::ApiBase* base) {
    const ort::Api api{base->table(ort::VERSION)};
    if (api.table == nullptr) {
        // An older runtime: CreateStatus has been the first function since the first version.
        const ort::Api oldest{base->table(1)};
        if (oldest.table == nullptr) return nullptr;
        std::string text = std::string("MoeeFfn needs ONNX Runtime 1.18 or later, this is ") + base->version();
        return oldest.status(ort::FAIL, text.c_str());
    }
    ort::Domain* domain = nullptr;
    ort::Status* status = api.create_domain("moee", &domain);
    if (status == nullptr) status = api.add_operator(domain, &moee::OPERATOR);
    if (status == nullptr) status = api.add_domain(options, domain);
    return status;
}
