// selftest: the plugin's kernels on this machine's GPU, against float64 answers and against the dense FFN.
#include "checks/checks.h"
#include "device/errors.h"
#include "operator/tactics.h"
#include "report/report.h"

#include <algorithm>
#include <chrono>
#include <new>
#include <cstdio>
#include <cstring>

namespace selftest {
namespace {

constexpr int kMemoryRounds = 20;
constexpr int kQuickMemoryRounds = 5;
constexpr moee::Type kTypes[] = {moee::Type::kFloat32, moee::Type::kFloat16, moee::Type::kBfloat16};

// Bits of the types that the plugin's tables have kernels of for this device; with `code`, its PTX.
uint32_t typesWithKernels(int sm, int code) {
    uint32_t types = 0;
    for (moee::Type const type : kTypes) {
        types |= moee::validTactics(type, moee::kDimMultiple, 1, 0, sm, code).empty() ? 0U : 1U << static_cast<unsigned>(type);
    }
    if (types == 0 && code != 0) {
        throw Stop(kBadInput, "--code " + std::to_string(code) + ": the plugin holds no PTX of sm_" + std::to_string(code)
                + " that runs on sm_" + std::to_string(sm) + "; build it with --sm " + std::to_string(code) + "," + std::to_string(sm));
    }
    if (types == 0) {
        throw Stop(kNoEnvironment, "the plugin has no kernels for this GPU, sm_" + std::to_string(sm) + "; it was built for "
                + moee::builtSms(moee::Type::kFloat16) + "; make the bundle with --sm " + std::to_string(sm));
    }
    return types;
}

// The program knows tactics and workspaces from its own tables: they must be the plugin's.
void requireSameKernels(Library const& library, Case const& c, uint32_t types, int code) {
    for (moee::Type const type : kTypes) {
        if (c.has(type) && (types >> static_cast<unsigned>(type) & 1U) != 0) {
            std::string const hash = Layer(library, c, type, c.sizes.tokens, code).kernelsHash();
            if (hash != moee::tables().sourceHash) {
                throw Stop(kBadInput, "the plugin was built with other kernels (" + hash.substr(0, 12) + ") than this program ("
                        + std::string(moee::tables().sourceHash).substr(0, 12) + "); build both from one bundle");
            }
            return;
        }
    }
}

int run(Options const& options) {
    auto const start = std::chrono::steady_clock::now();
    auto const progress = [](char const* what) {
        return [what](std::string const& name) {
            std::printf("%s %s\n", what, name.c_str());
            std::fflush(stdout);
        };
    };
    std::vector<Case> const cases = readCases(options.cases);
    Library const library(options.plugin);
    requireWritable(options.out);
    Device const device(options.multiprocessors);
    int const sm = device.facts().sm;
    uint32_t const types = typesWithKernels(sm, options.code);
    requireSameKernels(library, cases.front(), types, options.code);
    bool const timed = !options.checkOnly
        && std::any_of(cases.begin(), cases.end(), [types](Case const& c) { return (c.timed & types) != 0; });
    Results results(timed);
    checkAll(device, library, cases, {types, options.code, options.quick ? kQuickMemoryRounds : kMemoryRounds}, results,
        progress("checking"));
    std::string notTimed;
    std::vector<Timing> timings;
    if (!timed) {
        notTimed = options.checkOnly ? "--check-only" : "the cases hold no layer to time in a type with kernels";
    } else if (results.failed()) {
        notTimed = "a check failed, and nothing is timed that is wrong";
    } else {
        timings = timeAll(device, library, cases, {options.batches, options.quick, options.code, types}, results, progress("timing"));
    }
    std::vector<std::string> missing;
    for (moee::Type const type : kTypes) {
        if ((types >> static_cast<unsigned>(type) & 1U) == 0) {
            missing.emplace_back(moee::typeName(type));
        }
    }
    std::chrono::duration<double> const seconds = std::chrono::steady_clock::now() - start;
    Report const report{options, device.facts(), moee::tables().sourceHash, library.compiledPtx(), missing, cases, results, timings,
        notTimed, seconds.count()};
    writeFile(options.out, report.json());
    std::printf("%s\n%s; %s\n", report.table().c_str(), results.passed() ? "passed" : "FAILED", options.out.c_str());
    return results.passed() ? kRight : kWrong;
}

}  // namespace
}  // namespace selftest

int main(int argc, char** argv) {
    using namespace selftest;
    try {
        Options const options = readOptions(argc, argv);
        if (options.help) {
            std::printf("%s", kUsage);
            return kRight;
        }
        return run(options);
    } catch (Stop const& stop) {
        std::fprintf(stderr, "selftest: %s\n", stop.what());
        return stop.code;
    } catch (std::bad_alloc const&) {
        std::fprintf(stderr, "selftest: too little memory on this machine; end other programs\n");
        return kNoEnvironment;
    } catch (std::exception const& error) {
        std::fprintf(stderr, "selftest: %s\n", error.what());
        return kNoEnvironment;
    }
}
