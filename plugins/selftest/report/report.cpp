#include "report/report.h"

#include "device/errors.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <fstream>

namespace selftest {
namespace {

std::string quoted(std::string const& text) {
    std::string out = "\"";
    for (char const c : text) {
        auto const byte = static_cast<unsigned char>(c);
        if (c == '"' || c == '\\') {
            out += std::string("\\") + c;
        } else if (byte < 0x20 || byte > 0x7e) {
            std::array<char, 8> escaped{};
            std::snprintf(escaped.data(), escaped.size(), "\\u%04x", byte);
            out += escaped.data();
        } else {
            out += c;
        }
    }
    return out + "\"";
}

// JSON has no infinity and no NaN: null.
std::string number(double value) {
    std::array<char, 32> text{};
    std::snprintf(text.data(), text.size(), "%.6g", value);
    return std::isfinite(value) ? text.data() : "null";
}

template <typename Values, typename Text>
std::string list(Values const& values, Text const& text) {
    std::string out;
    for (auto const& value : values) {
        out += (out.empty() ? "" : ", ") + text(value);
    }
    return "[" + out + "]";
}

std::string times(Times const& t) { return "\"p50_us\": " + number(t.p50Us) + ", \"p95_us\": " + number(t.p95Us); }

std::string optional(std::optional<int> const& value, double per = 1) { return value ? number(*value / per) : "null"; }

std::string where(std::string const& name, moee::Type type) {
    return "\"case\": " + quoted(name) + ", \"type\": " + quoted(moee::typeName(type));
}

std::string timingJson(Timing const& t, bool emulated) {
    auto const tactic = [](auto const& each) {
        return "{\"name\": " + quoted(tacticName(each.first)) + ", " + times(each.second) + "}";
    };
    Sensors const& s = t.sensors;
    return "\n    {" + where(t.name, t.type) + ", \"batch\": " + std::to_string(t.batch) + ", \"tokens\": "
        + std::to_string(t.tokens) + ", \"emulated\": " + (emulated ? "true" : "false") + ", \"buffer_sets\": "
        + std::to_string(t.rounds.sets) + ", \"samples\": " + std::to_string(t.rounds.samples) + ", \"winner\": "
        + quoted(tacticName(t.routed.all[t.routed.best].first)) + ", \"tactics\": " + list(t.routed.all, tactic)
        + ", \"dense\": {\"by\": " + quoted(t.dense.by) + ", \"note\": " + quoted(t.dense.note) + ", " + times(t.dense.times)
        + "}, \"ratio\": " + number(t.ratio()) + ", \"mac_share\": " + number(t.macShare) + ", \"ideal_share\": "
        + number(t.idealShare()) + ", \"sm_mhz\": " + optional(s.smMhz) + ", \"memory_mhz\": " + optional(s.memoryMhz)
        + ", \"power_w\": " + optional(s.powerMilliwatts, 1000) + ", \"temperature_c\": " + optional(s.celsius) + "}";
}

[[gnu::format(printf, 2, 3)]] void print(std::string& out, char const* format, ...) {
    std::array<char, 512> line{};
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(line.data(), line.size(), format, arguments);
    va_end(arguments);
    out += line.data();
}

}  // namespace

std::string Report::label() const {
    std::string what;
    if (options.multiprocessors != 0) {
        what += std::to_string(device.multiprocessors) + " of " + std::to_string(device.allMultiprocessors) + " multiprocessors";
    }
    if (options.code != 0) {
        what += (what.empty() ? "" : ", ") + std::string("code of sm_") + std::to_string(options.code);
    }
    return what.empty() ? "native" : "emulated: " + what;
}

std::string Report::json() const {
    std::string checks;
    for (size_t i = 0; i < kChecks; ++i) {
        auto const check = static_cast<Check>(i);
        if (results.wanted(check)) {
            checks += std::string(checks.empty() ? "" : ",") + "\n    {\"name\": " + quoted(checkName(check)) + ", \"meaning\": "
                + quoted(checkMeaning(check)) + ", \"passed\": " + (results.passed(check) ? "true" : "false")
                + ", \"comparisons\": " + std::to_string(results.count(check)) + ", \"failed\": "
                + std::to_string(results.failed(check)) + ", \"failures\": " + list(results.failures(check), quoted) + "}";
        }
    }
    auto const accuracy = [](Accuracy const& a) {
        return "\n    {" + where(a.where.name, a.where.type) + ", \"tactic\": " + quoted(a.where.tactic) + ", \"error\": "
            + number(a.error) + ", \"bound\": " + number(a.bound) + "}";
    };
    auto const workspace = [](WorkspaceBytes const& w) {
        return "\n    {" + where(w.name, w.type) + ", \"bytes\": " + std::to_string(w.bytes) + "}";
    };
    auto const caseText = [](Case const& c) {
        return "\n    {\"name\": " + quoted(c.name) + ", \"layer\": " + (c.isLayer ? "true" : "false") + ", \"tokens\": "
            + std::to_string(c.sizes.tokens) + ", \"dim\": " + std::to_string(c.sizes.dim) + ", \"experts\": "
            + std::to_string(c.sizes.experts) + ", \"top_k\": " + std::to_string(c.sizes.topK) + ", \"union\": "
            + std::to_string(c.sizes.unionSize) + ", \"max_width\": " + std::to_string(c.sizes.maxWidth) + ", \"dense_width\": "
            + std::to_string(c.denseWidth) + "}";
    };
    bool const emulated = options.emulated();
    return "{\n  \"schema\": \"moee.selftest/1\",\n  \"passed\": " + std::string(results.passed() ? "true" : "false")
        + ",\n  \"native\": " + (emulated ? "false" : "true") + ",\n  \"label\": " + quoted(label())
        + ",\n  \"emulated\": {\"multiprocessors\": " + (options.multiprocessors != 0 ? std::to_string(device.multiprocessors) : "null")
        + ", \"code\": " + (options.code != 0 ? std::to_string(options.code) : "null") + "},\n  \"device\": {\"name\": "
        + quoted(device.name) + ", \"sm\": " + std::to_string(device.sm) + ", \"multiprocessors\": "
        + std::to_string(device.allMultiprocessors) + ", \"driver_cuda\": " + std::to_string(device.driver) + ", \"memory_bytes\": "
        + std::to_string(device.memoryBytes) + ", \"l2_bytes\": " + std::to_string(device.l2Bytes) + "},\n  \"kernels\": "
        + quoted(kernels) + ",\n  \"compiled_ptx\": " + list(ptx, quoted) + ",\n  \"types_without_kernels\": " + list(missing, quoted)
        + ",\n  \"cases\": " + list(cases, caseText) + ",\n  \"checks\": [" + checks + "],\n  \"accuracy\": "
        + list(results.accuracies(), accuracy) + ",\n  \"workspaces\": " + list(results.workspaces(), workspace) + ",\n  \"timing\": "
        + list(timings, [emulated](Timing const& t) { return timingJson(t, emulated); }) + ",\n  \"not_timed\": "
        + (notTimed.empty() ? "null" : quoted(notTimed)) + ",\n  \"seconds\": " + number(seconds) + "\n}\n";
}

std::string Report::table() const {
    std::string out;
    print(out, "\n%s, sm_%d, %s\n\n%-10s %8s  %s\n", device.name.c_str(), device.sm, label().c_str(), "check", "compared", "result");
    for (size_t i = 0; i < kChecks; ++i) {
        auto const check = static_cast<Check>(i);
        if (!results.wanted(check)) {
            continue;
        }
        print(out, "%-10s %8lld  ", checkName(check), static_cast<long long>(results.count(check)));
        if (results.passed(check)) {
            print(out, "right: %s\n", checkMeaning(check));
        } else if (results.count(check) == 0) {
            out += "NOT CHECKED\n";
        } else {
            out += "WRONG in " + std::to_string(results.failed(check)) + ": " + results.failures(check).front() + "\n";
        }
    }
    for (std::string const& type : missing) {
        print(out, "%s was not checked: the plugin has no kernels of that type for sm_%d\n", type.c_str(), device.sm);
    }
    if (!ptx.empty()) {
        print(out, "%zu kernels are PTX that the driver compiled\n", ptx.size());
    }
    if (!notTimed.empty()) {
        print(out, "not timed: %s\n", notTimed.c_str());
    }
    for (Timing const& t : timings) {
        if (&t == timings.data()) {
            print(out, "\n%s; microseconds a call, p50 (p95), dense by %s\n", label().c_str(), t.dense.by.c_str());
            print(out, "%-24s %-9s %5s  %-10s %16s %16s %7s %7s\n", "layer", "type", "batch", "tactic", "routed", "dense", "faster",
                "ideal");
        }
        print(out, "%-24s %-9s %5d  %-10s %7.1f (%6.1f) %7.1f (%6.1f) %6.2fx %5.0f %%\n", t.name.c_str(), moee::typeName(t.type),
            t.batch, tacticName(t.routed.all[t.routed.best].first), t.best().p50Us, t.best().p95Us, t.dense.times.p50Us,
            t.dense.times.p95Us, t.ratio(), 100 * t.idealShare());
        if (!t.dense.note.empty() && (&t == timings.data() || t.dense.note != (&t)[-1].dense.note)) {
            out += "  dense: " + t.dense.note + "\n";
        }
    }
    return out;
}

static std::string temporaryFor(std::string const& path) { return path + "." + std::to_string(getpid()) + ".new"; }

[[noreturn]] static void refuse(std::string const& path) {
    std::remove(temporaryFor(path).c_str());
    throw Stop(kBadInput, "results cannot be written to " + path + "; give another place with --out");
}

void requireWritable(std::string const& path) {
    if (!std::ofstream(temporaryFor(path)) || std::ifstream(path + "/.").good()) {
        refuse(path);
    }
    std::remove(temporaryFor(path).c_str());
}

void writeFile(std::string const& path, std::string const& text) {
    std::ofstream file(temporaryFor(path), std::ios::binary);
    file << text;
    file.close();
    if (!file || std::rename(temporaryFor(path).c_str(), path.c_str()) != 0) {
        refuse(path);
    }
}

}  // namespace selftest
