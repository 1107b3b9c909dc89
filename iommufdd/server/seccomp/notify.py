"""A seccomp listener in the reactor: system calls of traced processes, received, answered and sent back."""

from __future__ import annotations

import errno
import os
import select
from logging import INFO
from typing import TYPE_CHECKING

from iommufd_uapi.seccomp import native
from iommufd_uapi.wire import (
    SUPERVISE_EXPLAIN,
    SUPERVISE_KVM,
    SUPERVISE_PROC,
    SUPERVISE_REACH,
    SUPERVISE_SANITIZE,
    SUPERVISE_SANITIZE_FAIL,
    SUPERVISE_SUMMARY,
)
from iommufdd.errors import EINVAL, EMFILE
from iommufdd.server import log
from iommufdd.server.devices import OpenDevice
from iommufdd.server.instance import OpenContext

from .calls import Calls
from .listener import CONTINUE, Listener
from .procfile import TargetFiles
from .procmm import Clock, StaleError
from .reach import Answer, Ask, Reach, Waiting
from .sys import inodes_of
from .target import Origin, Process, Targets, Thread, tgid_of

if TYPE_CHECKING:
    import socket

    from iommufdd.sanitizer import Sanitizer
    from iommufdd.server.channel import Channel
    from iommufdd.server.credentials import Peer, Virtual
    from iommufdd.server.devices import Opened
    from iommufdd.server.files import FileKey, Pipe
    from iommufdd.server.instance import Instance
    from iommufdd.server.serve import Server
    from iommufdd.server.trace import Reader

    from .calls import Handler
    from .fds import Installed
    from .proc import FailNth
    from .report import Report

MANY_THREADS = 256
REFUSED = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE}
GONE = {errno.ENOENT, errno.ESRCH, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE}


class Supervisor(Listener, Targets[Thread]):
    """One tree of traced processes."""

    def __init__(
        self, server: Server, instance: Instance, peer: Peer, listener: int, page: int, base: int, virtual: Virtual
    ) -> None:
        """Takes over `listener`; `page` is the file of the page. EINVAL, EMFILE."""
        numbers = native()
        if numbers is None:
            raise EINVAL(f"system calls of {os.uname().machine} are not known")
        Listener.__init__(self, server.reactor, listener, page)
        Targets.__init__(self)
        self.server = server
        self.instance = instance
        self.machine = instance.machine
        self.uid = peer.uid
        self.keeper = peer.pid
        self.origin = origin_of(peer)
        self.base = base
        self.virtual = virtual
        self.clock = Clock()
        self.watch = server.watch()
        self.files = TargetFiles(server.page_files, peer.uid, self.watch.has, cautious=peer.uid != os.geteuid() == 0)
        self.reach = Reach(self)
        self.second_look = 0  # the notification whose caller was looked up anew
        self.channel: Channel | None = None  # to the keeper
        self.report: Report | None = None  # what it wants to know
        self._reader: Reader | None = None  # of the trace
        self.sanitizer: Sanitizer | None = None  # of the machine, if it wants to know
        self.debug_folder = -1
        self.proc = False
        self.kvm = False
        self._ending = False
        self._said_unreachable = False
        self._calls = Calls(self, numbers)
        self.reactor.register(listener, self, select.EPOLLIN)
        server.supervisors.add(self)
        instance.keep(self)

    def close(self, why: str = "shutdown") -> None:
        """No more notifications: the last process has ended, or the daemon does."""
        if self.listener < 0:
            return
        self.reactor.unregister(self.listener)
        os.close(self.listener)
        self.listener = -1
        for thread in self.threads.values():
            thread.close()
        self.threads.clear()
        for process in list(self.processes.values()):
            self.forget_process(process)
        self._page.close()
        self.reach.clear()
        if self.debug_folder >= 0:
            os.close(self.debug_folder)
        self.server.supervisors.discard(self)
        self.instance.let_go(self)
        log.event(INFO, "supervisor-closed", uid=self.uid, why=why)
        if self.channel is not None and (self.report is not None or self.sanitizer is not None):
            self._drain()
            if self.report is not None:
                self.report.end()
            if self.sanitizer is not None:
                from iommufdd.server.sanitize import tell

                tell(self.channel, self.sanitizer)
        if self._reader is not None:
            self._drain()
            self._reader.end()
        if self.channel is not None:
            self.channel.close(why)
        self.server.channel_closed()

    def ended(self) -> None:
        """No process can call any more; what the last ones have open is closed before they count as ended."""
        self._ending = True
        self.reactor.modify(self.listener, 0)
        if not self.processes:
            self.close("the last process has ended")

    # ---- the keeper ----

    def attach(self, channel: Channel, flags: int) -> None:
        """Tell this keeper what it wants to know (SUPERVISE_*), and hang up at the end."""
        self.channel, channel.supervisor = channel, self
        self.proc = bool(flags & SUPERVISE_PROC)
        self.kvm = bool(flags & SUPERVISE_KVM)
        self.reach.willing = bool(flags & SUPERVISE_REACH)
        if flags & (SUPERVISE_EXPLAIN | SUPERVISE_SUMMARY):
            from .report import Report

            self.report = Report(
                channel.say, explain=bool(flags & SUPERVISE_EXPLAIN), summary=bool(flags & SUPERVISE_SUMMARY)
            )
        if flags & (SUPERVISE_SANITIZE | SUPERVISE_SANITIZE_FAIL):
            from iommufdd.sanitizer import Mode
            from iommufdd.server.sanitize import sanitize

            mode = Mode.FAIL if flags & SUPERVISE_SANITIZE_FAIL else Mode.REPORT
            self.sanitizer = sanitize(self.machine, mode)

    def detach(self) -> None:
        """The keeper is gone; the processes are served until the last one ends."""
        self.channel = None
        self.reach.give_up()
        self.resume()

    def heard(self, packet: bytes, fds: list[int]) -> None:
        """The keeper has answered; it keeps the descriptors that stay in `fds`. ProtocolError."""
        self.reach.take(packet, fds)
        self.resume()

    def mm_of_keeper(self, tgid: int, others: tuple[int, ...]) -> Answer:
        return self.reach.mm(tgid, others)

    def ask(self, ask: Ask) -> None:
        assert self.channel is not None
        self.reach.waiting = ask
        self.channel.ask(ask.pack())

    def answered(self) -> None:
        self.reach.clear()

    def tell(self, sock: socket.socket) -> None:
        """Events of our processes, and of the hardware of their machine, as lines on a socket, which is taken over."""
        from iommufdd.server.trace import follow_owner

        self._reader = follow_owner(self.server, self.machine, self, sock)

    # ---- notifications ----

    def notified(self, tid: int, nr: int, args: list[int]) -> int:
        self.clock.now += 1
        if self.watch.pending.poll(0):
            self._drain()
        try:
            return self._answer(tid, nr, args)
        except Waiting:
            raise
        except Exception as error:
            log.bug(error, uid=self.uid, pid=tid)
            return -errno.EIO
        finally:
            if self.files.offered:
                self.files.end()

    def _drain(self) -> None:
        """Close what was closed before now."""
        while self.watch.pending.poll(0):
            self.watch.ready(0)
            self.server.pipes.ready(0)

    def _answer(self, tid: int, nr: int, args: list[int]) -> int:
        """Twice, if what is kept of the caller turns out to be of a task that had its number before."""
        handler = self._calls.handlers.get(nr)
        if handler is None:
            return CONTINUE
        for _ in range(2):
            thread = self.threads.get(tid)
            try:
                if thread is None or thread.process.shares_mm:
                    thread = self._thread(tid)
                fail_nth = thread.process.fail_nth
                return handler(thread, args) if fail_nth is None else self._with_faults(fail_nth, handler, thread, args)
            except StaleError:
                self._forget_thread(tid)
            except OSError as error:
                if error.errno not in GONE:
                    raise
                if not tid or error.errno in REFUSED:
                    self._unreachable(tid, os.strerror(error.errno or 0) if tid else "another pid namespace")
                return CONTINUE
            except EMFILE as error:
                self._unreachable(tid, error.reason)
                return CONTINUE
        return CONTINUE

    def _unreachable(self, tid: int, why: str) -> None:
        """The caller's number is not visible here, or the right to look into it is missing: said once."""
        if self.channel is not None and not self._said_unreachable and self.valid():
            self._said_unreachable = True
            self.channel.say(f"pid {tid} cannot be looked into ({why}): it sees no /dev/iommu")

    def _with_faults(self, fail_nth: FailNth, handler: Handler, thread: Thread, args: list[int]) -> int:
        """The process may have asked for the nth acquisition to fail."""
        nth = fail_nth.get()
        if not nth:
            return handler(thread, args)
        gate = thread.process.gate
        gate.arm(nth)
        try:
            return handler(thread, args)
        finally:
            fail_nth.set(gate.nth)
            if gate.fired is not None:
                self._note_fault(gate.fired.name)
            gate.arm(0)

    def _note_fault(self, gate: str) -> None:
        if self.report is not None:
            self.report.fired[gate] += 1

    # ---- who calls ----

    def _thread(self, tid: int) -> Thread:
        """A thread not seen before, or not to be trusted. OSError."""
        self._forget_thread(tid)
        tgid = tgid_of(tid)
        process = self.processes.get(tgid)
        if process is not None and process.ended:
            self.forget_process(process)
            process = None
        known = process is not None
        if process is None:
            process = self.processes[tgid] = Process(self, tgid)
        else:
            process.renew()
        thread = Thread(self, process, tid)
        if not self.valid():  # what was opened may be another's, who has the number now
            thread.close()
            if not known:
                self.forget_process(process)
            raise ProcessLookupError(errno.ESRCH, "killed meanwhile")
        self.threads[tid] = thread
        if len(self.threads) > MANY_THREADS:
            self._prune(tid)
        return thread

    def forget_process(self, process: Process) -> None:
        """It has ended."""
        super().forget_process(process)
        if self._ending and not self.processes:
            self.close("the last process has ended")

    def _prune(self, but: int) -> None:
        """Forget threads that have ended."""
        for tid, thread in list(self.threads.items()):
            if tid != but and not os.path.exists(f"/proc/{thread.process.tgid}/task/{tid}"):
                self._forget_thread(tid)

    # ---- what is open ----

    def find(self, key: FileKey) -> Installed | Pipe | None:
        """One of our files by its inode."""
        found = self.watch.by_key.get(key)
        if found is not None:
            return found
        pipe = self.server.pipes.by_key.get(key)
        return pipe if pipe is not None and pipe.file is not None else None

    def held(self, process: Process) -> set[Opened]:
        """The contexts and devices of which a process has a descriptor; none if that may not be looked at."""
        euid = os.geteuid()
        found = {self.find((*inode, euid)) for inode in inodes_of(f"/proc/{process.tgid}/fd")}
        opened = (each.opened for each in found if each is not None)
        return {each for each in opened if isinstance(each, OpenContext | OpenDevice)}


def origin_of(peer: Peer) -> Origin:
    try:
        return Origin.of(peer.pid)
    except OSError as error:
        raise EINVAL(f"the keeper cannot be looked into: {error.strerror}") from None
