"""SMs, the compute capabilities of GPUs: lists on the command line, and which ones are known."""

from __future__ import annotations

from collections.abc import Iterable

from moee.errors import UserError
from plugins.targets import TARGETS


def parse_sms(text: str | None) -> tuple[int, ...] | None:
    """`87,89` to (87, 89); None and `all` mean every SM that ships. Raises `UserError` for no number and for an unknown SM."""
    if text in (None, "all"):
        return None
    try:
        numbers = [int(part) for part in str(text).replace("sm_", "").split(",")]
    except ValueError as error:
        raise UserError(f"--sm {text}: expected numbers such as 87 or 87,89, or all") from error
    return known_sms(numbers)


def known_sms(sms: Iterable[int]) -> tuple[int, ...]:
    """The SMs in order, each once. Raises `UserError` that lists the known ones for an unknown one, also where no kernel is
    needed: scripts and names of a bundle say the SM too."""
    wanted = tuple(sorted(set(sms)))
    unknown = [sm for sm in wanted if sm not in TARGETS]
    if unknown:
        known = ", ".join(map(str, TARGETS))
        raise UserError(f"unknown SM {', '.join(map(str, unknown))}; expected some of {known} (Jetson Orin is 87, Thor 110)")
    return wanted
