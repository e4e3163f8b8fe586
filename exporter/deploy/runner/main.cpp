// moee_run: runs an engine on a folder of images or on raw tensors; prints each top-1 class, and the latency.
#include "engine.h"
#include "preprocess.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <numeric>
#include <stdexcept>

namespace {

using namespace moee;

char const kUsage[] = R"(usage: moee_run --engine FILE (--images FOLDER | --raw FILE) [options]
  --engine FILE      engine that build.sh wrote
  --plugin FILE      libmoee_plugin.so; engines/dense.plan needs none
  --images FOLDER    *.ppm and *.pgm files (mogrify -format ppm *.jpg), pre-processed as --recipe says
  --raw FILE         float32 tensors [N, 3, H, W], pre-processed already
  --recipe FILE      preprocess.txt of the bundle (models/preprocess.txt)
  --head FILE        linear classifier of the bundle, for models that end in features (models/head.bin)
  --labels FILE      one class name a line (models/labels.txt, where it fits)
  --output KIND      classes, or features of a model without a classifier, whose length is shown (classes)
  --batch N          images a run (the engine's largest, at most the images given)
  --runs N           timed runs (100)
  --warm-up N        runs before (10)
  --device N         GPU (0)
  --out FILE         write the outputs as float32
  --tensorrt FILE    libnvinfer to use (the installed one)
)";

struct Input {
    std::vector<std::string> names;
    std::vector<float> values;
};

// `classes` rows of `features` weights and a bias each, behind a header of two int32.
struct Head {
    int32_t classes{0};
    int32_t features{0};
    std::vector<float> weights;
    std::vector<float> bias;
};

std::vector<float> readFloats(std::ifstream& in, size_t count, std::string const& path) {
    std::vector<float> values(count);
    in.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(count * sizeof(float)));
    if (in.gcount() != static_cast<std::streamsize>(count * sizeof(float))) {
        throw std::runtime_error(path + ": cut short");
    }
    return values;
}

Head readHead(std::string const& path, size_t features) {
    std::ifstream in(path, std::ios::binary);
    Head head;
    in.read(reinterpret_cast<char*>(&head.classes), sizeof(int32_t));
    in.read(reinterpret_cast<char*>(&head.features), sizeof(int32_t));
    if (!in || head.classes <= 0 || head.classes > (1 << 20) || static_cast<size_t>(head.features) != features) {
        throw std::runtime_error(path + ": not a classifier of this engine's " + std::to_string(features) + " features");
    }
    head.weights = readFloats(in, static_cast<size_t>(head.classes) * features, path);
    head.bias = readFloats(in, static_cast<size_t>(head.classes), path);
    return head;
}

Input readImages(std::string const& folder, std::string const& recipePath, size_t elements) {
    Recipe const recipe = readRecipe(recipePath);
    if (recipe.elements() != elements) {
        throw std::runtime_error(recipePath + ": size " + std::to_string(recipe.size.height) + " " + std::to_string(recipe.size.width)
            + " does not fit the engine's input");
    }
    Input input;
    std::vector<std::filesystem::path> files;
    for (auto const& entry : std::filesystem::directory_iterator(folder)) {
        std::string const kind = entry.path().extension().string();
        if (kind == ".ppm" || kind == ".pgm") {
            files.push_back(entry.path());
        }
    }
    std::sort(files.begin(), files.end());
    if (files.empty()) {
        throw std::runtime_error(folder + ": no *.ppm or *.pgm files; `mogrify -format ppm *.jpg` writes them");
    }
    for (auto const& file : files) {
        input.names.push_back(file.filename().string());
        input.values.resize(input.values.size() + elements);
        Image const image = readPpm(file.string());
        try {
            prepare(image, recipe, input.values.data() + input.values.size() - elements);
        } catch (std::runtime_error const& error) {
            throw std::runtime_error(file.string() + ": " + error.what());
        }
    }
    return input;
}

Input readRaw(std::string const& path, size_t elements) {
    std::ifstream in(path, std::ios::binary | std::ios::ate);
    if (!in) {
        throw std::runtime_error(path + ": cannot be read");
    }
    auto const bytes = static_cast<size_t>(in.tellg());
    if (bytes == 0 || bytes % (elements * sizeof(float)) != 0) {
        throw std::runtime_error(path + ": expected a multiple of " + std::to_string(elements) + " float32 values");
    }
    in.seekg(0);
    Input input;
    input.values = readFloats(in, bytes / sizeof(float), path);
    for (size_t i = 0; i < input.values.size() / elements; ++i) {
        input.names.push_back("tensor " + std::to_string(i));
    }
    return input;
}

// The scores of one image: the engine's output, or the classifier on top of it.
std::vector<float> scores(float const* output, size_t count, Head const* head) {
    if (head == nullptr) {
        return {output, output + count};
    }
    std::vector<float> result = head->bias;
    for (size_t c = 0; c < result.size(); ++c) {
        for (size_t i = 0; i < count; ++i) {
            result[c] += head->weights[c * count + i] * output[i];
        }
    }
    return result;
}

// Linear between neighbours, as NumPy does.
double percentile(std::vector<double> sorted, double share) {
    double const position = share * static_cast<double>(sorted.size() - 1);
    auto const below = static_cast<size_t>(position);
    size_t const above = std::min(below + 1, sorted.size() - 1);
    return sorted[below] + (position - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

class Options {
public:
    Options(int count, char** words) {
        static char const* const known[] = {"engine", "plugin", "images", "raw", "recipe", "head", "labels", "batch", "runs",
            "warm-up", "device", "out", "output", "tensorrt"};
        for (int i = 1; i < count; i += 2) {
            std::string const flag = std::strncmp(words[i], "--", 2) == 0 ? words[i] + 2 : "";
            if (std::find(std::begin(known), std::end(known), flag) == std::end(known) || i + 1 >= count) {
                throw std::runtime_error(std::string(words[i]) + ": unknown, or without a value\n" + kUsage);
            }
            mValues[flag] = words[i + 1];
        }
    }
    std::string text(char const* name, std::string const& otherwise = "") const {
        auto const found = mValues.find(name);
        return found == mValues.end() ? otherwise : found->second;
    }
    int number(char const* name, int otherwise, int least) const {
        std::string const value = text(name);
        char* end = nullptr;
        long const result = value.empty() ? otherwise : std::strtol(value.c_str(), &end, 10);
        if ((end != nullptr && *end != '\0') || result < least || result > 1'000'000) {
            throw std::runtime_error(std::string("--") + name + " " + value + ": expected a number of at least " + std::to_string(least));
        }
        return static_cast<int>(result);
    }

private:
    std::map<std::string, std::string> mValues;
};

// The names of `classes` classes: of the file that was asked for, which must fit, or of the bundle's, if it does.
std::vector<std::string> readLabels(std::string const& asked, size_t classes) {
    std::string const path = asked.empty() ? "models/labels.txt" : asked;
    std::vector<std::string> labels;
    std::ifstream in(path);
    if (!in && !asked.empty()) {
        throw std::runtime_error(path + ": cannot be read");
    }
    for (std::string line; std::getline(in, line);) {
        labels.push_back(line);
    }
    if (!asked.empty() && labels.size() != classes) {
        throw std::runtime_error(path + ": names " + std::to_string(labels.size()) + " classes of " + std::to_string(classes));
    }
    return labels.size() == classes ? labels : std::vector<std::string>{};
}

// Runs over all images; returns [N, outputElements].
std::vector<float> runAll(Engine& engine, Input const& input, int batch, int warmUp, int runs, std::vector<double>& times) {
    size_t const elements = engine.inputElements();
    std::vector<float> outputs;
    size_t const total = input.names.size();
    for (size_t start = 0; start < total; start += static_cast<size_t>(batch)) {
        // the last batch is filled up with its first image, so that every run has the same size
        size_t const real = std::min<size_t>(static_cast<size_t>(batch), total - start);
        std::vector<float> images(input.values.begin() + static_cast<std::ptrdiff_t>(start * elements),
            input.values.begin() + static_cast<std::ptrdiff_t>((start + real) * elements));
        for (size_t i = real; i < static_cast<size_t>(batch); ++i) {
            std::vector<float> const first(images.begin(), images.begin() + static_cast<std::ptrdiff_t>(elements));
            images.insert(images.end(), first.begin(), first.end());
        }
        engine.setInput(images, batch);
        if (start == 0) {
            for (int i = 0; i < warmUp; ++i) {
                engine.run();
            }
            for (int i = 0; i < runs; ++i) {
                times.push_back(engine.run());
            }
        } else {
            engine.run();
        }
        std::vector<float> const values = engine.output();
        outputs.insert(outputs.end(), values.begin(), values.begin() + static_cast<std::ptrdiff_t>(real * engine.outputElements()));
    }
    return outputs;
}

int run(Options const& options) {
    std::string const path = options.text("engine");
    std::string const folder = options.text("images");
    std::string const raw = options.text("raw");
    if (path.empty() || folder.empty() == raw.empty()) {
        throw std::runtime_error(kUsage);
    }
    std::string const kind = options.text("output", "classes");
    if (kind != "classes" && kind != "features") {
        throw std::runtime_error("--output " + kind + ": expected classes or features");
    }
    Device device(options.number("device", 0, 0));
    Engine engine(path, options.text("plugin"), options.text("tensorrt"), device);
    Input const input = folder.empty() ? readRaw(raw, engine.inputElements())
                                       : readImages(folder, options.text("recipe", "models/preprocess.txt"), engine.inputElements());
    int const most = static_cast<int>(std::min<size_t>(input.names.size(), static_cast<size_t>(engine.maxBatch())));
    int const batch = options.number("batch", std::max(most, engine.minBatch()), 1);
    Head head;
    std::string const headPath = options.text("head");
    if (!headPath.empty()) {
        head = readHead(headPath, engine.outputElements());
    }
    size_t const classes = headPath.empty() ? engine.outputElements() : static_cast<size_t>(head.classes);
    std::vector<std::string> const labels = readLabels(options.text("labels"), classes);
    std::vector<double> times;
    std::vector<float> const outputs = runAll(engine, input, batch, options.number("warm-up", 10, 0), options.number("runs", 100, 1), times);

    for (size_t i = 0; i < input.names.size(); ++i) {
        auto const result
            = scores(outputs.data() + i * engine.outputElements(), engine.outputElements(), headPath.empty() ? nullptr : &head);
        if (kind == "features") {
            double const squares = std::inner_product(result.begin(), result.end(), result.begin(), 0.0);
            std::printf("%s: %zu features, length %.4f\n", input.names[i].c_str(), result.size(), std::sqrt(squares));
            continue;
        }
        auto const best = static_cast<size_t>(std::max_element(result.begin(), result.end()) - result.begin());
        std::string const label = best < labels.size() ? labels[best] : "class " + std::to_string(best);
        std::printf("%s: %s (%.4f)\n", input.names[i].c_str(), label.c_str(), static_cast<double>(result[best]));
    }
    std::sort(times.begin(), times.end());
    std::printf("latency on %s, batch %d: p50 %.3f ms, p95 %.3f ms over %zu runs (copies not included), %.1f images/s\n",
        device.name().c_str(), batch, percentile(times, 0.50), percentile(times, 0.95), times.size(), 1e3 * batch / percentile(times, 0.50));
    std::string const out = options.text("out");
    if (!out.empty()) {
        std::ofstream file(out, std::ios::binary);
        file.write(reinterpret_cast<char const*>(outputs.data()), static_cast<std::streamsize>(outputs.size() * sizeof(float)));
        if (!file.flush()) {
            throw std::runtime_error(out + ": cannot be written");
        }
    }
    return 0;
}

}  // namespace

int main(int count, char** words) {
    try {
        return run(Options(count, words));
    } catch (std::exception const& error) {
        std::fprintf(stderr, "moee_run: %s\n", error.what());
        return 2;
    }
}
