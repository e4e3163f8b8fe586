"""The text of `tables.cpp` and `modules.cpp`: names of the kernel manifest to C++ of csrc/operator/tables.h."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moee.errors import UserError

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
}


def text_literal(value: str) -> str:
    """A C++ string. Raises `UserError` for anything that would need escaping."""
    if not re.fullmatch(r"[ -~]*", value) or '"' in value or "\\" in value:
        raise UserError(f"kernels.json holds {value!r}, which is not a plain name; build the kernels again")
    return f'"{value}"'


def lookup(table: Mapping[str, str], key: str, kind: str) -> str:
    """The enumerator for a manifest name. Raises `UserError` for one that the plugin does not know."""
    if key not in table:
        raise UserError(f"kernels.json has {kind} {key!r}, expected one of {', '.join(table)}; update the plugin")
    return table[key]


def argument_name(argument: Mapping[str, str]) -> str:
    """Enumerator of `csrc/operator/tables.h` for one manifest argument. Raises `UserError` for a name or type it lacks."""
    if argument["type"] == "scratch_ptr":
        return "Arg::kScratch"
    if argument["type"] not in ("ptr", "i32"):
        raise UserError(f"kernels.json has argument type {argument['type']!r}, expected ptr, i32 or scratch_ptr")
    table = POINTERS if argument["type"] == "ptr" else SCALARS
    return "Arg::" + lookup(table, argument["name"], f"{argument['type']} argument")


def kernel_row(kernel: Mapping[str, Any], is_ptx: bool, module: int, arguments: dict[tuple[str, ...], str]) -> str:
    args = tuple(argument_name(argument) for argument in kernel["args"])
    name = arguments.setdefault(args, f"kArgs{len(arguments)}")
    grid = ", ".join("Axis::" + lookup(AXES, axis, "grid axis") for axis in kernel["grid"])
    block = kernel["block"]
    return (
        f"    {{{text_literal(kernel['role'])}, {text_literal(kernel['variant'])}, {text_literal(kernel['symbol'])}, "
        f"Type::{lookup(TYPES, kernel['dtype'], 'dtype')}, {int(kernel['sm'])}, {'true' if is_ptx else 'false'}, "
        f"{int(kernel['num_warps'])}, {int(kernel['shared_bytes'])}, "
        f"{int(block['m'])}, {int(block['n'])}, {int(block['k'])}, {{{grid}}}, {name}, {len(args)}, {module}}},"
    )


def tactic_rows(manifest: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Lines of the tactic table, and the launch lists that they name."""
    tactics, launches = [], []
    ids = [int(tactic["id"]) for tactic in manifest["tactics"]]
    if len(set(ids)) != len(ids) or min(ids, default=0) < 1:
        raise UserError(f"kernels.json has tactic ids {ids}; they must be positive and unique")
    for tactic in manifest["tactics"]:
        steps = ", ".join(f"{{{text_literal(s['role'])}, {text_literal(s['variant'])}}}" for s in tactic["launches"])
        launches.append(f"constexpr Launch kLaunches{int(tactic['id'])}[] = {{{steps}}};")
        tactics.append(
            f"    {{{int(tactic['id'])}, {text_literal(tactic['name'])}, {'true' if tactic['top_k'] == 'one' else 'false'}, "
            f"{int(tactic['max_d'])}, {int(tactic['max_tokens'])}, kLaunches{int(tactic['id'])}, "
            f"{len(tactic['launches'])}}},"
        )
    return tactics, launches


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
