"""A kernel folder with the real tactic table and made-up modules, for the test-double driver.

A module is the text `MOEE-FAKE sm=87 symbol=...` and filler, so that the driver can check device and symbol.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from plugins.contract import DTYPES
from plugins.kernels.spec import POINTERS
from plugins.tactics import SPECS, TACTICS, VARIANTS, config, grid_axes

SCRATCH = [{"name": "global_scratch", "type": "scratch_ptr"}, {"name": "profile_scratch", "type": "scratch_ptr"}]


def _kernel(folder: Path, role: str, variant: str, dtype: str, sm: int) -> dict[str, Any]:
    settings = config(role, variant, dtype, sm)
    symbol = f"{role}_{variant}_{dtype}"
    filler = "".join(random.Random(f"{symbol}{sm}").choices("abcdefgh \n", k=3000))
    cubin = f"MOEE-FAKE sm={sm} symbol={symbol}\n{filler}\0".encode()
    ptx = f"// MOEE-FAKE ptx={sm} symbol={symbol}\n.version 7.0\n.target sm_{sm}\n{filler}".encode()
    name = f"{symbol}_sm{sm}"
    (folder / f"{name}.cubin").write_bytes(cubin)
    (folder / f"{name}.ptx").write_bytes(ptx)
    arguments = [{"name": a, "type": "ptr" if a in POINTERS else "i32"} for a in SPECS[role].arguments]
    block = settings.block
    return {
        **{"role": role, "variant": variant, "dtype": dtype, "sm": sm, "symbol": symbol},
        **{"cubin": f"{name}.cubin", "ptx": f"{name}.ptx", "sha256": hashlib.sha256(cubin).hexdigest()},
        **{"num_warps": settings.num_warps, "shared_bytes": 0 if role == "combine" else 16384 + 1024 * block.m},
        **{"registers": 64, "spill_bytes": 0, "stack_bytes": 0, "mma_count": 1, "cp_async_count": 1, "ptx_version": 80},
        **{"block": vars(block), "grid": list(grid_axes(role, settings)), "args": arguments + SCRATCH},
    }


def write_kernels(folder: Path, sms: tuple[int, ...] = (80, 87), dtypes: tuple[str, ...] = DTYPES) -> Path:
    """Write a synthetic kernel folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    kernels = [_kernel(folder, *key, dtype, sm) for sm in sms for dtype in dtypes for key in VARIANTS[dtype]]
    tactics = [
        {
            **{"id": t.id, "name": t.name, "top_k": t.top_k, "max_d": t.max_d, "max_tokens": t.max_tokens},
            "launches": [{"role": step.role, "variant": step.variant} for step in t.launches],
        }
        for t in TACTICS
    ]
    manifest = {
        **{"schema": "moee.kernels/1", "source_sha256": hashlib.sha256(b"synthetic").hexdigest()},
        **{"triton": "none", "ptxas": "none", "tactics": tactics, "kernels": kernels},
    }
    (folder / "kernels.json").write_text(json.dumps(manifest))
    return folder
