"""The sanitizer of each machine: switched on, and what becomes of its findings."""

from __future__ import annotations

from logging import INFO, WARNING
from typing import TYPE_CHECKING, ParamSpec

from iommufd_uapi import admin
from iommufdd.errors import ENOENT
from iommufdd.finding import Outcome
from iommufdd.hardware_events import tell_stale
from iommufdd.sanitizer import STATUS, Mode, Sanitizer

from . import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufdd.finding import Finding
    from iommufdd.machine import Machine

    from .channel import Channel
    from .serve import Server

P = ParamSpec("P")
PACKET = 16_384  # characters of one packet of lines


def sanitize(machine: Machine, mode: Mode) -> Sanitizer:
    """Watch a machine from now on; one that is watched becomes stricter at most."""
    if machine.sanitizer is None:
        machine.sanitizer = Sanitizer(mode)
        machine.sanitizer.listeners.append(tell_stale(machine.events))
        for iommu in machine.iommus.values():
            machine.sanitizer.watch(iommu)
    elif mode is Mode.FAIL:
        machine.sanitizer.mode = mode
    return machine.sanitizer


class Sanitize:
    """The daemon's --sanitize: every machine is watched, and what was never flushed goes to the log."""

    def __init__(self, mode: str) -> None:
        self.mode = Mode(mode)
        self.never = 0

    def watched(self, new_machine: Callable[P, Machine]) -> Callable[P, Machine]:
        """A maker of machines that are watched."""

        def make(*args: P.args, **kwargs: P.kwargs) -> Machine:
            machine = new_machine(*args, **kwargs)
            sanitize(machine, self.mode).listeners.append(self._found)
            return machine

        return make

    def _found(self, finding: Finding) -> None:
        if finding.outcome is Outcome.NEVER:
            self.never += 1
            log.event(WARNING, "never-flushed", use=finding.use, changed=finding.change, right=finding.right)

    def end(self) -> int:
        """The daemon's exit status, when nothing else went wrong."""
        log.event(INFO, "sanitizer", never=self.never)
        return STATUS if self.mode is Mode.FAIL and self.never else 0


def tell(channel: Channel, sanitizer: Sanitizer) -> None:
    """The keeper's verdict and its report."""
    if sanitizer.failed:
        channel.verdict(STATUS)
    packet = ""
    for line in sanitizer.summary():
        if len(packet) + len(line) > PACKET:
            channel.say(packet)
            packet = ""
        packet += ("\n" if packet else "") + line
    channel.say(packet)


def findings(server: Server, request: admin.Sanitize) -> admin.Reply:
    """What every machine's sanitizer, or that of one instance, has found. ENOENT."""
    machines = [instance.machine for instance in server.instances]
    if request.machine is not None:
        machines = [machine for machine in machines if machine.name == request.machine]
        if not machines:
            raise ENOENT(f"there is no machine {request.machine!r}")
    return admin.Sanitized([_findings(machine, settle=request.settle) for machine in machines])


def _findings(machine: Machine, *, settle: bool) -> admin.Findings:
    sanitizer = machine.sanitizer
    if sanitizer is None:
        return admin.Findings(machine.name, Mode.OFF.value)
    if settle:
        sanitizer.settle()
    counts = sanitizer.counts
    return admin.Findings(
        machine.name, sanitizer.mode.value, checked=counts.checked, never=counts.never, raced=counts.raced,
        pending=sanitizer.pending, useless=counts.useless, lines=sanitizer.summary(),
    )  # fmt: skip
