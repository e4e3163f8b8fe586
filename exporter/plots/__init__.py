"""Plots of an extracted artifact and of an ablation: `data` computes the numbers, `draw` and `ablation` turn them into SVG, and
`examples` makes what a report shows of images.

A model, images or tables come in; JSON and SVG files go out.
Imports moee.
"""

from __future__ import annotations

from pathlib import Path

from exporter.belonging import BELONGS_TO, source_ids
from exporter.plots import data as plot_data
from exporter.plots import draw
from exporter.plots.examples import make_examples, write_examples
from exporter.plots.figure import save_svg
from moee.artifacts.model import MoeeModel
from moee.data.image_set import ImageSet
from moee.data.transform import model_transform
from moee.places.output_folder import OutputFolder
from moee.progress import Reporter, silent
from moee.store.artifact import write_json, write_manifest
from moee.store.result_kinds import PLOTS

__all__ = ["draw", "plot_data", "write_examples", "write_plots"]


def write_plots(
    moee: MoeeModel, calibration: ImageSet, held_out: ImageSet, out: Path | str, *, images: int = 256, force: bool = False,
    report: Reporter = silent, source: Path | str | None = None,
) -> list[str]:  # fmt: skip
    """Write `routing`, `similarity`, `curves` and `patches`, each as .json and .svg, and `examples.json` into folder `out`.

    Returns the file names. Routes and examples are those of `images` held-out images, spread evenly; the curves are of the dense
    model on `calibration`. `source`: the artifact's folder, which the files then say they belong to. Raises `UserError` if `out`
    exists and `force` is off.
    """
    made_from = {BELONGS_TO: source_ids(source)}
    with OutputFolder(out, PLOTS, force).write() as folder:
        trace = plot_data.trace_routes(moee, held_out, images, report)
        dense = moee.dense()
        numbers = {
            "routing": plot_data.routing_by_class(trace),
            "similarity": plot_data.router_similarity(moee.model),
            "curves": plot_data.neuron_curves(dense, calibration, report=report),
            "patches": plot_data.expert_patches(trace),
        }
        figures = {
            "routing": draw.routing(numbers["routing"]),
            "similarity": draw.similarity(numbers["similarity"]),
            "curves": draw.curves(numbers["curves"]),
            "patches": draw.patches(numbers["patches"], held_out, model_transform(moee.model)),
        }
        for position, (name, figure) in enumerate(figures.items(), 1):
            if name != "routing":  # the manifest, which holds the hashes of the others
                write_json(folder / f"{name}.json", {**numbers[name], **made_from})
            save_svg(figure, folder / f"{name}.svg")
            report("draw", position, len(figures))
        write_json(folder / "examples.json", {**make_examples(moee, dense, held_out, trace, report), **made_from})
        body = {**numbers["routing"], **made_from}
        write_manifest(folder, PLOTS.manifest, body.pop("schema"), body)
        return sorted(path.name for path in folder.iterdir())
