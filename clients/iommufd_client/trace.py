"""Room client: `iommufdctl trace`, what happens in a daemon, line by line or summed up."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from iommufd_uapi.events import AnyEvent

TRACE = """\
Follow what happens in a running daemon: ioctls with their fields and why they fail, reads and writes of event queues,
and what the emulated hardware does. One line an event, as strace prints system calls."""

TRACE_EPILOG = """\
a line:
  0.001234 4711 (vmm) IOMMU_IOAS_ALLOC(iommufd:9, {flags=0}) = 0 {out_ioas_id=ioas:1} <0.000021>
  seconds since the trace began, pid and name of the process, the call on the open /dev/iommu with that inode
  (as in 'iommufdctl show'), what was passed, what came back, how long it took. Ids have their kind.

a line of hardware, which has a process only if a call of one has caused it:
  0.002345 - [lab] fault vfio0 read iova 0x1000: 0x71 a first-stage entry is not present
  0.002361 - [lab] dma vfio0 pasid 5 write 0x7f1234567000+0x1000 = done
  0.002390 4711 (vmm) [lab] invalidate dmar0 IOTLB page (did 2, pasid 0) 0x5000..0x5fff leaf: dropped 1
  0.002402 4711 (vmm) [lab] replace vfio0 pasid 0 hwpt_paging:4 -> hwpt_nested:5: window: P cleared opens it
  [lab] is the name of a machine that is shared. Of a call the hardware's lines come first.

words of --only, joined by commas (default: all but object); fault has page requests and responses too:
  ioctl queue dma fault invalidate replace stale object
  fault is also page requests, and entries of a VM's table that a device reads as its CPU would not.
  stale is what the sanitizer finds (iommufdd --sanitize): DMA through what should have been flushed.

a slow reader:
  The daemon never waits for whoever reads this. What it could not keep is counted: '... 12 events lost'.

examples:
  iommufdctl trace
  iommufdctl trace --failed                         what went wrong, and why
  iommufdctl trace --only dma,fault -o dma.log
  iommufdctl trace --pid 4711 --summary             counts and times, at ^C
  iommufdctl trace --json | jq 'select(.kind == "ioctl") | .fields'

see also:
  iommufdctl run --trace FILE -- CMD                the same for one program
"""


def add(command: Callable[[str, str, str, str], argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    parser = command("trace", "follow what happens in a daemon", TRACE, TRACE_EPILOG)
    parser.add_argument("--socket-path", metavar="PATH", help="the daemon's socket (default: $IOMMUFDD_SOCKET, ...)")
    parser.add_argument("--admin-socket", metavar="PATH", help="its admin socket (default: the socket with .admin)")
    parser.add_argument("-p", "--pid", type=int, action="append", default=[], metavar="N", help="this process; repeat")
    parser.add_argument("--machine", metavar="NAME", help="the machine of this name")
    parser.add_argument("--only", type=_words, metavar="WORDS", help="kinds of events, see below")
    parser.add_argument("--failed", action="store_true", help="only what failed")
    parser.add_argument("-o", "--output", metavar="FILE", help="write there (default: stdout)")
    parser.add_argument("-c", "--summary", action="store_true", help="no lines, but counts at the end")
    parser.add_argument("--json", action="store_true", help="print each event as a line of JSON")
    parser.set_defaults(run=_run)


def _words(text: str) -> list[str]:
    from iommufd_uapi.events import KINDS

    words = text.split(",")
    if unknown := [word for word in words if word not in KINDS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(KINDS)}")
    return words


def _run(args: argparse.Namespace) -> int:
    from iommufd_uapi.events import USUAL

    from .admin import connect

    with connect(args.socket_path, args.admin_socket) as admin, _opened(args.output) as output:
        since, events = admin.trace(
            pids=args.pid, machine=args.machine, only=args.only or USUAL, failed=args.failed
        )
        summary = Summary() if args.summary else None
        try:
            _follow(events, since, output, summary, as_json=args.json)
        except KeyboardInterrupt:
            pass  # the usual end
        if summary is not None:
            print(summary.text(), file=output)
    return 0


def _opened(path: str | None) -> AbstractContextManager[TextIO]:
    """OSError"""
    return open(path, "w", encoding="utf-8") if path else nullcontext(sys.stdout)


def _follow(
    events: Iterable[AnyEvent], since: int, output: TextIO, summary: Summary | None, *, as_json: bool
) -> None:
    from iommufd_uapi.admin import encode
    from iommufd_uapi.events import line

    for event in events:
        if summary is not None:
            summary.add(event)
            continue
        output.write(encode(event).decode() if as_json else line(event, since) + "\n")
        output.flush()


class Summary:
    """How often, how long, how many failed: as `strace -c`."""

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._time: Counter[str] = Counter()

    def add(self, event: AnyEvent) -> None:
        """Count it under its name."""
        from iommufd_uapi.events import Ioctl, Lost, Queue, failed

        match event:
            case Lost():
                self._calls["events lost"] += event.count
                return
            case Ioctl():
                name, duration = event.name, event.duration
            case Queue():
                name, duration = f"{event.op} of a {event.queue.partition(':')[0]}", event.duration
            case _:
                name, duration = str(event.__struct_config__.tag), 0
        self._calls[name] += 1
        self._errors[name] += failed(event)
        self._time[name] += duration

    def text(self) -> str:
        """The table, the longest in time first."""
        total = sum(self._time.values())
        lines = ["% time     seconds  usecs/call     calls    errors  name"]
        for name in sorted(self._calls, key=lambda name: (-self._time[name], name)):
            time, calls = self._time[name], self._calls[name]
            share = 100 * time / total if total else 0.0
            errors = str(self._errors[name] or "")
            lines.append(f"{share:6.2f} {time / 1e6:11.6f} {time // max(calls, 1):11} {calls:9} {errors:>9}  {name}")
        errors = str(self._errors.total() or "")
        lines.append(f"100.00 {total / 1e6:11.6f} {'':11} {self._calls.total():9} {errors:>9}  total")
        return "\n".join(lines)
