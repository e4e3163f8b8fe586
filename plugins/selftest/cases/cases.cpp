#include "cases/cases.h"

#include "cases/numbers.h"
#include "device/errors.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace selftest {
namespace {

constexpr size_t kHeaderBytes = 64;
constexpr size_t kCaseBytes = 128;
constexpr size_t kNameBytes = 64;
constexpr size_t kAlignment = 16;
constexpr int64_t kMost = int64_t{1} << 31;  // elements of one tensor

uint32_t crc32(unsigned char const* data, size_t bytes) {
    static auto const table = [] {
        std::array<uint32_t, 256> made{};
        for (uint32_t i = 0; i < made.size(); ++i) {
            uint32_t value = i;
            for (int bit = 0; bit < 8; ++bit) {
                value = (value & 1U) != 0 ? 0xEDB88320U ^ (value >> 1) : value >> 1;
            }
            made[i] = value;
        }
        return made;
    }();
    uint32_t sum = ~0U;
    for (size_t i = 0; i < bytes; ++i) {
        sum = table[(sum ^ data[i]) & 0xFFU] ^ (sum >> 8);
    }
    return ~sum;
}

std::vector<unsigned char> readFile(std::string const& path) {
    std::unique_ptr<FILE, int (*)(FILE*)> const file(std::fopen(path.c_str(), "rb"), &std::fclose);
    if (file == nullptr) {
        throw Stop(kBadInput, "cases " + path + " cannot be read; give the bundle's cases.bin with --cases");
    }
    std::vector<unsigned char> content;
    std::array<unsigned char, 65536> part{};
    for (size_t got = 0; (got = std::fread(part.data(), 1, part.size(), file.get())) > 0;) {
        content.insert(content.end(), part.begin(), part.begin() + static_cast<std::ptrdiff_t>(got));
    }
    return content;
}

class Reader {
public:
    explicit Reader(std::string path) : mPath(std::move(path)), mContent(readFile(mPath)) {}

    std::vector<Case> read() {
        if (mContent.size() < kHeaderBytes || std::memcmp(mContent.data(), "MOEECASE", 8) != 0) {
            refuse("is no file of cases");
        }
        mAt = 8;
        auto const format = number<uint32_t>();
        auto const plugin = number<uint32_t>();
        auto const count = number<uint32_t>();
        auto const sum = number<uint32_t>();
        auto const bytes = number<uint64_t>();
        if (format != kCasesFormat || plugin != static_cast<uint32_t>(std::atoi(moee::kPluginVersion))) {
            refuse("holds format " + std::to_string(format) + " for plugin version " + std::to_string(plugin)
                + "; this program reads format " + std::to_string(kCasesFormat) + " for version " + moee::kPluginVersion);
        }
        if (bytes != mContent.size()) {
            refuse("has " + std::to_string(mContent.size()) + " bytes, and should have " + std::to_string(bytes));
        }
        if (sum != crc32(mContent.data() + kHeaderBytes, mContent.size() - kHeaderBytes)) {
            refuse("was changed: its checksum is another one");
        }
        mAt = kHeaderBytes;
        std::vector<Case> cases;
        for (uint32_t i = 0; i < count; ++i) {
            cases.push_back(readCase());
        }
        if (cases.empty() || mAt != mContent.size()) {
            refuse("holds no cases, or more than it says");
        }
        return cases;
    }

private:
    [[noreturn]] void refuse(std::string const& why) const {
        throw Stop(kBadInput, "cases " + mPath + ": " + why + "; copy the bundle again, or write it again with moee bundle");
    }

    unsigned char const* take(int64_t count, size_t item) {
        if (count < 0 || count > kMost || static_cast<size_t>(count) * item > mContent.size() - mAt) {
            refuse("was cut short");
        }
        unsigned char const* const at = mContent.data() + mAt;
        mAt += static_cast<size_t>(count) * item;
        return at;
    }

    template <typename T>
    T number() {
        T value{};
        std::memcpy(&value, take(1, sizeof(T)), sizeof(T));
        return value;
    }

    void align() { mAt = std::min((mAt + kAlignment - 1) / kAlignment * kAlignment, mContent.size()); }

    template <typename T>
    std::vector<T> values(int64_t count) {
        align();
        unsigned char const* const at = take(count, sizeof(T));
        std::vector<T> out(static_cast<size_t>(count));
        std::memcpy(out.data(), at, out.size() * sizeof(T));
        return out;
    }

    // Values as they are kept in the file: float32, float16 or bfloat16.
    std::vector<float> numbers(int64_t count, moee::Type kept) {
        if (kept == moee::Type::kFloat32) {
            return values<float>(count);
        }
        auto const bits = values<uint16_t>(count);
        std::vector<float> out(bits.size());
        std::transform(bits.begin(), bits.end(), out.begin(), kept == moee::Type::kFloat16 ? fromHalf : fromBfloat);
        return out;
    }

    Case readCase() {
        align();
        size_t const start = mAt;
        Case c;
        auto const* const name = reinterpret_cast<char const*>(take(static_cast<int64_t>(kNameBytes), 1));
        c.name.assign(name, strnlen(name, kNameBytes));
        moee::Sizes& s = c.sizes;
        s.tokens = number<int32_t>();
        s.dim = number<int32_t>();
        s.experts = number<int32_t>();
        s.unionSize = number<int32_t>();
        c.neuronCount = number<int32_t>();
        s.maxWidth = number<int32_t>();
        s.topK = number<int32_t>();
        s.activation = number<int32_t>();
        auto const kept = number<uint32_t>();
        c.types = number<uint32_t>();
        c.timed = number<uint32_t>();
        c.perImage = number<int32_t>();
        c.denseWidth = number<int32_t>();
        c.isLayer = number<uint32_t>() != 0;
        if (s.tokens < 1 || s.dim < 1 || s.dim % moee::kDimMultiple != 0 || s.experts < 1 || s.unionSize < 1 || c.neuronCount < 1
            || s.maxWidth < 1 || s.maxWidth > s.unionSize || s.topK < 1 || s.topK > s.experts || s.activation < 0
            || s.activation >= static_cast<int32_t>(moee::kActivations.size()) || kept > 2 || c.types == 0 || c.types > 7
            || c.perImage < 1 || c.denseWidth < 1) {
            refuse("holds a case whose sizes are impossible");
        }
        mAt = start + kCaseBytes;
        auto const type = static_cast<moee::Type>(kept);
        int64_t const matrix = int64_t{s.unionSize} * s.dim;
        c.x = numbers(s.tokens * s.dim, type);
        c.router = numbers(int64_t{s.experts} * s.dim, type);
        c.routerBias = values<float>(s.experts);
        c.wUp = numbers(matrix, type);
        c.bUp = numbers(s.unionSize, type);
        c.wDown = numbers(matrix, type);
        c.bOut = numbers(int64_t{s.experts} * s.dim, type);
        c.neurons = values<int32_t>(c.neuronCount);
        c.offsets = values<int32_t>(s.experts + 1);
        c.routes = values<int32_t>(s.tokens * s.topK);
        c.y = values<double>(s.tokens * s.dim);
        c.scale = values<double>(s.tokens);
        align();
        checkIndices(c);
        return c;
    }

    void checkIndices(Case const& c) const {
        int32_t widest = 0;
        for (size_t e = 0; e + 1 < c.offsets.size(); ++e) {
            widest = std::max(widest, c.offsets[e + 1] - c.offsets[e]);
            if (c.offsets[e + 1] < c.offsets[e]) {
                refuse("holds offsets that fall");
            }
        }
        auto const outside = [](std::vector<int32_t> const& indices, int32_t end) {
            return std::any_of(indices.begin(), indices.end(), [end](int32_t i) { return i < 0 || i >= end; });
        };
        if (c.offsets.front() != 0 || c.offsets.back() != c.neuronCount || widest != c.sizes.maxWidth
            || outside(c.neurons, c.sizes.unionSize) || outside(c.routes, c.sizes.experts)
            || std::any_of(c.scale.begin(), c.scale.end(), [](double v) { return !(v >= 0) || std::isinf(v); })) {
            refuse("holds neurons, routes or scales that are impossible");
        }
    }

    std::string mPath;
    std::vector<unsigned char> mContent;
    size_t mAt{0};
};

}  // namespace

double unitOf(moee::Type type) {
    return std::ldexp(1.0, type == moee::Type::kFloat32 ? -20 : type == moee::Type::kFloat16 ? -11 : -8);
}

std::vector<Case> readCases(std::string const& path) { return Reader(path).read(); }

}  // namespace selftest
