"""nccl with one rank: what the ranks say to one another by `torch.distributed`, on the GPU that is here."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from moee.parallel.joining import joined


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    checks: list[dict[str, object]] = []

    def check(name: str, passed: bool) -> None:
        checks.append({"name": name, "passed": passed})

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    with joined(device=args.device) as group:
        check("a launcher's one rank computes on the device", group.alone and group.device.type == args.device)
    backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    one = torch.arange(1000.0, device=group.device)
    dist.barrier()
    for name, call in {"all_reduce": dist.all_reduce, "broadcast": lambda t: dist.broadcast(t, 0)}.items():
        moved = one.clone()
        call(moved)
        check(name, torch.equal(moved, one))
    gathered = [torch.empty_like(one)]
    dist.all_gather(gathered, one)
    check("all_gather", torch.equal(gathered[0], one))
    dist.destroy_process_group()
    args.out.write_text(json.dumps({"passed": all(c["passed"] for c in checks), "checks": checks, "backend": backend}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
