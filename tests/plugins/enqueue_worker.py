"""Runs the compiled plugin on the test-double driver: `python -m tests.plugins.enqueue_worker DOUBLES PLUGIN KERNELS`.

The plugin's C++ `enqueue` launches; the driver calls back; here each launch is decoded from the manifest's argument
list and executed by the kernel's own PyTorch reference on the plugin's buffers. A process of its own, because the
double takes the real driver's name. Prints one JSON object: a list of cases with errors, call logs and tactic ids.
"""

from __future__ import annotations

import ctypes
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

DOUBLES = Path(sys.argv[1])
FAKE = ctypes.CDLL(str(DOUBLES / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)  # before torch: the name must be ours

import torch  # noqa: E402

from plugins.dispatch import launch_reference  # noqa: E402
from plugins.kernels.spec import POINTERS  # noqa: E402
from plugins.reference import moee_ffn  # noqa: E402
from plugins.tactics import SPECS, by_id, config, grid_axes  # noqa: E402
from plugins.workspace import TORCH_DTYPES, Sizes, bytes_needed, layout  # noqa: E402
from tests.plugins.harness import DATA_TYPES, Harness, aligned, case_of, make_inputs  # noqa: E402

C_UINT = ctypes.c_uint
EXECUTOR = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(C_UINT), C_UINT, C_UINT, ctypes.POINTER(ctypes.c_void_p)
)


FAKE.fake_log.restype = ctypes.c_char_p


class Device:
    """Executes launches; remembers what was launched and whether grids and arguments were right."""

    def __init__(self, manifest: dict[str, Any], dtype: str, sm: int):
        kernels = [k for k in manifest["kernels"] if k["sm"] == sm]
        self.kernels = {(k["role"], k["variant"]): k for k in kernels if k["dtype"] == dtype}
        self.dtype = dtype
        self.problems: list[str] = []
        self.launches: list[str] = []
        self.expect: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.callback = EXECUTOR(self.execute)
        FAKE.fake_executor(self.callback)

    def execute(self, symbol: bytes, grid: Any, threads: int, shared: int, args: Any) -> int:
        try:
            # Real kernels share symbols between variants: the tactic's order tells which one is due.
            role, variant = self.expect[len(self.launches)].split("/")
            kernel = self.kernels[role, variant]
            self.launches.append(f"{role}/{variant}")
            self.run(kernel, symbol.decode(), tuple(grid[:3]), threads, shared, args)
        except Exception as error:  # must not cross into C++
            self.problems.append(f"{symbol.decode()}: {type(error).__name__}: {error}")
            return 999
        return 0

    def run(self, kernel: dict[str, Any], symbol: str, grid: tuple, threads: int, shared: int, args: Any) -> None:
        role = kernel["role"]
        settings = config(role, kernel["variant"], self.dtype)
        spec = SPECS[role]
        expected_grid = spec.__class__(role, spec.fn, spec.reference, grid_axes(role, settings)).launch_grid(
            self.sizes.as_dict(), settings.block
        )
        found = (symbol, grid, threads, shared)
        wanted = (kernel["symbol"], expected_grid, kernel["num_warps"] * 32, kernel["shared_bytes"])
        if found != wanted:
            self.problems.append(f"launched {found}, expected {wanted}")
        values: dict[str, Any] = {}
        for i, argument in enumerate(kernel["args"]):
            if argument["type"] == "i32":
                values[argument["name"]] = ctypes.cast(args[i], ctypes.POINTER(ctypes.c_int32))[0]
                continue
            address = ctypes.cast(args[i], ctypes.POINTER(ctypes.c_uint64))[0]
            if argument["type"] == "scratch_ptr":
                if address:
                    self.problems.append(f"{symbol}: scratch pointer is not null")
                continue
            values[argument["name"]] = self.view(argument["name"], address)
        launch_reference(spec, settings, grid, values)

    def view(self, name: str, address: int) -> torch.Tensor:
        """The tensor at a device pointer; a null pointer gives an empty one, which any use turns into an error."""
        kind = self.dtype if POINTERS[name] == "T" else POINTERS[name]
        if address == 0:
            if name in self.shapes:
                self.problems.append(f"{name} is null")
            return torch.empty(0, dtype=TORCH_DTYPES[kind])
        if address % 16:
            self.problems.append(f"{name} is not aligned")
        shape = self.shapes.get(name)
        if shape is None:
            self.problems.append(f"{name} should be null")
            return torch.empty(0, dtype=TORCH_DTYPES[kind])
        tensor_type = TORCH_DTYPES[kind]
        count = 1
        for n in shape:
            count *= n
        size = count * torch.empty((), dtype=tensor_type).element_size()
        buffer = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(buffer, dtype=tensor_type).view(shape)


def expected_launches(tactic: int, top_k: int, calibrated: bool) -> list[str]:
    steps = [s for s in by_id(tactic).launches if top_k > 1 or s.role != "combine"]
    return [f"{'route_load' if calibrated and s.role == 'route' else s.role}/{s.variant}" for s in steps]


def run_case(
    harness: Harness, manifest: dict[str, Any], sm: int, dtype: str, lead: tuple[int, ...], widths: list[int],
    dim: int, union: int, top_k: int, activation: int, calibrated: bool,
) -> dict[str, Any]:  # fmt: skip
    """One layer through TensorRT's life cycle, then every tactic. `calibrated`: it stays in the build phase."""
    tokens = 1
    for n in lead:
        tokens *= n
    sizes = Sizes(tokens, dim, len(widths), union, max(widths), top_k)
    inputs = make_inputs(sizes, TORCH_DTYPES[dtype], 7, widths)
    case = case_of(lead, sizes, sum(widths), dtype)
    load = [3, *([1] * (len(widths) - 1))]
    harness.clear_log()
    layer = harness.create(activation, top_k, max(widths), load)
    harness.configure(layer, case)
    tactics = harness.tactics(layer)
    workspace_bytes = harness.workspace(layer, case)
    plain = layer if calibrated else harness.recreate(layer)
    attached = harness.attach(plain)
    device = Device(manifest, dtype, sm)
    device.sizes = sizes
    want = moee_ffn(inputs, activation=activation, top_k=top_k)
    results = []
    harness.shape_change(attached, case)
    for tactic in tactics:
        kind = by_id(tactic).kind
        device.shapes = {name: tuple(t.shape) for name, t in inputs.items()}
        device.shapes |= {b.name: b.shape for b in layout(sizes, dtype, kind).buffers}
        device.shapes |= {"y": (tokens, dim), **({"load_cdf": (sizes.experts,)} if calibrated else {})}
        device.launches, device.expect = [], expected_launches(tactic, top_k, calibrated)
        y = aligned(tokens * dim, TORCH_DTYPES[dtype], float("nan")).view(tokens, dim)
        # Exactly as large as asked for, between guard bytes, and poisoned.
        memory = aligned(workspace_bytes + 256, torch.uint8, 0xFF)
        FAKE.fake_clear_log()
        FAKE.fake_capture(1)
        harness.set_tactic(attached, tactic)
        code = harness.enqueue(attached, case, inputs, y, memory)
        FAKE.fake_capture(0)
        assert code == 0, (harness.log(), device.problems)
        routes = layout(sizes, dtype, kind).split(memory)["routes"].view(tokens, top_k).long()
        # In the build phase tokens go where the load says, so the result is compared for that routing.
        due = moee_ffn(inputs, activation=activation, top_k=top_k, chosen=routes) if calibrated else want
        error = (y.double() - due).abs().max().item()
        shares = routes.flatten().bincount(minlength=len(widths)) / routes.numel()
        results.append(
            {
                **{"tactic": tactic, "code": code, "error": error, "shares": shares.tolist()},
                **{"launches": device.launches, "expected": device.expect},
                "guard_intact": bool((memory[workspace_bytes:] == 0xFF).all()),
                "calls": FAKE.fake_log().decode().split("\n"),
            }
        )
    log = harness.log()
    harness.destroy(layer, plain, attached)
    return {
        **{"dtype": dtype, "top_k": top_k, "calibrated": calibrated, "scale": want.abs().max().item()},
        "sizes": sizes.as_dict(),
        **{"problems": device.problems, "results": results, "workspace_bytes": workspace_bytes, "tactics": tactics},
        **{"python_workspace_bytes": python_workspace(sizes, dtype), "live_modules": FAKE.fake_live_modules()},
        **{"live_memory": FAKE.fake_live_memory(), "log": [line for line in log.split("\n") if line[:7] != "VERBOSE"]},
    }


def python_workspace(sizes: Sizes, dtype: str) -> int:
    return bytes_needed(sizes.as_dict(), dtype, tuple({t.kind for t in map(by_id, range(1, 9)) if _fits(t, sizes)}))


def _fits(tactic: Any, sizes: Sizes) -> bool:
    return not tactic.max_d or sizes.dim <= tactic.max_d


def main() -> None:
    torch.set_num_threads(1)
    plugin, kernels = Path(sys.argv[2]), Path(sys.argv[3])
    manifest = json.loads((kernels / "kernels.json").read_text())
    sm = 87
    harness = Harness(DOUBLES / "libharness.so", plugin)
    FAKE.fake_device(sm // 10, sm % 10)
    cases = []
    for dtype in DATA_TYPES:
        run = partial(run_case, harness, manifest, sm, dtype)
        for top_k, calibrated in ((1, False), (2, False), (1, True)):
            # Odd sizes: nothing but D is a multiple of a tile.
            cases.append(run((3, 19), [37, 5, 80, 1, 64, 33, 17], 96, 101, top_k, 0, calibrated))
        cases.append(run((1,), [24], 48, 24, 1, 1, False))  # one token, one expert, rank 2
        cases.append(run((2, 3, 5), [16] * 5, 400, 64, 1, 3, False))  # D > 384: no fused tactic
        cases.append(run((520,), [16] * 5, 16, 32, 1, 2, False))  # too many tokens for masked16
    print(json.dumps({"cases": cases}))


if __name__ == "__main__":
    main()
