"""Every target by the word that `--device` gives it."""

from __future__ import annotations

from exporter.targets.file import ENDING, ResultFile
from exporter.targets.here import CUDA, TENSORRT, Board, Cpu, Gpu
from exporter.targets.ssh import PREFIX, Ssh
from exporter.targets.target import Target
from exporter.timing.device import CPU
from plugins.devices import profile_named

WORDS: dict[str, type[Target]] = {CPU: Cpu, CUDA: Gpu, TENSORRT: Gpu}


def target_of(
    device: str, *, batch: int = 8, precision: str = "fp32", most: int = 6, sm: int | None = None
) -> Target:  # fmt: skip
    """The target of a word: cpu, cuda, tensorrt, ssh:HOST, a RESULT.json, or a board, which is modelled. `batch` images are timed
    at once, at most `most` candidates where they are timed together; `sm` is for a host that does not say which GPU it has.

    Raises `UserError` for another word. `Target.check` refuses what cannot be measured; call it before long work.
    """
    if device in WORDS:
        return WORDS[device](device, batch, precision, most)
    if device.startswith(PREFIX):
        target = Ssh(device, batch, precision, most, sm)
        target.host  # noqa: B018 (refuses what is no host)
        return target
    if device.endswith(ENDING):
        return ResultFile(device, batch, precision, most)
    board = profile_named(device, (*WORDS, "ssh:HOST", "RESULT.json"))
    return Board(board.name, batch, precision, most)
