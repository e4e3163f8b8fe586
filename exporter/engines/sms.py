"""SM lists on the command line."""

from __future__ import annotations

from moee.errors import UserError


def parse_sms(text: str | None) -> tuple[int, ...] | None:
    """`87,89` to (87, 89); None and `all` mean every SM that ships."""
    if text in (None, "all"):
        return None
    try:
        return tuple(int(part) for part in str(text).replace("sm_", "").split(","))
    except ValueError as error:
        raise UserError(f"--sm {text}: expected numbers such as 87 or 87,89, or all") from error
