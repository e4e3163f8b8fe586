// The kernels that route a group of tokens by themselves, on the host: program by program, tile by tile.
#include "fake_device.h"
#include "fake_kernels.h"

#include "cases/numbers.h"

#include <algorithm>
#include <cstring>

using moee::Arg;

namespace {

constexpr int64_t kGroupTokens = 128;  // GROUP of plugins/kernels/group.py

struct Tile {
    int64_t expert;
    std::vector<int64_t> tokens;
};

// The tiles of tokens [begin, end): each expert's tokens in order, `rows` a tile.
std::vector<Tile> tilesOf(std::vector<int32_t> const& routes, int64_t begin, int64_t end, int64_t experts, int64_t rows) {
    std::vector<Tile> tiles;
    for (int64_t e = 0; e < experts; ++e) {
        int64_t rank = 0;
        for (int64_t t = begin; t < end; ++t) {
            if (routes[static_cast<size_t>(t)] != e) {
                continue;
            }
            if (rank++ % rows == 0) {
                tiles.push_back({e, {}});
            }
            if (!(FAULT("off_by_one") && rank % 4 == 0)) {
                tiles.back().tokens.push_back(t);
            }
        }
    }
    return tiles;
}

}  // namespace

std::vector<int32_t> Call::groupRoutes() const {
    std::vector<int32_t> routes;
    bool const isDown = std::strcmp(mKernel->role, "group_down") == 0;
    for (int64_t t = 0; t < number(Arg::kTokens); ++t) {
        routes.push_back(isDown ? at<int32_t>(Arg::kRoutes)[t] : number(Arg::kByLoad) == 1 ? chooseByLoad(t)[0] : choose(t)[0]);
        if (!isDown && !FAULT("stale_routes")) {
            at<int32_t>(Arg::kRoutes)[t] = routes.back();
        }
    }
    return routes;
}

// Calls visit(expert, token) for the rows of every tile that the grid's programs reach.
template <typename Visit>
void Call::eachRow(Visit const& visit) const {
    bool const isFused = std::strcmp(mKernel->role, "group_fused") == 0;
    int64_t const tokens = number(Arg::kTokens);
    int64_t const rows = isFused ? mKernel->m : std::atoi(mKernel->variant + 1);
    int64_t const programs = mGrid[0];
    int64_t const groups = (tokens + kGroupTokens - 1) / kGroupTokens;
    int64_t const size = isFused ? (tokens + groups - 1) / groups : kGroupTokens;
    int64_t const share = kGroupTokens / mKernel->m;
    auto const routes = groupRoutes();
    for (int64_t x = 0; x < programs - (FAULT("last_group") ? 1 : 0); ++x) {
        int64_t const group = isFused ? x % groups : x / share;
        int64_t const part = isFused ? x / groups : x % share;
        int64_t const parts = isFused ? (programs - group + groups - 1) / groups : std::min(share, programs - group * share);
        auto const tiles
            = tilesOf(routes, group * size, std::min(tokens, group * size + size), number(Arg::kExperts), rows);
        for (auto tile = static_cast<size_t>(part); tile < tiles.size(); tile += static_cast<size_t>(parts)) {
            size_t const from = FAULT("wrong_tile") ? (tile + 1) % tiles.size() : tile;
            for (int64_t const token : tiles[tile].tokens) {
                visit(tiles[from].expert, token);
            }
        }
    }
}

void Call::groupUp() const {
    auto const* const offsets = at<int32_t>(Arg::kOffsets);
    eachRow([&](int64_t e, int64_t token) {
        int64_t const width = offsets[e + 1] - offsets[e];
        auto const hidden = hiddenRow(e, token, offsets[e], width);
        for (int64_t n = 0; n < std::min((width + 15) / 16 * 16, columns()); ++n) {
            put(Arg::kHidden, token * ((number(Arg::kMaxWidth) + 15) / 16 * 16) + n, n < width ? hidden[static_cast<size_t>(n)] : 0);
        }
    });
}

void Call::groupDown() const {
    eachRow([&](int64_t e, int64_t token) { downRow(e, token); });
}

void Call::groupFused() const {
    eachRow([&](int64_t e, int64_t token) { fusedRow(e, token, token); });
}
