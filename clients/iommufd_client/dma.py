"""Room client: `iommufdctl dma`, a device's DMA by hand."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from .endpoint import DmaError, How, Result, requests
from .show import amount, several

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from iommufd_uapi.admin import Dma

    from .admin import Admin
    from .endpoint import Op

DUMPED = 4096  # bytes of a read that a terminal is shown
WIDTH = 30  # of the bar
BETWEEN = 0.1  # seconds between two looks of the bar


class Transfer(NamedTuple):
    """What is asked for."""

    device: str
    op: Op
    iova: int
    length: int
    data: Data
    instance: str
    how: How
    repeat: int
    output: str  # file that a read goes to, "" for stdout


class Data:
    """Bytes to write or to compare with: at hand, or in a file that is read part by part."""

    def __init__(self, data: bytes = b"", file: BinaryIO | None = None) -> None:
        self._data = data
        self._file = file
        self.length = len(data) if file is None else os.fstat(file.fileno()).st_size

    @classmethod
    def of_file(cls, path: str) -> Data:
        """What a file has; of '-' and of what has no size, all that can be read now. OSError."""
        if path == "-":
            return cls(sys.stdin.buffer.read())
        file = open(path, "rb")  # noqa: SIM115 - as long as the command
        if file.seekable():
            return cls(file=file)
        with file:
            return cls(file.read())

    def part(self, at: int, count: int) -> bytes:
        if self._file is None:
            return self._data[at : at + count]
        self._file.seek(at)
        return self._file.read(count)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Bar:
    """How far it is, on a terminal's last line; nothing where there is no terminal."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._shown = 0.0
        self._start = time.monotonic()
        self._on = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def show(self, done: int) -> None:
        now = time.monotonic()
        if self._on and now - self._shown > BETWEEN:
            self._shown = now
            rate = amount(int(done / max(now - self._start, 1e-6)))
            full = WIDTH * done // max(self._total, 1)
            text = f"[{'#' * full}{' ' * (WIDTH - full)}] {amount(done)} of {amount(self._total)}, {rate}/s"
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._on and self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def run(admin: Admin, transfer: Transfer, advice: str) -> int:
    """Do it; 1 and one line when it fails. `advice`: what to look at next, of the iova that it is given."""
    bar = Bar(transfer.length * transfer.repeat)
    out = _Output(transfer)
    done = 0
    try:
        for number in range(transfer.repeat):
            result = Result(transfer.device)
            for request in _requests(transfer):
                moved = admin.dma(request)
                if number == 0:
                    out.write(moved.data)
                done += moved.done
                bar.show(done)
                result.add(moved)
    except DmaError as error:
        bar.end()
        out.close()
        print(f"iommufdctl: {error}{_next(error, transfer, advice)}", file=sys.stderr)
        return 1
    finally:
        bar.end()
        out.close()
        transfer.data.close()
    if transfer.op != "read":
        times = f", {several(transfer.repeat, 'time')}" if transfer.repeat > 1 else ""
        verb = {"write": "wrote", "fill": "filled", "compare": "compared"}[transfer.op]
        print(f"{transfer.device} {verb} {amount(transfer.length)} at iova {transfer.iova:#x}{times}")
    return 0


def _next(error: DmaError, transfer: Transfer, advice: str) -> str:
    return f"; see {advice.format(iova=transfer.iova + error.done)}" if error.fault is not None else ""


def _requests(transfer: Transfer) -> Iterator[Dma]:
    """The calls, with data as late as possible."""
    t = transfer
    pattern = t.data.part(0, t.data.length) if t.op == "fill" else b""
    for request in requests(t.device, t.instance, t.op, t.iova, t.length, pattern, t.how):
        if t.op in ("write", "compare"):
            request.data = t.data.part(request.iova - t.iova, request.length)
        yield request


class _Output:
    """Where a read goes: a file, raw; stdout, raw; or on a terminal as text."""

    def __init__(self, transfer: Transfer) -> None:
        self._iova = transfer.iova
        self._file: BinaryIO | None = None
        if transfer.op == "read" and transfer.output not in ("", "-"):
            self._file = open(transfer.output, "wb")  # noqa: SIM115 - closed by close()
        self._dump = transfer.output == "" and sys.stdout.isatty()

    def write(self, data: bytes) -> None:
        if not data:
            return
        if self._file is not None:
            self._file.write(data)
        elif self._dump:
            print("\n".join(hexdump(data, self._iova)))
        else:
            sys.stdout.buffer.write(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def hexdump(data: bytes, at: int) -> Iterator[str]:
    """Sixteen bytes a line, numbered from `at`."""
    for start in range(0, len(data), 16):
        line = data[start : start + 16]
        digits = " ".join([line[:8].hex(" "), "", line[8:].hex(" ")]) if len(line) > 8 else line.hex(" ")
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in line)
        yield f"{at + start:#014x}  {digits:<48}  {text}"
