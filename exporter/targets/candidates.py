"""Candidates as exports: each is made, exported and known by an id."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.graph.export import DENSE, DENSE_DATA, MOEE_DATA, TENSORRT, export
from exporter.manifests import read_export
from exporter.timing.device import dense_facts, modelled
from moee.artifacts.model import MoeeModel
from moee.data.image_set import batches
from moee.planning.budget import StoredLatency
from moee.planning.shortlist import Candidate
from moee.progress import Reporter
from moee.stages.session import Session
from moee.store.artifact import sha256_file
from plugins.devices import PROFILES


@dataclass(frozen=True)
class Exported:
    """A candidate in its export `folder`. `modelled`: dense and candidate in ms by the roofline, by the board's name."""

    id: str
    folder: Path
    plugin: bool
    modelled: dict[str, StoredLatency]


def exported(
    candidates: Sequence[Candidate], session: Session, precision: str, batch: int, place: Path, *, report: Reporter
) -> Iterator[Exported]:  # fmt: skip
    """Export the candidates one after another below `place`; each is removed when the next one is asked for."""
    facts = dense_facts(session.dense, session.transform.shape)
    first = place / "dense"  # the first one's dense graph, which is the others' too
    for number, candidate in enumerate(candidates):
        report("candidates", number, len(candidates))
        model, folder = candidate.make().eval(), place / f"export-{number}"
        known = first if first.is_dir() else None
        export(MoeeModel(model, session.spec, None, session.source), folder, precision=precision, dense_from=known)
        if known is None:
            first.mkdir()
            for name in (DENSE, DENSE_DATA):
                shutil.copy2(folder / name, first / name)
        figures = {name: modelled(board, session.dense, model, facts, batch) for name, board in PROFILES.items()}
        kept = {name: StoredLatency(dense_ms=said["dense_ms"], moee_ms=said["moee_ms"]) for name, said in figures.items()}
        needs_plugin = read_export(folder, verify=False)["plugin_nodes"] > 0
        yield Exported(candidate_id(candidate.point.recipe, folder), folder, needs_plugin, kept)
        shutil.rmtree(folder)
    shutil.rmtree(first, ignore_errors=True)
    report("candidates", len(candidates), len(candidates))


def candidate_id(recipe: dict[str, Any] | None, folder: Path) -> str:
    """What identifies a candidate: SHA-256 of its recipe, and of the graph and weights that a device gets."""
    files = {name: sha256_file(folder / name) for name in (TENSORRT, MOEE_DATA)}
    return digest({"recipe": recipe, "files": files})


def digest(facts: Any) -> str:
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def held_out_batch(session: Session, batch: int) -> np.ndarray:
    """The first held-out images [batch, C, H, W] float32, repeated where there are fewer: routing depends on images."""
    images = next(batches(session.held_out, batch)).images.numpy()
    return np.ascontiguousarray(np.resize(images, (batch, *images.shape[1:])), dtype=np.float32)
