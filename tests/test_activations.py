"""One table of activations a language: the same names everywhere, the same values, and no default for another name."""

import re

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import timm.layers
import torch
from timm.layers.create_act import get_act_layer
from torch import nn

from exporter.passes.activation import FORMS
from exporter.passes.activation import activation as onnx_form
from exporter.passes.tape import Tape
from moee.errors import UserError
from moee.layers.activations import ACTIVATIONS, activate, activation_name, find_activation
from moee.layers.routed import Experts, RoutedFFN
from plugins import contract, dispatch
from plugins.kernels.common import REFERENCES, activate_reference
from plugins.library.build import SOURCE
from tests.moee.reference import random_problem

# How each is written down by its authors, in float64.
FORMULAS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
}


def test_every_language_has_the_same_rows():
    cpp = re.search(r"kActivations\{(.*?)\}", (SOURCE / "csrc" / "operator" / "operator.h").read_text(), re.DOTALL)
    assert cpp and re.findall(r'"(\w+)"', cpp.group(1)) == list(contract.ACTIVATIONS)
    cpu = re.search(r"ACTIVATIONS\[\] = \{(.*?)\}", (SOURCE / "cpu" / "csrc" / "layer.cpp").read_text())
    assert cpu and re.findall(r'"(\w+)"', cpu.group(1)) == list(contract.CPU_ACTIVATIONS)
    for table in (ACTIVATIONS, FORMS, REFERENCES, FORMULAS):
        assert sorted(table) == sorted(contract.ACTIVATIONS)
    assert all(row.name == name for name, row in ACTIVATIONS.items())


@pytest.mark.parametrize("name", FORMULAS)
def test_values_and_gradients(name):
    x = torch.linspace(-6, 6, 97, dtype=torch.float64, requires_grad=True)  # no point at relu's corner
    x = (x + 0.01).detach().requires_grad_()
    torch.testing.assert_close(activate(x, name), FORMULAS[name](x), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(activate_reference(x, contract.ACTIVATIONS.index(name)), FORMULAS[name](x), atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(find_activation(name).forward, x)
    upstream = torch.randn(97, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (expected,) = torch.autograd.grad(activate(x, name), x, upstream)
    torch.testing.assert_close(find_activation(name).gradient(upstream, x.detach()), expected, atol=1e-12, rtol=1e-12)
    assert activate(torch.zeros(3), name).tolist() == [0, 0, 0], "masks set neurons to zero before the activation"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", FORMULAS)
def test_onnx_forms(name, dtype):
    """bfloat16 has no kernels on the CPU: the graph must be valid and typed throughout."""
    kind = ir.DataType[{"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}[dtype]]
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20})
    x = ir.Value(name="x", type=ir.TensorType(kind), shape=ir.Shape([97]))
    graph.inputs.append(x)
    last = ir.Node("", "Identity", [x], name="last")
    graph.append(last)
    last.replace_input_with(0, onnx_form(Tape(graph, last, "layer"), x, name, kind))
    y = last.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(kind), ir.Shape([97])
    graph.outputs.append(y)
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    if dtype == "bfloat16":
        import onnx

        assert onnx.shape_inference.infer_shapes(proto, strict_mode=True, check_type=True).graph.output[0].name == "y"
        return
    values = np.linspace(-6, 6, 97).astype(dtype)
    (got,) = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": values})
    exact = FORMULAS[name](torch.from_numpy(values).double()).numpy()
    scale = np.maximum(1, np.abs(exact) / 6)  # squares and the like are larger than their argument, and so is their rounding
    assert (np.abs(got - exact) / scale).max() < {"float32": 2e-6, "float16": 8e-3}[dtype]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.GELU(), "gelu"), (nn.GELU(approximate="tanh"), "gelu_tanh"), (nn.ReLU(), "relu"), (nn.ReLU(inplace=True), "relu"),
        (nn.SiLU(inplace=True), "silu"), (timm.layers.GELU(), "gelu"), (timm.layers.GELUTanh(), "gelu_tanh"),
        (get_act_layer("quick_gelu")(), "quick_gelu"), (get_act_layer("swish")(), "silu"),
        (nn.Sequential(nn.GELU(), nn.Identity()), "gelu"), (nn.functional.relu, "relu"),
        (nn.ReLU6(), None), (nn.Hardswish(), None), (nn.Mish(), None), (nn.Identity(), None), (nn.Softmax(-1), None),
        (nn.GLU(), None), (nn.PReLU(init=0.0), None), (nn.LeakyReLU(1e-4), None), (nn.Linear(4, 4), None),
        (nn.Hardtanh(0.0, 1000.0), None), (lambda x: x.relu().sum(), None), (lambda x: (x, x), None),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)  # fmt: skip
def test_an_activation_is_what_it_computes(module, name):
    assert activation_name(module) == name


def test_classes_of_other_libraries_are_recognised():
    """As transformers writes them, whatever they are called."""

    class NewGELUActivation(nn.Module):
        def forward(self, x):
            return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))

    class ClippedGELU(nn.Module):
        def forward(self, x):
            return torch.clip(nn.functional.gelu(x), -10, 10)

    assert activation_name(NewGELUActivation()) == "gelu_tanh"
    assert activation_name(ClippedGELU()) is None


def test_an_unknown_name_raises_everywhere():
    with pytest.raises(UserError, match="unknown activation 'swish'; expected one of gelu, gelu_tanh, relu, silu, quick_gelu"):
        find_activation("swish")
    problem = random_problem(9, 16, 24, [20], activation="swish")
    del problem["x"]
    with pytest.raises(UserError, match="unknown activation 'swish'"):
        RoutedFFN(Experts(**problem))
    graph = ir.Graph([], [], nodes=[])
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        onnx_form(Tape(graph, ir.Node("", "Identity", []), "layer"), ir.Value(name="x"), "swish", ir.DataType.FLOAT)
    for code in (-1, len(contract.ACTIVATIONS)):
        with pytest.raises(ValueError, match="activation must be an index"):
            activate_reference(torch.zeros(1), code)
        with pytest.raises(ValueError, match="activation must be an index"):
            dispatch.run_sized(None, {}, None, activation=code)
