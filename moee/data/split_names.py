"""What a name says of a split: training, validation or test images by the usual words, in names such as `seg_train`, `Testdaten`,
`80_train`, `valX` or `flowers-val-000`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

# trained on is train, else trainval; held out is val, else eval, else test; what only predictions are made on, and what holds
# several splits, is neither
STEMS = {
    "train": (
        "train", "training", "trainings", "trn", "entrainement", "apprentissage", "entrenamiento", "treino", "treinamento",
        "addestramento", "训练",
    ),
    "trainval": ("trainval",),
    "val": (
        "val", "valid", "validate", "validation", "validations", "vld", "dev", "devel", "validierung", "validierungs",
        "validacion", "validacao", "validazione", "验证",
    ),
    "eval": ("eval", "evaluate", "evaluation", "holdout", "heldout"),
    "test": ("test", "tests", "testing", "tst", "teste", "testes", "prueba", "pruebas", "测试"),
    "pred": ("pred", "predict", "prediction", "predictions", "inference", "unlabeled", "unlabelled"),
}  # fmt: skip
TRAINED, HELD_OUT = ("train", "trainval"), ("val", "eval", "test")
SHORT = {"tr": "train", "va": "val", "vl": "val", "te": "test", "ts": "test"}  # also codes of languages: see `Names`
PLAIN = "sets?|splits?|data|datasets?|daten|datensatz|menge|bilder|images?|imgs?|pictures?|photos?|samples?|files?|folder|dir|集"
WORDS = {kind: re.compile(f"(?:{'|'.join(stems)})(?:{PLAIN})?") for kind, stems in STEMS.items()}


@dataclass(frozen=True)
class SplitName:
    """`kind` of the split that a name stands for, None for none, and `rest`: its words beside that and beside plain ones
    (`data`, `images`, numbers)."""

    kind: str | None
    rest: tuple[str, ...]

    @property
    def plain(self) -> bool:
        """Whether the name says nothing else: `train`, `val2017`, `images_test`."""
        return self.kind is not None and not self.rest


def words_of(name: str) -> list[str]:
    """The words of a name in lower case, without accents: parts between digits, signs and camel case."""
    text = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    text = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
    text = re.sub(r"\bh(o|e)ld[\W_]+out", r"h\1ldout", text.lower())
    return re.findall(r"[^\W\d_]+", text)


def read_name(name: str, short: bool = False) -> SplitName:
    """What `name` says of a split; `short`: two letters (`tr`, `te`) are a word for it too."""
    kinds, rest = [], []
    for word in words_of(name):
        kind = next((kind for kind, pattern in WORDS.items() if pattern.fullmatch(word)), SHORT.get(word) if short else None)
        if kind is not None:
            kinds.append(kind)
        elif not re.fullmatch(PLAIN, word):
            rest.append(word)
    found = set(kinds)
    if found == {"train", "val"}:  # train_val
        found = {"trainval"}
    kind = found.pop() if len(found) == 1 else "several" if found else None
    return SplitName(kind, tuple(rest))


class Names:
    """Names that lie beside each other. Two letters are taken for a split only where every other name is one's too: beside `en`
    and `de`, `tr` is a language."""

    def __init__(self, names: Sequence[str]):
        self.read = {name: read_name(name) for name in names}
        if not all(read.kind for read in self.read.values()):
            short = {name: read_name(name, short=True) for name in names}
            if all(read.kind for read in short.values()):
                self.read = short
        self.named = [name for name in names if self.read[name].kind]
        self.others = [name for name in names if not self.read[name].kind]

    def of(self, *kinds: str, plain: bool = False) -> list[str]:
        """The names of the first of the kinds that any has; `plain` ones that say nothing else."""
        for kind in kinds:
            found = [name for name, read in self.read.items() if read.kind == kind and (read.plain or not plain)]
            if found:
                return found
        return []

    def trained(self, plain: bool = False) -> list[str]:
        """The names of what is trained on."""
        return self.of(*TRAINED, plain=plain)

    def held_out(self, plain: bool = False) -> list[str]:
        """The names of what is held out; `trainval` holds the images of `val`."""
        joined = self.of("trainval", plain=plain) and not self.of("train", plain=plain)
        return self.of(*[kind for kind in HELD_OUT if kind != "val" or not joined], plain=plain)

    def pair(self) -> tuple[str, str] | None:
        """The one training and the one held-out name that belong together, as `seg_train` and `seg_test`; None if that is not
        certain."""
        train, held_out = self.trained(), self.held_out()
        if len(train) != 1 or len(held_out) != 1:
            return None
        rests = {self.read[name].rest for name in (train[0], held_out[0])}
        alike = len(rests) == 1 or (not self.others and () in rests)
        return (train[0], held_out[0]) if alike else None
