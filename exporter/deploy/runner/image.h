// 8-bit RGB images: reading PPM files, resizing as Pillow does, cropping.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace moee {

struct Image {
    int width{0};
    int height{0};
    std::vector<uint8_t> rgb;  // row by row, three bytes a pixel
};

struct Sides {
    int height{0};
    int width{0};
};

enum class Filter { kBilinear, kBicubic };

// A binary PPM (P6) or PGM (P5, grey to RGB) file with 8 bits a channel. Throws std::runtime_error for anything else.
Image readPpm(std::string const& path);

// Antialiased resize: the filter's support grows with the reduction, weights are fixed-point, rows before columns, each
// pass rounded to 8 bits. The results are Pillow's, bit for bit, hence torchvision's and timm's on images. One exception:
// from Pillow 13 on, an image that is squashed in height takes the passes in the other order, and may differ by one in 255.
Image resize(Image const& image, Sides to, Filter filter);

// The middle of the image. Throws std::runtime_error if the image is smaller.
Image centreCrop(Image const& image, Sides size);

}  // namespace moee
