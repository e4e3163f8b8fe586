"""How large the pieces are that work is done in: the usual ones, or those that a bound on the memory leaves."""

from __future__ import annotations

from dataclasses import astuple, dataclass

FORWARD = 32  # images of a batch that only runs forward
BACKWARD = 4096  # tokens of a backward pass
OUTPUTS = 1 << 24  # numbers of the outputs of all experts that are held at once where they are compared


@dataclass(frozen=True)
class Limits:
    """`forward`: images of a batch that only runs forward. `backward`: tokens of a backward pass of the sensitivity.
    `refit_tokens`: tokens a layer that the refit holds at most (None: as many as the options ask for). `jobs`: layers that are
    clustered side by side at most (None: as many as are asked for)."""

    forward: int = FORWARD
    backward: int = BACKWARD
    refit_tokens: int | None = None
    jobs: int | None = None

    def tighter(self, other: Limits) -> Limits:
        """The smaller of both in every piece."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        least = [min((x for x in pair if x is not None), default=None) for pair in pairs]
        return Limits(*least)  # type: ignore[arg-type]

    def refitted(self, tokens: int) -> int:
        """How many of the `tokens` that the options ask for."""
        return tokens if self.refit_tokens is None else min(tokens, self.refit_tokens)

    def side_by_side(self, jobs: int) -> int:
        """How many of the `jobs` that a user asks for."""
        return jobs if self.jobs is None else min(jobs, self.jobs)


USUAL = Limits()
