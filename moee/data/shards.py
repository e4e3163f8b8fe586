"""WebDataset shards: images in tar files, found through timm's `wds/` reader and read at their offsets.

timm's reader says which shards a split has and which members of a sample count. Its iterator is not used: over several ranks it
hands out a rounded-up share of the total to each, so that some images come twice and some never, and it knows no positions. One
scan of the tar headers gives the exact count, the labels and a place for every image; a rank then reads its own shards only,
front to back, as a stream. Members are never extracted, and nothing but images and `.cls` numbers is decoded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image
from torch import Tensor

from moee.data.class_names import listed
from moee.data.image_set import SPLITS, Division, ImageSet, Source, divide
from moee.data.source import DataSource
from moee.data.split_names import Names
from moee.data.transform import Transform, decoded, evaluation
from moee.errors import MissingDependency, UserError
from moee.progress import Reporter, silent
from moee.schema import shown
from moee.store.artifact import read_json, stays_inside
from moee.store.file_content import Stored, files_digest

PREFIX = "wds/"
INFO = ("_info.json", "info.json")
MAX_LABEL_BYTES, MAX_LABEL = 32, (1 << 31) - 1
OPEN_FILES = 8


Member = tuple[int, int, int, int]  # number of the shard, first byte, bytes, label (-1: none)
Unlabelled = dict[str, tuple[int, str]]  # why images have no label: how many, and what the first one has instead


class Shards(DataSource):
    """`wds/FOLDER`."""

    def takes(self, name: str) -> bool:
        return name.startswith(PREFIX)

    def path(self, name: str) -> str:
        return name.removeprefix(PREFIX)

    def open(self, name: str, transform: Transform, splits: Sequence[str], seed: int, report: Reporter = silent) -> Source:
        return open_shards(name, transform, seed)


class ShardSet(ImageSet):
    """Images of tar shards in the order in which the shards hold them."""

    def __init__(
        self, name: str, shards: list[Path], members: Tensor, numbers: list[int], classes: list[str], *, transform: Transform
    ):  # fmt: skip
        places = {number: position for position, number in enumerate(numbers)}
        super().__init__(name, [places.get(label, -1) for label in members[:, 3].tolist()], classes)
        self.shards, self.transform, self.prepare = shards, transform, evaluation(transform)
        self.places = members[:, :3].clone()  # int64 [N, 3]: shard, first byte, bytes; 24 bytes an image
        self._open: dict[int, int] = {}

    def load(self, index: int) -> Tensor:
        return self.prepare(self.picture(index))

    def picture(self, index: int) -> Image.Image:
        shard, offset, size = self.places[index].tolist()
        raw = os.pread(self._descriptor(shard), size, offset)
        return decoded(io.BytesIO(raw), self.transform)

    def stored(self, index: int) -> Stored:
        shard, offset, size = self.places[index].tolist()
        return Stored(str(self.shards[shard]), offset, size)

    def content(self, report: Reporter = silent) -> bytes:
        """The shards, and which of their bytes are this split's."""
        places = hashlib.sha256(self.places.numpy().data).digest()
        return places + files_digest([str(path) for path in self.shards], self.name.removeprefix(PREFIX), report)

    def describe(self, index: int) -> str:
        shard, offset, _ = self.places[index].tolist()
        return f"{self.shards[shard]}, byte {offset}"

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return self._open[shard]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


def open_shards(source: str, transform: Transform, seed: int) -> Source:
    """The splits of `wds/FOLDER`; the numbers in `.cls` members are the names of the classes.

    The folder's `_info.json` names the shards of each split, as timm expects; without one their names do
    (`moee.data.split_names`), and where none is a split's, a fifth of all images, drawn with `seed`, is held out. Raises
    `UserError` for a folder without shards, names that cannot be told apart, a damaged shard, or one whose count differs from
    `_info.json`; `MissingDependency` without webdataset.
    """
    root = Path(source.removeprefix(PREFIX))
    if not root.is_dir():
        raise UserError(f"data {source!r}: {root} is not a folder; expected wds/FOLDER with tar shards on this machine")
    if importlib.util.find_spec("webdataset") is None:
        raise MissingDependency("data wds/... needs the package webdataset; install it with pip install 'moee[stream]'")
    unlabelled: dict[str, Unlabelled] = {"train": {}, "val": {}}
    train, divided = _members(root, "train", source, unlabelled["train"])
    if divided:
        parts = {"train": train, "val": _members(root, "val", source, unlabelled["val"])[0]}
        _refuse_repeated([*parts["train"][0], *parts["val"][0]])
    else:
        _refuse_repeated(train[0])
        shards, members = train
        parts = {split: (shards, members[positions]) for split, positions in divide(len(members), seed).items()}
    numbers = sorted({label for _, members in parts.values() for label in members[:, 3].unique().tolist() if label >= 0})
    classes = [str(number) for number in numbers]
    sets: dict[str, ImageSet] = {s: ShardSet(source, *part, numbers, classes, transform=transform) for s, part in parts.items()}
    if not divided:
        names = (f"{shards[shard].name} {offset}" for shard, offset in members[:, :2].tolist())
        division = Division.of(names)
        for data in sets.values():
            data.division = division
    return Source(sets, divided, indices=True, notes=[*_unread(root, parts), *_reasons(unlabelled, divided)])


def _reasons(unlabelled: dict[str, Unlabelled], divided: bool) -> list[str]:
    """Sentences that say why images have no label."""
    found = []
    for split, reasons in unlabelled.items():
        for why, (count, first) in reasons.items():
            images = f"{count} {'image' if count == 1 else 'images'}" + (f" of {split}" if divided else "")
            found.append(f"{images} {'has' if count == 1 else 'have'} no label: {why} (first: {first})")
    return found


@contextmanager
def _quiet_reader() -> Iterator[None]:
    """timm's reader warns of a missing `_info.json`, which no set needs here."""
    logger = logging.getLogger("timm.data.readers.reader_wds")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _members(root: Path, split: str, source: str, unlabelled: Unlabelled) -> tuple[tuple[list[Path], Tensor], bool]:
    """The shards of a split with the places of their images, and whether the set is divided into splits at all. `unlabelled`
    gets why images have no label."""
    wanted, divided = _split_of(root, split, source)
    try:
        with _quiet_reader():
            dataset: Any = timm.data.create_dataset(PREFIX, root=str(root.resolve()), split=wanted)
    except Exception as error:  # readers raise many kinds
        raise UserError(f"data {source!r}: timm cannot read it ({str(error).splitlines()[0]}); check {INFO[0]}") from error
    info = dataset.reader.split_info
    outside = [name for name in info.filenames if not stays_inside(root, name)]
    if outside:
        raise UserError(f"data {source!r}: {INFO[0]} names {outside[0]!r}, which leaves its folder")
    shards = [root / name for name in info.filenames]
    keys = dataset.reader.input_key.split(";")
    parts: list[Tensor] = []
    for number, path in enumerate(shards):
        found = torch.tensor(list(_scan(path, number, keys, unlabelled)), dtype=torch.int64).view(-1, 4)
        if info.shard_lengths and len(found) != info.shard_lengths[number]:
            raise UserError(f"{path} holds {len(found)} images, {INFO[0]} says {info.shard_lengths[number]}; make it again")
        parts.append(found)
    members = torch.cat(parts) if parts else torch.empty(0, 4)
    if not len(members):
        raise UserError(f"data {source!r}: no images in {len(shards)} shards; expected members such as 0001.jpg and 0001.cls")
    return (shards, members), divided


def _refuse_repeated(shards: list[Path]) -> None:
    """Raise `UserError` if a shard comes twice, under whatever name: its images would be trained on and held out."""
    seen: dict[tuple[int, int], Path] = {}
    for path in shards:
        facts = path.stat()
        first = seen.setdefault((facts.st_dev, facts.st_ino), path)
        if first is not path:
            raise UserError(f"{first} and {path} are one file, so images would be both trained on and held out; remove one")


def _split_of(root: Path, split: str, source: str) -> tuple[str, bool]:
    """What timm calls the split, and whether the set is divided into splits at all."""
    described = next((root / name for name in INFO if (root / name).is_file()), None)
    if described is not None:
        body = read_json(described)
        splits = body.get("splits") if isinstance(body, dict) else None
        known = splits if isinstance(splits, dict) else {}
        for name in SPLITS[split]:
            if name in known:
                return name, True
        raise UserError(f"{described} has no split {SPLITS[split][0]!r}, it has {', '.join(known) or 'none'}; add it")
    names = sorted(path.name for path in root.glob("*.tar"))
    unsafe = [name for name in names if set(name) & set("{},|:")]
    if not names or unsafe:
        came = f"{unsafe[0]!r}, a name with a character that timm reads as a pattern" if unsafe else "none"
        raise UserError(f"data {source!r}: expected *.tar shards in {root}, came {came}")
    read = Names([name.removesuffix(".tar") for name in names])
    parts = {"train": read.trained(), "val": read.held_out()}
    divided = bool(parts["train"] and parts["val"])
    kinds = {each.kind for each in read.read.values()}
    if not divided and len(kinds) > 1:
        raise UserError(
            f"data {source!r}: {root} holds {listed([*read.named, *read.others])}, of which it cannot be told what is trained on "
            f"and what is held out; call the shards train-*.tar and val-*.tar, or write {INFO[0]}"
        )
    chosen = [f"{name}.tar" for name in parts[split]] if divided else names
    return (chosen[0] if len(chosen) == 1 else "{" + ",".join(chosen) + "}"), divided


def _unread(root: Path, parts: dict[str, tuple[list[Path], Tensor]]) -> list[str]:
    """A sentence about shards that are in neither split, if there are any."""
    taken = {path.name for shards, _ in parts.values() for path in shards}
    beside = sorted(path.name for path in root.glob("*.tar") if path.name not in taken)
    return [f"shards of neither train nor val are not read ({listed(beside)})"] if beside else []


def _scan(path: Path, number: int, keys: list[str], unlabelled: Unlabelled) -> Iterator[Member]:
    """The images of one shard, from its headers. Neighbouring members with one stem are a sample, as WebDataset has it."""
    try:
        with tarfile.open(path, "r:") as archive:
            stem, parts = "", dict[str, tarfile.TarInfo]()
            for item in archive:
                if not item.isreg():
                    continue
                folder, _, name = item.name.rpartition("/")
                base, _, extension = name.partition(".")
                if f"{folder}/{base}" != stem:
                    yield from _sample(archive, parts, number, keys, unlabelled)
                    stem, parts = f"{folder}/{base}", {}
                parts[extension.lower()] = item
            yield from _sample(archive, parts, number, keys, unlabelled)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path} is not a readable tar file ({error}); make the shard again") from error


def _sample(
    archive: tarfile.TarFile, parts: dict[str, tarfile.TarInfo], number: int, keys: list[str], unlabelled: Unlabelled
) -> Iterator[Member]:  # fmt: skip
    image = next((key for key in keys if key in parts), None)
    if image is None:
        return
    label, why, came = _label(archive, parts, image)
    if why:
        count, first = unlabelled.get(why, (0, came))
        unlabelled[why] = count + 1, first
    yield number, parts[image].offset_data, parts[image].size, label


def _label(archive: tarfile.TarFile, parts: dict[str, tarfile.TarInfo], image: str) -> tuple[int, str, str]:
    """The number in a sample's `.cls`; or -1, why there is none, and what came. Nothing is said of an image that stands alone."""
    if "cls" not in parts:
        beside = sorted(key for key in parts if key != image)
        why = "labels are read from members .cls, which hold a number, and these have other members"
        return (-1, why, shown(f".{beside[0]}", quoted=False)) if beside else (-1, "", "")
    why = f"their .cls holds no number from 0 to {MAX_LABEL}"
    if parts["cls"].size > MAX_LABEL_BYTES:
        return -1, why, f"more than {MAX_LABEL_BYTES} bytes"
    handle = archive.extractfile(parts["cls"])
    text = handle.read().strip() if handle is not None else b""
    if text.isdigit() and int(text) <= MAX_LABEL:
        return int(text), "", ""
    return -1, why, shown(text.decode(errors="replace"))
