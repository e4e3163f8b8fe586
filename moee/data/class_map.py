"""timm's class maps: a text file that gives the order of the classes."""

from __future__ import annotations

from pathlib import Path

from moee.data.class_names import MAX_CLASSES, MAX_NAME
from moee.errors import UserError
from moee.schema import shown

MAX_BYTES = MAX_CLASSES * (MAX_NAME + 8)


def read_class_map(path: Path | str) -> tuple[str, ...]:
    """Class names by their number: one name a line in the order of the classes, or a name and its number on every line.

    What ends every line is no number of a class where a blank is before it and the names would be the same without (`type 3`,
    `type 2`). Raises `UserError` for a file that is none, a name that comes twice, or numbers that are not 0, 1, 2, ...
    """
    path = Path(path)
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise UserError(f"--class-map {path} is no text file of class names; expected one name a line")
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-map {path} is no text ({type(error).__name__}); expected one name a line") from error
    lines = [line for line in lines if line]
    pairs = [line.rsplit(None, 1) for line in lines]
    numbered = bool(pairs) and all(len(pair) == 2 and pair[1].isdecimal() for pair in pairs)
    alike = len({pair[0] for pair in pairs}) < len(pairs) and not any("\t" in line for line in lines)
    if numbered and not alike:
        numbers = [int(number) for _, number in pairs]
        if sorted(numbers) != list(range(len(numbers))):
            raise UserError(f"--class-map {path} numbers its classes {_some(sorted(numbers))}; expected 0 to "
                            f"{len(numbers) - 1}; where these are parts of the names, number each line behind them")  # fmt: skip
        names = [name for _, (name, _) in sorted(zip(numbers, pairs, strict=True))]
    else:
        names = lines
    bad = next((name for name in names if len(name) > MAX_NAME or not name.isprintable()), None)
    if bad is not None or not 1 < len(names) <= MAX_CLASSES:
        what = f"the name {shown(bad, limit=40)}" if bad is not None else f"{len(names)} names"
        raise UserError(f"--class-map {path} has {what}; expected 2 to {MAX_CLASSES} names of at most {MAX_NAME} characters")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"--class-map {path} names {shown(name)} twice; each class has one line")
        seen.add(name)
    return tuple(names)


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
