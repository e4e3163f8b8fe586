// From an image to the network's input, as timm's evaluation transform does it.
#pragma once

#include "image.h"

#include <array>
#include <string>

namespace moee {

// What `preprocess.txt` of the bundle says: one `key value...` a line.
struct Recipe {
    Sides size;          // of the network's input
    Sides resize;        // what the image covers, or is squashed to, before the crop
    bool squash{false};  // both sides become `resize`, whatever the image's shape
    Filter filter{Filter::kBicubic};
    std::array<float, 3> mean{};
    std::array<float, 3> deviation{};

    size_t elements() const { return 3 * static_cast<size_t>(size.height) * static_cast<size_t>(size.width); }
};

// Throws std::runtime_error if the file lacks a key, or holds one that it should not.
Recipe readRecipe(std::string const& path);

// Resize, centre crop, scale to 0..1, normalise. Writes [3, height, width] to `out`. Throws
// std::runtime_error for an image so long and narrow that it would fill the memory.
void prepare(Image const& image, Recipe const& recipe, float* out);

}  // namespace moee
