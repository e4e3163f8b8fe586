"""A command line that torchrun started several times over: threads, and who talks."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from moee.config import MOST_WORKERS
from moee.errors import RankLost, UserError
from moee.schema import shown

RANKED = ("extract", "finetune", "verify")  # commands that may run on several processes
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def several() -> bool:
    """Whether this process is one of several ranks."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def follower() -> bool:
    """Whether this is a rank other than 0: it shows nothing, for rank 0 speaks for all."""
    return several() and os.environ["RANK"] != "0"


def prepare(args: argparse.Namespace) -> None:
    """Pin threads and warnings of a rank. Call it before torch is imported. Raises `UserError` for a command that cannot be
    divided, and for more threads than the libraries start without a crash."""
    for name in POOLS:
        count = os.environ.get(name, "").partition(",")[0].strip()
        if count.isascii() and count.isdecimal() and int(count.lstrip("0")[:9] or 0) > MOST_WORKERS:
            asked = shown(count, quoted=False, limit=20)
            raise UserError(f"{name}: expected at most {MOST_WORKERS} threads, came {asked}; set it lower, or unset it")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        # sums depend on the number of threads, which must not depend on the number of ranks
        threads = str(getattr(args, "threads", None) or os.environ.get("OMP_NUM_THREADS", 1))
        os.environ.update(dict.fromkeys(POOLS, threads))
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DistributedDataParallel warns of a choice that is meant
    if follower():
        logging.getLogger().setLevel(logging.ERROR)
    if several() and args.command not in RANKED:
        raise UserError(f"{args.command} runs in one process; start it without torchrun ({', '.join(RANKED)} take several)")


def speaks(error: BaseException) -> bool:
    """Whether this rank shows an error: rank 0 what all ranks share, any rank what it alone has met."""
    return getattr(error, "speaks", not follower())


def leave(error: BaseException, code: int) -> None:
    """End the process at once if another rank is gone: a thread may still be clustering, or waiting for that rank."""
    if isinstance(error, RankLost):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
