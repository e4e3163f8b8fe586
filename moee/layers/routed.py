"""The routed FFN as a module: experts are lists of neuron ids into one shared weight store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moee.errors import UserError
from moee.layers import ops
from moee.layers.activations import activate, find_activation
from moee.layers.routing import route, scores

MASKED_TOKENS = 128  # an expert, up to which training on a CPU computes all neurons under a mask
# On a GPU, up to so many times the multiplications of the groups. Groups gather their weights, run one after another and make the
# host wait, so they are taken to reach half of a large product's rate. That is assumed and not measured.
MASKED_EXCESS = 2.0
LOAD_UNIT = 1_000_000  # loads are parts per million


@dataclass(frozen=True)
class Experts:
    """Everything a routed FFN computes with: shapes as in the operator's contract, float32, neuron ids int32."""

    router: Tensor
    router_bias: Tensor
    w_up: Tensor
    b_up: Tensor
    w_down: Tensor
    b_out: Tensor
    neurons: Tensor
    offsets: Tensor
    activation: str
    top_k: int = 1
    load: tuple[int, ...] = ()

    @property
    def widths(self) -> list[int]:
        return self.offsets.diff().tolist()


def check_indices(neurons: Tensor, offsets: Tensor, experts: int, union: int) -> None:
    """Raise `UserError` unless offsets rise from 0 to len(neurons) and each expert's ids ascend within [0, union)."""
    bounds = offsets.tolist()
    if len(bounds) != experts + 1 or bounds[0] != 0 or bounds[-1] != len(neurons) or bounds != sorted(bounds):
        raise UserError(f"offsets do not rise from 0 to {len(neurons)} in {experts} steps; the artifact is damaged")
    if len(neurons) and (int(neurons.min()) < 0 or int(neurons.max()) >= union):
        raise UserError(f"a neuron id lies outside 0..{union - 1}; the artifact is damaged")
    if any((neurons[a:b].diff() <= 0).any() for a, b in zip(bounds, bounds[1:], strict=False)):
        raise UserError("an expert's neuron ids do not ascend; the artifact is damaged")


class RoutedLayer(nn.Module, ABC):
    """What evaluation, cost, checkpoints, parity and export need of a layer that sends tokens to experts.

    `router` (a parameter, frozen unless told otherwise; None where there is one expert and nothing to choose), `top_k`,
    `num_experts`, and what follows. `bypassed`: paths of the MLP's other parts, where it was no module of its own (see
    `moee.mlps.sites`).
    """

    router: nn.Parameter | None
    top_k: int
    channels_first: bool
    activation: str
    bypassed: tuple[str, ...] = ()
    masked = False  # train on all stored neurons under a mask, where the kind can

    @property
    @abstractmethod
    def num_experts(self) -> int:
        """Experts of the layer."""

    @property
    def dtype(self) -> torch.dtype:
        """The type that the layer computes in."""
        assert self.router is not None, "layers without a router say it themselves"
        return self.router.dtype

    @abstractmethod
    def routes(self, x: Tensor) -> Tensor:
        """Experts [tokens, top_k] int64 of the layer's input, tokens in reading order."""

    @abstractmethod
    def macs_per_token(self, share: Sequence[float] | Tensor) -> float:
        """MACs a token, router included, experts weighted by their share [K] of the tokens."""

    @property
    @abstractmethod
    def widths(self) -> list[int]:
        """Hidden neurons of each expert, or of a dense MLP of equal MACs."""

    @property
    @abstractmethod
    def union(self) -> int:
        """Hidden neurons stored, or those of a dense MLP of equally many weights."""

    def stored_numbers(self) -> int:
        """Parameters and the floating-point buffers of the router, which a layer of one expert has no use for; indices are not
        counted."""
        unused = ("router", "router_bias") if self.num_experts == 1 else ()
        own = [*self.named_parameters(), *((name, b) for name, b in self.named_buffers() if b.is_floating_point())]
        return sum(t.numel() for name, t in own if name not in unused)


class NeuronLayer(RoutedLayer):
    """A routed layer whose experts are hidden neurons of one store, so that its down map can be refitted.

    `w_down` [U, D], `b_out` [K, D], `neurons` [sum of widths] int32, `offsets` [K + 1] int32 as in the operator's contract.
    """

    w_down: nn.Parameter
    b_out: nn.Parameter
    neurons: Tensor
    offsets: Tensor

    @abstractmethod
    def activations(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """Hidden activations [n, H] of the stored neurons `kept` [H] for input tokens [n, D]."""


class RoutedFFN(NeuronLayer):
    """Takes the place of an fc1-act-fc2 MLP on [..., D] (or [B, D, H, W] with `channels_first`).

    Parameters `w_up` [U, D], `b_up` [U], `w_down` [U, D], `b_out` [K, D], `router` [K, D] (frozen unless told otherwise);
    buffers `router_bias` [K], `neurons` [sum of widths] int32, `offsets` [K + 1] int32.
    """

    router: nn.Parameter
    w_up: nn.Parameter
    b_up: nn.Parameter
    w_down: nn.Parameter
    b_out: nn.Parameter
    router_bias: Tensor
    neurons: Tensor
    offsets: Tensor

    def __init__(self, experts: Experts, channels_first: bool = False):
        super().__init__()
        check_indices(experts.neurons, experts.offsets, len(experts.router), len(experts.w_up))
        self.activation, self.top_k, self.load = find_activation(experts.activation).name, experts.top_k, tuple(experts.load)
        self.channels_first = channels_first
        self.masked = False  # whether training may take `_masked`
        self.max_width = max(experts.widths)
        for name in ("w_up", "b_up", "w_down", "b_out"):
            setattr(self, name, nn.Parameter(getattr(experts, name).detach().clone().float()))
        self.router = nn.Parameter(experts.router.detach().clone().float(), requires_grad=False)
        self.register_buffer("router_bias", experts.router_bias.detach().clone().float())
        self.register_buffer("neurons", experts.neurons.detach().clone().to(torch.int32))
        self.register_buffer("offsets", experts.offsets.detach().clone().to(torch.int32))

    @property
    def num_experts(self) -> int:
        return self.router.shape[0]

    @property
    def widths(self) -> list[int]:
        return self.offsets.diff().tolist()

    def macs_per_token(self, share: Sequence[float] | Tensor) -> float:
        """The router's scores, where there are several experts, and the two products of these weighted by their share of the
        tokens."""
        dim, scored = self.w_up.shape[1], self.num_experts if self.num_experts > 1 else 0
        weighted = sum(w * s for w, s in zip(self.widths, share, strict=True))
        return scored * dim + 2.0 * dim * float(weighted) * self.top_k

    @property
    def union(self) -> int:
        return self.w_up.shape[0]

    @property
    def store(self) -> ops.Store:
        """What its experts compute with, without copying."""
        return ops.Store(self.w_up, self.b_up, self.w_down, self.b_out, self.neurons, self.offsets, self.activation)

    def activations(self, tokens: Tensor, kept: Tensor) -> Tensor:
        return activate(torch.addmm(self.b_up[kept], tokens, self.w_up[kept].T), self.activation)

    def routes(self, x: Tensor) -> Tensor:
        """Experts [tokens, top_k] int64 of the layer's input, tokens in reading order."""
        x = x.movedim(1, -1) if self.channels_first else x
        return route(x.reshape(-1, x.shape[-1]), self.router, self.router_bias, self.top_k)

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_first:
            x = x.movedim(1, -1).contiguous()
        y = self._whole(x) if torch.compiler.is_exporting() or self._provided(x) else self._routed(x)
        return y.movedim(-1, 1) if self.channels_first else y

    def _provided(self, x: Tensor) -> bool:
        """Whether an implementation of the whole layer was provided for x's device, and no gradient is needed."""
        if x.device.type not in ops.WHOLE:
            return False
        return not torch.is_grad_enabled() or not (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def _whole(self, x: Tensor) -> Tensor:
        """The layer as the one operator that the contract describes. Under autocast tokens are rounded before they are routed, as
        in a graph of that precision."""
        x, store = self._cast(x)
        router = self.router if self.router.dtype == x.dtype else self.router.to(x.dtype)
        return ops.ffn(x, router, self.router_bias, *store, self.top_k, self.max_width, list(self.load))

    def _cast(self, x: Tensor) -> tuple[Tensor, ops.Store]:
        """Tokens and weights in autocast's type, which does not reach into a custom operator; as they are without it."""
        if not torch.is_autocast_enabled(x.device.type):
            return x, self.store
        dtype = torch.get_autocast_dtype(x.device.type)
        return x.to(dtype), self.store.to(dtype)

    def _routed(self, x: Tensor) -> Tensor:
        """Routed once, from the tokens as they come; the forward and the backward pass then have the same experts."""
        with torch.no_grad():
            chosen = route(x.reshape(-1, x.shape[-1]), self.router, self.router_bias, self.top_k)
        y = self._masked(x, chosen) if self._masked_pays(x) else self._grouped(x, chosen)
        if self.router.requires_grad and torch.is_grad_enabled():
            y = y * self._straight_through(x, chosen)
        return y

    def _grouped(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Each expert on its own tokens; chosen [tokens, top_k]."""
        x, store = self._cast(x)
        return ops.experts(x, chosen, *store)

    def _masked_pays(self, x: Tensor) -> bool:
        """Whether to train on all neurons under a mask, by `mask_pays`."""
        if not (torch.is_grad_enabled() and (x.requires_grad or self.w_up.requires_grad)):
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        width = len(self.neurons) / self.num_experts
        return mask_pays(
            x.device.type, self.masked, tokens=x.numel() // x.shape[-1] / self.num_experts, share=self.top_k * width / self.union
        )

    def _masked(self, x: Tensor, chosen: Tensor) -> Tensor:
        """The same function: every neuron of the store on every token, times the number of the token's experts that keep it.

        What no expert keeps is set to zero before the activation, all of which leave zero as it is: no overflow can pass.
        """
        tokens = x.reshape(-1, x.shape[-1])
        kept = torch.zeros(self.num_experts, self.union, device=x.device, dtype=torch.uint8)
        numbers, length = torch.arange(self.num_experts, device=x.device), len(self.neurons)
        owner = torch.repeat_interleave(numbers, self.offsets.diff(), output_size=length)  # else the host waits for the sum
        kept[owner, self.neurons.long()] = 1
        times = kept[chosen].sum(1)
        before = nn.functional.linear(tokens, self.w_up, self.b_up).masked_fill(times == 0, 0)
        hidden = activate(before, self.activation)
        if self.top_k > 1:
            hidden = hidden * times.to(hidden.dtype)
        return (hidden @ self.w_down + self.b_out[chosen].sum(1)).to(x.dtype).reshape(x.shape)

    def _straight_through(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Ones [..., 1] whose gradient is that of the chosen experts' softmax share: what lets a router be trained."""
        gates = torch.softmax(scores(x.reshape(-1, x.shape[-1]), self.router, self.router_bias), -1)
        share = gates.gather(1, chosen).sum(-1).reshape(*x.shape[:-1], 1)
        return share / share.detach()

    def extra_repr(self) -> str:
        widths = self.widths
        return (
            f"experts={self.num_experts}, union={self.union}, widths={min(widths)}..{max(widths)}, "
            f"top_k={self.top_k}, activation={self.activation}"
        )


def mask_pays(device: str, wanted: bool, *, tokens: float, share: float) -> bool:
    """Whether a training step is faster on all stored neurons under a mask than expert by expert.

    A few large products are faster than many small ones with gathered weights. On a CPU, where it must be `wanted`, that holds
    while an expert has few `tokens` (measured), which also bounds what is kept for the backward pass. On a GPU it is taken to
    hold unless the groups compute less than half, `share` being their part of the masked multiplications (not measured); a step
    then keeps as much as that of a dense layer of all stored neurons.
    """
    if device == "cuda":
        return share * MASKED_EXCESS >= 1.0
    return wanted and tokens <= MASKED_TOKENS


def routed_layers(model: nn.Module) -> dict[str, RoutedLayer]:
    """Every routed layer of a model by name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedLayer)}
