"""Models of the Hugging Face hub and of folders in its layout: what timm downloads, and what to say where there is no network.

Without a network the hub's client tries again for a minute before it looks into its own cache. So the hub is asked for once, by
a connection; if there is none the client works offline: what is cached is found at once, and what is not is said at once.
"""

from __future__ import annotations

import contextlib
import json
import socket
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
from huggingface_hub import constants, errors
from timm.models import PretrainedCfg, parse_model_name
from torch import nn

from moee.cures import cures
from moee.errors import MissingDependency, UserError
from moee.schema import parse_json, shown

CONNECT_S = 5.0  # a hub that does not answer by then is out of reach
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth", "open_clip_model.safetensors",
           "open_clip_pytorch_model.bin")  # fmt: skip
FILE = "give a file with --checkpoint"
CONFIG = "config.json"
UNSAID = {name: getattr(PretrainedCfg(), name) for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
MAX_LABELS, MAX_LABEL = 1 << 15, 255  # class names, and characters of one
HUB_ERRORS = (OSError, errors.EntryNotFoundError)  # of its first versions, some are a ValueError as well


def reachable() -> bool:
    """Whether the hub answers."""
    return not constants.is_offline_mode() and host_reachable(constants.ENDPOINT)


def host_reachable(url: str) -> bool:
    """Whether the host of an address answers. Behind a proxy nobody can tell without asking it."""
    if urllib.request.getproxies():
        return True
    address = urllib.parse.urlsplit(url)
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), CONNECT_S).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def one_try() -> Iterator[None]:
    """A block in which the hub's client does not wait for a hub that is out of reach."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def pretrained_model(timm_name: str, **arguments: Any) -> nn.Module:
    """`timm.create_model` with pretrained weights. Raises `MissingDependency` if they cannot be had, `UserError` if there are
    none; what the model says to its arguments is passed on."""
    config = timm.get_pretrained_cfg(timm_name)
    if config is None or not (config.hf_hub_id or config.url or config.file):
        raise UserError(f"timm has no pretrained weights of {timm_name}; {cures(FILE, elsewhere='choose another')}")
    try:
        with one_try():
            return timm.create_model(timm_name, pretrained=True, **arguments)
    except Exception as error:  # the clients of the hub and of plain addresses raise many kinds
        if isinstance(error, (TypeError, AssertionError, ValueError)) and not isinstance(error, HUB_ERRORS):
            raise
        where = config.hf_hub_id or config.url
        raise _out_of_reach(f"pretrained weights of {timm_name}", str(where), error) from error


def _out_of_reach(what: str, where: str, error: Exception) -> MissingDependency:
    command = f"hf download {where}" if "://" not in where else f"curl -LO {where}"
    return MissingDependency(
        f"{what} could not be fetched ({type(error).__name__}) and are not in the cache; where there is a network run "
        f"`{command}`"
        + cures(", then give the file with --checkpoint", elsewhere=" there, and copy the cache")
    )


@dataclass(frozen=True)
class ModelFolder:
    """A model as timm saves it for the hub: `config` (the JSON of config.json) and the file of weights."""

    config: dict[str, Any]
    weights: Path

    @property
    def architecture(self) -> str:
        name = self.config.get("architecture")
        if not isinstance(name, str) or not timm.is_model(name.partition(".")[0]):
            raise UserError(f"{self.weights.parent / CONFIG} names the architecture {shown(name)}; expected one of timm's")
        return name

    @property
    def arguments(self) -> dict[str, Any]:
        """What the model was made with. Raises `UserError` where the file says it wrongly."""
        given = self.config.get("model_args", {})
        if not isinstance(given, dict):
            raise UserError(f"{self.weights.parent / CONFIG} has no object in model_args; save the model with timm again")
        return given

    @property
    def input(self) -> dict[str, Any]:
        """How its images are prepared: `mean`, `std`, `input_size` and so on. Older files have them beside the architecture.
        What a file leaves out is as timm takes it then, which is not what the architecture's own weights were trained with."""
        given = self.config.get("pretrained_cfg", self.config)
        said = {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else {}
        return {**UNSAID, **said}

    def labels(self) -> tuple[tuple[str, ...], str]:
        """Class names in the order of the head, as timm's `label_names`, and why the file's cannot be used ("" where they can, or
        are none)."""
        for key in ("label_names", "labels", "label_descriptions"):
            given = self.input.get(key) or self.config.get(key)
            if given:
                break
        else:
            return (), ""
        names = _ordered(given, key == "label_descriptions")
        if names is None:
            return (), f"{key} of its {CONFIG} is no list of names, nor one by their numbers"
        if len(names) > MAX_LABELS or not all(isinstance(n, str) and n.isprintable() and 0 < len(n) <= MAX_LABEL for n in names):
            return (), f"{key} of its {CONFIG} holds what is no class name"
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        return (tuple(names), "") if twice is None else ((), f"{key} of its {CONFIG} names {shown(twice)} twice")


def _ordered(given: Any, described: bool) -> list[Any] | None:
    """The values of a list, or of an object by the numbers that are its keys; of descriptions by name, the names."""
    if isinstance(given, list):
        return given
    if not isinstance(given, dict):
        return None
    if sorted(given) == sorted(map(str, range(len(given)))):
        return [given[str(number)] for number in range(len(given))]
    return list(given) if described else None


def source_of(name: str) -> tuple[str, str] | None:
    """("local-dir" or "hf-hub", folder or id) of a prefixed name; None for a plain one. Raises `UserError` for another prefix, or
    a plain name that looks like a path or an id."""
    try:
        source, where = parse_model_name(name)
    except ValueError as error:
        raise UserError(shown(error, quoted=False)) from error
    return (source, where) if source else None


def find_folder(source: str, where: str) -> ModelFolder:
    """The folder behind a `local-dir:` or `hf-hub:` name; the hub's files are fetched if need be.

    Raises `UserError` for a folder without a readable configuration or weights, `MissingDependency` if the hub is out of reach.
    """
    if source == "local-dir":
        folder = Path(where)
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder / CONFIG} not found; local-dir: expects a folder as timm saves it for the hub")
        return ModelFolder(_config(folder / CONFIG), _weights(folder))
    repository, _, revision = where.partition("@")
    with one_try():
        try:
            config = Path(huggingface_hub.hf_hub_download(repository, CONFIG, revision=revision or None))
            return ModelFolder(_config(config), _download(repository, revision or None))
        except UserError:
            raise
        except Exception as error:
            raise _out_of_reach(f"the files of hf-hub:{shown(where, quoted=False)}", repository, error) from error


def _config(path: Path) -> dict[str, Any]:
    try:
        body = parse_json(path)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not readable JSON ({shown(error, quoted=False)}); save the model with timm again") from error
    if not isinstance(body, dict):
        raise UserError(f"{path} holds no JSON object; save the model with timm again")
    return body


def _weights(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} holds no weights; expected one of {', '.join(WEIGHTS[:4])}")


def _download(repository: str, revision: str | None) -> Path:
    missing: Exception | None = None
    for name in WEIGHTS:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))
        except errors.EntryNotFoundError as error:  # offline, another name may be cached
            missing = error
    assert missing is not None
    raise missing
