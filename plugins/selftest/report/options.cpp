#include "report/options.h"

#include "device/errors.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>

namespace selftest {
namespace {

constexpr int kMostBatch = 1024;
constexpr size_t kMostBatches = 8;

int wholeNumber(std::string const& text, std::string const& flag, int least, int most) {
    char* end = nullptr;
    long const value = std::strtol(text.c_str(), &end, 10);
    if (text.empty() || *end != '\0' || value < least || value > most) {
        throw Stop(kBadInput, flag + " takes a whole number from " + std::to_string(least) + " to " + std::to_string(most)
                + "; came '" + text.substr(0, 40) + "'");
    }
    return static_cast<int>(value);
}

std::vector<int> numbers(std::string const& text, std::string const& flag) {
    std::vector<int> found;
    for (size_t at = 0; at <= text.size();) {
        size_t const end = std::min(text.find(',', at), text.size());
        found.push_back(wholeNumber(text.substr(at, end - at), flag, 1, kMostBatch));
        at = end + 1;
    }
    if (found.size() > kMostBatches) {
        throw Stop(kBadInput, flag + " takes at most " + std::to_string(kMostBatches) + " numbers");
    }
    return found;
}

// The first of these that is there; the first of all if none is, so that messages name it.
std::string firstThere(std::vector<std::string> const& paths) {
    auto const found = std::find_if(paths.begin(), paths.end(), [](std::string const& path) { return std::ifstream(path).good(); });
    return found != paths.end() ? *found : paths.front();
}

}  // namespace

char const* const kUsage =
    "selftest: are the kernels right on this GPU, and how fast is the routed FFN beside the dense one?\n"
    "  --plugin FILE    libmoee_plugin.so (default: the one of the bundle that this program lies in)\n"
    "  --cases FILE     cases.bin (default: the bundle's)\n"
    "  --out FILE       results as JSON (selftest.json)\n"
    "  --check-only     times nothing\n"
    "  --quick          fewer rounds; times one layer in one type\n"
    "  --batch LIST     images a batch that are timed, separated by commas (1,8,32; with --quick 8)\n"
    "  --sms N          emulates a smaller GPU: everything runs on N multiprocessors (driver of CUDA 12.4 or newer)\n"
    "  --code SM        emulates another GPU's code: its PTX through the driver's compiler, such as 87\n"
    "Exit codes: 0 right, 1 a check failed, 2 bad input, 3 no driver, GPU, kernels or memory.\n";

Options readOptions(int argc, char** argv) {
    Options options;
    bool batchesGiven = false;
    for (int i = 1; i < argc; ++i) {
        std::string const flag = argv[i];
        auto const value = [&] {
            if (i + 1 >= argc) {
                throw Stop(kBadInput, flag + " needs a value; selftest --help lists the options");
            }
            return std::string(argv[++i]);
        };
        if (flag == "--plugin") {
            options.plugin = value();
        } else if (flag == "--cases") {
            options.cases = value();
        } else if (flag == "--out") {
            options.out = value();
        } else if (flag == "--batch") {
            options.batches = numbers(value(), flag);
            batchesGiven = true;
        } else if (flag == "--sms") {
            options.multiprocessors = wholeNumber(value(), flag, 1, 4096);
        } else if (flag == "--code") {
            options.code = wholeNumber(value(), flag, 50, 999);
        } else if (flag == "--quick") {
            options.quick = true;
        } else if (flag == "--check-only") {
            options.checkOnly = true;
        } else if (flag == "--help" || flag == "-h") {
            options.help = true;
        } else {
            throw Stop(kBadInput, "unknown option '" + flag.substr(0, 40) + "'; selftest --help lists the options");
        }
    }
    if (options.quick && !batchesGiven) {
        options.batches = {8};
    }
    // In a bundle the program is selftest/build/selftest, beside plugin/ or in the plugin's own folder.
    std::string const program = argv[0];
    size_t const slash = program.rfind('/');
    std::string const here = slash == std::string::npos ? "." : program.substr(0, slash);
    if (options.plugin.empty()) {
        options.plugin = firstThere({here + "/../../plugin/build/libmoee_plugin.so", here + "/../../build/libmoee_plugin.so"});
    }
    if (options.cases.empty()) {
        options.cases = here + "/../cases.bin";
    }
    return options;
}

}  // namespace selftest
