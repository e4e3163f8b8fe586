"""`moee bundle`: one folder with everything that a device needs, to copy there and to build there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from exporter.deploy import DEPLOY
from exporter.graph.export import MANIFEST, TENSORRT
from exporter.passes.raw_pixels import take_raw_pixels
from exporter.ship import bundle_configs as configs
from exporter.ship.contents import MODELS, read_contents, write_sums
from exporter.ship.selftest_layers import layer_cases
from moee.artifacts.card import pass_card
from moee.artifacts.checkpoint import Word
from moee.errors import UserError
from moee.measure.probe import Probe
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder
from moee.store.artifact import read_json, write_json, write_manifest
from moee.store.result_kinds import DEPLOYMENT
from plugins.library.build import SOURCE
from plugins.library.bundle import write_bundle
from plugins.library.selftest import write_selftest

DEPLOYMENT_SCHEMA = "moee.deployment/2"
PIXELS = "tensorrt_pixels.onnx"


def write_deployment(
    export_dir: Path | str,
    out: Path | str,
    sm: int,
    kernels: Callable[[], Path],
    batch: tuple[int, int, int] = (1, 8, 32),
    *, force: bool = False,
    word: Word | None = None,
    probe: Probe | None = None,
) -> Path:
    """Write the folder for one SM from an export, and return its path.

    `kernels` gives the folder of the compiled kernels, and may take minutes for it: it is called after everything else was
    checked, and not for an export without plugin nodes, which gets no plugin. `batch` is the profile's (min, opt, max), `word`
    as in `exported_model`, `probe` the classifier of a model that ends in features, where it does not lie beside the artifact.
    Raises `UserError` for a foreign or damaged export, an SM that the kernels lack, or a pre-processing
    that the runner cannot do; the output appears whole or not at all.
    """
    export_dir, out = Path(export_dir), Path(out)
    low, opt, high = batch
    if not 1 <= low <= opt <= high:
        raise UserError(f"batch profile {low}/{opt}/{high} must satisfy 1 <= min <= opt <= max")
    target = OutputFolder(out, DEPLOYMENT, force, source_paths(export_dir))
    target.check()
    contents = read_contents(export_dir, word, probe)
    compiled = kernels() if contents.plugin_nodes else None
    layers = layer_cases(export_dir, contents, word) if compiled is not None else []
    recipe, head = contents.recipe, contents.head
    with target.write() as folder:
        _copy_models(export_dir, folder / "models")
        take_raw_pixels(
            folder / "models" / TENSORRT, folder / "models" / PIXELS, recipe.mean, recipe.std, contents.classifies
        )  # fmt: skip
        if head is not None:
            (folder / "models" / "head.bin").write_bytes(head.content)
        if compiled is not None:
            write_bundle(folder / "plugin", sm, compiled)
            write_selftest(folder / "selftest", layers)
        shutil.copytree(DEPLOY / "runner", folder / "runner", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(SOURCE / "csrc" / "compat", folder / "runner" / "compat")
        shutil.copy2(DEPLOY / "build.sh", folder / "build.sh")
        (folder / "build.sh").chmod(0o755)
        facts = configs.Facts(
            contents.given, contents.output, recipe, batch, contents.classes, contents.classifies, sm, contents.title,
            contents.names, plugin=contents.plugin_nodes > 0,
        )  # fmt: skip
        for name, text in configs.files(facts).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
            if name.endswith(".sh"):
                (folder / name).chmod(0o755)
        pass_card(export_dir, contents.export, folder)
        write_sums(folder)
        body = {"sm": sm, "batch": {"min": low, "opt": opt, "max": high}, **contents.to_json()}
        write_manifest(folder, "deployment.json", DEPLOYMENT_SCHEMA, body)
    return out


def _copy_models(export_dir: Path, models: Path) -> None:
    models.mkdir()
    for name in MODELS:
        shutil.copy2(export_dir / name, models / name)
    manifest = read_json(models / MANIFEST)  # without what a device does not need, such as the reference of an int8 export
    manifest["files"] = {name: digest for name, digest in manifest["files"].items() if (models / name).is_file()}
    if "reference" in manifest.get("graphs", {}):
        del manifest["graphs"]["reference"]
    write_json(models / MANIFEST, manifest)
