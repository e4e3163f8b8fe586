"""Gated MLPs, down(act(gate(x)) * up(x)): what one of a model is, and the narrower one that takes its place.

A hidden neuron is a row of the gate, a row of the up map and a column of the down map. `moee.methods.neurons.gated_pruning` takes
those that stay. There is no router and no operator of its own in a graph: an export holds the plain products
(`exporter.passes.gated`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moee.errors import chosen
from moee.layers.activations import ACTIVATIONS, SAME, activation_name
from moee.layers.routed import NeuronLayer
from moee.models.ffn import FFN

NO_EXPERTS = "gated: only --preset static and --method corp cut it"
# of the gate: those of a plain MLP and the sigmoid of the first gated linear units (Dauphin et al. 2017), which is not 0 at 0
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    **{row.name: row.forward for row in ACTIVATIONS.values()}, "sigmoid": torch.sigmoid,
}  # fmt: skip


def find_gate(name: str) -> Callable[[Tensor], Tensor]:
    """The gate's activation of this name. Raises `UserError` for an unknown one."""
    return chosen(GATES, name, "activation of a gated MLP")


@torch.no_grad()
def gate_name(function: Callable[[Tensor], Tensor]) -> str | None:
    """As `moee.layers.activations.activation_name`, for the activation of a gate."""
    name = activation_name(function)
    if name is not None:
        return name
    grid = torch.linspace(-20, 20, 1601)
    try:
        values = function(grid.clone())
    except Exception:  # any code may stand behind it; what cannot take a vector is not elementwise
        return None
    alike = isinstance(values, Tensor) and values.shape == grid.shape and values.is_floating_point()
    return "sigmoid" if alike and bool(((values - torch.sigmoid(grid)).abs() <= SAME).all()) else None


@dataclass(frozen=True, kw_only=True)
class GatedMLP(FFN):
    """One gated MLP of a model; `w_gate` [H, D] and `b_gate` [H] beside what every MLP has, `stored` numbers in all.

    Which of two equal maps is the gate shows when it runs, and so does the activation where no module says it (`guesses`).
    """

    w_gate: Tensor
    b_gate: Tensor
    stored: int
    guesses: tuple[str, ...] = ()

    @property
    def params(self) -> int:
        return self.stored

    @property
    def neuron_macs(self) -> int:
        return 3 * self.dim

    @property
    def maps_in(self) -> tuple[Tensor, ...]:
        return self.w_gate, self.w_up

    @property
    def gated(self) -> bool:
        return True

    @property
    def formula(self) -> str:
        return "fc2(act(gate(x)) * up(x))"

    def routing_macs(self, experts: int) -> int:
        return 0

    def activations(self, tokens: Tensor) -> Tensor:
        gate = torch.addmm(self.b_gate, tokens, self.w_gate.T)
        return find_gate(self.activation)(gate) * torch.addmm(self.b_up, tokens, self.w_up.T)

    def readings(self) -> tuple[GatedMLP, ...]:
        """Every function that its maps may form, by their shapes; all have the same width."""
        orders = [self, self._permuted("up", "gate", "down")]
        if self.dim == self.hidden:
            orders += [
                self._permuted(*order)
                for order in (("gate", "down", "up"), ("down", "gate", "up"), ("up", "down", "gate"), ("down", "up", "gate"))
            ]
        return tuple(replace(order, activation=name) for order in orders for name in self.guesses or (self.activation,))

    def _permuted(self, gate: str, up: str, down: str) -> GatedMLP:
        w = {"gate": self.w_gate, "up": self.w_up, "down": self.w_down}
        b = {"gate": self.b_gate, "up": self.b_up, "down": self.b_down}
        return replace(
            self, w_gate=w[gate], b_gate=b[gate], w_up=w[up], b_up=b[up], w_down=w[down], b_down=b[down]
        )

    def proof(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        maps = ((self.w_gate, self.b_gate), (self.w_up, self.b_up), (self.w_down, self.b_down))
        (w_gate, b_gate), (w_up, b_up), (w_down, b_down) = ((w.float(), b.float()) for w, b in maps)
        gate = find_gate(self.activation)(torch.addmm(b_gate, tokens, w_gate.T))
        up = torch.addmm(b_up, tokens, w_up.T)
        hidden = gate * up
        size, walk = tokens.abs(), self.dim**0.5  # of biases, as in `FFN.proof`
        of_gate = torch.addmm(b_gate.abs() * walk, size, w_gate.abs().T)
        of_up = torch.addmm(b_up.abs() * walk, size, w_up.abs().T)
        rounded = of_gate * up.abs() + of_up * gate.abs() + hidden.abs()  # a product's error is each factor's times the other
        last = b_down.abs() * self.hidden**0.5
        return torch.addmm(b_down, hidden, w_down.T), torch.addmm(last, rounded, w_down.abs().T)


@dataclass(frozen=True)
class GatedWeights:
    """What a `GatedFFN` computes with, float32: gate and up [U, D] with biases [U], down [U, D] (transposed), `b_out` [1, D]."""

    w_gate: Tensor
    b_gate: Tensor
    w_up: Tensor
    b_up: Tensor
    w_down: Tensor
    b_out: Tensor


NAMES = ("w_gate", "b_gate", "w_up", "b_up", "w_down", "b_out")


def weight_shapes(dim: int, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a `GatedFFN`'s tensors."""
    rows, row = (width, dim), (width,)
    return dict(zip(NAMES, (rows, row, rows, row, rows, (1, dim)), strict=True))


class GatedFFN(NeuronLayer):
    """Takes the place of a gated MLP on [..., D] (or [B, D, H, W] with `channels_first`): the same with fewer neurons.

    To evaluation and parity it is a layer of one expert, which every token takes.
    """

    w_gate: nn.Parameter
    b_gate: nn.Parameter
    w_up: nn.Parameter
    b_up: nn.Parameter
    w_down: nn.Parameter
    b_out: nn.Parameter
    router = None
    top_k = 1

    def __init__(self, weights: GatedWeights, activation: str, channels_first: bool = False):
        super().__init__()
        find_gate(activation)
        self.activation, self.channels_first = activation, channels_first
        for name in NAMES:
            setattr(self, name, nn.Parameter(getattr(weights, name).detach().clone().float()))
        self.register_buffer("neurons", torch.arange(self.union, dtype=torch.int32), persistent=False)
        self.register_buffer("offsets", torch.tensor([0, self.union], dtype=torch.int32), persistent=False)

    @property
    def num_experts(self) -> int:
        return 1

    @property
    def dtype(self) -> torch.dtype:
        return self.w_up.dtype

    @property
    def widths(self) -> list[int]:
        return [self.union]

    @property
    def union(self) -> int:
        return self.w_up.shape[0]

    def macs_per_token(self, share: Sequence[float] | Tensor) -> float:
        """The three products; there is nothing to route."""
        return 3.0 * self.w_up.shape[1] * self.union

    def routes(self, x: Tensor) -> Tensor:
        """Expert 0 [tokens, 1] int64 for every token."""
        x = x.movedim(1, -1) if self.channels_first else x
        return torch.zeros(x.numel() // x.shape[-1], 1, dtype=torch.int64, device=x.device)

    def activations(self, tokens: Tensor, kept: Tensor) -> Tensor:
        gate = torch.addmm(self.b_gate[kept], tokens, self.w_gate[kept].T)
        return find_gate(self.activation)(gate) * torch.addmm(self.b_up[kept], tokens, self.w_up[kept].T)

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_first:
            x = x.movedim(1, -1).contiguous()
        compute = gated_ffn if torch.compiler.is_exporting() else _forward
        y = compute(x, self.w_gate, self.b_gate, self.w_up, self.b_up, self.w_down, self.b_out, self.activation)
        return y.movedim(-1, 1) if self.channels_first else y

    def extra_repr(self) -> str:
        return f"dim={self.w_up.shape[1]}, width={self.union}, activation={self.activation}"


def _forward(
    x: Tensor, w_gate: Tensor, b_gate: Tensor, w_up: Tensor, b_up: Tensor, w_down: Tensor, b_out: Tensor, activation: str
) -> Tensor:
    linear = nn.functional.linear
    return linear(find_gate(activation)(linear(x, w_gate, b_gate)) * linear(x, w_up, b_up), w_down.T, b_out[0])


@torch.library.custom_op("moee::gated_ffn", mutates_args=())
def gated_ffn(
    x: Tensor,
    w_gate: Tensor,
    b_gate: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    w_down: Tensor,
    b_out: Tensor,
    activation: str,
) -> Tensor:
    """x [..., D] to y [..., D]: what the exporter traces, so that the layer stays one node until it is lowered to products."""
    return _forward(x, w_gate, b_gate, w_up, b_up, w_down, b_out, activation)


@gated_ffn.register_fake
def _(x, w_gate, b_gate, w_up, b_up, w_down, b_out, activation):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
