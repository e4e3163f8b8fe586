"""Mutants that no test can notice, each with the reason: the program does the same, or what differs is promised nowhere."""

from __future__ import annotations

REFIT, LAYERS = "moee/calibrate/refit.py", "moee/calibrate/layer_sums.py"
ELIMINATION, ALLOCATION = "moee/calibrate/elimination.py", "moee/methods/neurons/allocation.py"
FILES, ROUTED = "moee/weights/weights_file.py", "moee/layers/routed.py"

COMPACTION = "when matrices are made smaller is a matter of time and memory; the neurons are the same"
LAST = "of two dimensions the last is the one after the first"
NAMES_SHOWN = "how many names a message lists, and how long they may be, is promised nowhere"

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (ELIMINATION, "for left in range(hidden - count, 0, -block):", "for left in range(hidden - count, -1, -block):"): (
        "one more round, in which none is removed"
    ),
    (
        ELIMINATION, "if count + left - block < COMPACT * len(alive):", "if count + left + block < COMPACT * len(alive):"
    ): COMPACTION,
    (
        ELIMINATION, "if count + left - block < COMPACT * len(alive):", "if count + left - block >= COMPACT * len(alive):"
    ): COMPACTION,
    (
        ELIMINATION,
        "total[e] = (hidden_activations(ffn, part.tokens[few]) * each[:, None]).sum(0, dtype=torch.float64)",
        "total[e] = (hidden_activations(ffn, part.tokens[few]) / each[:, None]).sum(0, dtype=torch.float64)",
    ): "the first mean may lie anywhere near: what it is off by is taken off afterwards",
    (
        ALLOCATION,
        "kept[name] = [ids[: int(w)].sort().values for ids, w in zip(ranked[name].indices, widths, strict=True)]",
        "kept[name] = [ids[: int(w)].sort().values for ids, w in zip(ranked[name].indices, widths, strict=False)]",
    ): "both have an entry an expert",
    (
        REFIT,
        "passes = self._passes(models, entry, some.names[0], orders, image)",
        "passes = self._passes(models, entry, some.names[ -1], orders, image)",
    ): "the layer that a line of progress names",
    (
        REFIT,
        "KEPT = 4  # numbers kept of the images on their way to a later stage, as a multiple of the tokens times the widest layer's width",  # noqa: E501
        "KEPT = 3  # numbers kept of the images on their way to a later stage, as a multiple of the tokens times the widest layer's width",  # noqa: E501
    ): "a bound of memory",
    (
        REFIT,
        "parts = min(PARTS, tokens // (PART_TOKENS * max(len(layer.b_out) for layer in self.layers.values())))",
        "parts = min(PARTS, tokens * (PART_TOKENS * max(len(layer.b_out) for layer in self.layers.values())))",
    ): "into how many parts the images are cut is a matter of time",
    (
        REFIT,
        "for own, model in zip(passes, models, strict=True):",
        "for own, model in zip(passes, models, strict=False):",
    ): "one is made of the other",
    (
        "moee/calibrate/ridge.py",
        "width = max(1, -(-len(gram) // BLOCKS))",
        "width = max(1, -(-len(gram) * BLOCKS))",
    ): "one product in place of ten smaller ones",
    (
        LAYERS,
        "routes = layer.routes(self.tokens.movedim(-1, 1) if layer.channels_first else self.tokens)[:, :1]",
        "routes = layer.routes(self.tokens.movedim(-1, 1) if layer.channels_first else self.tokens)[:, : 2]",
    ): "layers that are refitted send a token to one expert",
    (LAYERS, " @property", ""): "of a protocol, which is never run",
    (ROUTED, " @property", ""): "of an abstract class, whose kinds have their own",
    (ROUTED, "if self.top_k > 1:", "if self.top_k > 0:"): "a token of one expert has each of its neurons once",
    (
        "moee/calibrate/ridge.py",
        "BLOCKS = 4  # of a Gram matrix's columns: ten of their sixteen products are made",
        "BLOCKS = 5  # of a Gram matrix's columns: ten of their sixteen products are made",
    ): "how a symmetric product is cut is a matter of time",
    (
        LAYERS,
        "parts = [self.layer(part) for part in x.split(max(1, CHUNK * len(x) // max(1, x.numel() // self.ffn.dim)))]",
        "parts = [self.layer(part) for part in x.split(max(1, CHUNK * len(x) // max( 2, x.numel() // self.ffn.dim)))]",
    ): "a single token is one part in any case",
    (
        "moee/layers/routing.py",
        "return torch.where(torch.isfinite(raw).all(-1, keepdim=True), raw, torch.zeros_like(raw))",
        "return torch.where(torch.isfinite(raw).all(1, keepdim=True), raw, torch.zeros_like(raw))",
    ): LAST,
    ("moee/layers/routing.py", "return values.argmax(-1, keepdim=True)", "return values.argmax(1, keepdim=True)"): LAST,
    (
        "moee/layers/routing.py",
        "return values.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]",
        "return values.sort(dim=1, descending=True, stable=True).indices[:, :top_k]",
    ): LAST,
    ("moee/layers/routing.py", "if top_k == 1:", "if top_k == 0:"): "the first of a stable sort is the first largest",
    (
        ELIMINATION,
        "COMPACT = 0.75  # of the neurons: when so few are left, matrices are made that hold no others",
        "COMPACT = -0.25  # of the neurons: when so few are left, matrices are made that hold no others",
    ): COMPACTION,
    (
        ALLOCATION,
        "error, cost = errors[order].cumsum(0), costs[order].cumsum(0)",
        "error, cost = errors[order].cumsum(0), costs[order].cumsum( -1)",
    ): "of one dimension the first is the last",
    (
        ALLOCATION,
        "shape = blocks[name][0].shape",
        "shape = blocks[name][ -1].shape",
    ): "all three have one shape",
    (
        "moee/weights/fitting.py",
        "most = max((len(fit.fitting) for fit in fits), default=0)",
        "most = max((len(fit.fitting) for fit in fits), default= -1)",
    ): "neither is half of the model's tensors",
    (
        ROUTED,
        "gates = torch.softmax(scores(x.reshape(-1, x.shape[-1]), self.router, self.router_bias), -1)",
        "gates = torch.softmax(scores(x.reshape(-1, x.shape[-1]), self.router, self.router_bias), 1)",
    ): LAST,
    (
        ROUTED,
        "def mask_pays(device: str, wanted: bool, *, tokens: float, share: float) -> bool:",
        "def mask_pays(device: str, wanted: bool, /, tokens: float, share: float) -> bool:",
    ): "what is given by name may be given by name",
    (
        FILES,
        "yield from _called(value, inner, wanted, depth - 1)",
        "yield from _called(value, inner, wanted, depth - 2)",
    ): "how deep it looks is bounded by the name that is looked for",
    (
        FILES,
        "if max(sizes) > size or sum(sizes) > MAX_SHARING * size:",
        "if max(sizes) >= size or sum(sizes) > MAX_SHARING * size:",
    ): "a file is always larger than a tensor in it",
    (
        FILES,
        'raise UserError(f"checkpoint {path} names {shown(names[:3])} as its shards; expected files of its own folder")',
        'raise UserError(f"checkpoint {path} names {shown(names[: 2])} as its shards; expected files of its own folder")',
    ): NAMES_SHOWN,
    (
        FILES,
        'keys = ", ".join(shown(str(key), quoted=False, limit=40) for key in list(content)[:5])',
        'keys = ", ".join(shown(str(key), quoted=False, limit= 39) for key in list(content)[:5])',
    ): NAMES_SHOWN,
}  # fmt: skip
"""By file, line before and line after."""
