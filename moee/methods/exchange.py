"""What the ranks of a distributed run hand each other: a dense model, a layer's findings, the finished layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from moee.calibrate.grouping import GroupedLayer
from moee.calibrate.selection import Moments
from moee.data.image_set import ImageSet
from moee.errors import UserError
from moee.kinds.registry import layer_records, rebuild_layers
from moee.layers.report import LayerReport
from moee.layers.routed import Experts
from moee.models.ffn import FFN
from moee.parallel.group import Group, Parcel

Finding = GroupedLayer | LayerReport | tuple[Experts, LayerReport]
MOMENTS = ("count", "mean", "variance", "magnitude")
EXPERTS = ("router", "router_bias", "w_up", "b_up", "w_down", "b_out", "neurons", "offsets")


def share_dense(model: nn.Module, group: Group) -> None:
    """Give every rank rank 0's weights: files may differ between machines, and weights that no file holds are random."""
    if group.alone:
        return
    state = model.state_dict()
    theirs = group.broadcast(Parcel(None, state) if group.leader else None).tensors
    if not group.leader:
        model.load_state_dict(dict(theirs))


def check_same_data(data: ImageSet, group: Group) -> None:
    """Raise `UserError` on every rank unless all see the same number of images and the same labels."""
    seen = group.all_json([len(data), sum((i + 1) * (label + 2) for i, label in enumerate(data.labels)) % (1 << 61)])
    with group.agreed():
        for rank, other in enumerate(seen):
            if other != seen[0]:
                raise UserError(
                    f"rank {rank} sees {other[0]} images of {data.name} where rank 0 sees {seen[0][0]}, or other labels; give "
                    "every machine the same data"
                )


def pack_finding(found: Finding) -> Parcel:
    """What a rank found out about one layer."""
    if isinstance(found, GroupedLayer):
        tensors = {"router": found.router, "bias": found.bias, "share": found.share}
        tensors |= {name: getattr(found.moments, name) for name in MOMENTS}
        return Parcel({"kind": "grouped", "noise": found.noise}, tensors)
    if isinstance(found, LayerReport):
        return Parcel({"kind": "report", "report": _report(found)})
    experts, report = found
    body = {
        "kind": "experts", "report": _report(report), "activation": experts.activation, "top_k": experts.top_k,
        "load": list(experts.load),
    }  # fmt: skip
    return Parcel(body, {name: getattr(experts, name) for name in EXPERTS})


def unpack_finding(parcel: Parcel, ffn: FFN) -> Finding:
    """The inverse of `pack_finding`, for the layer `ffn`. Raises `UserError` for another version's."""
    body, tensors = parcel.body, parcel.tensors
    if body["kind"] == "grouped":
        moments = Moments(**{name: tensors[name] for name in MOMENTS})
        return GroupedLayer(ffn, tensors["router"], tensors["bias"], moments, tensors["share"], body["noise"])
    report = LayerReport(**body["report"])
    if body["kind"] == "report":
        return report
    if body["kind"] != "experts":
        raise UserError(f"a rank sent {body['kind']!r}; expected grouped, report or experts: start all with the same version")
    parts = {name: tensors[name] for name in EXPERTS}
    experts = Experts(**parts, activation=body["activation"], top_k=body["top_k"], load=tuple(body["load"]))
    return experts, report


def _report(report: LayerReport) -> dict[str, Any]:
    values = report.to_json()
    del values["mean_width"], values["notes"]  # properties
    return values


def share_layers(model: nn.Module, group: Group) -> None:
    """Put rank 0's routed layers into the dense `model` of every other rank."""
    if group.alone:
        return
    records = layer_records(model)
    state = model.state_dict()
    names = tuple(f"{record['name']}." for record in records)
    own = {key: value for key, value in state.items() if key.startswith(names)} if names else {}
    parcel = group.broadcast(Parcel(records, own) if group.leader else None)
    if not group.leader:
        rebuild_layers(model, parcel.body, dict(parcel.tensors))
        model.eval()


def by_leader(
    model: nn.Module, group: Group, convert: Callable[[], Sequence[LayerReport]],
    share: Callable[[nn.Module, Group], None] = share_layers,
) -> Sequence[LayerReport]:  # fmt: skip
    """Rank 0 alone converts `model`, and `share` puts its layers into every other rank's. The reports are rank 0's; an error
    there is raised on every rank."""
    reports: Sequence[LayerReport] = ()
    with group.agreed():
        if group.leader:
            reports = convert()
    share(model, group)
    return reports
