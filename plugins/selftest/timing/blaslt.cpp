#include "timing/blaslt.h"

#include "device/errors.h"

#include <dlfcn.h>

#include <array>

namespace selftest {
namespace {

// cublasLt.h and library_types.h
constexpr int kComputeFloat32 = 68;     // CUBLAS_COMPUTE_32F: no TF32
constexpr int kReal32 = 0;              // CUDA_R_32F
constexpr int kReal16 = 2;              // CUDA_R_16F
constexpr int kRealBfloat16 = 14;       // CUDA_R_16BF
constexpr int kDescTransA = 3;          // CUBLASLT_MATMUL_DESC_*
constexpr int kDescEpilogue = 7;
constexpr int kDescBiasPointer = 8;
constexpr int kDescMultiprocessors = 15;
constexpr int kTransposed = 1;          // CUBLAS_OP_T
constexpr int kMostWorkspace = 1;       // CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
constexpr int kMostAlgorithms = 16;

template <typename Function>
bool find(void* library, char const* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    return function != nullptr;
}

bool findAll(void* library, BlasLtCalls& c) {
    return find(library, "cublasLtCreate", c.create) && find(library, "cublasLtDestroy", c.destroy)
        && find(library, "cublasLtGetVersion", c.getVersion) && find(library, "cublasLtMatmulDescCreate", c.descCreate)
        && find(library, "cublasLtMatmulDescDestroy", c.descDestroy)
        && find(library, "cublasLtMatmulDescSetAttribute", c.descSet)
        && find(library, "cublasLtMatrixLayoutCreate", c.layoutCreate)
        && find(library, "cublasLtMatrixLayoutDestroy", c.layoutDestroy)
        && find(library, "cublasLtMatmulPreferenceCreate", c.preferenceCreate)
        && find(library, "cublasLtMatmulPreferenceDestroy", c.preferenceDestroy)
        && find(library, "cublasLtMatmulPreferenceSetAttribute", c.preferenceSet)
        && find(library, "cublasLtMatmulAlgoGetHeuristic", c.heuristic) && find(library, "cublasLtMatmul", c.matmul);
}

}  // namespace

std::unique_ptr<BlasLt> BlasLt::open(std::string& why) {
    why = "libcublasLt was not found";
    for (char const* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so.11", "libcublasLt.so"}) {
        void* const library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            continue;
        }
        BlasLtCalls calls{};
        void* handle = nullptr;
        if (!findAll(library, calls)) {
            why = std::string(name) + " lacks a function";
        } else if (int const status = calls.create(&handle)) {
            why = std::string(name) + " does not start here (status " + std::to_string(status) + ")";
        } else {
            return std::unique_ptr<BlasLt>(new BlasLt(calls, handle));
        }
    }
    return nullptr;
}

std::string BlasLt::version() const {
    size_t const number = mCalls.getVersion();  // 130100 for 13.1.0, 120300 for 12.3.0
    return std::to_string(number / 10000) + "." + std::to_string(number / 100 % 100) + "." + std::to_string(number % 100);
}

// cuBLASLt counts by columns: a row-major [T, n] is its n x T, and the weight's [n, k] its k x n, to be transposed.
Product::Product(BlasLt const& library, moee::Type type, int64_t tokens, int64_t n, int64_t k, Epilogue epilogue,
    int multiprocessors)
    : mCalls(library.mCalls), mHandle(library.mHandle), mDesc(mCalls.descDestroy), mWeight(mCalls.layoutDestroy),
      mIn(mCalls.layoutDestroy), mOut(mCalls.layoutDestroy) {
    int const real = type == moee::Type::kFloat32 ? kReal32 : type == moee::Type::kFloat16 ? kReal16 : kRealBfloat16;
    auto const value = static_cast<int>(epilogue);
    auto const [t, rows, inner] = std::array{static_cast<uint64_t>(tokens), static_cast<uint64_t>(n), static_cast<uint64_t>(k)};
    check(mCalls.descCreate(&mDesc.handle, kComputeFloat32, kReal32), "cublasLtMatmulDescCreate");
    check(mCalls.descSet(mDesc.handle, kDescTransA, &kTransposed, sizeof(kTransposed)), "cublasLtMatmulDescSetAttribute");
    check(mCalls.descSet(mDesc.handle, kDescEpilogue, &value, sizeof(value)), "cublasLtMatmulDescSetAttribute");
    if (multiprocessors > 0) {
        int32_t const target = multiprocessors;
        mCalls.descSet(mDesc.handle, kDescMultiprocessors, &target, sizeof(target));  // older libraries do without
    }
    check(mCalls.layoutCreate(&mWeight.handle, real, inner, rows, k), "cublasLtMatrixLayoutCreate");
    check(mCalls.layoutCreate(&mIn.handle, real, inner, t, k), "cublasLtMatrixLayoutCreate");
    check(mCalls.layoutCreate(&mOut.handle, real, rows, t, n), "cublasLtMatrixLayoutCreate");
    Owned preference(mCalls.preferenceDestroy);
    check(mCalls.preferenceCreate(&preference.handle), "cublasLtMatmulPreferenceCreate");
    check(mCalls.preferenceSet(preference.handle, kMostWorkspace, &kWorkspaceBytes, sizeof(kWorkspaceBytes)),
        "cublasLtMatmulPreferenceSetAttribute");
    mAlgorithms.resize(kMostAlgorithms);
    int count = 0;
    int const status = mCalls.heuristic(mHandle, mDesc.handle, mWeight.handle, mIn.handle, mOut.handle, mOut.handle,
        preference.handle, kMostAlgorithms, mAlgorithms.data(), &count);
    check(status != 0 ? status : count < 1 ? -1 : 0, "cublasLtMatmulAlgoGetHeuristic");
    mAlgorithms.resize(static_cast<size_t>(count));
}

void Product::check(int status, char const* call) const {
    if (status != 0) {
        throw CudaError(std::string(call) + " failed with status " + std::to_string(status));
    }
}

void Product::enqueue(
    void const* in, void const* weight, void const* bias, void* out, Memory const& workspace, CuStream stream) const {
    float const one = 1;
    float const zero = 0;
    check(mCalls.descSet(mDesc.handle, kDescBiasPointer, &bias, sizeof(bias)), "cublasLtMatmulDescSetAttribute");
    check(mCalls.matmul(mHandle, mDesc.handle, &one, weight, mWeight.handle, in, mIn.handle, &zero, out, mOut.handle, out,
              mOut.handle, &mAlgorithms[mSelected].data, workspace.pointer(), kWorkspaceBytes, stream),
        "cublasLtMatmul");
}

}  // namespace selftest
