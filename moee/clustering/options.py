"""How the tokens of a layer are clustered."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from moee.config import MOST_COUNT, MOST_FACTOR, PAPER_TOKENS, Count, Options, Seed

PARTITIONS = ("kmeans", "birch", "random")  # clusterings that are told how many clusters to make


class ClusteringOptions(Options):
    """Which clustering, and its parameters. With `clustering` none all tokens are one cluster."""

    seed: Seed = Field(0, description="seed of everything that is drawn")
    clustering: Literal["hdbscan", "dbscan", "optics", "kmeans", "birch", "random"] = Field(
        "hdbscan", description="how the hidden activations of a layer's tokens are clustered; each cluster becomes an expert"
    )
    components: Count | None = Field(
        None, description="principal components of the activations that are clustered (default: all features)"
    )
    cluster_tokens: int = Field(
        PAPER_TOKENS, ge=2, le=MOST_COUNT, description="tokens a layer that are clustered; the others count for statistics alone"
    )
    min_cluster_size: float = Field(
        0.006, gt=0, lt=1, description="smallest cluster of hdbscan and optics, as a share of the clustered tokens"
    )
    min_samples: Count | None = Field(
        None, description="neighbours that make a token a core point, of hdbscan, dbscan and optics (default: the library's)"
    )
    clusters: int | None = Field(
        None, ge=2, le=MOST_COUNT,
        description="number of clusters, of kmeans (chosen if --clustering is not given), birch and random "
        "(default: as many as hdbscan finds)",
    )  # fmt: skip
    eps: float | None = Field(
        None, gt=0, le=MOST_FACTOR, description="radius of a neighbourhood, of dbscan (default: the median core distance)"
    )

    @model_validator(mode="before")
    @classmethod
    def _kmeans_of_a_number(cls, values: Any) -> Any:
        """A number of clusters alone asks for k-means."""
        if isinstance(values, dict) and values.get("clusters") is not None and values.get("clustering") is None:
            return {**values, "clustering": "kmeans"}
        return values

    @model_validator(mode="after")
    def _of_this_clustering(self) -> ClusteringOptions:
        if self.clustering not in PARTITIONS and self.clusters is not None:
            raise ValueError(
                f"--clusters is for {', '.join(PARTITIONS)}; clustering {self.clustering} chooses their number itself"
            )
        if self.clustering != "dbscan" and self.eps is not None:
            raise ValueError(f"--eps is for dbscan; clustering {self.clustering} has no radius")
        return self

    def idle(self) -> dict[str, str]:
        sized, found = "hdbscan and optics", dict[str, str]()
        if not self.by_density or self.clustering == "dbscan":
            found["min_cluster_size"] = f"--clustering {sized}, and it is {self.clustering}"
        if not self.by_density:
            found["min_samples"] = f"--clustering hdbscan, dbscan and optics, and it is {self.clustering}"
        return {**super().idle(), **found}

    @property
    def by_density(self) -> bool:
        """Whether distances between all tokens are looked at: a number of clusters that nobody gave is found so too."""
        return self.clustering not in PARTITIONS or self.clusters is None

    def clustering_json(self) -> str:
        """What decides the labels, as text that tells one clustering from another."""
        return self.model_dump_json(include=set(ClusteringOptions.model_fields) - {"cluster_tokens"})
