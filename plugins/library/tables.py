"""The text of `tables.cpp` and `modules.cpp`: names of the kernel manifest to C++ of csrc/operator/tables.h."""

from __future__ import annotations

from collections.abc import Iterable

from plugins.aot.manifest import Argument, Kernel, TacticEntry

# Names of the manifest and the enumerators of csrc/operator/tables.h.
TYPES = {"float32": "kFloat32", "float16": "kFloat16", "bfloat16": "kBfloat16"}
AXES = {
    "one": "kOne",
    "token_tiles": "kTokenTiles",
    "slot_tiles": "kSlotTiles",
    "expert_tiles": "kExpertTiles",
    "width_tiles": "kWidthTiles",
    "union_tiles": "kUnionTiles",
    "dim_tiles": "kDimTiles",
}
POINTERS = {
    "x": "kX",
    "router": "kRouter",
    "router_bias": "kRouterBias",
    "w_up": "kWUp",
    "b_up": "kBUp",
    "w_down": "kWDown",
    "b_out": "kBOut",
    "neurons": "kNeurons",
    "offsets": "kOffsets",
    "y": "kY",
    "counts": "kCounts",
    "member": "kMember",
    "buckets": "kBuckets",
    "routes": "kRoutes",
    "hidden": "kHidden",
    "partial": "kPartial",
    "load_cdf": "kLoadCdf",
}
SCALARS = {
    "tokens": "kTokens",
    "dim": "kDim",
    "experts": "kExperts",
    "union_size": "kUnionSize",
    "max_width": "kMaxWidth",
    "top_k": "kTopK",
    "activation": "kActivation",
    "by_load": "kByLoad",
}


def argument_name(argument: Argument) -> str:
    """Enumerator of `csrc/operator/tables.h` for one argument."""
    if argument.type == "scratch_ptr":
        return "Arg::kScratch"
    return "Arg::" + (POINTERS if argument.type == "ptr" else SCALARS)[argument.name]


def kernel_row(kernel: Kernel, is_ptx: bool, module: int, arguments: dict[tuple[str, ...], str]) -> str:
    """Line of the kernel table. `arguments` names each distinct argument list, and gets this one's if it is new."""
    args = tuple(argument_name(argument) for argument in kernel.args)
    name = arguments.setdefault(args, f"kArgs{len(arguments)}")
    grid = ", ".join("Axis::" + AXES[axis] for axis in kernel.grid)
    block = kernel.block
    return (
        f'    {{"{kernel.role}", "{kernel.variant}", "{kernel.symbol}", Type::{TYPES[kernel.dtype]}, {kernel.sm}, '
        f"{'true' if is_ptx else 'false'}, {kernel.num_warps}, {kernel.shared_bytes}, "
        f"{block.m}, {block.n}, {block.k}, {{{grid}}}, {name}, {len(args)}, {module}}},"
    )


def tactic_rows(tactics: Iterable[TacticEntry]) -> tuple[list[str], list[str]]:
    """Lines of the tactic table, and the launch lists that they name."""
    rows, launches = [], []
    for tactic in tactics:
        steps = ", ".join(f'{{"{step.role}", "{step.variant}"}}' for step in tactic.launches)
        launches.append(f"constexpr Launch kLaunches{tactic.id}[] = {{{steps}}};")
        rows.append(
            f'    {{{tactic.id}, "{tactic.name}", {"true" if tactic.top_k == "one" else "false"}, '
            f"{tactic.max_d}, {tactic.max_tokens}, kLaunches{tactic.id}, {len(tactic.launches)}}},"
        )
    return rows, launches


MODULES = """// Written by plugins/library/embed.py from kernels.json. Do not edit.
#include "operator/tables.h"

__asm__(
    ".pushsection .rodata\\n"
    ".balign 16\\n"
    ".globl moee_blob\\n"
    ".hidden moee_blob\\n"
    "moee_blob:\\n"
    ".incbin \\"" MOEE_BLOB "\\"\\n"
    ".byte 0\\n"
    ".popsection\\n");

extern "C" unsigned char const moee_blob[];

namespace moee {{

unsigned char const* moduleImage(int32_t module) {{
    static unsigned char const* const images[] = {{
{entries}
    }};
    return images[module];
}}

}}  // namespace moee
"""

TABLES = """// Written by plugins/library/embed.py from kernels.json. Do not edit.
#include "operator/tables.h"

namespace moee {{
namespace {{

{arguments}

constexpr Kernel kKernels[] = {{
{kernels}
}};

{launches}

constexpr Tactic kTactics[] = {{
{tactics}
}};

}}  // namespace

Tables const& tables() {{
    static Tables const instance{{kKernels, {kernel_count}, kTactics, {tactic_count}, {source}}};
    return instance;
}}

}}  // namespace moee
"""
