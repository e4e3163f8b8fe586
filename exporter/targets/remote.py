"""A script on another machine, by the user's own ssh: what is sent, what comes back, and that nothing is left behind.

Host keys and logins are ssh's business, and it asks nothing (`BatchMode`). Whatever ends the connection, this end or the other,
ends the script too: it watches its standard input, which stays open as long as somebody waits for it.
"""

from __future__ import annotations

import os
import re
import selectors
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moee.errors import MissingDependency, StepFailed, UserError, plain
from moee.schema import shown

HOST = re.compile(r"([A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9_][A-Za-z0-9._-]*", re.ASCII)
OPTIONS = {"BatchMode": "yes", "ConnectTimeout": "10", "ServerAliveInterval": "15", "ServerAliveCountMax": "4"}
SILENCE_S = 1800.0  # an engine of a large model takes a small board ten minutes, and says nothing meanwhile
GRACE_S = 15.0  # for the other end to clean up
MAX_ANSWER = 1 << 20  # bytes: a result is a few thousand
BLOCK = 1 << 16
SSH_FAILED = 255  # ssh's own exit code, of a connection that failed or broke


@dataclass(frozen=True)
class Answer:
    """How a script ended: its exit code, what it answered after the mark, and what it complained last."""

    code: int
    text: str | None
    complaint: str


def checked_host(text: str) -> str:
    """`host` or `user@host`, also a name of ~/.ssh/config. Raises `UserError` for anything that ssh or a shell might read in
    another way, and for root."""
    if len(text) > 255 or not HOST.fullmatch(text):
        raise UserError(
            f"ssh:{shown(text, quoted=False, limit=80)}: expected ssh:HOST or ssh:USER@HOST of letters, digits and . _ -; ports, "
            "keys and other addresses go into ~/.ssh/config under such a name"
        )
    if text.startswith("root@"):
        raise UserError(f"ssh:{text}: nothing is run as root on a device; name another user")
    return text


def converse(
    host: str, script: str, payload: Iterable[bytes] = (), *, hold: bool = False, mark: str, line: Callable[[str], None] = print,
    silence_s: float = SILENCE_S,
) -> Answer:  # fmt: skip
    """Run a one-line `script` by `sh` on `host` with `payload` as its standard input, which with `hold` stays open until the
    script ends. `line` gets what it prints before the `mark`, line by line; what follows is its answer.

    Raises `MissingDependency` if ssh is not installed, or if nothing comes and goes for `silence_s` seconds.
    """
    ssh = shutil.which("ssh")
    if ssh is None:
        raise MissingDependency("ssh is not installed; install openssh-client (apt-get install openssh-client)")
    options = [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]
    command = [ssh, "-T", *options, "--", checked_host(host), f"exec sh -c {shlex.quote(script)}"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True  # Ctrl-C is ours
        )
        try:
            answer = _exchange(process, host, iter(payload), hold, mark.encode(), line, silence_s)
            _close(process)
            code = process.wait(GRACE_S)
        except subprocess.TimeoutExpired as error:
            raise MissingDependency(f"{host} does not end the connection") from error
        finally:
            _end(process)
        errors.seek(0, os.SEEK_END)
        errors.seek(max(0, errors.tell() - BLOCK))
        said = errors.read().decode(errors="replace")
    complaints = [text for text in said.splitlines() if text.strip()]
    return Answer(code, answer, plain(complaints[-1].strip())[:300] if complaints else "")


def _exchange(
    process: subprocess.Popen[bytes], host: str, payload: Iterator[bytes], hold: bool, mark: bytes,
    line: Callable[[str], None], silence_s: float,
) -> str | None:  # fmt: skip
    """Send and receive until the other end closes its output; what came after the mark, or None where it did not come."""
    assert process.stdin is not None and process.stdout is not None
    os.set_blocking(process.stdin.fileno(), False)
    listener = _Listener(host, mark, line)
    waiting = memoryview(b"")
    with selectors.DefaultSelector() as both:
        both.register(process.stdout, selectors.EVENT_READ)
        both.register(process.stdin, selectors.EVENT_WRITE)
        while True:
            ready = {key.fileobj for key, _ in both.select(silence_s)}
            if not ready:
                raise MissingDependency(f"{host} has answered nothing for {silence_s:g} s; look whether it still runs")
            if process.stdin in ready:
                waiting = waiting or memoryview(next(payload, b""))
                sent = _send(process.stdin.fileno(), waiting)
                waiting = waiting[sent or 0 :]
                if sent is None:  # all is sent, or nobody takes it; why is said on what is read
                    both.unregister(process.stdin)
                    if not hold:
                        _close(process)
            if process.stdout in ready:
                block = os.read(process.stdout.fileno(), BLOCK)
                if not block:
                    return listener.answer
                listener.hear(block)


def _send(descriptor: int, waiting: memoryview) -> int | None:
    """How many bytes went out; None if there are none left, or the other end is gone."""
    try:
        return os.write(descriptor, waiting) if waiting else None
    except BlockingIOError:
        return 0
    except BrokenPipeError:
        return None


class _Listener:
    """Passes lines on until the mark comes; keeps what follows it."""

    def __init__(self, host: str, mark: bytes, line: Callable[[str], None]):
        self.host, self.mark, self.line = host, mark, line
        self.held = bytearray()
        self.marked = False

    @property
    def answer(self) -> str | None:
        return self.held.decode(errors="replace") if self.marked else None

    def hear(self, block: bytes) -> None:
        self.held += block
        while not self.marked and b"\n" in self.held:
            text, _, rest = bytes(self.held).partition(b"\n")
            self.held = bytearray(rest)
            if text == self.mark:
                self.marked = True
            elif text.strip():
                self.line(plain(text.decode(errors="replace").strip())[:200])
        if len(self.held) > MAX_ANSWER:
            raise StepFailed(f"{self.host} answers with more than {MAX_ANSWER >> 20} MiB, which no result has")


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    if not process.stdin.closed:
        process.stdin.close()  # nothing is buffered: it was written through its descriptor


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the connection. The other end first gets time to notice and to clean up, also when an interrupt ends this one."""
    _close(process)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()


def new_mark() -> str:
    """A line that nothing else prints."""
    return f"moee-answer-{uuid.uuid4().hex}"


def tar_size(folder: Path) -> int:
    """Bytes of what `tar_blocks` gives."""
    return sum(len(header) + size + -size % tarfile.BLOCKSIZE for _, header, size in _members(folder)) + len(_TAIL)


def tar_blocks(folder: Path, report: Callable[[int], None] = lambda sent: None) -> Iterator[bytes]:
    """A folder as a tar archive, block by block; `report` gets the bytes so far. No owner, no times."""
    sent = 0
    for path, header, size in _members(folder):
        yield header
        sent += len(header)
        if size:
            with open(path, "rb") as file:
                while block := file.read(BLOCK):
                    yield block
                    sent += len(block)
                    report(sent)
            if padding := -size % tarfile.BLOCKSIZE:
                yield bytes(padding)
                sent += padding
    yield _TAIL


_TAIL = bytes(2 * tarfile.BLOCKSIZE)


def _members(folder: Path) -> Iterator[tuple[Path, bytes, int]]:
    """Path, tar header and bytes of everything below a folder."""
    for path in sorted(folder.rglob("*")):
        member = tarfile.TarInfo(path.relative_to(folder).as_posix())
        if path.is_dir():
            member.type, member.mode = tarfile.DIRTYPE, 0o700
        else:
            member.size, member.mode = path.stat().st_size, 0o700 if os.access(path, os.X_OK) else 0o600
        yield path, member.tobuf(tarfile.GNU_FORMAT), member.size
