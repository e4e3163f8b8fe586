// Lives of a layer as engines lead them: contexts side by side, other shapes, loading again and again.
#include "checks/checks.h"

#include "device/errors.h"

#include <algorithm>

namespace selftest {
namespace {

constexpr int kRounds = 4;                  // calls a stream that run side by side
constexpr int kAttempts = 3;
constexpr size_t kGrowth = size_t{1} << 20;  // bytes that may be missing after all rounds: less than one module's memory

bool sameRows(Subject const& s, std::vector<unsigned char> const& a, std::vector<unsigned char> const& b, int64_t tokens) {
    auto const bytes = static_cast<std::ptrdiff_t>(s.rowBytes() * static_cast<size_t>(tokens));
    return std::equal(a.begin(), a.begin() + bytes, b.begin());
}

}  // namespace

// Two execution contexts of one engine: one with all tokens, one with half of them.
void checkStreams(Subject const& s, int32_t tactic, Results& results) {
    Where const where{s.c.name, s.type, tacticName(tactic)};
    int64_t const tokens[2] = {s.c.sizes.tokens, (s.c.sizes.tokens + 1) / 2};
    Plugin const attached[2] = {s.layer.attach(), s.layer.attach()};
    Place const places[2] = {{s.device, s.layer, s.c, s.type}, {s.device, s.layer, s.c, s.type}};
    Stream const other(s.device);
    Stream const* const streams[2] = {&s.stream, &other};
    std::vector<unsigned char> alone[2];
    for (size_t i = 0; i < 2; ++i) {
        s.layer.setTactic(*attached[i], tactic);
        s.layer.setTokens(*attached[i], tokens[i]);
        alone[i] = s.run(*attached[i], tokens[i], places[i], kPoison).y;
    }
    for (Place const& place : places) {
        place.poison(kOtherPoison);
    }
    for (int round = 0; round < kRounds; ++round) {
        for (size_t i = 0; i < 2; ++i) {
            s.enqueue(*attached[i], tokens[i], places[i], *streams[i]);
        }
    }
    s.device.synchronize();
    for (size_t i = 0; i < 2; ++i) {
        results.note(Check::kStreams, where, sameRows(s, places[i].download().y, alone[i], tokens[i]),
            "with " + std::to_string(tokens[i]) + " tokens on stream " + std::to_string(i + 1) + " the bits differ from a run alone");
    }
}

// One context, as a profile of 1 to T tokens allows.
void checkShapes(Subject const& s, int32_t tactic, Results& results) {
    int64_t const all = s.c.sizes.tokens;
    Plugin const attached = s.layer.attach();
    Place const place(s.device, s.layer, s.c, s.type);
    s.layer.setTactic(*attached, tactic);
    std::vector<unsigned char> first;
    for (int64_t const tokens : {all, (all + 1) / 2, int64_t{1}, all}) {
        Where const where{s.c.name, s.type, std::string(tacticName(tactic)) + ", " + std::to_string(tokens) + " tokens"};
        s.layer.setTokens(*attached, tokens);
        Output const output = s.run(*attached, tokens, place, kPoison);
        compare(s.c, output.y, tokens, where, results, Check::kShapes);
        results.note(Check::kShapes, where, output.yDamage == 0 && output.workspaceDamage == 0, "wrote around output or workspace");
        auto const rest = output.y.begin() + static_cast<std::ptrdiff_t>(s.rowBytes() * static_cast<size_t>(tokens));
        results.note(Check::kShapes, where,
            std::all_of(rest, output.y.end(), [](unsigned char byte) { return byte == kPoison; }), "wrote rows behind the last token");
        if (first.empty()) {
            first = output.y;
        }
    }
    results.note(Check::kShapes, {s.c.name, s.type, tacticName(tactic)}, sameRows(s, place.download().y, first, all),
        "the first number of tokens gives other bits the second time");
}

void checkMemory(Device const& device, Library const& library, Case const& c, moee::Type type, int32_t code, int rounds,
    Results& results) {
    auto const live = [&] {
        Subject const s(device, library, c, type, code);
        Plugin const attached = s.layer.attach();
        Place const place(device, s.layer, c, type);
        s.layer.setTokens(*attached, c.sizes.tokens);
        s.run(*attached, c.sizes.tokens, place, kPoison);
    };
    live();  // what the driver keeps for good
    live();
    // Other programs take memory too, on a Jetson the whole system does: a leak shows every time.
    size_t gone = kGrowth;
    for (int attempt = 0; attempt < kAttempts && gone >= kGrowth; ++attempt) {
        size_t const before = device.freeBytes();
        for (int round = 0; round < rounds; ++round) {
            live();
        }
        gone = before - std::min(before, device.freeBytes());
    }
    results.note(Check::kMemory, {c.name, type, "default"}, gone < kGrowth,
        std::to_string(gone) + " bytes are gone after " + std::to_string(rounds) + " rounds, as after those before");
}

void checkAll(Device const& device, Library const& library, std::vector<Case> const& cases, Plan const& plan, Results& results,
    std::function<void(std::string const&)> const& progress) {
    uint32_t lived = 0;  // types whose memory was looked at
    for (Case const& c : cases) {
        progress(c.name);
        for (auto const type : {moee::Type::kFloat32, moee::Type::kFloat16, moee::Type::kBfloat16}) {
            uint32_t const bit = 1U << static_cast<unsigned>(type);
            if (!c.has(type) || (plan.types & bit) == 0) {
                continue;
            }
            Where where{c.name, type, "all tactics"};
            try {
                Subject const s(device, library, c, type, plan.code);
                Plugin const attached = s.layer.attach();
                results.note(WorkspaceBytes{c.name, type, s.layer.workspaceBytes()});
                for (int32_t const tactic : s.layer.tactics()) {
                    where.tactic = tacticName(tactic);
                    checkTactic(s, *attached, tactic, results);
                    checkStreams(s, tactic, results);
                    checkShapes(s, tactic, results);
                }
                int const changed = s.inputs.changed();
                results.note(Check::kInputs, {c.name, type, "all tactics"}, changed < 0, "input " + std::to_string(changed) + " was changed");
                if ((lived & bit) == 0) {
                    lived |= bit;
                    where.tactic = "default";
                    checkMemory(device, library, c, type, plan.code, plan.memoryRounds, results);
                }
                results.note(Check::kCalls, where, true, "");
            } catch (CudaError const& error) {
                results.note(Check::kCalls, where, false, error.what());
            } catch (PluginError const& error) {
                results.note(Check::kCalls, where, false, error.what());
            }
        }
    }
}

}  // namespace selftest
