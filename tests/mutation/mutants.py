"""The mutants of a file, by cosmic-ray's operators."""

from __future__ import annotations

import ast
import difflib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

# Of the replacements of an operator those that run: its opposite, and for comparisons the bound that is moved by one
COMPARISONS = ("Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt", "Eq_NotEq", "NotEq_Eq", "Is_IsNot",
               "IsNot_Is")  # fmt: skip
ARITHMETIC = ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Mul", "Pow_Mul", "BitAnd_BitOr", "BitOr_BitAnd")
UNARY = ("Delete_Not", "Delete_USub", "Delete_Invert")
OTHERS = ("AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd", "NumberReplacer",
          "ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ExceptionReplacer", "RemoveDecorator",
          "ZeroIterationForLoop")  # fmt: skip
OPERATORS = (
    *(f"core/ReplaceComparisonOperator_{pair}" for pair in COMPARISONS),
    *(f"core/ReplaceBinaryOperator_{pair}" for pair in ARITHMETIC),
    *(f"core/ReplaceUnaryOperator_{pair}" for pair in UNARY),
    *(f"core/{name}" for name in OTHERS),
)


@dataclass(frozen=True)
class Mutant:
    """A file's text with one change: the `line` where it begins, its text before and after."""

    file: str
    line: int
    before: str
    after: str
    text: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is known by when lines above it move."""
        return self.file, self.before, self.after


def sample(root: Path, files: tuple[str, ...], count: int, seed: int) -> tuple[list[Mutant], int]:
    """`count` mutants of `files`, drawn by `seed`, in the order of the files; and how many there are in all, those that change
    nothing included."""
    texts = {file: (root / file).read_text(encoding="utf-8") for file in files}
    programs = {file: _program(text) for file, text in texts.items()}
    places = [(file, name, n) for file, text in texts.items() for name, many in _places(text) for n in range(many)]
    random.Random(seed).shuffle(places)
    found: dict[tuple[str, str], Mutant] = {}
    for file, name, occurrence in places:
        if len(found) == count:
            break
        mutant = _mutant(file, texts[file], programs[file], name, occurrence)
        if mutant is not None:
            found[file, mutant.text] = mutant
    return sorted(found.values(), key=lambda m: (files.index(m.file), m.line, m.after)), len(places)


def _places(text: str) -> Iterator[tuple[str, int]]:
    """Each operator, and how often it can be applied."""
    nodes = list(ast_nodes(get_ast(text)))
    for name in OPERATORS:
        operator = get_operator(name)()
        yield name, sum(1 for node in nodes for _ in operator.mutation_positions(node))


def _mutant(file: str, text: str, program: str, name: str, occurrence: int) -> Mutant | None:
    """None for a change that is no program, or the same one: of annotations, which nothing reads, and of docstrings."""
    changed = mutate_code(text, get_operator(name)(), occurrence)
    if changed is None:
        return None
    try:
        if _program(changed) == program:
            return None
    except SyntaxError:
        return None
    old, new = text.splitlines(), changed.splitlines()
    changes = difflib.SequenceMatcher(None, old, new, False).get_opcodes()
    first, last, start, end = next(change[1:] for change in changes if change[0] != "equal")
    before, after = (" ".join(line.strip() for line in lines) for lines in (old[first:last], new[start:end]))
    return Mutant(file, first + 1, before, after, changed)


def _program(text: str) -> str:
    """What a text does: its syntax tree without annotations, and with parameters that may all be given by name or place."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
            node.args.posonlyargs, node.args.args = [], [*node.args.posonlyargs, *node.args.args]
    return ast.dump(tree)
