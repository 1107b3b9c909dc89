"""KVM under `iommufdctl run --kvm`: C programs whose VM's table a VT-d walks (kvm.c); we are who starts the DMA."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest

from iommufd_client.endpoint import DmaError
from iommufd_client.show import render
from iommufd_client.testing import Daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from iommufd_client.admin import Admin
    from iommufd_client.endpoint import Endpoint
    from iommufd_uapi.admin import Counts

    from .conftest import Run

PAGE = 4096
GPA = 0x10_0000
PATIENCE = 10.0
LEFT = ("instances", "contexts", "devices", "objects", "files", "page_files", "charged_fds", "open_fds")
OF_KVM = (
    "server.vms.ServedVm", "server.vms.ServedKvm", "kvm.vm.Vcpu", "kvm.tdp_fd.TdpFile", "server.seccomp.procmm.ProcMm",
)  # fmt: skip


@pytest.fixture(scope="module")
def lab(run: Run) -> Iterator[Daemon]:
    with Daemon("--machine=vtd") as daemon:
        run("--socket-path", daemon.socket_path, "--", "true")  # what it keeps from the first run on is there
        yield daemon


@contextmanager
def nothing_left(admin: Admin) -> Iterator[None]:
    """What there was before is there after."""

    def left(counts: Counts) -> list[int]:
        classes = [counts.classes.get(f"iommufdd.{name}", 0) for name in OF_KVM]
        return [*(getattr(counts, name) for name in LEFT), *classes]

    before = left(admin.stats(classes=True))
    yield
    until = time.monotonic() + PATIENCE
    while (after := left(admin.stats(classes=True))) != before and time.monotonic() < until:
        time.sleep(0.02)
    assert after == before


class Program(NamedTuple):
    """A way of kvm.c that waits for us, and the device it has attached."""

    process: subprocess.Popen[str]
    endpoint: Endpoint
    admin: Admin

    def turn(self) -> str:
        """Up to its next word; it goes on with the next call."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("x")
        self.process.stdin.flush()

    def during(self, word: str) -> Turn:
        return Turn(self, word)


class Turn:
    """A block in which the program waits, having said a word."""

    def __init__(self, program: Program, word: str) -> None:
        self.program, self.word = program, word

    def __enter__(self) -> Endpoint:
        assert self.program.turn() == self.word
        return self.program.endpoint

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.program.go_on()


@pytest.fixture
def start(run: Run, compiled: Path, lab: Daemon) -> Iterator[Callable[..., Program]]:
    """Start one of the ways; at the end it has printed ok, unless it was killed, and has left nothing."""
    started: list[subprocess.Popen[str]] = []
    with lab.admin() as admin, nothing_left(admin):

        def program(way: str, *options: str) -> Program:
            words = ("--socket-path", lab.socket_path, "--machine", "ci@vtd", "--kvm", *options)
            started.append(run.start(*words, "--", compiled / "kvm", way, stdin=subprocess.PIPE))
            return Program(started[-1], admin.endpoint("vfio0", "ci"), admin)

        try:
            yield program
            for process in started:
                out, err = process.communicate(timeout=PATIENCE)
                assert process.returncode == -signal.SIGKILL or (process.returncode, out, err) == (0, "ok\n", "")
        finally:
            for process in started:
                process.kill()
                process.communicate()


def refused(call: Callable[[], object], why: str) -> None:
    with pytest.raises(DmaError, match=why):
        call()


def test_the_whole_story(start: Callable[..., Program]) -> None:
    program = start("story")
    with program.during("shared") as endpoint:
        assert endpoint.read(GPA + PAGE, 12) == b"of the guest"
        endpoint.write(GPA + 2 * PAGE - 4, b"by DMA!!")
        assert program.admin.stats().pinned_pages == 0
        endpoints = [each for instance in program.admin.show().instances for each in instance.endpoints]
        (device,) = (each for each in endpoints if each.attachments)
        assert (device.page_requests, device.failures) == (2, 0)
        drawn = render(program.admin.show())
        assert re.search(r"VM  of pid \d+  1 slot, 64 KiB  1 vCPU  table exported, 1 importer, 8 KiB mapped", drawn)
    with program.during("logged") as endpoint:
        endpoint.write(GPA + PAGE, b"dirty")
    with program.during("deleted") as endpoint:
        refused(lambda: endpoint.read(GPA + PAGE, 1), "answered FAILURE")
    with program.during("again") as endpoint:
        assert endpoint.read(GPA + PAGE, 5) == b"dirty"
    with program.during("closed") as endpoint:
        endpoint.write(GPA + PAGE, b"held!")
    with program.during("without a VM") as endpoint:
        endpoint.write(GPA, b"still")


def test_every_kind_of_memory(start: Callable[..., Program]) -> None:
    with start("kinds").during("shared") as endpoint:
        for index in range(3):
            gpa = GPA * (index + 1) + PAGE
            assert endpoint.read(gpa, 6) == f"kind {index}".encode()
            endpoint.write(gpa, b"DMA")
        assert endpoint.read(4 * GPA + PAGE, 3) == b"DMA"
        refused(lambda: endpoint.write(4 * GPA + PAGE, b"no"), "answered FAILURE")
        refused(lambda: endpoint.read(8 * GPA, 1), "answered FAILURE")


def test_memory_that_the_program_takes_back_is_out_of_reach(start: Callable[..., Program]) -> None:
    """Nobody hears of munmap() and mprotect(): each DMA looks at what the addresses show and allow by now."""
    program = start("unmaps")
    with program.during("shared") as endpoint:
        assert endpoint.read(GPA, 4) == b"kept"
        endpoint.write(GPA + 8, b"DMA")
    with program.during("read only") as endpoint:
        assert endpoint.read(GPA, 4) == b"kept"
        refused(lambda: endpoint.write(GPA, b"lost"), "is gone")
    with program.during("nothing allowed") as endpoint:
        refused(lambda: endpoint.read(GPA, 4), "is gone")
    with program.during("unmapped") as endpoint:
        refused(lambda: endpoint.read(GPA, 4), "is gone")
        refused(lambda: endpoint.write(GPA, b"lost"), "is gone")
        refused(lambda: endpoint.read(GPA + 2 * PAGE, 1), "is gone|FAILURE")
    with program.during("something else") as endpoint:
        assert endpoint.read(GPA, 4) == b"anew"
        endpoint.write(GPA + 8, b"new")
    with program.during("private, read only") as endpoint:
        refused(lambda: endpoint.write(GPA + 8, b"lost"), "is gone")
        assert endpoint.read(GPA + 8, 3) == b"new"


def test_a_table_outlives_the_memory_that_it_showed(start: Callable[..., Program]) -> None:
    program = start("orphans")
    with program.during("shared") as endpoint:
        endpoint.write(GPA, b"there")
    with program.during("another program") as endpoint:
        refused(lambda: endpoint.read(GPA, 5), "is gone|FAILURE")
        refused(lambda: endpoint.read(GPA + PAGE, 5), "FAILURE")
    with program.during("killed") as endpoint:
        refused(lambda: endpoint.read(GPA, 5), "FAILURE")
        assert "table exported, 1 importer, 0 B mapped" in render(program.admin.show())


@pytest.mark.parametrize("way", ["errors", "files", "closes", "processes"])
@pytest.mark.parametrize("options", [(), ("--trace", os.devnull)], ids=["", "traced"])
def test_a_program_finds_what_a_kernel_shows(start: Callable[..., Program], way: str, options: tuple[str, ...]) -> None:
    start(way, *options)


def test_a_program_that_is_killed_leaves_nothing(start: Callable[..., Program]) -> None:
    program = start("killed")
    with program.during("shared") as endpoint:
        endpoint.write(GPA, b"x")
        assert program.admin.stats().objects_by_type["HWPT_KVM"] == 1
        program.process.kill()


def test_without_the_option_the_node_is_the_hosts(run: Run) -> None:
    code = """
import os
try: print(os.readlink("/proc/self/fd/%d" % os.open("/dev/kvm", os.O_RDWR)))
except OSError as error: print(error.errno)
"""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
        there = "/dev/kvm"
    except OSError as error:
        there = str(error.errno)
    assert run("--", "python3", "-c", code).stdout == there + "\n"
    assert "memfd" in run("--kvm", "--", "python3", "-c", code).stdout


def test_a_machine_without_vtd_has_no_such_hwpt(run: Run, compiled: Path) -> None:
    """The VM is there all the same."""
    assert run("--kvm", "--", compiled / "kvm", "files").stdout == "ok\n"
    result = run("--kvm", "--explain", "--machine", "smmuv3", "--", compiled / "kvm", "killed")
    assert "IOMMU_HWPT_ALLOC = EOPNOTSUPP" in result.stderr


def test_the_trace_names_it_all(run: Run, compiled: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace"
    run("--machine", "vtd", "--kvm", "--trace", out, "--summary", "--", compiled / "kvm", "killed", stdin=None)
    text = out.read_text()
    for call in (
        "KVM_GET_API_VERSION(kvm, {arg=0}) = 12", "KVM_CREATE_VM(kvm, {arg=0}) = 9", "KVM_ENABLE_CAP(vm, {",
        "KVM_CREATE_TDP_FD(vm, {", "data_type=IOMMU_HWPT_DATA_KVM",
    ):  # fmt: skip
        assert call in text, call


def test_when_the_daemon_dies_the_node_stays_away_from_the_host(run: Run) -> None:
    code = """
import os, signal, time
def opened():
    try: return os.open("/dev/kvm", os.O_RDWR)
    except OSError as error: return -error.errno
print(opened() >= 900)
os.kill(int(os.environ["DAEMON"]), signal.SIGKILL)
time.sleep(0.2)
print(opened())
"""
    daemon = Daemon(terminate=False)
    with daemon:
        run.environment["DAEMON"] = str(daemon.pid)
        try:
            result = run("--socket-path", daemon.socket_path, "--kvm", "--", "python3", "-c", code)
        finally:
            del run.environment["DAEMON"]
    assert result.stdout == f"True\n{-errno.ENODEV}\n"
