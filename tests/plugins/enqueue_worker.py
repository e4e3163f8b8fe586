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
HARNESS = ctypes.CDLL(str(DOUBLES / "libharness.so"))

import torch  # noqa: E402

from plugins.contract import ACTIVATIONS, INPUT_NAMES  # noqa: E402
from plugins.dispatch import launch_reference  # noqa: E402
from plugins.kernels.spec import POINTERS  # noqa: E402
from plugins.reference import moee_ffn  # noqa: E402
from plugins.tactics import SPECS, by_id, config, grid_axes  # noqa: E402
from plugins.workspace import TORCH_DTYPES, Sizes, bytes_needed, layout  # noqa: E402

DATA_TYPES = {"float32": 0, "float16": 1, "bfloat16": 7}  # nvinfer1::DataType
C_UINT = ctypes.c_uint
EXECUTOR = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(C_UINT), C_UINT, C_UINT, ctypes.POINTER(ctypes.c_void_p)
)


class Case(ctypes.Structure):
    """Mirrors `Case` of csrc/host.h."""

    _fields_ = [
        *(("lead_count", ctypes.c_int32), ("lead", ctypes.c_int64 * 4), ("dim", ctypes.c_int64)),
        *(("experts", ctypes.c_int64), ("union", ctypes.c_int64), ("neurons", ctypes.c_int64)),
        ("type", ctypes.c_int32),
    ]


for name in ("harness_create", "harness_recreate", "harness_attach"):
    getattr(HARNESS, name).restype = ctypes.c_void_p
HARNESS.harness_workspace.restype = ctypes.c_size_t
for name in ("harness_log", "harness_creator", "harness_timing_id"):
    getattr(HARNESS, name).restype = ctypes.c_char_p
FAKE.fake_log.restype = ctypes.c_char_p


def pointer(handle: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(handle)


def aligned(count: int, dtype: torch.dtype, fill: float | None = None) -> torch.Tensor:
    """A tensor that starts on a 256-byte boundary, as device memory does."""
    item = torch.empty((), dtype=dtype).element_size()
    raw = torch.empty(count * item + 256, dtype=torch.uint8)
    start = -raw.data_ptr() % 256
    tensor = raw[start : start + count * item].view(dtype)
    return tensor if fill is None else tensor.fill_(fill)


def make_inputs(sizes: Sizes, dtype: torch.dtype, seed: int, widths: list[int]) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        value = torch.randn(*shape, generator=g) * scale
        return aligned(value.numel(), dtype).view(shape).copy_(value)

    picks = [torch.randperm(sizes.union_size, generator=g)[:w].sort().values.int() for w in widths]
    offsets = torch.tensor([0, *torch.tensor(widths).cumsum(0).tolist()], dtype=torch.int32)
    neurons = torch.cat(picks)
    inputs = {
        "x": normal(sizes.tokens, sizes.dim),
        "router": normal(sizes.experts, sizes.dim),
        "router_bias": aligned(sizes.experts, torch.float32).copy_(torch.randn(sizes.experts, generator=g)),
        "w_up": normal(sizes.union_size, sizes.dim, scale=sizes.dim**-0.5),
        "b_up": normal(sizes.union_size, scale=0.1),
        "w_down": normal(sizes.union_size, sizes.dim, scale=sizes.max_width**-0.5),
        "b_out": normal(sizes.experts, sizes.dim, scale=0.1),
        "neurons": aligned(len(neurons), torch.int32).copy_(neurons),
        "offsets": aligned(len(offsets), torch.int32).copy_(offsets),
    }
    assert tuple(inputs) == INPUT_NAMES
    return inputs


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


def case_of(lead: tuple[int, ...], sizes: Sizes, neurons: int, dtype: str) -> Case:
    case = Case(lead_count=len(lead), dim=sizes.dim, experts=sizes.experts, union=sizes.union_size, neurons=neurons)
    case.type = DATA_TYPES[dtype]
    for i, n in enumerate(lead):
        case.lead[i] = n
    return case


def expected_launches(tactic: int, top_k: int, calibrated: bool) -> list[str]:
    steps = [s for s in by_id(tactic).launches if top_k > 1 or s.role != "combine"]
    return [f"{'route_load' if calibrated and s.role == 'route' else s.role}/{s.variant}" for s in steps]


def run_case(
    manifest: dict[str, Any], sm: int, dtype: str, lead: tuple[int, ...], widths: list[int], dim: int, union: int,
    top_k: int, activation: int, calibrated: bool,
) -> dict[str, Any]:  # fmt: skip
    """One layer through TensorRT's life cycle, then every tactic. `calibrated`: it stays in the build phase."""
    tokens = 1
    for n in lead:
        tokens *= n
    sizes = Sizes(tokens, dim, len(widths), union, max(widths), top_k)
    inputs = make_inputs(sizes, TORCH_DTYPES[dtype], 7, widths)
    case = case_of(lead, sizes, sum(widths), dtype)
    load = [3, *([1] * (len(widths) - 1))]
    HARNESS.harness_clear_log()
    built = HARNESS.harness_create(
        ACTIVATIONS[activation].encode(), top_k, max(widths), (ctypes.c_int32 * len(load))(*load), len(load)
    )
    assert built, HARNESS.harness_log().decode()
    assert HARNESS.harness_configure(pointer(built), ctypes.byref(case), ctypes.byref(case), ctypes.byref(case)) == 0
    ids = (ctypes.c_int32 * 64)()
    count = HARNESS.harness_tactics(pointer(built), ids, 64)
    workspace_bytes = HARNESS.harness_workspace(pointer(built), ctypes.byref(case))
    plain = built if calibrated else HARNESS.harness_recreate(pointer(built))
    attached = HARNESS.harness_attach(pointer(plain))
    assert attached, HARNESS.harness_log().decode()
    device = Device(manifest, dtype, sm)
    device.sizes = sizes
    want = moee_ffn(**inputs, activation=activation, top_k=top_k)
    results = []
    assert HARNESS.harness_shape_change(pointer(attached), ctypes.byref(case)) == 0, HARNESS.harness_log().decode()
    for tactic in ids[:count]:
        kind = by_id(tactic).kind
        device.shapes = {name: tuple(t.shape) for name, t in inputs.items()}
        device.shapes |= {b.name: b.shape for b in layout(sizes, dtype, kind).buffers}
        device.shapes |= {"y": (tokens, dim), **({"load_cdf": (sizes.experts,)} if calibrated else {})}
        device.launches, device.expect = [], expected_launches(tactic, top_k, calibrated)
        y = aligned(tokens * dim, TORCH_DTYPES[dtype], float("nan")).view(tokens, dim)
        # Exactly as large as asked for, between guard bytes, and poisoned.
        memory = aligned(workspace_bytes + 256, torch.uint8, 0xFF)
        addresses = (ctypes.c_void_p * 9)(*(inputs[n].data_ptr() for n in INPUT_NAMES))
        FAKE.fake_clear_log()
        FAKE.fake_capture(1)
        assert HARNESS.harness_set_tactic(pointer(attached), tactic) == 0
        code = HARNESS.harness_enqueue(
            pointer(attached), ctypes.byref(case), addresses, pointer(y.data_ptr()), pointer(memory.data_ptr())
        )
        FAKE.fake_capture(0)
        assert code == 0, (HARNESS.harness_log().decode(), device.problems)
        routes = layout(sizes, dtype, kind).split(memory)["routes"].view(tokens, top_k).long()
        # In the build phase tokens go where the load says, so the result is compared for that routing.
        due = moee_ffn(**inputs, activation=activation, top_k=top_k, chosen=routes) if calibrated else want
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
    log = HARNESS.harness_log().decode()
    for handle in {built, plain, attached}:
        HARNESS.harness_destroy(pointer(handle))
    return {
        **{"dtype": dtype, "top_k": top_k, "calibrated": calibrated, "scale": want.abs().max().item()},
        "sizes": sizes.as_dict(),
        **{"problems": device.problems, "results": results, "workspace_bytes": workspace_bytes, "tactics": ids[:count]},
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
    assert HARNESS.harness_open(str(plugin).encode()) == 0, HARNESS.harness_log().decode()
    FAKE.fake_device(sm // 10, sm % 10)
    cases = []
    for dtype in DATA_TYPES:
        run = partial(run_case, manifest, sm, dtype)
        for top_k, calibrated in ((1, False), (2, False), (1, True)):
            # Odd sizes: nothing but D is a multiple of a tile.
            cases.append(run((3, 19), [37, 5, 80, 1, 64, 33, 17], 96, 101, top_k, 0, calibrated))
        cases.append(run((1,), [24], 48, 24, 1, 1, False))  # one token, one expert, rank 2
        cases.append(run((2, 3, 5), [16] * 5, 400, 64, 1, 3, False))  # D > 384: no fused tactic
        cases.append(run((520,), [16] * 5, 16, 32, 1, 2, False))  # too many tokens for masked16
    print(json.dumps({"creator": HARNESS.harness_creator().decode(), "cases": cases}))


if __name__ == "__main__":
    main()
