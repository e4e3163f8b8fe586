// The part of ONNX Runtime's C interface that the operator uses: a table of functions whose places never change.
// ONNX Runtime's wheel ships no headers, so this was written from the interface's documented layout.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t VERSION = 18;  // of the table: ONNX Runtime 1.18 and later

struct Status;
struct Value;
struct Info;  // of a tensor's type and shape
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct Domain;
struct MemoryInfo;
struct Allocator {
    uint32_t version;
    void* (*alloc)(Allocator*, size_t);
    void (*free)(Allocator*, void*);
};

enum ErrorCode : int { FAIL = 1, INVALID_ARGUMENT = 2 };
enum ElementType : int { FLOAT = 1, INT32 = 6 };

// Functions of the table by their places.
struct Api {
    const void* const* table;

    template <size_t Place, typename Result, typename... Arguments>
    Result call(Arguments... arguments) const {
        return reinterpret_cast<Result (*)(Arguments...)>(const_cast<void*>(table[Place]))(arguments...);
    }
    Status* status(ErrorCode code, const char* text) const { return call<0, Status*>(code, text); }
    Status* create_domain(const char* name, Domain** out) const { return call<26, Status*>(name, out); }
    Status* add_operator(Domain* domain, const void* op) const { return call<27, Status*>(domain, op); }
    Status* add_domain(SessionOptions* options, Domain* domain) const { return call<28, Status*>(options, domain); }
    Status* data(const Value* value, void** out) const { return call<51, Status*>(value, out); }
    Status* element_type(const Info* info, ElementType* out) const { return call<60, Status*>(info, out); }
    Status* rank(const Info* info, size_t* out) const { return call<61, Status*>(info, out); }
    Status* dimensions(const Info* info, int64_t* out, size_t rank) const { return call<62, Status*>(info, out, rank); }
    Status* info(const Value* value, Info** out) const { return call<65, Status*>(value, out); }
    Status* cpu_memory(int allocator, int memory, MemoryInfo** out) const { return call<69, Status*>(allocator, memory, out); }
    Status* attribute(const KernelInfo* info, const char* name, int64_t* out) const {
        return call<86, Status*>(info, name, out);
    }
    Status* attribute(const KernelInfo* info, const char* name, char* out, size_t* size) const {
        return call<87, Status*>(info, name, out, size);
    }
    Status* input(const KernelContext* context, size_t index, const Value** out) const {
        return call<90, Status*>(context, index, out);
    }
    Status* output(KernelContext* context, size_t index, const int64_t* dims, size_t rank, Value** out) const {
        return call<91, Status*>(context, index, dims, rank, out);
    }
    void release(Status* status) const { call<93, void>(status); }
    void release(MemoryInfo* info) const { call<94, void>(info); }
    void release(Info* info) const { call<99, void>(info); }
    void release(Allocator* allocator) const { call<132, void>(allocator); }
    Status* constant(const KernelInfo* info, size_t index, int* is_constant, const Value** out) const {
        return call<249, Status*>(info, index, is_constant, out);
    }
    Status* allocator(const KernelContext* context, const MemoryInfo* memory, Allocator** out) const {
        return call<253, Status*>(context, memory, out);
    }
    Status* parallel(const KernelContext* context, void (*task)(void*, size_t), size_t count, void* argument) const {
        return call<274, Status*>(context, task, count, size_t{0}, argument);
    }
};

struct ApiBase {
    const void* const* (*table)(uint32_t version);
    const char* (*version)();
};

// An operator as the runtime sees it; a member that is null has the runtime's default.
struct Operator {
    uint32_t version;
    void* (*create)(const Operator*, const void* const*, const KernelInfo*);
    const char* (*name)(const Operator*);
    const char* (*provider)(const Operator*);
    ElementType (*input_type)(const Operator*, size_t);
    size_t (*inputs)(const Operator*);
    ElementType (*output_type)(const Operator*, size_t);
    size_t (*outputs)(const Operator*);
    void (*compute)(void*, KernelContext*);
    void (*destroy)(void*);
    int (*input_kind)(const Operator*, size_t);
    int (*output_kind)(const Operator*, size_t);
    int (*input_memory)(const Operator*, size_t);
    int (*variadic[4])(const Operator*);
    Status* (*create_checked)(const Operator*, const void* const*, const KernelInfo*, void**);
    Status* (*compute_checked)(void*, KernelContext*);
    Status* (*infer_shape)(const Operator*, void*);
    int (*start_version)(const Operator*);
    int (*end_version)(const Operator*);
    size_t (*may_inplace)(int**, int**);
    void (*release_inplace)(int*, int*);
    size_t (*aliases)(int**, int**);
    void (*release_aliases)(int*, int*);
};

}  // namespace ort
