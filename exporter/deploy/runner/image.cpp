#include "image.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <stdexcept>

namespace moee {
namespace {

constexpr int kWeightBits = 22;           // 32 less 8 of a pixel and 2 of head room, as Pillow has it
constexpr int64_t kMaxPixels = 1LL << 28;  // a header that promises more is damaged

// One number of a PPM header; comments run from # to the end of the line.
int headerNumber(std::istream& in, std::string const& path) {
    for (int c = in.peek(); c == '#' || c == ' ' || c == '\t' || c == '\r' || c == '\n'; c = in.peek()) {
        if (c == '#') {
            std::string comment;
            std::getline(in, comment);
        } else {
            in.get();
        }
    }
    int value = 0;
    if (!(in >> value) || value <= 0) {
        throw std::runtime_error(path + ": damaged PPM header");
    }
    return value;
}

double bilinear(double x) { return std::max(0.0, 1.0 - std::abs(x)); }

// Keys' cubic with a = -0.5.
double bicubic(double x) {
    x = std::abs(x);
    if (x < 1.0) {
        return (1.5 * x - 2.5) * x * x + 1.0;
    }
    return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 : 0.0;
}

// The source pixels that one output position reads, and their weights.
struct Window {
    int first;
    std::vector<int32_t> weights;
};

std::vector<Window> windows(int from, int to, Filter filter) {
    double const scale = static_cast<double>(from) / to;
    double const stretch = std::max(scale, 1.0);
    double const support = (filter == Filter::kBicubic ? 2.0 : 1.0) * stretch;
    std::vector<Window> result;
    result.reserve(static_cast<size_t>(to));
    for (int i = 0; i < to; ++i) {
        double const centre = (i + 0.5) * scale;
        int const first = std::max(0, static_cast<int>(centre - support + 0.5));
        int const last = std::min(from, static_cast<int>(centre + support + 0.5));
        std::vector<double> exact;
        double sum = 0.0;
        for (int x = first; x < last; ++x) {
            double const position = (x - centre + 0.5) * (1.0 / stretch);
            exact.push_back(filter == Filter::kBicubic ? bicubic(position) : bilinear(position));
            sum += exact.back();
        }
        Window window{first, {}};
        for (double weight : exact) {
            double const scaled = (sum != 0.0 ? weight / sum : weight) * (1 << kWeightBits);
            window.weights.push_back(static_cast<int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5));
        }
        result.push_back(std::move(window));
    }
    return result;
}

// Resizes lines of `from` pixels to `to`. `step` is the distance of neighbours on a line, in pixels.
void pass(uint8_t const* in, uint8_t* out, std::vector<Window> const& wins, int lines, size_t inLine, size_t inStep,
    size_t outLine, size_t outStep) {
    for (int line = 0; line < lines; ++line) {
        for (size_t i = 0; i < wins.size(); ++i) {
            uint8_t* const pixel = out + 3 * (static_cast<size_t>(line) * outLine + i * outStep);
            for (size_t channel = 0; channel < 3; ++channel) {
                int32_t sum = 1 << (kWeightBits - 1);
                uint8_t const* source
                    = in + 3 * (static_cast<size_t>(line) * inLine + static_cast<size_t>(wins[i].first) * inStep) + channel;
                for (int32_t weight : wins[i].weights) {
                    sum += *source * weight;
                    source += 3 * inStep;
                }
                pixel[channel] = static_cast<uint8_t>(std::clamp(sum >> kWeightBits, 0, 255));
            }
        }
    }
}

}  // namespace

Image readPpm(std::string const& path) {
    std::ifstream in(path, std::ios::binary);
    char magic[2] = {};
    in.read(magic, 2);
    if (!in || magic[0] != 'P' || (magic[1] != '5' && magic[1] != '6')) {
        throw std::runtime_error(path + ": expected a binary PPM (P6) or PGM (P5) file; `mogrify -format ppm *.jpg` writes them");
    }
    Image image;
    image.width = headerNumber(in, path);
    image.height = headerNumber(in, path);
    if (headerNumber(in, path) != 255) {
        throw std::runtime_error(path + ": expected 8 bits a channel; `mogrify -depth 8 -format ppm` writes them");
    }
    in.get();  // the one blank before the pixels
    int64_t const pixels = static_cast<int64_t>(image.width) * image.height;
    if (pixels > kMaxPixels) {
        throw std::runtime_error(path + ": header promises " + std::to_string(pixels) + " pixels");
    }
    size_t const channels = magic[1] == '6' ? 3 : 1;
    std::vector<uint8_t> bytes(static_cast<size_t>(pixels) * channels);
    in.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    if (in.gcount() != static_cast<std::streamsize>(bytes.size())) {
        throw std::runtime_error(path + ": cut short");
    }
    if (channels == 3) {
        image.rgb = std::move(bytes);
    } else {
        for (uint8_t grey : bytes) {
            image.rgb.insert(image.rgb.end(), 3, grey);
        }
    }
    return image;
}

Image resize(Image const& image, Sides to, Filter filter) {
    auto const [height, width] = to;
    if (width <= 0 || height <= 0) {
        throw std::runtime_error("an image cannot be resized to no pixels");
    }
    Image result = image;
    if (width != image.width) {
        result = Image{width, image.height, std::vector<uint8_t>(3 * static_cast<size_t>(width) * image.height)};
        pass(image.rgb.data(), result.rgb.data(), windows(image.width, width, filter), image.height, image.width, 1, width, 1);
    }
    if (height != image.height) {
        Image const wide = std::move(result);
        result = Image{width, height, std::vector<uint8_t>(3 * static_cast<size_t>(width) * height)};
        auto const step = static_cast<size_t>(width);
        pass(wide.rgb.data(), result.rgb.data(), windows(image.height, height, filter), width, 1, step, 1, step);
    }
    return result;
}

Image centreCrop(Image const& image, Sides size) {
    if (image.width < size.width || image.height < size.height) {
        throw std::runtime_error("the image is smaller than the crop");
    }
    // to the even neighbour, as Python's round
    auto const left = static_cast<size_t>(std::nearbyint((image.width - size.width) / 2.0));
    auto const top = static_cast<size_t>(std::nearbyint((image.height - size.height) / 2.0));
    Image result{size.width, size.height, {}};
    for (size_t y = top; y < top + static_cast<size_t>(size.height); ++y) {
        auto const row = image.rgb.begin() + static_cast<std::ptrdiff_t>(3 * (y * static_cast<size_t>(image.width) + left));
        result.rgb.insert(result.rgb.end(), row, row + 3 * static_cast<std::ptrdiff_t>(size.width));
    }
    return result;
}

}  // namespace moee
