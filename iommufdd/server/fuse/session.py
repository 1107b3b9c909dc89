"""A mount: its /dev/fuse descriptor in the reactor, requests received and answered."""

from __future__ import annotations

import errno
import os
import select
from logging import DEBUG, INFO
from typing import TYPE_CHECKING, NamedTuple

from iommufd_uapi.wire import SUPERVISE_EXPLAIN, SUPERVISE_SUMMARY
from iommufdd.errors import IommufdError, ProtocolError
from iommufdd.server import log
from iommufdd.server.seccomp.procfile import TargetFiles
from iommufdd.server.seccomp.procmm import Clock, StaleError
from iommufdd.server.seccomp.target import Targets, tgid_of

from . import abi
from .backing import Backing
from .caller import MountProcess, Thread
from .calls import Calls
from .files import BACKED_DEVICES, OUR_DEVICES, OpenFiles

if TYPE_CHECKING:
    from iommufdd.context import Context
    from iommufdd.server.channel import Channel
    from iommufdd.server.credentials import Peer, Virtual
    from iommufdd.server.instance import Instance, OpenContext
    from iommufdd.server.seccomp.report import Report
    from iommufdd.server.seccomp.target import Origin, Process
    from iommufdd.server.serve import Server

    from .exact import Exact
    from .files import Opened
    from .identity import Question
    from .inject import Injection

MANY_THREADS = 256


class Request(NamedTuple):
    """A struct fuse_in_header, as far as it counts, and what follows it."""

    opcode: int
    unique: int
    pid: int  # of the thread; 0 when it is not visible from where the mount was made
    body: bytes


class Config(NamedTuple):
    """How a mount is to be served."""

    dev: int  # st_dev of the file
    container: bool  # as /dev/vfio/vfio
    private: bool  # one command's, whose mappings need not be kept apart
    cautious: bool  # callers may be others than who mounted it
    virtual: Virtual
    origin: Origin


class Session(Targets[Thread]):
    """One mount, until it is unmounted and nothing has it open any more. Serves processes as a Supervisor does."""

    def __init__(self, server: Server, instance: Instance, peer: Peer, device: int, config: Config) -> None:
        """Takes over `device`."""
        super().__init__()
        self.server = server
        self.reactor = server.reactor
        self.instance = instance
        self.machine = instance.machine
        self.uid = peer.uid
        self.config = config
        self.origin, self.virtual = config.origin, config.virtual
        self.clock = Clock()
        self.files = TargetFiles(server.page_files, peer.uid, self._is_ours, cautious=config.cautious)
        self.open_files = OpenFiles()
        self.injection: Injection | None = None  # the one in work
        self.stuck: list[Injection] = []  # whose threads did not stop in time
        self.question: Question | None = None  # the one being asked
        self.exact: Exact | None = None
        self.backing: Backing | None = None  # of mappings, where there can be one
        self.report: Report | None = None
        self.channel: Channel | None = None
        self.device = device
        self._deferred: list[Request] = []  # came while another needed the ptrace, and need it too
        self._view = memoryview(bytearray(abi.REQUEST_ROOM))
        self._target = (self._view,)
        self._calls = Calls(self)
        self._unmounted = False
        self._opened = False
        os.set_blocking(device, False)
        self.reactor.register(device, self, select.EPOLLIN)
        server.supervisors.add(self)
        instance.keep(self)
        OUR_DEVICES[config.dev] += 1

    # ---- the keeper ----

    def attach(self, channel: Channel, flags: int) -> None:
        """Tell whoever mounted what they want to know (SUPERVISE_*), and hang up at the end."""
        self.channel, channel.supervisor = channel, self
        explain, summary = bool(flags & SUPERVISE_EXPLAIN), bool(flags & SUPERVISE_SUMMARY)
        if explain or summary:
            from iommufdd.server.seccomp.report import Report

            self.report = Report(channel.say, explain=explain, summary=summary)

    def detach(self) -> None:
        """The keeper is gone; who has the file open is served until it is closed."""
        self.channel = None

    def heard(self, packet: bytes, fds: list[int]) -> None:
        """Nothing is ever asked. ProtocolError."""
        raise ProtocolError("a keeper has nothing more to say")

    def held(self, process: Process) -> set[OpenContext]:
        """What a process has open is not known: the kernel tells of files, not of descriptors."""
        return set()

    def close(self, why: str = "shutdown") -> None:
        self._close_device()
        if self.exact is not None:
            self.exact.close()
        self.end_if_over(why)

    def end_if_over(self, why: str = "unmounted") -> None:
        """Hang up, when the mount and the listener have both ended."""
        if self.device >= 0 or (self.exact is not None and self.exact.listener >= 0):
            return
        if self not in self.server.supervisors:
            return
        self.server.supervisors.discard(self)
        log.event(INFO, "mount-closed", uid=self.uid, why=why)
        if self.channel is not None:
            if self.report is not None:
                self.report.end()
            self.channel.close(why)
        self.server.channel_closed()

    def _close_device(self) -> None:
        """It is unmounted, and nothing has it open."""
        if self.device < 0:
            return
        self.reactor.unregister(self.device)
        os.close(self.device)
        self.device = -1
        OUR_DEVICES.subtract([self.config.dev])
        if not OUR_DEVICES[self.config.dev]:
            del OUR_DEVICES[self.config.dev]
        for fh in list(self.open_files.by_fh):
            self.release(fh)
        if self.backing is not None:
            self.backing.close()
            BACKED_DEVICES.discard(self.config.dev)
        for process in list(self.processes.values()):
            self.forget_process(process)
        self.instance.let_go(self)

    # ---- requests ----

    def ready(self, mask: int) -> None:
        self.stuck = [injection for injection in self.stuck if not injection.freed()]
        self.pump()
        self.run_deferred()

    def run_deferred(self) -> None:
        """What could not be answered at once, at the latest now."""
        while self._deferred and not self._unmounted:
            self._dispatch(self._deferred.pop(0))
        if self._unmounted:
            self._close_device()
            self.end_if_over()

    def pump(self) -> bool:
        """Answer the next request; False if there is none."""
        try:
            size = os.readv(self.device, self._target)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):  # withdrawn
                return True
            self._unmounted = True  # ENODEV
            return False
        _, opcode, unique, _, _, _, pid, _, _ = abi.IN_HEADER.unpack_from(self._view)
        self._dispatch(Request(opcode, unique, pid, bytes(self._view[abi.IN_HEADER.size : size])))
        return True

    def defer(self, request: Request) -> None:
        """Later: the tracer is busy."""
        self._deferred.append(request)

    def _dispatch(self, request: Request) -> None:
        self.clock.now += 1
        if self.exact is not None:
            self.exact.settle()
        try:
            answer = self._calls.handle(request)
        except IommufdError as error:
            answer = -error.errno
        except (OSError, StaleError) as error:
            self._unreachable(request.pid, error)
            answer = -errno.EACCES
        except Exception as error:
            log.bug(error, uid=self.uid, pid=request.pid)
            answer = -errno.EIO
        if self.files.offered:
            self.files.end()
        if answer is not None:
            self.reply(request.unique, answer)

    def reply(self, unique: int, answer: bytes | int) -> bool:
        """What follows the header, or minus an errno; False when nobody waits for it any more."""
        data, error = (answer, 0) if isinstance(answer, bytes) else (b"", answer)
        try:
            os.write(self.device, abi.OUT_HEADER.pack(abi.OUT_HEADER.size + len(data), error, unique) + data)
        except OSError:
            return False
        return True

    def poll_wakeup(self, opened: Opened) -> None:
        """The poll mask of a file has changed: whoever waits asks again (FUSE_NOTIFY_POLL)."""
        if not opened.kh:
            return
        size = abi.OUT_HEADER.size + abi.POLL_WAKEUP_OUT.size
        try:
            os.write(self.device, abi.OUT_HEADER.pack(size, abi.NOTIFY_POLL, 0) + abi.POLL_WAKEUP_OUT.pack(opened.kh))
        except OSError:
            pass

    def release(self, fh: int) -> None:
        """The last descriptor of a file is closed."""
        opened = self.open_files.by_fh.get(fh)
        if opened is not None and self.report is not None and opened.file is opened.context.ctx:
            self.report.closed(opened.context.ctx)
        self.open_files.release(fh)

    def ioctl(self, thread: Thread, ctx: Context, cmd: int, arg: int) -> int:
        """The result, or minus an errno. StaleError."""
        report = self.report
        rc = ctx.ioctl(thread.caller, cmd, arg) if report is None else report.ioctl(thread, ctx, cmd, arg)
        thread.caller.error = None  # it keeps the frames of the call alive
        return rc

    # ---- who calls ----

    def thread(self, tid: int) -> Thread:
        """A caller; it waits for us, so what is found by its number is its own. OSError, EMFILE."""
        thread = self.threads.get(tid)
        if thread is not None and not thread.process.shares_mm and thread.alive and thread.process.mm.mem >= 0:
            return thread
        return self.look_up(tid)

    def _is_ours(self, inode: tuple[int, int]) -> bool:
        """Whether a mapping is of registers."""
        return inode[0] in OUR_DEVICES or (self.exact is not None and self.exact.watch.has(inode))

    def find_backing(self) -> None:
        """At the first open: INIT is over, and all that follow must be like it."""
        if not self.config.private or self._opened:
            return
        self._opened = True
        try:
            self.backing = Backing(self.device, (self.config.dev, abi.ROOT_INO))
        except OSError as error:
            log.event(DEBUG, "no-mappings", uid=self.uid, why=error.strerror)
            return
        BACKED_DEVICES.add(self.config.dev)

    def forget(self, thread: Thread) -> None:
        """It turns out to be another task, or may be."""
        self.forget_process(thread.process)

    def look_up(self, tid: int) -> Thread:
        """A caller not seen before, or after exec. OSError, EMFILE."""
        self._forget_thread(tid)
        if not tid:
            raise ProcessLookupError(errno.ESRCH, "not visible in the pid namespace of the mount")
        tgid = tgid_of(tid)
        process = self.processes.get(tgid)
        if process is not None and process.ended:
            self.forget_process(process)
            process = None
        if process is None:
            process = self.processes[tgid] = MountProcess(self, tgid)
        else:
            process.renew()
        thread = self.threads[tid] = Thread(self, process, tid)
        if len(self.threads) > MANY_THREADS:
            for other in [other for other in self.threads.values() if not other.alive]:
                self._forget_thread(other.tid)
        return thread

    def _unreachable(self, tid: int, error: Exception) -> None:
        if self.server.ratelimit("unreachable"):
            log.event(INFO, "caller-unreachable", pid=tid, why=error)
