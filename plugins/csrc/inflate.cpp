#include "inflate.h"

#include <algorithm>
#include <array>
#include <stdexcept>

namespace moee {
namespace {

struct Corrupt : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Deflate packs bits from the least significant end of each byte.
class BitReader {
public:
    BitReader(unsigned char const* data, size_t bytes) : mData(data), mBytes(bytes) {}

    uint32_t bits(int count) {
        while (mHeld < count) {
            if (mNext == mBytes) {
                throw Corrupt("stream ends early");
            }
            mBuffer |= static_cast<uint64_t>(mData[mNext++]) << mHeld;
            mHeld += 8;
        }
        uint32_t const value = static_cast<uint32_t>(mBuffer & ((uint64_t{1} << count) - 1));
        mBuffer >>= count;
        mHeld -= count;
        return value;
    }

    void alignToByte() {
        mBuffer >>= mHeld % 8;
        mHeld -= mHeld % 8;
    }

private:
    unsigned char const* mData;
    size_t mBytes;
    size_t mNext{0};
    uint64_t mBuffer{0};
    int mHeld{0};
};

constexpr int kMaxLength = 15;

// Canonical Huffman code: how many codes each length has, and the symbols in code order.
class Huffman {
public:
    Huffman(uint8_t const* lengths, int symbols) : mSymbols(static_cast<size_t>(symbols)) {
        for (int s = 0; s < symbols; ++s) {
            ++mCounts[lengths[s]];
        }
        mCounts[0] = 0;
        std::array<int, kMaxLength + 2> first{};
        int space = 1;
        for (int length = 1; length <= kMaxLength; ++length) {
            space = 2 * space - mCounts[length];
            if (space < 0) {
                throw Corrupt("code lengths overflow");
            }
            first[length + 1] = first[length] + mCounts[length];
        }
        for (int s = 0; s < symbols; ++s) {
            if (lengths[s] != 0) {
                mSymbols[static_cast<size_t>(first[lengths[s]]++)] = static_cast<uint16_t>(s);
            }
        }
    }

    int decode(BitReader& reader) const {
        int code = 0;
        int start = 0;
        int index = 0;
        for (int length = 1; length <= kMaxLength; ++length) {
            code |= static_cast<int>(reader.bits(1));
            int const count = mCounts[length];
            if (code - count < start) {
                return mSymbols[static_cast<size_t>(index + code - start)];
            }
            index += count;
            start = (start + count) << 1;
            code <<= 1;
        }
        throw Corrupt("code not in the table");
    }

private:
    std::array<int, kMaxLength + 1> mCounts{};
    std::vector<uint16_t> mSymbols;
};

// RFC 1951, section 3.2.5: base and extra bits of match lengths (symbols 257..285) and distances (0..29).
constexpr std::array<uint16_t, 29> kLengthBase{3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59,
    67, 83, 99, 115, 131, 163, 195, 227, 258};
constexpr std::array<uint8_t, 29> kLengthExtra{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5,
    5, 5, 5, 0};
constexpr std::array<uint16_t, 30> kDistanceBase{1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385,
    513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
constexpr std::array<uint8_t, 30> kDistanceExtra{0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10,
    10, 11, 11, 12, 12, 13, 13};

void append(std::vector<unsigned char>& out, size_t limit, unsigned char byte) {
    if (out.size() == limit) {
        throw Corrupt("stream is longer than its table says");
    }
    out.push_back(byte);
}

void inflateStored(BitReader& reader, size_t limit, std::vector<unsigned char>& out) {
    reader.alignToByte();
    uint32_t const length = reader.bits(16);
    if ((length ^ 0xFFFFU) != reader.bits(16)) {
        throw Corrupt("stored block's length does not match its complement");
    }
    for (uint32_t i = 0; i < length; ++i) {
        append(out, limit, static_cast<unsigned char>(reader.bits(8)));
    }
}

void inflateCoded(BitReader& reader, Huffman const& literals, Huffman const& distances, size_t limit,
    std::vector<unsigned char>& out) {
    for (int symbol = literals.decode(reader); symbol != 256; symbol = literals.decode(reader)) {
        if (symbol < 256) {
            append(out, limit, static_cast<unsigned char>(symbol));
            continue;
        }
        auto const l = static_cast<size_t>(symbol - 257);
        if (l >= kLengthBase.size()) {
            throw Corrupt("match length not in the table");
        }
        size_t const length = kLengthBase[l] + reader.bits(kLengthExtra[l]);
        auto const d = static_cast<size_t>(distances.decode(reader));
        if (d >= kDistanceBase.size()) {
            throw Corrupt("match distance not in the table");
        }
        size_t const distance = kDistanceBase[d] + reader.bits(kDistanceExtra[d]);
        if (distance > out.size()) {
            throw Corrupt("match reaches before the start");
        }
        for (size_t i = 0; i < length; ++i) {
            append(out, limit, out[out.size() - distance]);
        }
    }
}

void inflateFixed(BitReader& reader, size_t limit, std::vector<unsigned char>& out) {
    std::array<uint8_t, 288> lengths{};
    std::fill(lengths.begin(), lengths.begin() + 144, uint8_t{8});
    std::fill(lengths.begin() + 144, lengths.begin() + 256, uint8_t{9});
    std::fill(lengths.begin() + 256, lengths.begin() + 280, uint8_t{7});
    std::fill(lengths.begin() + 280, lengths.end(), uint8_t{8});
    std::array<uint8_t, 30> distances{};
    distances.fill(5);
    inflateCoded(reader, Huffman(lengths.data(), 288), Huffman(distances.data(), 30), limit, out);
}

void inflateDynamic(BitReader& reader, size_t limit, std::vector<unsigned char>& out) {
    constexpr std::array<uint8_t, 19> kOrder{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    size_t const literalCount = reader.bits(5) + 257;
    size_t const distanceCount = reader.bits(5) + 1;
    size_t const codeCount = reader.bits(4) + 4;
    if (literalCount > 286 || distanceCount > 30) {
        throw Corrupt("too many codes");
    }
    std::array<uint8_t, 320> lengths{};
    for (size_t i = 0; i < codeCount; ++i) {
        lengths[kOrder[i]] = static_cast<uint8_t>(reader.bits(3));
    }
    Huffman const codes(lengths.data(), 19);
    lengths.fill(0);
    size_t const total = literalCount + distanceCount;
    for (size_t i = 0; i < total;) {
        int const symbol = codes.decode(reader);
        if (symbol < 16) {
            lengths[i++] = static_cast<uint8_t>(symbol);
            continue;
        }
        if (symbol == 16 && i == 0) {
            throw Corrupt("repeat with nothing before it");
        }
        uint8_t const value = symbol == 16 ? lengths[i - 1] : uint8_t{0};
        size_t const repeat = symbol == 16 ? 3 + reader.bits(2) : symbol == 17 ? 3 + reader.bits(3) : 11 + reader.bits(7);
        if (i + repeat > total) {
            throw Corrupt("repeat runs over the end of the table");
        }
        std::fill_n(lengths.begin() + static_cast<std::ptrdiff_t>(i), repeat, value);
        i += repeat;
    }
    Huffman const literals(lengths.data(), static_cast<int>(literalCount));
    Huffman const distances(lengths.data() + literalCount, static_cast<int>(distanceCount));
    inflateCoded(reader, literals, distances, limit, out);
}

}  // namespace

bool inflateRaw(unsigned char const* packed, size_t packedBytes, size_t bytes, std::vector<unsigned char>& out,
    std::string& why) {
    out.clear();
    out.reserve(bytes);
    try {
        BitReader reader(packed, packedBytes);
        bool last = false;
        while (!last) {
            last = reader.bits(1) != 0;
            switch (reader.bits(2)) {
            case 0: inflateStored(reader, bytes, out); break;
            case 1: inflateFixed(reader, bytes, out); break;
            case 2: inflateDynamic(reader, bytes, out); break;
            default: throw Corrupt("unknown block type");
            }
        }
        if (out.size() != bytes) {
            throw Corrupt("stream is shorter than its table says");
        }
        return true;
    } catch (Corrupt const& error) {
        why = error.what();
        return false;
    }
}

uint32_t adler32(unsigned char const* data, size_t bytes) {
    uint32_t a = 1;
    uint32_t b = 0;
    for (size_t i = 0; i < bytes; ++i) {
        a = (a + data[i]) % 65521U;
        b = (b + a) % 65521U;
    }
    return (b << 16U) | a;
}

}  // namespace moee
