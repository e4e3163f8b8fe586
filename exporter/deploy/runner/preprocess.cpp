#include "preprocess.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>
#include <sstream>
#include <stdexcept>

namespace moee {
namespace {

std::string word(std::istringstream& line, std::string const& where) {
    std::string value;
    if (!(line >> value)) {
        throw std::runtime_error(where + ": a value is missing");
    }
    return value;
}

template <typename Number>
Number positive(std::istringstream& line, std::string const& where) {
    Number value{};
    if (!(line >> value) || !(value > 0)) {
        throw std::runtime_error(where + ": expected a number above 0");
    }
    return value;
}

// Throws for an image so long and narrow that covering `rows` x `columns` pixels would fill the memory; the bounds are those of
// the Python side (moee/data/image_set.py).
void refuseOblong(Image const& image, double rows, double columns) {
    constexpr double kMaxResizedPixels = 1 << 26;
    constexpr double kMaxRatio = 16.0;
    double const scale = std::max(rows / image.height, columns / image.width);
    double const pixels = static_cast<double>(image.width) * image.height * scale * scale;
    if (pixels > std::max(kMaxResizedPixels, kMaxRatio * rows * columns)) {
        throw std::runtime_error("its " + std::to_string(image.width) + " x " + std::to_string(image.height)
            + " pixels would be resized to " + std::to_string(static_cast<int64_t>(pixels / 1e6)) + " million");
    }
}

Sides sides(std::istringstream& line, std::string const& where) {
    int const height = positive<int>(line, where);
    return {height, positive<int>(line, where)};
}

// What an image becomes before the crop. A square is covered by torchvision's rule, which rounds the longer side down; a
// rectangle by timm's, which rounds both to the nearest.
Sides resized(Image const& image, Recipe const& recipe) {
    auto const [height, width] = recipe.resize;
    if (recipe.squash) {
        return recipe.resize;
    }
    if (height != width) {
        double const ratio = std::min(static_cast<double>(image.height) / height, static_cast<double>(image.width) / width);
        return {static_cast<int>(std::nearbyint(image.height / ratio)), static_cast<int>(std::nearbyint(image.width / ratio))};
    }
    if (image.width > image.height) {
        return {height, static_cast<int>(static_cast<int64_t>(width) * image.width / image.height)};
    }
    return {static_cast<int>(static_cast<int64_t>(height) * image.height / image.width), width};
}

}  // namespace

Recipe readRecipe(std::string const& path) {
    std::ifstream in(path);
    if (!in) {
        throw std::runtime_error(path + ": cannot be read");
    }
    Recipe recipe;
    std::set<std::string> missing{"size", "resize", "crop", "filter", "mean", "std"};
    std::string text;
    while (std::getline(in, text)) {
        std::istringstream line(text);
        std::string key;
        if (!(line >> key) || key[0] == '#') {
            continue;
        }
        std::string const where = path + ": " + key;
        if (missing.erase(key) == 0) {
            throw std::runtime_error(where + ": unknown or repeated");
        }
        if (key == "size") {
            recipe.size = sides(line, where);
        } else if (key == "resize") {
            recipe.resize = sides(line, where);
        } else if (key == "crop") {
            std::string const mode = word(line, where);
            if (mode != "center" && mode != "squash") {
                throw std::runtime_error(where + ": expected center or squash");
            }
            recipe.squash = mode == "squash";
        } else if (key == "filter") {
            std::string const name = word(line, where);
            if (name != "bicubic" && name != "bilinear") {
                throw std::runtime_error(where + ": expected bicubic or bilinear");
            }
            recipe.filter = name == "bicubic" ? Filter::kBicubic : Filter::kBilinear;
        } else {
            for (float& value : key == "mean" ? recipe.mean : recipe.deviation) {
                if (!(line >> value) || (key == "std" && !(value > 0))) {
                    throw std::runtime_error(where + ": expected three numbers");
                }
            }
        }
    }
    if (!missing.empty()) {
        throw std::runtime_error(path + ": " + *missing.begin() + " is missing");
    }
    if (recipe.resize.height < recipe.size.height || recipe.resize.width < recipe.size.width) {
        throw std::runtime_error(path + ": resize is below size, so the crop would not fit");
    }
    return recipe;
}

void prepare(Image const& image, Recipe const& recipe, float* out) {
    if (!recipe.squash) {
        refuseOblong(image, recipe.resize.height, recipe.resize.width);
    }
    Image const crop = centreCrop(resize(image, resized(image, recipe), recipe.filter), recipe.size);
    size_t const pixels = recipe.elements() / 3;
    for (size_t channel = 0; channel < 3; ++channel) {
        for (size_t i = 0; i < pixels; ++i) {
            float const value = static_cast<float>(crop.rgb[3 * i + channel]) / 255.0F;
            out[channel * pixels + i] = (value - recipe.mean[channel]) / recipe.deviation[channel];
        }
    }
}

}  // namespace moee
