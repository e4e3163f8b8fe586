"""MoEE models on disk: `moee.json` and `model.safetensors` in one folder (schema `moee.model/2`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from moee.artifacts.answers import CODED, answers_of, check_answers
from moee.artifacts.card import model_card, write_card
from moee.artifacts.manifest import Info, Manifest, whole_stages
from moee.artifacts.model import MoeeModel
from moee.errors import UserError
from moee.interface.adapted import title_of_model
from moee.kinds.attention_records import attention_records, narrowed_in, rebuild_attention
from moee.kinds.kind import LayerRecord
from moee.kinds.merging_records import check_merging_record, merging_record, rebuild_merging
from moee.kinds.registry import layer_records, read_record, rebuild_layer
from moee.libraries.from_python import is_function_name
from moee.measure.probe import Probe, classes_told
from moee.methods.recipe import read_recipe_json
from moee.mlps.structure import read_mlp
from moee.models.licence import licence_of
from moee.models.model import MAX_DEPTH, ModelSpec, build_model, check_numbers, load_model, names_of
from moee.places.output_folder import OutputFolder
from moee.schema import checked, json_text, shown
from moee.store.artifact import read_manifest, write_manifest
from moee.store.result_kinds import CARD, MODEL
from moee.store.tensor_file import write_tensors
from moee.weights.weights_file import checkpoint_sha256, read_safetensors, refuse_not_finite

MANIFEST, WEIGHTS, PROBE = "moee.json", "model.safetensors", "probe.safetensors"
SCHEMA = "moee.model/2"
ROUTER = ("router", "router_bias")  # of a routed layer; they may be buffers
MAX_MLP_RATIO = 64  # hidden over token width; models have 4


def save(moee: MoeeModel, path: Path | str, force: bool = False, inputs: tuple[Path, ...] = ()) -> None:
    """Write the artifact atomically. Raises `UserError` if `path` exists and `force` is off, or must not be replaced, as one of
    the `inputs` must not; the artifact is written beside it then, since it may have taken hours, and the message says where. A
    file of weights whose hash nobody took yet gets it here: `load` wants one."""
    spec = moee.spec
    if spec.weights is not None and spec.weights_sha256 is None and Path(spec.weights).is_file():
        spec = spec.model_copy(update={"weights_sha256": checkpoint_sha256(Path(spec.weights))})
    with OutputFolder(path, MODEL, force, inputs).write(late=True) as folder:
        write_tensors(moee.model.state_dict(), folder / WEIGHTS)
        if moee.probe is not None:
            write_tensors(moee.probe.state(), folder / PROBE)
        body = {**manifest_body(moee), "model": spec.model_dump(mode="json")}
        if spec.library in CODED:
            body["info"]["answers"] = answers_of(moee.model)
        write_card(folder, model_card(body))
        write_manifest(folder, MANIFEST, SCHEMA, body)


def manifest_body(moee: MoeeModel) -> dict[str, Any]:
    """What `moee.json` says of a model, as JSON has it."""
    body = {
        "model": moee.spec.model_dump(mode="json"),
        "recipe": moee.recipe.to_json() if moee.recipe else None,
        "data": moee.data,
        "classes": list(moee.classes),
        "layers": layer_records(moee.model),
        "attention": attention_records(moee.model),
        "merging": merging_record(moee.model),
        "info": {"licence": licence_of(moee.spec), **moee.info},
    }
    return cast(dict[str, Any], json.loads(json_text(body)))


def load(path: Path | str, model: Word | None = None) -> MoeeModel:
    """Read an artifact; the caller's random state is left as it was. `model`: the user's function `package.module:function`, or
    module, that its model comes from, without which none is imported. Raises `UserError` for a damaged, foreign or inconsistent
    one."""
    path = Path(path)
    manifest = read_manifest(path, MANIFEST, SCHEMA)
    body = checked(Manifest, manifest, path / MANIFEST)
    records = [read_record(item, path / MANIFEST) for item in body.layers]
    if len({record.name for record in records}) != len(records):
        raise UserError(f"{path / MANIFEST} lists a layer twice; make the artifact again")
    if len({record.name for record in body.attention}) != len(body.attention):
        raise UserError(f"{path / MANIFEST} lists an attention twice; make the artifact again")
    spec, data = vouched(body.model, model), body.data
    if spec.weights is not None and spec.weights_sha256 is None:
        named = shown(spec.weights)
        raise UserError(f"{path / MANIFEST} has no hash of the weights {named} that it names; make the artifact again")
    recipe = read_recipe_json(body.recipe, path / MANIFEST) if body.recipe else None
    info = {"layers": [], **manifest["info"], "stages": whole_stages(manifest["info"].get("stages", {}))}
    _check_shares(body.info, records, path)
    for name in (WEIGHTS, PROBE, CARD):
        if name not in manifest["files"] and (path / name).exists():
            raise UserError(f"{path / MANIFEST} has no hash of {name}, which lies beside it; make the artifact again")
    state = read_safetensors(path / WEIGHTS)
    _check_size(spec, state, records, body, path)
    with torch.random.fork_rng(devices=[]):  # modules draw weights, which are then replaced
        made = build_model(spec)
        for record in records:
            rebuild_layer(made, record, state)
        rebuild_attention(made, body.attention, state, path / MANIFEST)
        rebuild_merging(made, body.merging)
    try:
        made.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path / WEIGHTS} does not fit its manifest: {str(error).splitlines()[-1].strip()}") from error
    learned = (*dict(made.named_parameters()), *(f"{record.name}.{part}" for record in records for part in ROUTER))
    refuse_not_finite({name: state[name] for name in learned if name in state}, path / WEIGHTS)
    if spec.library in CODED:
        check_answers(made.eval(), body.info.answers)
    probe = _probe(path / PROBE, made)
    return MoeeModel(made.eval(), spec, recipe, data, probe, info, _classes(body.classes, made, probe, path))


def _classes(names: list[str], model: nn.Module, probe: Probe | None, path: Path) -> tuple[str, ...]:
    """The manifest's classes. Raises `UserError` unless there is one for each output."""
    told = classes_told(model, probe)
    if names and len(names) != told:
        raise UserError(f"{path / MANIFEST} names {len(names)} classes, the model tells {told} apart; make the artifact again")
    return tuple(names)


Word = str | nn.Module  # by which a user vouches for a model that a file names: its function, or the module itself


def vouched(spec: ModelSpec, word: Word | None) -> ModelSpec:
    """`spec`, which a file names, with the function that the user names for it, or the module that the user gives. Raises
    `UserError` for a word that is no function, for one about a model that needs none, and for a module with other weights."""
    if word is None:
        return spec
    if isinstance(word, nn.Module):
        if spec.library != "module":
            name = shown(spec.called, quoted=False)
            raise UserError(f"the model is {name}, which needs no module; leave it out")
        spec = spec.with_module(word)
        load_model(spec)
        return spec
    if spec.library != "python":
        name = shown(spec.called, quoted=False)
        raise UserError(f"--model {word}: the model is {name}, which needs no function; leave it out")
    if not is_function_name(word):
        raise UserError(f"--model {word}: expected package.module:function")
    return spec.with_word(word)


def _check_shares(info: Info, records: list[LayerRecord], path: Path) -> None:
    """Of stages since the experts were made fewer, if they were: before, there were more."""
    experts = {record.name: record.num_experts for record in records}
    stages = list(info.stages.items())
    since = next((number for number, (stage, _) in enumerate(stages) if stage == "shrunk"), 0)
    for stage, body in stages[since:]:
        for name, shares in body.shares.items():
            if len(shares) != experts.get(name, len(shares)):
                raise UserError(
                    f"{path / MANIFEST}: stage {shown(stage)} has {len(shares)} shares for the {experts[name]} experts of "
                    f"{name}; make the artifact again"
                )


def _probe(path: Path, model: nn.Module) -> Probe | None:
    """The probe beside the weights, if there is one. Raises `UserError` if its tensors do not fit together, or the model."""
    if not path.is_file():
        return None
    state = read_safetensors(path)
    refuse_not_finite(state, path)
    weight, bias = state.get("weight"), state.get("bias")
    if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1] or not len(bias):
        raise UserError(f"{path} should hold weight [classes, features] and bias [classes]; make the artifact again")
    widths = {getattr(model, name, 0) for name in ("num_features", "head_hidden_size")}
    if weight.dtype != torch.float32 or bias.dtype != torch.float32 or weight.shape[1] not in widths:
        raise UserError(
            f"{path} has {weight.dtype} weights for {weight.shape[1]} features; the model needs torch.float32 for "
            f"{max(widths)}; make the artifact again"
        )
    return Probe(weight, bias)


def _check_size(
    spec: ModelSpec, state: dict[str, Tensor], routed: list[LayerRecord], body: Manifest, path: Path
) -> None:
    """A manifest may ask for a model of any size, which would fill the memory before the weights were compared with it. So the
    model is first laid out without memory: every tensor outside the routed MLPs and narrowed attentions must be in the
    file, in that shape, and no MLP may be absurdly wide. Raises `UserError` otherwise."""
    model = laid_out(spec, path / MANIFEST, min(MAX_DEPTH, len(state)))
    expected = model.state_dict()
    check_merging_record(model, body.merging, path / MANIFEST)
    known = narrowed_in(model, body.attention, state, path / MANIFEST)
    narrowed = tuple(f"{name}.{part}." for name in known for part in ("qkv", "proj"))
    inside = tuple(f"{each}." for record in routed for each in _names_of_mlp(model, record, path / MANIFEST))
    for key, tensor in expected.items():
        if inside and key.startswith(inside):
            if tensor.ndim > 1 and max(tensor.shape[:2]) > MAX_MLP_RATIO * min(tensor.shape[:2]):
                raise UserError(f"{path / MANIFEST}: {key} has the shape {list(tensor.shape)}; no MLP is so wide")
        elif narrowed and key.startswith(narrowed):
            continue  # `narrowed_in` saw at least half of it in the file
        elif key not in state or state[key].shape != tensor.shape or state[key].dtype != tensor.dtype:
            wanted, came = _described(tensor), _described(state[key]) if key in state else "nothing"
            raise UserError(f"{path / WEIGHTS} does not fit its manifest: {key} should be {wanted}, came {came}")


def _names_of_mlp(model: nn.Module, record: LayerRecord, path: Path) -> list[str]:
    """Every name of the record's MLP and its parts. Raises `UserError` if `model` has none there: an artifact of before MLPs were
    proved may have cut what is none."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in (record.name, *record.parts):
        if name not in modules:
            raise UserError(f"{path} names layer {name}, which {title_of_model(model)} does not have")
    try:
        read_mlp(model, record.name, record.parts)
    except UserError as error:
        raise UserError(f"{path} has a cut layer that cannot be right: {error}; extract again") from error
    return [each for name in (record.name, *record.parts) for each in names_of(model, modules[name])]


def laid_out(spec: ModelSpec, path: Path, most_blocks: int = MAX_DEPTH) -> nn.Module:
    """The model of `spec`, which the manifest `path` names, on the device meta: its shapes and its input, without weights. Raises
    `UserError` for arguments whose construction alone would take the machine, and for a model that timm does not make."""
    if spec.library != "python":  # whose arguments mean what the user's own code makes of them
        check_numbers({**(spec.config or {}), **spec.kwargs}, path, most_blocks)
    with torch.device("meta"):
        return build_model(spec)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
