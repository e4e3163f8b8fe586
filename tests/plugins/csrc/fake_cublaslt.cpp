// A stand-in for libcublasLt.so.13 on the driver double: column-major products with a bias and an activation, on its streams.
#include "cases/numbers.h"
#include "fake_device.h"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

namespace {

struct Desc {
    int transposed{0}, epilogue{1}, multiprocessors{0};
    void const* bias{nullptr};
};
struct Layout {
    int type;
    int64_t rows, columns, ld;
};
struct Algorithm {
    uint64_t data[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
struct Job {
    Desc desc;
    Layout a, b, d;
    void const* left;
    void const* right;
    void* out;
};

moee::Type typeOf(int real) {
    return real == 0 ? moee::Type::kFloat32 : real == 2 ? moee::Type::kFloat16 : moee::Type::kBfloat16;
}

double activated(double v, int epilogue) {
    if ((epilogue & 32) != 0) {
        return 0.5 * v * (1 + std::tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)));
    }
    return (epilogue & 2) != 0 && v < 0 ? 0 : v;
}

void multiply(void* data) {
    auto* const job = static_cast<Job*>(data);
    auto const at = [](void const* memory, Layout const& l, int64_t row, int64_t column) {
        return static_cast<double>(selftest::valueAt(static_cast<unsigned char const*>(memory), static_cast<size_t>(column * l.ld + row), typeOf(l.type)));
    };
    int64_t const inner = job->b.rows;
    for (int64_t j = 0; j < job->d.columns; ++j) {
        for (int64_t i = 0; i < job->d.rows; ++i) {
            double sum = 0;
            for (int64_t k = 0; k < inner; ++k) {
                sum += (job->desc.transposed != 0 ? at(job->left, job->a, k, i) : at(job->left, job->a, i, k)) * at(job->right, job->b, k, j);
            }
            if ((job->desc.epilogue & 4) != 0 && !FAULT("dense_without_bias")) {
                sum += at(job->desc.bias, {job->d.type, job->d.rows, 1, job->d.rows}, i, 0);
            }
            auto const value = static_cast<float>(activated(sum, job->desc.epilogue));
            auto const bytes = selftest::toBytes(&value, 1, typeOf(job->d.type));
            std::memcpy(static_cast<unsigned char*>(job->out) + static_cast<size_t>(j * job->d.ld + i) * bytes.size(), bytes.data(), bytes.size());
        }
    }
}

}  // namespace

extern "C" {

int cublasLtCreate(void** handle) { *handle = new int(0); return 0; }
int cublasLtDestroy(void* handle) { delete static_cast<int*>(handle); return 0; }
size_t cublasLtGetVersion() { return 130002; }
int cublasLtMatmulDescCreate(void** desc, int compute, int scale) { *desc = new Desc; return compute == 68 && scale == 0 ? 0 : 7; }
int cublasLtMatmulDescDestroy(void* desc) { delete static_cast<Desc*>(desc); return 0; }
int cublasLtMatmulDescSetAttribute(void* handle, int attribute, void const* value, size_t bytes) {
    auto* const desc = static_cast<Desc*>(handle);
    void* const at = attribute == 3 ? static_cast<void*>(&desc->transposed) : attribute == 7 ? &desc->epilogue
        : attribute == 8                                                  ? static_cast<void*>(&desc->bias)
        : attribute == 15                                                 ? &desc->multiprocessors
                                                                          : nullptr;
    if (at == nullptr || bytes != (attribute == 8 ? 8 : 4)) {
        return 7;  // CUBLAS_STATUS_INVALID_VALUE
    }
    std::memcpy(at, value, bytes);
    return 0;
}
int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns, int64_t ld) {
    *layout = new Layout{type, static_cast<int64_t>(rows), static_cast<int64_t>(columns), ld};
    return ld >= static_cast<int64_t>(rows) ? 0 : 7;
}
int cublasLtMatrixLayoutDestroy(void* layout) { delete static_cast<Layout*>(layout); return 0; }
int cublasLtMatmulPreferenceCreate(void** preference) { *preference = new int(0); return 0; }
int cublasLtMatmulPreferenceDestroy(void* preference) { delete static_cast<int*>(preference); return 0; }
int cublasLtMatmulPreferenceSetAttribute(void*, int attribute, void const*, size_t bytes) { return attribute == 1 && bytes == 8 ? 0 : 7; }
int cublasLtMatmulAlgoGetHeuristic(
    void*, void* desc, void*, void*, void*, void*, void*, int wanted, Algorithm* algorithms, int* count) {
    bool const confined = static_cast<Desc*>(desc)->multiprocessors != 0;
    *count = FAULT("dense_without_algorithm") ? 0 : std::min(wanted, confined ? 1 : 3);
    for (int i = 0; i < *count; ++i) {
        algorithms[i] = Algorithm{{static_cast<uint64_t>(i) + 1}, 0, 0, 1, {}};
    }
    return 0;
}
int cublasLtMatmul(void*, void* desc, void const*, void const* a, void* aLayout, void const* b, void* bLayout, void const*, void const*,
    void*, void* d, void* dLayout, void const* algorithm, void*, size_t, void* stream) {
    if (*static_cast<uint64_t const*>(algorithm) == 0) {
        return 7;
    }
    static auto const enqueue = reinterpret_cast<void (*)(void*, void (*)(void*), void*)>(dlsym(dlopen("libcuda.so.1", RTLD_NOW), "fake_enqueue"));
    static std::vector<std::unique_ptr<Job>> jobs;  // graphs launch them again
    jobs.push_back(std::make_unique<Job>(Job{*static_cast<Desc*>(desc), *static_cast<Layout*>(aLayout), *static_cast<Layout*>(bLayout),
        *static_cast<Layout*>(dLayout), a, b, d}));
    enqueue(stream, &multiply, jobs.back().get());
    return 0;
}

}  // extern "C"
