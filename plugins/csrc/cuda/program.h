// Kernels loaded on one device: made when a plugin is attached to a context, read-only afterwards.
#pragma once

#include "cuda/driver.h"
#include "operator/operator.h"
#include "operator/tactics.h"

#include <memory>
#include <string>
#include <vector>

namespace moee {

class Module;

struct Step {
    Kernel const* kernel;
    CuFunction function;
};

// One tactic, ready to launch.
struct Program {
    Tactic const* tactic;
    Kind kind;
    std::vector<Step> steps;
};

class Programs {
public:
    // Loads every tactic that fits the layer on the current CUDA device. `sizes.tokens` is not read. With
    // `calibrated`, routes by `attributes.load` instead of by score. Null with a reason on failure.
    static std::shared_ptr<Programs const> load(
        Sizes const& sizes, Attributes const& attributes, bool calibrated, std::string& why);

    Programs(Programs const&) = delete;
    Programs& operator=(Programs const&) = delete;
    ~Programs();

    Program const* find(int32_t tactic) const;
    Program const* choose(int32_t tactic, Sizes const& sizes) const;  // falls back to the default tactic
    CudaDriver const& driver() const { return *mDriver; }
    CuDevicePtr loadCdf() const { return mLoadCdf; }

private:
    Programs() = default;
    bool build(Sizes const& sizes, Attributes const& attributes, bool calibrated, std::string& why);
    bool addTactic(Tactic const& tactic, Sizes const& sizes, bool calibrated, std::string& why);
    bool loadStep(char const* role, char const* variant, Type type, Step& step, std::string& why);
    bool uploadLoad(std::vector<int32_t> const& load, std::string& why);

    CudaDriver const* mDriver{nullptr};
    CuContext mContext{nullptr};
    int32_t mSm{0};
    int32_t mCode{0};  // as in Attributes
    CuDevicePtr mLoadCdf{0};
    std::vector<Program> mPrograms;
    std::vector<std::shared_ptr<Module>> mModules;
};

// SM of the current CUDA device as 10 * major + minor; 0 with a reason if there is none.
int32_t currentSm(std::string& why);

}  // namespace moee
