"""The C++ side against plugins/contract.py, the kernels' argument names and the manifest's axis names."""

import re

import pytest

from plugins.contract import (
    ACTIVATIONS,
    ATTRIBUTES,
    INPUT_NAMES,
    OP_TYPE,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
)
from plugins.kernels.group import GROUP, SCORED
from plugins.kernels.spec import AXES, POINTERS, SCALARS
from plugins.library import tables
from plugins.library.build import SOURCE


def source(name: str) -> str:
    return (SOURCE / "csrc" / name).read_text()


def snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def enumerators(text: str, kind: str) -> list[str]:
    body = re.search(rf"enum (?:class )?{kind}[^{{]*{{(.*?)}}", text, re.DOTALL)
    assert body, f"no enum {kind}"
    return re.findall(r"\bk(?:In(?=[A-Z]))?([A-Z]\w*)", re.sub(r"//.*", "", body.group(1)))


def test_inputs_have_the_contracts_order():
    assert [snake(n) for n in enumerators(source("operator/operator.h"), "Input")] == list(INPUT_NAMES)


def test_activations_have_the_contracts_codes():
    line = re.search(r"kActivations\{(.*?)\}", source("operator/operator.h"))
    assert line and tuple(re.findall(r'"(\w+)"', line.group(1))) == ACTIVATIONS


def test_the_default_tactic_knows_a_group():
    text = source("operator/tactics.cpp")
    assert f"kGroupTokens = {GROUP};" in text and f"kScoredExperts = {SCORED};" in text


def test_plugin_name_version_and_namespace():
    text = source("operator/operator.h")
    for name, value in (("Name", OP_TYPE), ("Version", PLUGIN_VERSION), ("Namespace", PLUGIN_NAMESPACE)):
        assert f'kPlugin{name} = "{value}";' in text


def test_creator_fields_are_the_contracts_attributes():
    kinds = {"string": "kCHAR", "int": "kINT32", "ints": "kINT32"}
    found = re.findall(r'emplace_back\("(\w+)", nullptr, PluginFieldType::(\w+)', source("plugin/creator.cpp"))
    assert found == [(a.name, kinds[a.kind]) for a in ATTRIBUTES]
    assert tuple(name for name, _ in found) == tuple(a.name for a in ATTRIBUTES)


def test_kernel_arguments_are_known_to_the_generator_and_to_the_launcher():
    assert set(tables.POINTERS) == set(POINTERS) and set(tables.SCALARS) == set(SCALARS)
    known = enumerators(source("operator/tables.h"), "Arg")
    assert [snake(n) for n in known] == [*POINTERS, "scratch", *SCALARS]
    assert {f"k{n}" for n in known} == {*tables.POINTERS.values(), *tables.SCALARS.values(), "kScratch"}


def test_grid_axes_are_known_to_the_generator_and_to_the_launcher():
    assert list(tables.AXES) == list(AXES)
    assert [snake(n) for n in enumerators(source("operator/tables.h"), "Axis")] == list(AXES)


@pytest.mark.parametrize("forbidden", ["<cuda.h>", "getPluginRegistry()", "REGISTER_TENSORRT_PLUGIN", "std::exit"])
def test_sources_link_nothing_and_never_exit(forbidden):
    for file in (SOURCE / "csrc").rglob("*.*"):
        assert forbidden not in file.read_text(), file.name
