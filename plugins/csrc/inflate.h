// Decompression of raw deflate streams (RFC 1951), so that the plugin needs no zlib on the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace moee {

// Inflates `packed` into exactly `bytes` bytes. On corrupt input returns false and says why; never reads or writes
// out of bounds.
bool inflateRaw(unsigned char const* packed, size_t packedBytes, size_t bytes, std::vector<unsigned char>& out,
    std::string& why);

// Checksum of RFC 1950.
uint32_t adler32(unsigned char const* data, size_t bytes);

}  // namespace moee
