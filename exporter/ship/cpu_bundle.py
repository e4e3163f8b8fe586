"""The bundle for a CPU: the portable graph, how images are prepared, class names, and a script that runs it. Of an export with
`runtime.onnx` that graph too, and the operator that it needs: its sources, and the library for processors like this one."""

from __future__ import annotations

import logging
import platform
import shutil
from pathlib import Path

from exporter.deploy import DEPLOY
from exporter.graph.export import MOEE_DATA, PORTABLE
from exporter.graph.runtime_graph import KEY, RUNTIME
from exporter.runners.operator_cache import operator_or_reason
from exporter.ship import bundle_configs as configs
from exporter.ship.contents import read_contents, write_sums
from exporter.ship.deployment import DEPLOYMENT_SCHEMA
from moee.artifacts.card import pass_card
from moee.artifacts.checkpoint import Word
from moee.errors import UserError
from moee.measure.probe import Probe
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder
from moee.store.artifact import write_manifest
from moee.store.result_kinds import DEPLOYMENT
from plugins.cpu.build import FLAGS, LIBRARY, prebuilt, sources

log = logging.getLogger("moee")
CPU = "cpu"  # in place of an SM
README = """# {title}, for a CPU

    pip install numpy Pillow onnxruntime
    python3 run.py photos/*.jpg         # {what}
    python3 run.py --time 20 photo.jpg  # also milliseconds an image

run.py checks the files against SHA256SUMS, and resizes, crops and normalises as timm does.

| part | holds |
|---|---|
| models/portable.onnx, models/moee.data | the graph, of standard ONNX operators, and its weights |
| models/preprocess.txt | how images are prepared |
{rows}| MODEL_CARD.md | what was cut, on which data, the accuracy with its interval, the licence of the base model |
| SHA256SUMS, deployment.json | hashes; where the graph comes from |
"""


OPERATOR = "operator"  # the folder; also in deploy/run.py
OPERATOR_ROWS = """| models/runtime.onnx | the same with experts as an operator, which is faster; run.py takes it where it can |
| operator/ | the operator's library for {machines}; `operator/build.sh` compiles it on another, with a C++ compiler alone |
"""


def write_cpu_bundle(
    export_dir: Path | str, out: Path | str, *, force: bool = False, word: Word | None = None, probe: Probe | None = None
) -> Path:
    """Write the folder from an export, and return its path; `word` and `probe` as in `exporter.ship.deployment`.

    Raises `UserError` for a foreign or damaged export, a type that ONNX Runtime has no kernels for on the CPU, or a
    pre-processing that the script cannot do; the output appears whole or not at all.
    """
    export_dir, out = Path(export_dir), Path(out)
    target = OutputFolder(out, DEPLOYMENT, force, source_paths(export_dir))
    target.check()
    contents = read_contents(export_dir, word, probe)
    if contents.export.get("precision") == "bf16":
        raise UserError("ONNX Runtime has no bfloat16 kernels on the CPU; export in fp32 or fp16 for a bundle for the CPU")
    with target.write() as folder:
        models = folder / "models"
        models.mkdir()
        for name in (PORTABLE, MOEE_DATA):
            shutil.copy2(export_dir / name, models / name)
        (models / "preprocess.txt").write_text(configs.preprocess(contents.recipe), encoding="utf-8")
        rows = ""
        if KEY in contents.export.get("graphs", {}):
            shutil.copy2(export_dir / RUNTIME, models / RUNTIME)
            rows += _write_operator(folder / OPERATOR)
        if contents.names:
            (models / configs.LABELS).write_text(configs.lines(contents.names), encoding="utf-8")
            rows += f"| models/{configs.LABELS} | the classes' names |\n"
        if contents.head is not None:
            (models / "head.bin").write_bytes(contents.head.content)
            rows += "| models/head.bin | the classifier of the graph's features |\n"
        what = "the class of each" if contents.classes else "the features of each"
        text = README.format(title=contents.title.replace("`", "'"), what=what, rows=rows)
        (folder / "README.md").write_text(text, encoding="utf-8")
        shutil.copy2(DEPLOY / "run.py", folder / "run.py")
        pass_card(export_dir, contents.export, folder)
        write_sums(folder)
        write_manifest(folder, "deployment.json", DEPLOYMENT_SCHEMA, {"sm": None, **contents.to_json()})
    return out


def _write_operator(folder: Path) -> str:
    """Write the operator's sources and build.sh, and the libraries of the wheel, or the one for this machine's processor if
    it can be had; returns the README's rows."""
    (folder / "csrc").mkdir(parents=True)
    for source in sources():
        shutil.copy2(source, folder / "csrc" / source.name)
    script = folder / "build.sh"
    script.write_text((DEPLOY / "operator.sh").read_text(encoding="utf-8").replace("@FLAGS@", " ".join(FLAGS)), encoding="utf-8")
    script.chmod(0o755)
    libraries, reason = prebuilt(), ""
    if platform.machine() not in libraries:
        library, reason = operator_or_reason()
        libraries |= {platform.machine(): library} if library else {}
    if reason:
        log.warning("the bundle's operator has no library for %s: %s", platform.machine(), reason)
    for machine, library in libraries.items():
        (folder / machine).mkdir()
        shutil.copy2(library, folder / machine / LIBRARY)
    return OPERATOR_ROWS.format(machines=" and ".join(libraries) or "no processor yet")
