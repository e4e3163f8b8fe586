"""A kernel folder with made-up modules: same schema and roles as the real one, readable by the test-double driver.

A module is the text `MOEE-FAKE sm=87 symbol=...`, then filler, so that the driver can check device and symbol.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

ROUTER = ("x", "router", "router_bias")
OUT = {
    "route": (*ROUTER, "counts", "buckets", "routes"),
    "route_load": ("load_cdf", "counts", "buckets", "routes"),
    "expert_up": ("x", "w_up", "b_up", "neurons", "offsets", "counts", "buckets", "hidden"),
    "expert_down": ("hidden", "w_down", "b_out", "neurons", "offsets", "counts", "buckets", "y", "partial"),
    "fused": (
        *("x", "w_up", "b_up", "w_down", "b_out", "neurons", "offsets", "counts", "buckets", "y", "partial"),
    ),
    "member": ("neurons", "offsets", "member"),
    "masked_up": ("x", "w_up", "b_up", "routes", "member", "hidden"),
    "masked_down": ("hidden", "w_down", "b_out", "routes", "y"),
    "combine": ("partial", "y"),
}
SCALARS = ("tokens", "dim", "experts", "union_size", "max_width", "top_k", "activation")
GRID = {
    "route": ("token_tiles", "one", "one"),
    "route_load": ("token_tiles", "one", "one"),
    "expert_up": ("expert_tiles", "width_tiles", "one"),
    "expert_down": ("expert_tiles", "dim_tiles", "one"),
    "fused": ("expert_tiles", "one", "one"),
    "masked_up": ("token_tiles", "union_tiles", "one"),
    "masked_down": ("token_tiles", "dim_tiles", "one"),
    "combine": ("token_tiles", "dim_tiles", "one"),
}


def _kernel(folder: Path, role: str, variant: str, dtype: str, sm: int, block: tuple[int, int, int]) -> dict[str, Any]:
    symbol = f"{role}_{variant}_{dtype}"
    filler = random.Random(f"{symbol}{sm}").choices("abcdefgh \n", k=3000)
    cubin = f"MOEE-FAKE sm={sm} symbol={symbol}\n{''.join(filler)}\0".encode()
    ptx = f"// MOEE-FAKE ptx={sm} symbol={symbol}\n.version 7.0\n.target sm_{sm}\n{''.join(filler)}".encode()
    name = f"{symbol}_sm{sm}"
    (folder / f"{name}.cubin").write_bytes(cubin)
    (folder / f"{name}.ptx").write_bytes(ptx)
    pointers = [{"name": n, "type": "ptr"} for n in OUT[role]]
    scalars = [{"name": n, "type": "i32"} for n in SCALARS]
    return {
        **{"role": role, "variant": variant, "dtype": dtype, "sm": sm, "symbol": symbol},
        **{"cubin": f"{name}.cubin", "ptx": f"{name}.ptx", "sha256": hashlib.sha256(cubin).hexdigest()},
        **{"num_warps": 4, "shared_bytes": 0 if role == "combine" else 16384 + 1024 * block[0]},
        **{"registers": 64, "spill_bytes": 0, "stack_bytes": 0, "mma_count": 1, "cp_async_count": 1, "ptx_version": 80},
        **{"block": {"m": block[0], "n": block[1], "k": block[2]}, "grid": list(GRID[role])},
        "args": [*pointers, *scalars, {"name": "scratch0", "type": "scratch_ptr"}, {"name": "scratch1", "type": "scratch_ptr"}],
    }


def write_kernels(folder: Path, sms: tuple[int, ...] = (80, 87), dtypes: tuple[str, ...] = ()) -> Path:
    """Write a synthetic kernel folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    kernels = []
    for dtype in dtypes or ("float32", "float16", "bfloat16"):
        for sm in sms:
            kernels += [_kernel(folder, role, "bm32", dtype, sm, (32, 64, 32)) for role in ("route", "route_load")]
            for m in (16, 32, 64, 128):
                kernels += [_kernel(folder, role, f"bm{m}", dtype, sm, (m, 64, 32)) for role in ("expert_up", "expert_down")]
            kernels += [_kernel(folder, role, "bm16", dtype, sm, (16, 64, 32)) for role in ("masked_up", "masked_down")]
            kernels.append(_kernel(folder, "fused", "bm32", dtype, sm, (32, 64, 32)))
            kernels.append(_kernel(folder, "combine", "bm32", dtype, sm, (32, 64, 32)))
    route = {"role": "route", "variant": "bm32"}
    combine = {"role": "combine", "variant": "bm32"}
    tactics: list[dict[str, Any]] = []
    for k, name in ((1, "one"), (2, "any")):
        tail = [combine] if name == "any" else []
        for i, m in enumerate((16, 32, 64, 128)):
            steps = [route, *({"role": r, "variant": f"bm{m}"} for r in ("expert_up", "expert_down")), *tail]
            tactics.append(_tactic(10 * k + i, f"tile{m}_{name}", name, 0, 0, steps))
    tactics.append(_tactic(31, "fused", "one", 384, 0, [route, {"role": "fused", "variant": "bm32"}]))
    masked = [{"role": r, "variant": "bm16"} for r in ("masked_up", "masked_down")]
    tactics.append(_tactic(41, "masked", "one", 0, 512, [route, *masked]))
    manifest = {
        **{"schema": "moee.kernels/1", "source_sha256": hashlib.sha256(b"synthetic").hexdigest()},
        **{"triton": "none", "ptxas": "none", "tactics": tactics, "kernels": kernels},
    }
    (folder / "kernels.json").write_text(json.dumps(manifest))
    return folder


def _tactic(id_: int, name: str, top_k: str, max_d: int, max_tokens: int, launches: list[Any]) -> dict[str, Any]:
    return {"id": id_, "name": name, "top_k": top_k, "max_d": max_d, "max_tokens": max_tokens, "launches": launches}
