// cuBLASLt, opened with dlopen: the two products of a dense FFN with bias and activation in their epilogues.
#pragma once

#include "cases/cases.h"
#include "device/device.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace selftest {

// cublasLtMatmulHeuristicResult_t: an opaque algorithm, then what it needs.
struct Algorithm {
    uint64_t data[8];
    size_t workspaceBytes;
    int state;
    float waves;
    int reserved[4];
};

struct BlasLtCalls {
    int (*create)(void**);
    int (*destroy)(void*);
    size_t (*getVersion)();
    int (*descCreate)(void**, int, int);
    int (*descDestroy)(void*);
    int (*descSet)(void*, int, void const*, size_t);
    int (*layoutCreate)(void**, int, uint64_t, uint64_t, int64_t);
    int (*layoutDestroy)(void*);
    int (*preferenceCreate)(void**);
    int (*preferenceDestroy)(void*);
    int (*preferenceSet)(void*, int, void const*, size_t);
    int (*heuristic)(void*, void*, void*, void*, void*, void*, void*, int, Algorithm*, int*);
    int (*matmul)(void*, void*, void const*, void const*, void*, void const*, void*, void const*, void const*, void*, void*, void*,
        void const*, void*, size_t, CuStream);
};

class BlasLt {
public:
    // Null with a reason where there is no library that works here.
    static std::unique_ptr<BlasLt> open(std::string& why);
    ~BlasLt() { mCalls.destroy(mHandle); }
    BlasLt(BlasLt const&) = delete;
    BlasLt& operator=(BlasLt const&) = delete;

    std::string version() const;

private:
    friend class Product;
    BlasLt(BlasLtCalls const& calls, void* handle) : mCalls(calls), mHandle(handle) {}
    BlasLtCalls mCalls;
    void* mHandle;
};

enum class Epilogue : int { kBias = 4, kReluBias = 6, kGeluBias = 36 };  // CUBLASLT_EPILOGUE_*

// out [T, n] = epilogue(in [T, k] @ weight [n, k].T + bias [n]), row by row.
class Product {
public:
    // `multiprocessors` 0: all. Throws `CudaError` where the library has no algorithm for it.
    Product(BlasLt const& library, moee::Type type, int64_t tokens, int64_t n, int64_t k, Epilogue epilogue, int multiprocessors);
    Product(Product const&) = delete;
    Product& operator=(Product const&) = delete;

    static constexpr size_t kWorkspaceBytes = size_t{32} << 20;
    size_t algorithms() const { return mAlgorithms.size(); }
    void select(size_t algorithm) { mSelected = algorithm; }
    void enqueue(void const* in, void const* weight, void const* bias, void* out, Memory const& workspace, CuStream stream) const;

private:
    // What the library made and has to destroy.
    struct Owned {
        void* handle{nullptr};
        int (*destroy)(void*);
        explicit Owned(int (*by)(void*)) : destroy(by) {}
        ~Owned() {
            if (handle != nullptr) {
                destroy(handle);
            }
        }
        Owned(Owned const&) = delete;
        Owned& operator=(Owned const&) = delete;
    };
    void check(int status, char const* call) const;
    BlasLtCalls const& mCalls;
    void* mHandle;
    Owned mDesc, mWeight, mIn, mOut;
    std::vector<Algorithm> mAlgorithms;
    size_t mSelected{0};
};

}  // namespace selftest
