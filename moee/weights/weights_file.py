"""Read files of weights that come from others: safetensors, and what `torch.save` wrote.

Nothing in a file is run. Of a pickle only tensors, plain values and `argparse.Namespace` are taken (timm's train.py writes its
arguments as one), and sizes that the file cannot hold are refused before memory is taken for them.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import stat
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moee.errors import UserError
from moee.schema import parse_json, shown
from moee.store.artifact import sha256_file
from moee.weights.prefixes import is_average

PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")  # by torch.save; timm's own end in .pth.tar
READ = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
ZIP_START = b"PK\x03\x04"
ALONE = "save the state dict alone where it comes from: torch.save(model.state_dict(), FILE)"
INDEX = ".index.json"  # of shards, as transformers writes it
MAX_SHARDS = 1000
# containers of what a training keeps beside the weights, of their names and shapes: gradients and an optimiser's averages
TRAINING = re.compile(r"(^|[._])(optim\w*|opt|grads?|gradients?|exp_avg(_sq)?|momentum\w*)([._]|$)")
MAX_DEPTH = 3  # of dictionaries in a checkpoint: {"model": {"state_dict": {...}}}
MAX_CONTAINERS = 64
MAX_SHARING = 4  # tensors may share memory, as tied weights do; more than this is no model


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises `UserError` if it is missing, truncated or of another format."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file; expected one that a moee command wrote")
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"weights {path} not found; give an existing .safetensors file") from error
    except (SafetensorError, OSError, ValueError) as error:
        reason = shown(error, quoted=False)
        raise UserError(f"weights {path} are not valid safetensors ({reason}); fetch or convert them again") from error


def refuse_not_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise `UserError` for the first of a file's tensors that holds NaN or infinity: whatever comes of it would be no number."""
    for name, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not tensor.isfinite().all():
            raise UserError(f"{path}: {shown(name)} holds numbers that are not finite; make it again, or do not use it")


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """What a file of weights holds: tensors by name, or dictionaries that hold some (`containers` finds them).

    Tensors of files by `torch.save` are mapped where the format allows it: they take memory when they are used. Raises
    `UserError`, one sentence, for a file that is missing, damaged, of another format, or wants anything but data.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} not found; give an existing {', '.join(READ)} file with --checkpoint") from error
    if not stat.S_ISREG(mode):  # a pipe would be waited for, a device has no end
        raise UserError(f"checkpoint {path} is no ordinary file; give an existing {', '.join(READ)} file with --checkpoint")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.name.endswith(INDEX):
        return _read_shards(path)
    if path.suffix not in PICKLED:
        raise UserError(f"checkpoint {path} ends in {path.suffix or 'nothing'}; expected {', '.join(READ)}")
    content = _read_pickled(path)
    if not isinstance(content, Mapping):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}; expected a state dict, or a dictionary with one")
    return content


def shards_of(path: Path) -> list[Path]:
    """The files of an index of shards as transformers writes it, in order. Raises `UserError` as `_weight_map`, and for one that
    is not there."""
    shards = [path.parent / name for name in sorted(set(_weight_map(path).values()))]
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"checkpoint {path} names the shard {shown(shard.name)}, which is not beside it; put it there")
    return shards


def _weight_map(path: Path) -> dict[str, str]:
    """The shard of every tensor. Raises `UserError` for an index that is none, and for names that leave its folder."""
    try:
        places: dict[str, str] = parse_json(path)["weight_map"]
        names = sorted(set(places.values()))
        fine = all(Path(name).name == name and name.endswith((".safetensors", *PICKLED)) for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint {path} is no index of shards ({shown(error, quoted=False)}); save it again") from error
    if not names or not fine or len(names) > MAX_SHARDS:
        raise UserError(f"checkpoint {path} names {shown(names[:3])} as its shards; expected files of its own folder")
    return places


def _read_shards(path: Path) -> dict[str, Any]:
    """The tensors that an index names, each from its own shard: another shard may hold an older one of that name."""
    places = _weight_map(path)
    shards = {shard.name: read_checkpoint(shard) for shard in shards_of(path)}
    for name, shard in places.items():
        if name not in shards[shard]:
            raise UserError(f"checkpoint {path}: {shown(name)} is not in {shown(shard)}, which it names for it; save it again")
    return {name: shards[shard][name] for name, shard in places.items()}


def checkpoint_sha256(path: Path) -> str:
    """Hash of a file of weights; of an index of shards, over it and each of them."""
    if not path.name.endswith(INDEX):
        return sha256_file(path)
    return hashlib.sha256(" ".join(map(sha256_file, [path, *shards_of(path)])).encode()).hexdigest()


def checkpoint_size(path: Path) -> int:
    """Bytes of a file of weights, its shards included."""
    return sum(each.stat().st_size for each in ([path, *shards_of(path)] if path.name.endswith(INDEX) else [path]))


def _read_pickled(path: Path) -> Any:
    """The content of a file that `torch.save` wrote."""
    size = path.stat().st_size
    if not size:
        raise UserError(f"checkpoint {path} is empty; fetch or save it again")
    try:
        with open(path, "rb") as file:
            archive = file.read(len(ZIP_START)) == ZIP_START
        if archive:
            _check_archive(path, size)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own about formats; what is wrong is said in one sentence
            # in an archive the mapping bounds every tensor by the file; the format of 2020 and before cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except UserError:
        raise
    except Exception as error:  # whatever torch's readers make of bytes that are no checkpoint, MemoryError included
        raise UserError(f"checkpoint {path} {_reason(str(error), type(error).__name__)}") from error


def _check_archive(path: Path, size: int) -> None:
    """`torch.save` stores without compression, so the members are no larger than the file. Raises `UserError` where they are, and
    for TorchScript, whose archives hold code."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(m.filename.endswith("/constants.pkl") for m in members):
        raise UserError(f"checkpoint {path} is a TorchScript archive, which is code; {ALONE}")
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise UserError(f"checkpoint {path} is a compressed archive, which torch.save never writes; unpack it first")


def _reason(message: str, kind: str) -> str:
    """Why torch refused a file, and the cure."""
    wanted = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"but got <class '([\w.]+)'>", message)
    if wanted:
        name = shown(wanted[1], quoted=False)
        return f"wants {name}, and only tensors, plain values and argparse.Namespace are read; {ALONE}"
    if "legacy .tar" in message:
        return f"is damaged, or has the .tar format of before PyTorch 0.1.10; {ALONE}"
    if "Unsupported operand" in message or "Weights only load failed" in message or "WeightsUnpickler" in message:
        return f"is no checkpoint that torch.save wrote, or wants more than tensors and plain values; {ALONE}"
    last = next((line.strip() for line in reversed(message.splitlines()) if line.strip()), kind)
    return f"is damaged or no checkpoint by torch.save ({shown(last, quoted=False)}); fetch or save it again"


def containers(content: Mapping[str, Any], path: Path) -> list[tuple[str, dict[str, Tensor]]]:
    """Every dictionary of tensors in a checkpoint with its name (`state_dict_ema`, "" for the whole), averaged weights first, an
    optimiser's last.

    Raises `UserError` if there is none, or if tensors are larger than the file that should hold them.
    """
    found = list(islice(_walk(content, "", MAX_DEPTH, set()), MAX_CONTAINERS))
    if not found:
        keys = ", ".join(shown(str(key), quoted=False, limit=40) for key in list(content)[:5])
        raise UserError(f"checkpoint {path} holds no tensors by name ({keys or 'nothing'}); expected a model's state dict")
    size = checkpoint_size(path)
    for _, tensors in found:
        sizes = [t.numel() * t.element_size() for t in tensors.values()]
        if max(sizes) > size or sum(sizes) > MAX_SHARING * size:
            raise UserError(f"checkpoint {path} claims tensors of {sum(sizes)} bytes in a file of {size}; do not use it")
    return sorted(found, key=lambda item: (TRAINING.search(item[0].lower()) is not None, not is_average(item[0])))


def unusable(content: Mapping[str, Any], container: str) -> dict[str, str]:
    """What `containers` leaves out of one of a checkpoint's dictionaries: tensors without plain values in memory, by name, and
    what each is."""
    found: dict[str, str] = {}
    for part in _called(content, "", container, MAX_DEPTH):
        tensors = {key: value for key, value in part.items() if isinstance(key, str) and isinstance(value, Tensor)}
        found |= {key: _kind(tensor) for key, tensor in tensors.items() if not _plain(tensor)}
    return found


def _called(content: Mapping[str, Any], name: str, wanted: str, depth: int) -> Iterator[Mapping[str, Any]]:
    """The dictionaries that `_walk` calls `wanted`; only those on the way are entered."""
    if name == wanted:
        yield content
    for key, value in content.items() if depth else ():
        inner = f"{name}.{key}" if name else str(key)
        if isinstance(key, str) and isinstance(value, Mapping) and f"{wanted}.".startswith(f"{inner}."):
            yield from _called(value, inner, wanted, depth - 1)


def _kind(tensor: Tensor) -> str:
    if tensor.is_quantized:
        return "quantized"
    return str(tensor.layout).removeprefix("torch.") if tensor.layout != torch.strided else f"on the device {tensor.device.type}"


def _walk(
    content: Mapping[str, Any], name: str, depth: int, barren: set[tuple[int, int]]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Dictionaries of tensors in `content`. `barren`: those without any, by identity and depth. A small file may hold one of them
    under any number of names."""
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and _plain(value)}
    if tensors:
        yield name, tensors
    for key, value in content.items() if depth else ():
        if isinstance(key, str) and isinstance(value, Mapping) and (id(value), depth) not in barren:
            inner = _walk(value, f"{name}.{key}" if name else key, depth - 1, barren)
            first = next(inner, None)
            if first is None:
                barren.add((id(value), depth))
            else:
                yield first
                yield from inner


def _plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
