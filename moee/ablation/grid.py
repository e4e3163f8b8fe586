"""What is run: the tables as rows of configuration changes, and the orderings that the paper states.

Only orderings that this project's issue names are claimed as published (Tables 2, 7 and 8). It names Tables 3 and 9 by number
alone; here they compare methods and routings, and nothing published is claimed for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from moee.config import MOST_COUNT, MOST_SEEDS, Count, Options, validated
from moee.methods.registry import DEFAULT, cutting, method_named, options_for

Compensation = Literal["none", "mean", "refit"]


@dataclass(frozen=True)
class Row:
    """One line of a table. `changes` are options that differ from the base; `sweep` holds the changes of each of its cells.

    Without `sweep` a row is run at every kept share, so that rows can be compared at equal MACs.
    """

    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    sweep: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Ordering:
    """A published ordering: each row of `better` retains more than each row of `worse` at equal MACs."""

    claim: str
    better: tuple[str, ...]
    worse: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """`reference` is the label of the row whose costs the others are compared at."""

    key: str
    title: str
    own: tuple[Row, ...] = ()
    orderings: tuple[Ordering, ...] = ()
    note: str = ""

    @property
    def rows(self) -> tuple[Row, ...]:
        """Its `own` rows; without any those of every method."""
        methods = ((method.name, label, row) for method in cutting("mlps") for label, row in method.rows.items())
        return self.own or tuple(Row(label, {"method": name, **row.values}, row.sweep) for name, label, row in methods)

    @property
    def reference(self) -> str:
        return self.rows[0].label


MOEE = "MoEE"
_CLUSTERINGS = ("hdbscan", "dbscan", "optics", "kmeans", "birch")
_SIZES = (0.003, 0.006, 0.0125, 0.025, 0.05)
_KEEPS = (0.30, 0.50, 0.70, 0.80, 0.90, 0.95)

TABLES: dict[str, Table] = {
    table.key: table
    for table in (
        Table(
            "2", "components, each against its random counterpart",
            (
                Row(MOEE),
                Row("random clusters", {"clustering": "random"}),
                Row("random neurons", {"criterion": "random"}),
                Row("random routing", {"routing": "random"}),
                Row("all random", {"clustering": "random", "criterion": "random", "routing": "random"}),
            ),
            (
                Ordering("clustering helps", (MOEE,), ("random clusters",)),
                Ordering("selection helps", (MOEE,), ("random neurons",)),
                Ordering("routing helps", (MOEE,), ("random routing",)),
            ),
        ),
        Table(
            "3", "methods",
            note="MoEfication: 16 experts, trained router, mean compensation where the others are refitted.",
        ),
        Table(
            "7", "clusterings",
            tuple(Row(name, {"clustering": name} if name != "hdbscan" else {}) for name in _CLUSTERINGS),
            (Ordering("density-based before partition", ("hdbscan", "dbscan", "optics"), ("kmeans", "birch")),),
            note="k-means and BIRCH make as many clusters as HDBSCAN finds.",
        ),
        Table(
            "8", "selection criteria",
            (
                Row("variance"),
                Row("output variance", {"criterion": "output_variance"}),
                Row("magnitude", {"criterion": "magnitude"}),
                Row("random", {"criterion": "random"}),
                Row("sensitivity", {"criterion": "sensitivity", "statistics": "routed"}),
            ),
            (
                Ordering("variance before magnitude", ("variance",), ("magnitude",)),
                Ordering("variance before random", ("variance",), ("random",)),
            ),
            note="Magnitude and random keep as many neurons as variance does; sensitivity is measured on routed tokens.",
        ),
        Table(
            "9", "routings",
            (
                Row("cosine"),
                Row("Euclidean", {"routing": "euclidean"}),
                Row("hash", {"routing": "hash"}),
                Row("random", {"routing": "random"}),
            ),
        ),
        Table("fig6", "sweep of the kept variance", (Row(MOEE, sweep=tuple({"keep": k} for k in _KEEPS)),)),
        Table(
            "fig7", "sweep of the minimum cluster size",
            tuple(Row(f"{size:.2%} of the tokens", {"min_cluster_size": size}) for size in _SIZES),
        ),
    )
}  # fmt: skip


class AblationConfig(Options):
    """Which tables, at which scale. The fields of `shared` must not change between runs into one folder; the others only
    add cells."""

    tables: tuple[str, ...] = tuple(TABLES)
    seeds: int = Field(3, ge=1, le=MOST_SEEDS, description="runs of a cell, with seeds 0, 1, ...")
    compensation: tuple[Compensation, ...] = ("none", "refit")
    keeps: tuple[float, ...] = (0.50, 0.70, 0.90)
    tokens: Count = Field(20_000, description="calibration tokens a layer")
    cluster_tokens: int = Field(4000, ge=2, le=MOST_COUNT, description="tokens a layer that are clustered")
    components: Count = Field(50, description="principal components of the activations that are clustered")
    min_cluster_size: float = Field(0.006, gt=0, lt=1, description="smallest cluster, as a share of the clustered tokens")
    statistics: Literal["cluster", "routed"] = Field(
        "cluster", description="whether statistics are of an expert's cluster, as in the paper, or of the tokens routed to it"
    )
    refit_tokens: Count = Field(41_600, description="tokens a layer that the refit may use")

    @model_validator(mode="after")
    def _known(self) -> AblationConfig:
        unknown = [key for key in self.tables if key not in TABLES]
        if unknown or not self.tables:
            raise ValueError(f"--tables: unknown table {', '.join(unknown) or '(none)'}; expected some of {', '.join(TABLES)}")
        if not self.keeps or not self.compensation:
            raise ValueError("--keep and --compensation need at least one value")
        if any(not 0 < keep <= 1 for keep in self.keeps):
            raise ValueError(f"--keep: each share must lie in 0..1, came {', '.join(map(str, self.keeps))}")
        return self

    def shared(self) -> dict[str, Any]:
        """What every cell of a folder has in common."""
        return self.model_dump(mode="json", exclude={"tables", "seeds", "compensation", "keeps"})

    def base(self) -> dict[str, Any]:
        """Options of the paper's recipe that the rows start from."""
        scale = {"tokens": self.tokens, "cluster_tokens": self.cluster_tokens, "components": self.components}
        method = {"criterion": "variance", "statistics": self.statistics, "min_cluster_size": self.min_cluster_size}
        return {**scale, **method, "refit_tokens": self.refit_tokens}


@dataclass(frozen=True)
class Cell:
    """One run: where it stands in which table, and the options that make it."""

    table: str
    row: str
    compensation: str
    seed: int
    options: Options
    point: str


def cells_of(ablation: AblationConfig) -> Iterator[Cell]:
    """Every cell of the chosen tables; the same configuration may stand in several tables."""
    for key in ablation.tables:
        for seed in range(ablation.seeds):
            for compensation in ablation.compensation:
                for row in TABLES[key].rows:
                    yield from _cells_of_row(ablation, key, row, compensation, seed)


def _cells_of_row(ablation: AblationConfig, table: str, row: Row, compensation: str, seed: int) -> Iterator[Cell]:
    values = dict(row.changes)
    method = method_named(values.pop("method", DEFAULT.name))
    known = method.options.model_fields
    base = {name: value for name, value in ablation.base().items() if name in known}
    if "compensation" in known:
        allowed = get_args(known["compensation"].annotation)
        base["compensation"] = compensation if compensation in allowed else "mean"  # not every method has a refit
    keeps = tuple({"keep": keep} for keep in ablation.keeps) if "keep" in known else ({},)
    for point in row.sweep or keeps:
        made = options_for(method, {**base, **values, **point, "seed": seed})
        yield Cell(table, row.label, compensation, seed, made, _point(point))


def _point(point: Mapping[str, Any]) -> str:
    """How a table calls a point: the kept share, or the options that it sets."""
    named = {"keep": "", "top_k": "top "}
    return ", ".join(
        f"{named.get(name, f'{name} ')}{value:.2f}" if isinstance(value, float) else f"{named.get(name, f'{name} ')}{value}"
        for name, value in point.items()
    )


def make_ablation_config(**values: Any) -> AblationConfig:
    """An `AblationConfig`; `UserError` for values that do not fit. None takes the default."""
    return validated(AblationConfig, {name: value for name, value in values.items() if value is not None})
