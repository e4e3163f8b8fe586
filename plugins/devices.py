"""GPUs by name: what every command and function takes that asks for a target device or for its SM.

A name is of one board, or of all that are called so and share an SM; an SM (compute capability) is written 87, sm_87 or 8.7.
Capitals do not count, nor does what stands between the words: Orin_AGX, "orin agx" and orin-agx are one name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from moee.errors import UserError
from moee.schema import shown
from plugins.targets import TARGETS


@dataclass(frozen=True)
class Device:
    """A GPU, or all that share a name and an SM. `also`: what else they are called."""

    name: str
    sm: int
    also: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Profile(Device):
    """One board with its vendor's figures: float16 tensor-core TFLOP/s (dense) and memory GB/s, by their `source`. Microseconds
    a launch are an assumption."""

    tflops: float
    gbytes: float
    launch_us: float
    source: str


# SMs: NVIDIA's table of CUDA GPUs. Jetson data sheets give sparse int8 TOPS of the GPU: a quarter of them is dense float16.
DEVICES: tuple[Device, ...] = (
    Device("t4", 75),
    Device("rtx-20", 75),
    Device("a100", 80),
    Device("a10", 86),
    Device("rtx-30", 86),
    Profile("rtx-3090", 86, tflops=71.0, gbytes=936.0, launch_us=3.0, source="NVIDIA GA102 white paper"),
    Device("orin", 87, ("jetson-orin",)),
    Profile(
        "orin-agx", 87, ("agx-orin", "jetson-agx-orin"), tflops=42.5, gbytes=204.8, launch_us=6.0,
        source="NVIDIA Jetson AGX Orin 64GB data sheet, 170 sparse int8 TOPS",
    ),
    Device("orin-nx", 87, ("jetson-orin-nx",)),
    Profile(
        "orin-nano", 87, ("jetson-orin-nano",), tflops=10.0, gbytes=68.0, launch_us=8.0,
        source="NVIDIA Jetson Orin Nano 8GB data sheet, 40 sparse int8 TOPS",
    ),
    Profile("l4", 89, tflops=121.0, gbytes=300.0, launch_us=3.0, source="NVIDIA L4 data sheet: 242 TFLOP/s with sparsity"),
    Device("rtx-40", 89),
    Profile("rtx-4090", 89, tflops=165.2, gbytes=1008.0, launch_us=3.0, source="NVIDIA Ada architecture white paper"),
    Profile(
        "rtx-4060", 89, tflops=30.2, gbytes=272.0, launch_us=3.0,
        source="NVIDIA Ada architecture white paper: a multiprocessor of the RTX 4090, 24 of them at 2.46 GHz",
    ),
    Device("h100", 90),
    Profile("h200", 90, tflops=989.0, gbytes=4800.0, launch_us=3.0, source="NVIDIA H200 data sheet: 1,979 with sparsity"),
    Device("b200", 100),
    Device("b300", 103),
    Device("thor", 110, ("jetson-thor",)),
    Profile(
        "thor-agx", 110, ("agx-thor", "jetson-agx-thor"), tflops=258.8, gbytes=273.0, launch_us=6.0,
        source="NVIDIA Jetson T5000 data sheet, 2,070 sparse FP4 TFLOP/s: an eighth is dense float16",
    ),
    Device("rtx-50", 120),
    Profile(
        "rtx-5090", 120, tflops=209.5, gbytes=1792.0, launch_us=3.0,
        source="NVIDIA RTX Blackwell white paper: 838 sparse FP16 TFLOP/s, a quarter with float32 sums and without sparsity",
    ),
    Device("dgx-spark", 121, ("spark",)),
)  # fmt: skip
PROFILES: dict[str, Profile] = {device.name: device for device in DEVICES if isinstance(device, Profile)}
NAMES = ", ".join(device.name for device in DEVICES)
SMS = ", ".join(map(str, TARGETS))
HOW = "a name such as orin or rtx-4090, or the SM as 87, sm_87 or 8.7"  # of help texts

_BETWEEN = re.compile(r"(?<=[a-z])[ _-](?=[a-z0-9])|(?<=[0-9])[ _-](?=[a-z])")  # words of a name; never digits of a number


def _key(text: str) -> str:
    return _BETWEEN.sub("", text.strip().lower())


_NUMBERS = {_key(text): sm for sm, t in TARGETS.items() for text in (str(sm), f"sm_{sm}", t.arch, f"{sm // 10}.{sm % 10}")}
_DEVICES = {_key(text): device for device in DEVICES for text in (device.name, *device.also)}


def sm_named(text: str) -> int:
    """The SM that a name or a number says. Raises `UserError` that lists both for another one."""
    key = _key(text)
    if key in _NUMBERS:
        return _NUMBERS[key]
    if key in _DEVICES:
        return _DEVICES[key].sm
    if re.fullmatch(r"(sm)?[-+.0-9]+a?", key):
        raise UserError(f"--sm: unknown SM {shown(text, limit=40, quoted=False)}; expected some of {SMS}, or a device: {NAMES}")
    raise UserError(f"unknown device {shown(text, limit=40)}; expected some of {NAMES}, or an SM of {SMS}")


def profile_named(text: str, beside: tuple[str, ...] = ()) -> Profile:
    """The board of a name. Raises `UserError` that lists the profiles for another name, also for one of several boards whose
    figures differ, and for an SM. `beside`: what else the caller would have taken."""
    key = _key(text)
    device = _DEVICES.get(key)
    if isinstance(device, Profile):
        return device
    known = ", ".join([*beside, *PROFILES])
    if device is None and key not in _NUMBERS:
        raise UserError(f"unknown device {shown(text, limit=40)}; expected one of {known}")
    sm = _NUMBERS[key] if device is None else device.sm
    boards = [name for name, profile in PROFILES.items() if profile.sm == sm]
    cure = f"name a board of sm_{sm} that has them: {', '.join(boards)}" if boards else f"expected one of {known}"
    raise UserError(f"device {shown(text, limit=40)} has no figures to model it by; {cure}")


def known_sms(sms: Iterable[int | str]) -> tuple[int, ...]:
    """The SMs of names or numbers in order, each once. Raises `UserError` for an unknown one, also where no kernel is needed:
    scripts and names of a bundle say the SM too."""
    return tuple(sorted({sm_named(str(sm)) for sm in sms}))


def parse_sms(text: str | None) -> tuple[int, ...] | None:
    """`orin,8.9` to (87, 89); None and `all` mean every SM that ships. Raises `UserError` for an unknown device or SM."""
    return None if text in (None, "all") else known_sms(str(text).split(","))


def parse_sm(text: str) -> int:
    """The one SM that `--sm` names. Raises `UserError` for several, and for an unknown one."""
    sms = parse_sms(text)
    if sms is None or len(sms) != 1:
        raise UserError(f"--sm {text}: a bundle is for one SM, for example --sm 87 or --sm orin")
    return sms[0]
