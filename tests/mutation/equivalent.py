"""Mutants that no test can notice, each with the reason: the program does the same, or what differs is promised nowhere."""

from __future__ import annotations

REFIT, LAYERS = "moee/calibrate/refit.py", "moee/calibrate/layer_sums.py"
ELIMINATION, ALLOCATION = "moee/calibrate/elimination.py", "moee/methods/neurons/allocation.py"
FILES, ROUTED = "moee/weights/weights_file.py", "moee/layers/routed.py"

COMPACTION = "when matrices are made smaller is a matter of time and memory; the neurons are the same"
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
        LAYERS,
        "routes = layer.routes(self.tokens.movedim(-1, 1) if layer.channels_first else self.tokens)[:, :1]",
        "routes = layer.routes(self.tokens.movedim(-1, 1) if layer.channels_first else self.tokens)[:, : 2]",
    ): "layers that are refitted send a token to one expert",
    (LAYERS, " @property", ""): "of a protocol, which is never run",
    (
        ROUTED,
        "gates = torch.softmax(scores(x.reshape(-1, x.shape[-1]), self.router, self.router_bias), -1)",
        "gates = torch.softmax(scores(x.reshape(-1, x.shape[-1]), self.router, self.router_bias), 1)",
    ): "of two dimensions the last is the one after the first",
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
