"""What `kernels.json` must hold before C++ tables are written from it.

`plugins.aot.manifest` reads the same file for the builder; this one needs no Triton.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from moee.schema import Body

MAX_ARGUMENTS = 32  # csrc/launch.cpp

Name = Annotated[str, StringConstraints(max_length=200)]  # plugins.library.tables refuses what is no plain C++ string
Size = Annotated[int, Field(ge=0, le=2**31 - 1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]  # what is divided by, or counts


class Argument(Body):
    name: Name
    type: Name


class Block(Body):
    m: Count
    n: Count
    k: Size


class Kernel(Body):
    role: Name
    variant: Name
    dtype: Name
    sm: Count
    symbol: Name
    cubin: Name
    ptx: Name
    sha256: Name
    num_warps: int = Field(ge=1, le=32)
    shared_bytes: Size
    block: Block
    grid: list[Name] = Field(min_length=3, max_length=3)
    args: list[Argument] = Field(max_length=MAX_ARGUMENTS)


class Step(Body):
    role: Name
    variant: Name


class Tactic(Body):
    id: Size  # plugins.library.tables wants them positive and unique
    name: Name
    top_k: Name
    max_d: Size
    max_tokens: Size
    launches: list[Step] = Field(min_length=1)


class Kernels(Body):
    """The body of `kernels.json`."""

    source_sha256: Name
    kernels: list[Kernel]
    tactics: list[Tactic]
