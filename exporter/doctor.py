"""`moee doctor`: what is installed, what is missing, and the command that adds it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Check:
    """One line of the report; `required` ones decide the exit code."""

    name: str
    found: str | None
    fix: str
    required: bool = False


def _version(*packages: str) -> str | None:
    for package in packages:
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def checks() -> list[Check]:
    """Everything that some command needs, in the order of the pipeline."""
    from exporter.pretrained import TIMM_NAME
    from moee.store.cache import cache_dir
    from plugins.cpu.build import prebuilt
    from plugins.library.build import find_cmake

    weights = cache_dir() / f"{TIMM_NAME}.safetensors"
    compiler = shutil.which("g++") or shutil.which("c++")
    operator = "came with moee" if platform.machine() in prebuilt() else None
    tensorrt = _version("tensorrt") if importlib.util.find_spec("tensorrt") else None
    return [
        Check("torch", _version("torch"), "pip install moee", True),
        Check("timm", _version("timm"), "pip install moee", True),
        Check("hdbscan", _version("hdbscan"), "pip install moee", True),
        Check("ONNX Runtime", _version("onnxruntime-gpu", "onnxruntime"), "pip install moee", True),
        Check("Triton (kernels ahead of time)", _version("triton"), "pip install triton (Linux)"),
        Check("TensorRT-RTX (engines with no GPU)", _version("tensorrt-rtx-cu13"), "pip install 'moee[rtx]'"),
        Check("TensorRT", tensorrt, "pip install 'moee[trt]', or the device's JetPack"),
        Check("C++ compiler (plugin)", compiler, "apt-get install g++"),
        Check("CMake (plugin)", find_cmake(), "pip install cmake"),
        Check(
            "operator of ONNX Runtime on this CPU",
            operator or (f"compiled by {compiler}" if compiler else None),
            "apt-get install g++",
        ),
        Check("NVIDIA GPU", _gpu(), "optional: kernels and engines run on one, everything else does not need it"),
        *_runners(),
        Check("dinov2-s weights", str(weights) if weights.is_file() else None, "fetched on first use of dinov2-s"),
    ]


def _gpu() -> str | None:
    """Name and SM of the GPU, and whether the kernels of routed layers support it."""
    from plugins.targets import DEFAULT_SMS

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    found = f"{torch.cuda.get_device_name(0)}, sm_{major}{minor}"
    if 10 * major + minor in DEFAULT_SMS:
        return found
    return f"{found}: unsupported by the routed kernels, which need tensor cores of sm_80 or later; use --method static here"


def _runners() -> list[Check]:
    """What can execute a graph or an engine here, each tried: an installed provider may still lack its driver."""
    from exporter.engines.build import BACKENDS
    from exporter.engines.worker import device_count
    from exporter.runners import PROVIDERS, provider_works

    found = []
    for name, (_, label, fix) in PROVIDERS.items():
        found.append(Check(f"run ONNX on {label}", f"--provider {name}" if provider_works(name) else None, fix))
    devices = device_count()
    for backend, (module, _, extra) in BACKENDS.items():
        works = importlib.util.find_spec(module) is not None and devices > 0 and torch.cuda.is_available()
        found.append(Check(f"run {backend} engines", "yes" if works else None, f"pip install 'moee[{extra}]' and an NVIDIA GPU"))
    return found
