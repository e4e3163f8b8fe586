"""The folder that `moee plan --emit` writes: candidates for a device, and the measure.sh that times them there."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from exporter.deploy import DEPLOY
from exporter.engines import plugin_cache
from exporter.graph.export import DENSE, DENSE_DATA, MOEE_DATA, TENSORRT
from exporter.ship.contents import graph_tensors, write_sums
from exporter.targets.candidates import digest, exported, held_out_batch
from moee.places.output_folder import OutputFolder
from moee.planning.emitted import Sending, Sent
from moee.planning.shortlist import Candidate
from moee.progress import Reporter, silent
from moee.stages.session import Session
from moee.store.artifact import sha256_file, write_manifest
from moee.store.scratch import temporary_folder
from plugins.library.bundle import write_bundle

SCHEMA, MANIFEST = "moee.emit/1", "emit.json"
SCRIPTS = ("measure.sh", "device.sh")
IMAGES = "images.bin"  # float32 [batch, C, H, W], as trtexec --loadInputs reads it


@dataclass(frozen=True)
class Order:
    """How candidates are to be measured: images a batch, precision of the graphs, the SM that the plugin's kernels are for."""

    batch: int
    precision: str
    sm: int


@contextmanager
def emitting(
    output: OutputFolder, candidates: Sequence[Candidate], session: Session, order: Order, report: Reporter = silent
) -> Iterator[Sending]:
    """Write the folder; it appears at the end of the block, whole."""
    with output.write() as folder:
        yield write_candidates(folder, candidates, session, order, report)


def write_candidates(
    folder: Path, candidates: Sequence[Candidate], session: Session, order: Order, report: Reporter = silent
) -> Sending:
    """Fill an empty folder: graphs, weights and images, the plugin if a candidate needs it, scripts, SHA256SUMS, emit.json."""
    sending, with_plugin = collect(folder, candidates, session, order.batch, precision=order.precision, report=report)
    if with_plugin:
        write_bundle(folder / "plugin", order.sm, plugin_cache.ensure_kernels((order.sm,), report))
    for name in SCRIPTS:
        shutil.copy2(DEPLOY / name, folder / name)
    (folder / SCRIPTS[0]).chmod(0o755)
    ids = [candidate.id for candidate in sending.candidates]
    lines = [f"{name} {'yes' if name in with_plugin else 'no'}\n" for name in ids]
    (folder / "candidates.txt").write_text("".join(lines), encoding="ascii")
    _write_environment(folder, sending, bool(with_plugin))
    write_sums(folder)
    body = {**sending.model_dump(exclude={"candidates"}), "candidates": ids, "sm": order.sm, "data": session.source}
    write_manifest(folder, MANIFEST, SCHEMA, {**body, "model": session.spec.model_dump(mode="json")})
    return sending


def collect(
    folder: Path, candidates: Sequence[Candidate], session: Session, batch: int, *, precision: str, report: Reporter = silent
) -> tuple[Sending, set[str]]:  # fmt: skip
    """Put the dense graph, each candidate's graph and weights, and a batch of images into a folder. Returns their ids, and those
    that need the plugin."""
    sent: list[Sent] = []
    with_plugin: set[str] = set()
    with temporary_folder() as scratch:
        for candidate in exported(candidates, session, precision, batch, scratch, report=report):
            if not sent:
                _move(candidate.folder, folder / "dense", (DENSE, DENSE_DATA))
            _move(candidate.folder, folder / "candidates" / candidate.id, (TENSORRT, MOEE_DATA))
            sent.append(Sent(id=candidate.id, modelled=candidate.modelled))
            if candidate.plugin:
                with_plugin.add(candidate.id)
    held_out_batch(session, batch).astype("<f4").tofile(folder / IMAGES)
    dense = digest({name: sha256_file(folder / "dense" / name) for name in (DENSE, DENSE_DATA)})
    facts = {"dense": dense, "batch": batch, "precision": precision}
    emit = digest({**facts, "candidates": [each.id for each in sent], "images": sha256_file(folder / IMAGES)})
    return Sending(emit=emit, dense=dense, batch=batch, precision=precision, candidates=sent), with_plugin


def _write_environment(folder: Path, sending: Sending, plugin: bool) -> None:
    """`measure.env`: shell variables; the input's name comes from the graph, hence quoted."""
    given, _ = graph_tensors(folder / "dense" / DENSE)
    values = {
        "EMIT": sending.emit, "DENSE": sending.dense, "INPUT": given.name, "SHAPE": "x".join(map(str, given.shape)),
        "BATCH": sending.batch, "PRECISION": sending.precision, "PLUGIN": "yes" if plugin else "no",
    }  # fmt: skip
    text = "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in values.items())
    (folder / "measure.env").write_text(text, encoding="utf-8")


def _move(source: Path, target: Path, names: Sequence[str]) -> None:
    target.mkdir(parents=True)
    for name in names:
        shutil.move(source / name, target / name)
