"""The accuracy of both graphs of an export, on images divided over ranks."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exporter.graph.export import DENSE, REFERENCE
from exporter.graph.runtime_graph import moee_graph
from exporter.manifests import read_export
from exporter.onnx_safety import load_ir
from exporter.parity.check import logits
from exporter.parity.taps import copied
from exporter.precision import INT8
from exporter.runners import graph_runner
from exporter.verification.accuracy import AccuracyResult, compare_accuracy
from moee.artifacts.model import MoeeModel
from moee.cures import cures
from moee.data.image_set import ImageSet, batches, merge_skipped
from moee.errors import UserError
from moee.measure.accuracy import NO_ANSWER, Comparison, comparison, top1
from moee.measure.probe import classes_told, head_drawn
from moee.parallel.group import Group, Parcel
from moee.progress import Reporter

ACCURACY_BATCH = 16


@dataclass(frozen=True)
class GraphAccuracy:
    """The accuracy of both graphs of an export on `images` images of `data` (None: all), divided over the ranks of `group`."""

    folder: Path
    moee: MoeeModel
    data: ImageSet
    images: int | None
    provider: str
    threads: int | None
    report: Reporter
    group: Group

    def early(self) -> Comparison:
        """What is known without running anything."""
        if self.images == 0:
            return Comparison(len(self.data), 0, "switched off with --images 0")
        told = classes_told(self.moee.model, self.moee.probe)
        drawn = head_drawn(self.moee.spec, self.moee.probe)
        data = self.data
        return comparison(data.labels, data.num_classes, told, data.name, drawn=drawn, unknown=data.unknown)

    def chosen(self) -> Tensor:
        """Positions of the images that are looked at: labelled ones, drawn once."""
        labelled = torch.tensor([index for index, label in enumerate(self.data.labels) if label >= 0])
        return labelled[torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0))][: self.images or None]

    def outputs(self, name: str) -> dict[str, Tensor]:
        """Logits [N, C] of `dense` or `moee` and labels [N] of the same images, in their order, on rank 0; nothing on the others.

        An int8 model is held against the dense one as it was, in float32: the loss of the quantisation is part of the drop."""
        answers: dict[str, Tensor] = {}
        with self.group.agreed():
            answers = self._own(name)
        if not self.group.alone:
            merge_skipped(self.data, self.group)
        parts = [part.tensors for part in self.group.gather(Parcel(None, answers)) if part.tensors]
        with self.group.agreed():
            if self.group.leader and not parts:
                first = self.data.describe(int(self.chosen()[0]))
                raise UserError(
                    f"none of the {len(self.chosen())} labelled images of {self.data.name} that are looked at could be read "
                    f"(first: {first}); "
                    + cures("check the files", "look at more with --images")
                )
        whole = {key: torch.cat([part[key] for part in parts]) for key in ("outputs", "labels")} if parts else {}
        return {"logits": logits(self.moee, whole["outputs"]), "labels": whole["labels"]} if whole else {}

    def _own(self, name: str) -> dict[str, Tensor]:
        """This rank's share; empty if it has no image to read."""
        manifest = read_export(self.folder, verify=False)
        precision = manifest.get("precision", "fp32")
        graph = moee_graph(manifest, self.provider) if name == "moee" else REFERENCE if precision in INT8 else DENSE
        order = self.chosen()
        share = self.group.part(len(order), ACCURACY_BATCH)
        order = order[share.start : share.stop]
        answers: dict[str, list[Tensor]] = {"outputs": [], "labels": []}
        with opened(self.folder / graph, self.threads, self.provider, precision == "bf16" and self.provider == "cpu") as runner:
            total = -(-len(order) // ACCURACY_BATCH)
            message = f"accuracy, {name}"
            self.report(message, 0, total)
            for done, batch in enumerate(batches(self.data, ACCURACY_BATCH, order=order, strict=False), 1):
                answers["outputs"].append(torch.from_numpy(runner.run(batch.images.numpy())[0]))
                answers["labels"].append(batch.labels)
                self.report(message, done, total)
        return {key: torch.cat(part) for key, part in answers.items() if part}

    def judge(self, dense: dict[str, Tensor], max_drop_pp: float | None) -> list[str]:
        """Why the dense graph's answers allow no comparison, what is wrong with that graph, and why the limit would fail no
        model, the same on every rank; each is empty for nothing. Extraction takes no model whose outputs are not finite, so such
        a graph is not what the model is."""
        verdict = None
        with self.group.agreed():
            if self.group.leader:
                told = classes_told(self.moee.model, self.moee.probe)
                drawn = head_drawn(self.moee.spec, self.moee.probe)
                compared = comparison(
                    dense["labels"], self.data.num_classes, told, self.data.name, logits=dense["logits"], drawn=drawn,
                    probe=self.moee.probe is not None, unknown=self.data.unknown,
                )  # fmt: skip
                reason = compared.reason
                silent = int((top1(dense["logits"]) == NO_ANSWER).sum())
                failure = f"its outputs are NaN or infinite on {silent} of {len(dense['logits'])} images; export again"
                idle = "" if max_drop_pp is None else compared.idle(max_drop_pp)
                verdict = [reason, f"the graph of the dense model is broken: {failure}" if silent else "", idle]
        return self.group.broadcast(Parcel(verdict) if self.group.leader else None).body

    def compare(self, dense: dict[str, Tensor], ours: dict[str, Tensor], max_drop_pp: float | None) -> AccuracyResult | None:
        """Both graphs' answers compared; None on ranks other than 0. Raises `UserError` where images can no longer be read."""
        with self.group.agreed():
            if not self.group.leader:
                return None
            if not torch.equal(dense["labels"], ours["labels"]):
                raise UserError(f"images of {self.data.name} that could be read before cannot be read any more; verify again")
            chosen = self.chosen()
            capped = len(chosen) < sum(label >= 0 for label in self.data.labels)
            unlabelled = 0 if capped else len(self.data) - len(chosen)
            probe = self.moee.probe is not None
            return compare_accuracy(dense["logits"], ours["logits"], dense["labels"], max_drop_pp, unlabelled, probe=probe)


@contextmanager
def opened(graph: Path, threads: int | None, provider: str, widen: bool):
    """A runner of a graph as it lies there, or of a float32 copy of a bfloat16 one."""
    if not widen:
        with graph_runner(graph, threads, provider) as runner:
            yield runner
        return
    with copied(load_ir(graph), graph, True) as path, graph_runner(path, threads, provider) as runner:
        yield runner
