// Devices, errors injected into each driver call, timing by the builder, modules where the driver reads them, no driver at all.
#include "host_checks.h"
#include "operator/tables.h"

#include <map>

namespace {

void testDevices(Fake const& fake) {
    struct Device {
        int major, minor;
        char const* module;  // kind and SM of what must be loaded last; null: attach must fail
    };
    // The tables of this test hold sm_80, sm_87 and the PTX of sm_80.
    for (Device const& device : {Device{8, 0, "cubin sm=80"}, Device{8, 7, "cubin sm=87"}, Device{8, 6, "cubin sm=80"},
             Device{8, 9, "cubin sm=80"}, Device{9, 0, "ptx sm=80"}, Device{12, 0, "ptx sm=80"}, Device{7, 5, nullptr}}) {
        fake.reset();
        fake.device(device.major, device.minor);
        Plugin const built = configured();
        if (device.module == nullptr) {
            CHECK(built == nullptr);  // the builder would otherwise fail later, with less to say
            fake.device(8, 7);
            Plugin const elsewhere = configured();
            fake.device(device.major, device.minor);
            Plugin const runtime(recreate(gCreator, elsewhere.get()));
            CHECK(attach(runtime.get()) == nullptr);
            CHECK(logged("no float16 kernels for sm_75 (it was built for 80, 87)"));
            continue;
        }
        fake.clearLog();
        Plugin const runtime(recreate(gCreator, built.get()));
        CHECK(attach(runtime.get()) != nullptr);
        CHECK_TEXT(fake.log().find(device.module) != std::string::npos, device.module);
    }
    // A cubin that this driver refuses gives way to PTX; any other error does not.
    fake.reset();
    Plugin const orin = configured();
    fake.fail("cuModuleLoadDataEx", 0, 209);
    CHECK(attach(orin.get()) != nullptr);
    CHECK(fake.log().find("cuModuleLoadDataEx ptx sm=80 route_load_buckets_float16") != std::string::npos);
    fake.reset();
    Plugin const built = configured();
    fake.context(0);
    Plugin const runtime(recreate(gCreator, built.get()));
    CHECK(attach(runtime.get()) == nullptr);
    CHECK(logged("no CUDA context"));
}

void testInjectedErrors(Fake const& fake) {
    fake.reset();
    Plugin const built = configured();
    Plugin const runtime(recreate(gCreator, built.get()));
    CHECK(fake.liveModules() == 0 && fake.liveMemory() == 0);
    for (char const* call : {"cuCtxGetCurrent", "cuCtxGetDevice", "cuDeviceGetAttribute", "cuModuleLoadDataEx",
             "cuModuleGetFunction", "cuFuncSetAttribute", "cuMemAlloc_v2", "cuMemcpyHtoD_v2"}) {
        // The build-phase object routes by load, hence allocates; errors late in the sequence must clean up too.
        for (int32_t after : {0, 1, 5}) {
            bool const once = std::strcmp(call, "cuModuleLoadDataEx") != 0 && std::strcmp(call, "cuModuleGetFunction") != 0
                && std::strcmp(call, "cuFuncSetAttribute") != 0;
            bool const twice = std::strcmp(call, "cuDeviceGetAttribute") == 0;
            fake.reset();
            fake.fail(call, after, 2);
            Plugin const attached = attach(built.get());
            bool const reached = !once || after == 0 || (twice && after == 1);
            CHECK_TEXT((attached == nullptr) == reached, std::string(call) + " " + std::to_string(after));
            if (reached) {
                CHECK_TEXT(logged("ERROR [moee] MoeeFfn attachToContext") && logged("CUDA_ERROR_OUT_OF_MEMORY")
                        && logged(std::string(call).substr(0, std::string(call).find('_'))),
                    call);
                CHECK_TEXT(fake.liveModules() == 0 && fake.liveMemory() == 0, call);
            }
        }
    }
    fake.reset();
    size_t const bytes = workspaceOf(built.get(), kCase);
    Buffers const buffers(kCase, bytes);
    {
        Plugin const attached = attach(runtime.get());
        for (auto const& [call, calls] : std::map<std::string, int>{{"cuMemsetD32Async", 1}, {"cuLaunchKernel", 3}}) {
            for (int after = 0; after < calls; ++after) {
                gLogger.lines.clear();
                fake.fail(call.c_str(), after, 719);
                CHECK_TEXT(runtimePart(attached.get())->setTactic(1) == 0, call);
                CHECK_TEXT(enqueue(attached.get(), kCase, buffers) != 0, call);
                CHECK_TEXT(logged("ERROR [moee] MoeeFfn enqueue: " + call), call);
            }
        }
        fake.fail("none", 0, 0);
        CHECK(enqueue(attached.get(), kCase, buffers) == 0);  // an error does not stick
        CHECK(fake.liveModules() > 0);
        Plugin const second = attach(runtime.get());  // shares the modules
        int const live = fake.liveModules();
        CHECK(second != nullptr && fake.liveModules() == live);
    }
    CHECK(fake.liveModules() == 0);
}

// The cumulative load that the last launch was given, and whether it routes by it where it can do either.
std::vector<int32_t> gLoads;
int32_t gByLoad = -1;
int readLoads(char const* symbol, unsigned const*, unsigned, unsigned, void** args) {
    moee::Tables const& t = moee::tables();
    for (int32_t i = 0; i < t.kernelCount; ++i) {
        moee::Kernel const& kernel = t.kernels[i];
        for (int32_t a = 0; std::strcmp(kernel.symbol, symbol) == 0 && a < kernel.argCount; ++a) {
            if (kernel.args[a] == moee::Arg::kLoadCdf) {
                auto const* const loads = *static_cast<int32_t**>(args[a]);
                gLoads = loads != nullptr ? std::vector<int32_t>(loads, loads + kCase.experts) : std::vector<int32_t>{};
            } else if (kernel.args[a] == moee::Arg::kByLoad) {
                gByLoad = *static_cast<int32_t*>(args[a]);
            }
        }
    }
    return 0;
}

// The builder may time without attaching.
void testBuilderTiming(Fake const& fake) {
    fake.reset();
    Plugin const built = configured();
    auto const d = describe(kCase);
    CHECK(runtimePart(built.get())->onShapeChange(d.data(), kInputs, d.data() + kInputs, 1) == 0);
    Buffers const buffers(kCase, workspaceOf(built.get(), kCase));
    fake.clearLog();
    fake.executor(&readLoads);
    fake.capture(1);
    moee::Tables const& t = moee::tables();
    for (int32_t i = 0; i < t.tacticCount; ++i) {
        bool const groups = std::strncmp(t.tactics[i].name, "group", 5) == 0;
        gLoads.clear();
        gByLoad = -1;
        fake.clearLog();
        CHECK(runtimePart(built.get())->setTactic(t.tactics[i].id) == 0 && enqueue(built.get(), kCase, buffers) == 0);
        CHECK_TEXT((gLoads == std::vector<int32_t>{500000, 800000, 1000000, 1000000}), t.tactics[i].name);
        CHECK_TEXT((fake.log().find("route_load") != std::string::npos) == !groups && gByLoad == (groups ? 1 : -1), t.tactics[i].name);
        CHECK(fake.log().find("FORBIDDEN") == std::string::npos);
    }
    fake.capture(0);
    // An engine routes by score.
    Plugin const runtime(recreate(gCreator, built.get()));
    Plugin const attached = attach(runtime.get());
    CHECK(runtimePart(attached.get())->setTactic(9) == 0 && enqueue(attached.get(), kCase, buffers) == 0);
    CHECK(gByLoad == 0 && gLoads.empty());
}

// The driver reads modules where they lie.
void testModuleImages() {
    moee::Tables const& t = moee::tables();
    for (int32_t i = 0; i < t.kernelCount; ++i) {
        moee::Kernel const& k = t.kernels[i];
        unsigned char const* const image = moee::moduleImage(k.module);
        std::string const text(reinterpret_cast<char const*>(image));
        CHECK_TEXT(reinterpret_cast<uintptr_t>(image) % 16 == 0 && text.size() > 3000, k.symbol);
        CHECK_TEXT(text.find(std::string("symbol=") + k.symbol + "\n") != std::string::npos, k.symbol);
        CHECK_TEXT(text.find(k.isPtx ? "// MOEE-FAKE ptx=" : "MOEE-FAKE sm=") == 0, k.symbol);
    }
}

}  // namespace

void checkWithoutDriver() {
    Plugin const built = configured();
    CHECK(built != nullptr);
    CHECK(workspaceOf(built.get(), kCase) > 0);
    CHECK(buildPart(built.get())->getNbTactics() > 0);
    auto const d = describe(kCase);
    CHECK(runtimePart(built.get())->onShapeChange(d.data(), kInputs, d.data() + kInputs, 1) == 0);
    Plugin const runtime(recreate(gCreator, built.get()));
    CHECK(attach(runtime.get()) == nullptr);
    CHECK(logged("no CUDA driver"));
}

void checkDriver(Fake const& fake) {
    testDevices(fake);
    testInjectedErrors(fake);
    testBuilderTiming(fake);
    testModuleImages();
}
