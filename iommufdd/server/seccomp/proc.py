"""What programs read of themselves under /proc and /sys/kernel/debug (`run --proc`).

An open can be answered with a file of ours where a read cannot. /proc/N/status is the real text with VmPin and VmLck
raised by what is pinned here; fail-nth is a number that a process writes and that the fault gate counts down; the
debug folder is one that the keeper made, with the switches of fault injection.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from iommufdd.user import PAGE_SIZE

if TYPE_CHECKING:
    from .notify import Supervisor
    from .target import Process, Thread

STATUS = re.compile(rb"/proc/(self|\d+)/status")
FAIL_NTH = re.compile(rb"/proc/(?:self|thread-self|\d+)/(?:task/\d+/)?fail-nth")
DEBUG_FOLDERS = (b"/sys/kernel/debug", b"/sys/kernel/debug/")
LINE = re.compile(rb"^(VmLck|VmPin):\s*(\d+) kB$", re.MULTILINE)
LONGEST = 32
UNIT = PAGE_SIZE // 1024


class FailNth:
    """/proc/PID/task/TID/fail-nth: the text that the process reads and writes without our being asked."""

    def __init__(self) -> None:
        """OSError."""
        self.memfd = os.memfd_create("fail-nth", os.MFD_CLOEXEC)
        self.set(0)

    def set(self, nth: int) -> None:
        text = b"%d\n" % nth
        os.ftruncate(self.memfd, len(text))
        os.pwrite(self.memfd, text, 0)

    def get(self) -> int:
        """What was written last: "5" over "12" leaves "52", so only "0" over anything is sure to be known."""
        text = os.pread(self.memfd, LONGEST, 0).split(b"\n")[0]
        return int(text) if text.isdigit() and not text.startswith(b"0") else 0

    def close(self) -> None:
        os.close(self.memfd)


def open_proc(supervisor: Supervisor, thread: Thread, path: bytes, flags: int) -> int:
    """A descriptor of ours, to be closed by the caller, for what the process opens; -1 for anything else. OSError."""
    if flags & os.O_DIRECTORY:
        return os.dup(supervisor.debug_folder) if path in DEBUG_FOLDERS and supervisor.debug_folder >= 0 else -1
    if flags & os.O_ACCMODE == os.O_RDWR:
        return _fail_nth(supervisor, thread.process) if FAIL_NTH.fullmatch(path) else -1
    found = STATUS.fullmatch(path)
    return -1 if found is None else _status(supervisor, thread, found[1])


def _fail_nth(supervisor: Supervisor, process: Process) -> int:
    if supervisor.debug_folder < 0:
        return -1
    if process.fail_nth is None:
        process.fail_nth = FailNth()
    return os.open(f"/proc/self/fd/{process.fail_nth.memfd}", os.O_RDWR | os.O_CLOEXEC)


def _status(supervisor: Supervisor, thread: Thread, who: bytes) -> int:
    """A copy of the text with our numbers, if there are any to show."""
    process = thread.process if who == b"self" else _process_of(supervisor, thread, int(who))
    if process is None or not (process.mm.locked_vm or process.mm.pinned_vm):
        return -1
    more = {b"VmLck": process.mm.locked_vm * UNIT, b"VmPin": process.mm.pinned_vm * UNIT}
    with open(f"/proc/{process.tgid}/status", "rb") as file:
        text = file.read()
    text = LINE.sub(lambda line: b"%s:\t%8d kB" % (line[1], int(line[2]) + more[line[1]]), text)
    memfd = os.memfd_create("status", os.MFD_CLOEXEC)
    try:
        os.write(memfd, text)
        return os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(memfd)


def _process_of(supervisor: Supervisor, thread: Thread, pid: int) -> Process | None:
    """The process that has this number in the caller's pid namespace."""
    namespace = _pid_namespace(thread.tid)
    if namespace == _pid_namespace(os.getpid()):
        return supervisor.processes.get(pid)
    for process in supervisor.processes.values():
        if _pid_namespace(process.tgid) == namespace and process.pid_inside() == pid:
            return process
    return None


def _pid_namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""
