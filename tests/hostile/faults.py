"""Faults that are planted in a copy of the product, one at a time, and the tests that must fail for each."""

from __future__ import annotations

from dataclasses import dataclass

OPTIONS, FILES, AROUND = (f"tests/hostile/test_{name}.py" for name in ("options", "files", "surroundings"))

NUMBERS = "tests/exporter/test_numbers.py"


@dataclass(frozen=True)
class Fault:
    """In `file`, `old` becomes `new`; the tests of `where` that `choice` chooses (pytest's -k) must fail."""

    file: str
    old: str
    new: str
    where: str
    choice: str


FAULTS = {
    "counts without an upper bound": Fault(
        "exporter/terminal/flags.py", "not least <= int(text) <= most:", "not least <= int(text):", OPTIONS, "bench and runs"
    ),
    "an option takes NaN": Fault("moee/config.py", "allow_inf_nan=False)", "allow_inf_nan=True)", NUMBERS, "no_configuration"),
    "a share above 1": Fault("moee/calibrate/options.py", "0.95, gt=0, le=1,", "0.95, gt=0, le=100,",
    FILES, "share_of_90 or (share and 90)"),
    "an empty path is the current folder": Fault("exporter/cli.py", "if not text.strip():", "if not text:",
    OPTIONS, "verify and data"),
    "control characters in names": Fault("exporter/cli.py", "if not printable(text):", "if False:", OPTIONS, "extract and data"),
    "values without end": Fault("exporter/cli.py", "MOST_TEXT = 1024", "MOST_TEXT = 10**9", OPTIONS, "extract and checkpoint"),
    "a sentence without its option": Fault(
        "exporter/cli.py", "sentence = with_option(sentence, args, names)", "pass", OPTIONS, "export and precision"
    ),
    "the validator's words": Fault("moee/config.py",
    '"a number")\n        raise OptionError', '"a number")\n        wanted = ""\n        raise OptionError',
                                   OPTIONS, "finetune and epochs"),  # fmt: skip
    "bad input called unexpected": Fault(
        "exporter/terminal/failures.py", "if isinstance(error, UserError):", "if False:", OPTIONS, "extract and recipe"
    ),
    "a plan beside a recipe": Fault("exporter/commands/models/extract.py", "if sources and (chosen or len(sources) > 1):",
    "if False:",
                                    OPTIONS, "together and plan and recipe"),  # fmt: skip
    "markup in names": Fault("exporter/terminal/ui.py", "markup=False, emoji=False", "markup=True, emoji=False",
    AROUND, "odd_characters"),
    "escapes in names of files": Fault(
        "moee/data/class_names.py", "c if printable(c) else ascii(c)[1:-1] for c in name)", "c for c in name)",
        AROUND, "odd_names"
    ),
    "closed streams stay closed": Fault("exporter/terminal/streams.py", "if getattr(sys, name) is None:", "if False:",
    AROUND, "streams and stdout"),
    "ASCII terminals end a command": Fault("exporter/terminal/streams.py", "stream.reconfigure(errors=REPLACING)", "pass",
    AROUND, "streams and ASCII"),
    "output that nobody flushes": Fault("exporter/cli.py", "            streams.flush()", "            pass",
    AROUND, "streams and JSON"),
    "narrow tables lose columns": Fault(
        "exporter/terminal/ui.py", "if least > options.max_width:", "if False:", AROUND, "process_of_its_own"
    ),
    "the cache in the current folder": Fault(
        "moee/store/home.py", "return Path(given) if given else", "return Path(given) if given is not None else",
        AROUND, "cache_folder"
    ),
    "a link is replaced": Fault("moee/places/placement.py", "if place.is_symlink():", "if False:", AROUND, "places and link"),
    "a place is not tried": Fault("moee/places/placement.py", "        probe(self.place)", "        pass",
    AROUND, "places and proc"),
    "data that is not there, unsaid": Fault("moee/data/folders/image_folder.py", "{came}; {expected}; {LAYOUT}",
    "{came}; {expected}", AROUND,
                                           "places and not_there or (places and data)"),  # fmt: skip
    "NaN in a model": Fault("moee/weights/weights_file.py", "and not tensor.isfinite().all():", "and False:",
    FILES, "weights_that_no_model"),
    "a load of other experts": Fault("moee/kinds/routed.py", "if record.load and len(record.load) != record.experts:",
    "if False:", FILES, "manifest_that_lies"),
    "an unknown activation is another": Fault("moee/errors.py", "if name not in table:",
    "name = name if name in table else next(iter(table))\n    if False:",
                                              FILES, "manifest_that_lies"),  # fmt: skip
    "figures that lack": Fault("moee/artifacts/manifest.py", "{**empty, **stage", "{**stage", FILES, "without_figures"),
    "weights without a hash": Fault(
        "moee/artifacts/checkpoint.py", "if spec.weights is not None and spec.weights_sha256 is None:\n        named",
        "if False:\n        named",
        FILES, "hash_is_wanted",
    ),
    "names that leave the folder": Fault("moee/store/artifact.py", "if not stays_inside(folder, relative):", "if False:",
    FILES, "manifest_that_lies"),
    "differences that wrap round": Fault("exporter/onnx_safety.py", ".astype(np.int64) for part", " for part",
    FILES, "wrap_round"),
    "unknown attributes": Fault("exporter/onnx_safety.py", "if wanted is None or given.name in found:",
    "if wanted is None:\n            continue\n        if False:",
                                FILES, "breaks_the_contract"),  # fmt: skip
    "operators of the future": Fault("exporter/onnx_safety.py", "if not 1 <= opset.version <= newest:", "if False:",
    FILES, "breaks_the_contract"),
    "long thin pictures": Fault("moee/data/transform.py", "    transform.refuse_oblong(*picture.size)", "    pass",
    FILES, "thin_pictures"),
    "Infinity in JSON": Fault("moee/schema.py", "return value if math.isfinite(value) else None", "return value",
    FILES, "no_word_for"),
}  # fmt: skip
