"""Compile one kernel variant for one architecture, with no GPU: Triton to PTX, ptxas to a cubin, and the gates."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from plugins.aot import cubin
from plugins.aot.manifest import ARGUMENT_BYTES, Argument, Block, Kernel
from plugins.kernels.spec import POINTERS, KernelSpec, check_arguments
from plugins.tactics import GEMM_ROLES, SPECS, Config, config, grid_axes
from plugins.targets import Target, target

TRITON_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "uint8": "u8"}
# ptxas reports each figure once for the one kernel in the file.
REGISTERS = re.compile(r"Used (\d+) registers")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


class GateError(RuntimeError):
    """A compiled kernel breaks a promise: spills, stack, no tensor-core instruction, too much shared memory."""


@dataclass(frozen=True)
class Job:
    """One kernel to compile. `dtype` "any" stands for a kernel that never touches T."""

    role: str
    variant: str
    dtype: str
    sm: int

    @property
    def name(self) -> str:
        """Base name of the files."""
        return f"{self.role}-{self.variant}-{self.dtype}-sm{self.sm}"


@dataclass(frozen=True)
class Compiled:
    """What came out: the manifest entry and the two files."""

    kernel: Kernel
    cubin: bytes
    ptx: str


def uses_token_type(spec: KernelSpec) -> bool:
    """Whether the binary depends on T."""
    return any(POINTERS.get(a) == "T" for a in spec.arguments)


def signature(spec: KernelSpec, settings: Config, dtype: str) -> tuple[dict[str, str], dict[tuple[int], list]]:
    """Triton's signature and attributes: divisibility 16 for every pointer and for `dim`.

    Without these hints the compiler must assume any alignment and drops asynchronous copies and wide loads.
    """
    types: dict[str, str] = {}
    hints: dict[tuple[int], list] = {}
    for position, name in enumerate(spec.fn.arg_names):
        if name in POINTERS:
            element = dtype if POINTERS[name] == "T" else POINTERS[name]
            types[name] = "*" + TRITON_TYPES[element]
            hints[(position,)] = [["tt.divisibility", 16]]
        elif name in dict(settings.constants):
            types[name] = "constexpr"
        else:
            types[name] = "i32"
            if name == "dim":
                hints[(position,)] = [["tt.divisibility", 16]]
    return types, hints


def arguments(spec: KernelSpec, metadata: Any) -> tuple[Argument, ...]:
    """Launch arguments in order. Triton appends one pointer for every `*_scratch_size` in its metadata.

    Raises GateError if a scratch buffer is really needed: the plugin passes null.
    """
    listed = [Argument(name=n, type="ptr" if n in POINTERS else "i32") for n in spec.arguments]
    for name in ("global_scratch", "profile_scratch"):
        size = getattr(metadata, f"{name}_size", None)
        if size is None:
            continue
        if size:
            raise GateError(f"{spec.role} needs {size} bytes of {name}; the plugin cannot provide it")
        listed.append(Argument(name=name, type="scratch_ptr"))
    return tuple(listed)


def check_parameters(listed: tuple[Argument, ...], table: list[cubin.Parameter], name: str) -> None:
    """Raises GateError unless the cubin's own parameter table has these arguments, with natural alignment."""
    offset = 0
    expected = []
    for i, a in enumerate(listed):
        size = ARGUMENT_BYTES[a.type]
        offset = -(-offset // size) * size
        expected.append(cubin.Parameter(i, offset, size))
        offset += size
    if expected != table:
        raise GateError(f"{name}: expected parameters {expected}, the cubin has {table}; Triton's launch ABI changed")


def check_gates(kernel: Kernel, goal: Target) -> None:
    """Raises GateError on spills, stack, too much shared memory, or a half-precision GEMM without tensor cores."""
    name = f"{kernel.role}/{kernel.variant}/{kernel.dtype}/sm_{kernel.sm}"
    if kernel.spill_bytes or kernel.stack_bytes:
        raise GateError(f"{name} spills {kernel.spill_bytes} bytes, stack {kernel.stack_bytes}; use a smaller tile")
    if kernel.shared_bytes > goal.shared_block:
        raise GateError(f"{name} wants {kernel.shared_bytes} bytes of shared memory; the limit is {goal.shared_block}")
    half = kernel.dtype in ("float16", "bfloat16")
    if half and kernel.role in GEMM_ROLES and goal.tensor_cores and not kernel.mma_count:
        raise GateError(f"{name} has no tensor-core instruction")


@cache
def ptxas_version(name: str) -> str:
    """Release of a bundled ptxas, such as 12.9."""
    text = subprocess.check_output([cubin.tool(name), "--version"], text=True)
    found = re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else "unknown"


def settings_of(job: Job) -> Config:
    """The tactic table's settings for a kernel."""
    return config(job.role, job.variant, token_type(job), job.sm)


def token_type(job: Job) -> str:
    """The type that T stands for; any will do for a kernel that never touches it."""
    return "float16" if job.dtype == "any" else job.dtype


def to_ptx(job: Job, settings: Config | None = None, *, max_registers: int | None = None) -> tuple[str, Any]:
    """PTX text and Triton's metadata for one kernel in these settings (None: the table's); `max_registers` becomes a `.maxnreg`
    directive in the PTX."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    spec, dtype = SPECS[job.role], token_type(job)
    check_arguments(spec)
    settings = settings or settings_of(job)
    types, hints = signature(spec, settings, dtype)
    source = ASTSource(spec.fn, signature=types, constexprs=dict(settings.constants), attrs=hints)
    goal = target(job.sm)

    def without_cubin(*stage: Any) -> Any:
        # Triton asks for a cache key first (no arguments), then offers its stages.
        if not stage:
            return "moee-ptx", "moee-ptx"
        stage[1]["cubin"] = lambda ptx, metadata: b"\0"
        return None

    options = {"num_warps": settings.num_warps, "num_stages": settings.num_stages, "ptx_version": goal.ptx_version,
               "maxnreg": max_registers}  # fmt: skip
    knobs = triton.knobs
    with tempfile.TemporaryDirectory() as folder:
        with knobs.compilation.scope(), knobs.runtime.scope(), knobs.cache.scope():
            knobs.compilation.disable_line_info = True  # else PTX and cubin hold this machine's paths
            knobs.compilation.always_compile = True
            knobs.runtime.add_stages_inspection_hook = without_cubin
            knobs.cache.dir = folder
            compiled = triton.compile(source, target=GPUTarget("cuda", job.sm, 32), options=options)
            return compiled.asm["ptx"], compiled.metadata


def assemble(ptx: str, goal: Target) -> tuple[bytes, int, int, int]:
    """Cubin, registers, spill bytes, stack bytes of a PTX text. The device bundle runs the same command. Raises
    `GateError` if ptxas rejects it."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [cubin.tool(goal.ptxas), "-v", f"--gpu-name={goal.arch}", str(source), "-o", str(binary)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise GateError(f"{goal.ptxas} rejects the PTX for {goal.arch}: {result.stderr.strip()[:500]}")
        registers = REGISTERS.search(result.stderr)
        stack = STACK.search(result.stderr)
        if not registers or not stack:
            raise GateError(f"{goal.ptxas} printed no resource usage; its output was: {result.stderr[:500]}")
        return binary.read_bytes(), int(registers[1]), int(stack[2]) + int(stack[3]), int(stack[1])


def compile_job(job: Job, settings: Config | None = None, *, gates: bool = True) -> Compiled:
    """Compile, inspect and check one kernel in these settings (None: the table's); GateError says which promise broke
    (`gates=False` only reports)."""
    spec, goal = SPECS[job.role], target(job.sm)
    settings = settings or settings_of(job)
    ptx, metadata = to_ptx(job, settings)
    binary, registers, spills, stack = assemble(ptx, goal)
    if spills or stack:
        # ptxas trades a few spilled bytes for occupancy; an explicit bound, even the highest, makes it stop.
        ptx, metadata = to_ptx(job, settings, max_registers=255)
        binary, registers, spills, stack = assemble(ptx, goal)
    listed = arguments(spec, metadata)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        table = cubin.parameters(Path(file.name))
        counts = cubin.instructions(Path(file.name))
    check_parameters(listed, table, job.name)
    kernel = Kernel(
        role=job.role,
        variant=job.variant,
        dtype=job.dtype,
        sm=job.sm,
        symbol=metadata.name,
        cubin=f"{job.name}.cubin",
        ptx=f"{job.name}.ptx",
        sha256=hashlib.sha256(binary).hexdigest(),
        num_warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        registers=registers,
        spill_bytes=spills,
        stack_bytes=stack,
        mma_count=counts.mma,
        cp_async_count=counts.cp_async,
        ptx_version=goal.ptx_version,
        block=Block(**asdict(settings.block)),
        grid=grid_axes(job.role, settings),
        args=listed,
        constants=dict(settings.constants),
    )
    if gates:
        check_gates(kernel, goal)
    return Compiled(kernel, binary, ptx)
