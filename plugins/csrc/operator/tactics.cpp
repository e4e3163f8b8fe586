#include "operator/tactics.h"

#include <algorithm>
#include <cstring>
#include <set>

namespace moee {
namespace {

constexpr int64_t kGroupTokens = 128;   // GROUP of plugins/kernels/group.py
constexpr int32_t kScoredExperts = 16;  // SCORED there

bool isTegra(int32_t sm) { return sm == 72 || sm == 87 || sm == 101 || sm == 110; }

// CUDA promises that a cubin runs on later minor versions of its major version, on desktop parts alone. From sm_90 on
// the kernels use features of one architecture (90a, 100a, 120a), which do not carry over.
bool runsOn(Kernel const& kernel, int32_t sm) {
    if (sm == 0 || (!kernel.isPtx && kernel.sm == sm)) {
        return true;
    }
    if (kernel.isPtx) {
        return kernel.sm == sm || (kernel.sm < sm && kernel.sm < 90);
    }
    return sm < 90 && kernel.sm / 10 == sm / 10 && kernel.sm < sm && !isTegra(kernel.sm) && !isTegra(sm);
}

bool hasRole(Tactic const& tactic, char const* role) {
    return std::any_of(tactic.launches, tactic.launches + tactic.launchCount,
        [role](Launch const& launch) { return std::strcmp(launch.role, role) == 0; });
}

// Token tile of the tactic's widest GEMM stage.
int32_t tokenTile(Tactic const& tactic, Type type) {
    for (int32_t i = 0; i < tactic.launchCount; ++i) {
        Launch const& launch = tactic.launches[i];
        if (std::strcmp(launch.role, "expert_up") == 0 || std::strcmp(launch.role, "fused") == 0) {
            auto const kernels = candidates(launch.role, launch.variant, type, 0);
            return kernels.empty() ? 0 : kernels.front()->m;
        }
    }
    return 0;
}

}  // namespace

std::vector<Kernel const*> candidates(char const* role, char const* variant, Type type, int32_t sm, int32_t code) {
    std::vector<Kernel const*> found;
    Tables const& t = tables();
    for (int32_t i = 0; i < t.kernelCount; ++i) {
        Kernel const& kernel = t.kernels[i];
        if (kernel.type == type && std::strcmp(kernel.role, role) == 0 && std::strcmp(kernel.variant, variant) == 0
            && runsOn(kernel, sm) && (code == 0 || (kernel.isPtx && kernel.sm == code))) {
            found.push_back(&kernel);
        }
    }
    std::stable_sort(found.begin(), found.end(), [](Kernel const* a, Kernel const* b) {
        return a->isPtx != b->isPtx ? b->isPtx : a->sm > b->sm;
    });
    return found;
}

std::vector<Tactic const*> validTactics(Type type, int32_t dim, int32_t topK, int64_t tokens, int32_t sm, int32_t code) {
    std::vector<Tactic const*> found;
    Tables const& t = tables();
    for (int32_t i = 0; i < t.tacticCount; ++i) {
        Tactic const& tactic = t.tactics[i];
        bool const fits = (!tactic.onlyTopOne || topK == 1) && (tactic.maxDim == 0 || dim <= tactic.maxDim)
            && (tactic.maxTokens == 0 || tokens <= tactic.maxTokens);
        if (fits && std::all_of(tactic.launches, tactic.launches + tactic.launchCount, [&](Launch const& launch) {
                return !isNeeded(launch, topK) || !candidates(launch.role, launch.variant, type, sm, code).empty();
            })) {
            found.push_back(&tactic);
        }
    }
    return found;
}

Tactic const* findTactic(int32_t id) {
    Tables const& t = tables();
    auto const* const end = t.tactics + t.tacticCount;
    auto const* const found = std::find_if(t.tactics, end, [id](Tactic const& tactic) { return tactic.id == id; });
    return found != end ? found : nullptr;
}

Kind kindOf(Tactic const& tactic) {
    return hasRole(tactic, "masked_up") ? Kind::kMasked
        : hasRole(tactic, "fused")      ? Kind::kFused
        : hasRole(tactic, "group_up")   ? Kind::kGroup
        : hasRole(tactic, "group_fused") ? Kind::kGroupFused
                                         : Kind::kTile;
}

int64_t mostTokens(Tactic const& tactic, int64_t tokens) {
    return tactic.maxTokens != 0 ? std::min<int64_t>(tokens, tactic.maxTokens) : tokens;
}

bool isNeeded(Launch const& launch, int32_t topK) { return topK > 1 || std::strcmp(launch.role, "combine") != 0; }

Tactic const* defaultTactic(std::vector<Tactic const*> const& from, Sizes const& sizes) {
    auto const group
        = std::find_if(from.begin(), from.end(), [](Tactic const* tactic) { return kindOf(*tactic) == Kind::kGroup; });
    if (group != from.end() && sizes.tokens <= kGroupTokens && sizes.experts <= kScoredExperts) {
        return *group;
    }
    int64_t const average = sizes.tokens * sizes.topK / sizes.experts;
    Tactic const* best = nullptr;
    int32_t bestTile = 0;
    for (Tactic const* tactic : from) {
        int32_t const tile = tokenTile(*tactic, sizes.type);
        if (tile == 0 || (tactic->maxTokens != 0 && sizes.tokens > tactic->maxTokens)) {
            continue;
        }
        bool const better = tile <= average ? bestTile > average || tile > bestTile : bestTile > average && tile < bestTile;
        if (best == nullptr || better) {
            best = tactic;
            bestTile = tile;
        }
    }
    if (best != nullptr) {
        return best;
    }
    // Masked ones alone: the workspace holds no more tokens than their limit.
    auto const within = std::find_if(from.begin(), from.end(),
        [&sizes](Tactic const* tactic) { return mostTokens(*tactic, sizes.tokens) == sizes.tokens; });
    return within != from.end() ? *within : nullptr;
}

std::string builtSms(Type type) {
    std::set<int32_t> sms;
    Tables const& t = tables();
    for (int32_t i = 0; i < t.kernelCount; ++i) {
        if (t.kernels[i].type == type && !t.kernels[i].isPtx) {
            sms.insert(t.kernels[i].sm);
        }
    }
    std::string text;
    for (int32_t const sm : sms) {
        text += (text.empty() ? "" : ", ") + std::to_string(sm);
    }
    return text.empty() ? "none" : text;
}

}  // namespace moee
