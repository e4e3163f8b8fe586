"""What is done to a dense model: methods with their options, one after another, then the tuning.

An artifact records its recipe, a plan writes its winner's, and a TOML file may hold one:

    seed = 0

    [[step]]
    method = "heads"
    attention_macs = 0.8

    [[step]]
    method = "static"
    target_macs = 0.6

    [tune]
    epochs = 5
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moee.config import FinetuneConfig, Options, validated
from moee.errors import OptionError, UserError
from moee.keywords import spoken
from moee.methods.base import Method
from moee.methods.registry import DEFAULT, METHODS, cutting, method_named, method_of, options_for, presets, refuse_dashes
from moee.schema import shown

PARTS = ("attention", "tokens", "mlps")  # in the order in which they are cut
ALONE = ("tokens", "mlps")  # what a recipe may end with
_PART = {"attention": "the attention", "tokens": "the tokens", "mlps": "MLPs"}  # as sentences call them
MAX_BYTES = 1 << 20  # of a recipe's file


class StepError(UserError):
    """What is wrong with the step at a position, and with which option of it, if it is one."""

    def __init__(self, at: int, text: str, option: str = ""):
        super().__init__(text)
        self.at, self.option = at, option


@dataclass(frozen=True)
class Recipe:
    """`steps` are the options of methods: at most one that narrows the attention, then at most one that merges tokens, then one
    that cuts MLPs, which may lack where tokens merge. `tune` is what it was tuned by, or is to be. Raises `UserError` for other
    orders."""

    steps: tuple[Options, ...]
    tune: FinetuneConfig | None = None

    def __post_init__(self) -> None:
        methods = [method_of(step) for step in self.steps]
        for at, method in enumerate(methods):
            if method in methods[:at]:
                raise StepError(at, f"{method.name} comes twice; expected it once", "method")
            before = methods[at - 1] if at else None
            if before is not None and method.cuts == before.cuts:
                raise StepError(at, f"{method.name} after {before.name}: both cut {_PART[method.cuts]}; keep one", "method")
            if before is not None and PARTS.index(method.cuts) < PARTS.index(before.cuts):
                order = ", then ".join(_PART[part] for part in PARTS)
                raise StepError(at, f"{method.name} after {before.name}: expected {order}; change the order", "method")
        if not methods or methods[-1].cuts not in ALONE:
            names = ", ".join(method.name for part in reversed(ALONE) for method in cutting(part))
            raise UserError(f"a recipe has no step that cuts MLPs or merges tokens; expected one of {names}")
        if why := methods[-1].obstacle(self.steps[-1], [method.name for method in methods[:-1]]):
            raise StepError(len(methods) - 1, why, "method")

    @classmethod
    def of(cls, options: Options | Recipe) -> Recipe:
        """A recipe of one step; a recipe is its own."""
        return options if isinstance(options, Recipe) else cls((options,))

    @property
    def cut(self) -> Any:
        """Options of the last step: the one that cuts the MLPs, or else merges tokens."""
        return self.steps[-1]

    @property
    def first(self) -> tuple[Options, ...]:
        """The steps before it."""
        return self.steps[:-1]

    @property
    def method(self) -> Method[Any]:
        """The last step's method."""
        return method_of(self.cut)

    @property
    def seed(self) -> int:
        """What images are divided by."""
        return self.cut.seed

    def to_json(self) -> dict[str, Any]:
        steps = [{"method": method_of(step).name, **step.model_dump(mode="json")} for step in self.steps]
        return {"steps": steps, "tune": self.tune.model_dump(mode="json") if self.tune else None}

    def to_toml(self) -> str:
        """The text of a recipe's file: what differs from the defaults."""
        parts = [f"seed = {self.seed}\n"]
        for step in self.steps:
            changed = _lines(step, {"seed": self.seed})
            parts.append("\n".join(["[[step]]", f'method = "{method_of(step).name}"', *changed]) + "\n")
        if self.tune is not None:
            parts.append("\n".join(["[tune]", *_lines(self.tune)]) + "\n")
        return "\n".join(parts)


def make_recipe(method: str | None = None, preset: str | None = None, values: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that flags, or the keywords of Python, ask for: the values that are not None, each given to every step that
    knows it. What they leave open is as in the preset, or else in the method's first one. Raises `UserError` for what does not
    fit."""
    given = {name: value for name, value in (values or {}).items() if value is not None}
    chosen, start = _chosen(method, preset)
    if given.get("clustering") == "none":  # an older way to ask for static pruning
        del given["clustering"]
        static = method_named("static")
        if chosen is DEFAULT:
            start = {name: value for name, value in start.items() if name in static.options.model_fields}
            chosen, start = static, start if preset else _chosen(static.name, None)[1]
        elif chosen is not static:
            raise OptionError(f"--clustering is not for method {chosen.name}; leave it out", "clustering")
    void = {name for option in given for name in chosen.replaced.get(option, ())}
    start = {name: value for name, value in start.items() if name not in void}
    return recipe_with(chosen, given, start)


def recipe_with(method: Method[Any], values: Mapping[str, Any], start: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a method and of what goes beside it, each step with those of the `values` that it knows. What they leave open
    is as in `start`, which is for the method alone, or else by the options' own default. Raises `UserError` for what does not
    fit."""
    given, steps, known = dict(values), [], method.options.model_fields
    shared = {name for other in cutting("mlps") for name in other.options.model_fields}
    for beside in (other for part in PARTS[:-1] for other in cutting(part) if other is not method):
        own = {name: value for name, value in given.items() if name in beside.options.model_fields}
        if own.keys() - shared:  # asked for by a name of its own
            steps.append(options_for(beside, own))
            given = {name: value for name, value in given.items() if name not in own or name in known}
    steps.append(options_for(method, {**(start or {}), **given}))
    return Recipe(tuple(step for step in steps if method_of(step).changes(step)))


def _chosen(name: str | None, preset: str | None) -> tuple[Method[Any], Mapping[str, Any]]:
    """The method of a name or a preset, and the preset's values."""
    known = presets()
    if preset is not None and preset not in known:
        raise UserError(f"unknown preset {shown(preset)}; expected one of {', '.join(known)}")
    method = method_named(name) if name is not None else known[preset] if preset is not None else DEFAULT
    if method.cuts not in ALONE:
        raise UserError(f"--method {method.name} goes beside another one; give --attention-macs with --method {DEFAULT.name}")
    if preset is not None and known[preset] is not method:
        raise UserError(f"--preset {preset} is of method {known[preset].name}, and not of {method.name}; leave one of them out")
    return method, method.presets[preset] if preset is not None else next(iter(method.presets.values()), {})


def method_options(preset: str | None = None, **values: Any) -> Any:
    """The options of the step that cuts the MLPs, as `make_recipe`; without a preset with their own defaults."""
    name = values.pop("method", None)
    if preset is not None or values.get("clustering") == "none":
        return make_recipe(name, preset, values).cut
    return recipe_with(method_named(name) if name else DEFAULT, values).cut


def read_recipe_json(body: Any, path: Path | str) -> Recipe:
    """A recipe as a manifest has it. Raises `UserError` for a damaged one."""
    try:
        steps = body.get("steps") if isinstance(body, dict) else None
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise UserError(f"expected an object with steps, came {shown(body)}")
        return _recipe(steps, body.get("tune"))
    except UserError as error:
        raise UserError(f"{path}: recipe: {_spoken(error)}; make it again") from error


def read_recipe(path: Path | str) -> Recipe:
    """The recipe in a TOML file. Raises `UserError` that names the line of what does not fit."""
    path = Path(path)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is no ordinary file; name a recipe's file")
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES >> 20} MiB, which no recipe is")
        text = path.read_text(encoding="utf-8-sig")
        body = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; name a recipe's file") from error
    except (ValueError, RecursionError) as error:  # of bytes, of TOML, of numbers with thousands of digits
        raise UserError(f"{path} is no TOML: {str(error).partition(';')[0]}") from error
    unknown = [name for name in body if name not in ("seed", "step", "tune")]
    if unknown:
        raise UserError(f"{path}, line {_line(text, unknown[0])}: unknown {shown(unknown[0])}; expected seed, [[step]] or [tune]")
    steps = body.get("step", [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise UserError(f"{path}, line {_line(text, 'step')}: expected steps as [[step]], each with its method")
    if "seed" in body:
        steps = [{"seed": body["seed"], **step} for step in steps]
    try:
        return _recipe(steps, body.get("tune"))
    except StepError as error:
        option = "" if error.option not in body.get("step", [])[error.at] else error.option  # perhaps the seed of the whole
        line = _line(text, "seed") if error.option == "seed" and not option else _line(text, option, error.at)
        raise UserError(f"{path}, line {line}: {_spoken(error)}") from error
    except OptionError as error:
        raise UserError(f"{path}, line {_line(text, error.option, TUNE)}: {_spoken(error)}") from error
    except UserError as error:
        raise UserError(f"{path}: {_spoken(error)}") from error


def tuning_of(path: Path | str) -> FinetuneConfig:
    """The tuning in a recipe's file. Raises `UserError` where it has none."""
    found = read_recipe(path).tune
    if found is None:
        raise UserError(f"{path} has no [tune], so it does not say how to tune; add one, or leave --recipe out")
    return found


def _recipe(steps: list[dict[str, Any]], tune: Any) -> Recipe:
    made: list[Options] = []
    for at, step in enumerate(steps):
        values = dict(step)
        name = values.pop("method", None)
        try:
            if not isinstance(name, str):
                known = ", ".join(method.name for method in METHODS)
                raise UserError(f"a step needs its method, one of {known}" + ("" if name is None else f" (came {shown(name)})"))
            tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            made.append(options_for(method_named(name), tuples))
        except OptionError as error:
            raise StepError(at, str(error), error.option) from error
        except UserError as error:
            raise StepError(at, str(error), "method") from error
    if tune is not None and not isinstance(tune, dict):
        raise OptionError(f"--tune is {shown(tune)}; expected the options of the tuning", "tune")
    whole = Recipe(tuple(made), _tuning(tune))
    return replace(whole, steps=tuple(step for step in made if method_of(step).changes(step)))


def _tuning(values: dict[str, Any] | None) -> FinetuneConfig | None:
    if values is None:
        return None
    refuse_dashes(values, FinetuneConfig.model_fields)
    for name in values:
        if name not in FinetuneConfig.model_fields:
            known = ", ".join(FinetuneConfig.model_fields)
            raise OptionError(f"--{shown(name, quoted=False)} is no option of the tuning; expected some of {known}", name)
    made: FinetuneConfig = validated(FinetuneConfig, values)
    return made


def _spoken(error: UserError) -> str:
    """A sentence about flags as one about options."""
    kinds: list[type[Options]] = [FinetuneConfig, *(method.options for method in METHODS)]
    names = {name for kind in kinds for name in kind.model_fields} | {"method", getattr(error, "option", "")}
    return spoken(str(error), {name: name for name in names})


TUNE = -1  # the position of the table [tune], for `_line`


def _line(text: str, option: str, at: int | None = None) -> int:
    """The number of the line that sets an option: in the step at a position, in `[tune]`, or else before all tables; that of the
    table itself where it does not name the option."""
    table, steps = 1 if at is None else 0, 0
    inside = at is None
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*(\[\[?)\s*['\"]?([^]'\"]*)", line)
        if header is not None:
            if at is None and header[2].strip() == option:
                return number
            is_step = header[1] == "[[" and header[2].strip() == "step"
            inside = (is_step and steps == at) or (at == TUNE and header[2].strip() == "tune")
            steps += is_step
            table = number if inside else table
        elif inside and option and re.match(rf"\s*['\"]?{re.escape(option)}['\"]?\s*=", line):
            return number
    return max(table, 1)


def _lines(options: Options, like: Mapping[str, Any] | None = None) -> list[str]:
    """`name = value` of every option that differs from its default, or from what it is `like`."""
    plain = {name: field.get_default() for name, field in type(options).model_fields.items()} | dict(like or {})
    values = options.model_dump(mode="json")
    return [
        f"{name} = {json.dumps(value, ensure_ascii=False)}"
        for name, value in values.items()
        if value is not None and value != (list(plain[name]) if isinstance(plain[name], tuple) else plain[name])
    ]
