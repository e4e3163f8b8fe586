// Which tactics of the embedded table a layer can use, and which kernels run them on a device.
#pragma once

#include "operator/operator.h"
#include "operator/workspace.h"

#include <vector>

namespace moee {

// Kernels that can run `role`/`variant` on `sm`, best first: the SM's own cubin, a cubin that the architecture promises
// to run, PTX for the driver's compiler. With `sm` 0, any build. With `code`, the PTX of that SM alone.
std::vector<Kernel const*> candidates(char const* role, char const* variant, Type type, int32_t sm, int32_t code = 0);

// Tactics for this layer whose kernels all exist for `sm` and `code` (0: for any). `tokens` 0 means that T is not known.
std::vector<Tactic const*> validTactics(Type type, int32_t dim, int32_t topK, int64_t tokens, int32_t sm, int32_t code = 0);

Tactic const* findTactic(int32_t id);

// Follows from the roles among its launches.
Kind kindOf(Tactic const& tactic);

// The most tokens that the tactic is given where a profile goes up to `tokens`: above its limit the default takes over.
int64_t mostTokens(Tactic const& tactic, int64_t tokens);

// False for a step that this layer does without: `combine` adds up the experts of a token.
bool isNeeded(Launch const& launch, int32_t topK);

// Choice for tactic 0, when nothing was timed: the first that groups tokens where there is one group and few experts, else the
// largest token tile that the average expert fills. Null if none takes so many tokens.
Tactic const* defaultTactic(std::vector<Tactic const*> const& from, Sizes const& sizes);

// "80, 86, 87" of one type: for messages.
std::string builtSms(Type type);

}  // namespace moee
