"""From nothing to the first answer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from iommufd_client.pagetable import PageTable
from iommufd_client.testing import Daemon
from iommufd_uapi import iommufd as uapi

from .measure import MS, Aim, Bench, Case, Plan
from .peers import Raw, check, option_get, request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FLOOR = "python -c pass"


@contextmanager
def cases(plan: Plan) -> Iterator[list[Case]]:
    floor = Case(FLOOR, "", _python("pass"))
    first_answer()
    yield [
        floor,
        Case("iommufdd --version", "", _python(_version("iommufdd.cli")), base=floor),
        Case("iommufdctl --version", "", _python(_version("iommufd_client.cli")), base=floor),
        Case("import iommufd_client.iommufd", "", _python("import iommufd_client.iommufd"), base=floor),
        Case("import trio, which the daemon needs", "", _python("import trio"), base=floor),
        Case("iommufdd, until it has answered an ioctl", "", first_answer, base=floor),
        Case("iommufdd --machine vtd, until a nested DMA is done", "", first_dma, base=floor, aim=Aim(rate=1 / 0.4)),
    ]


def _version(module: str) -> str:
    """What the installed command does."""
    return f"import sys; from {module} import main; sys.exit(main(['--version']))"


def _environment() -> dict[str, str]:
    """Ours, with the packages where we have found them. Compiled modules are kept, as they are when installed."""
    kept = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def _python(code: str) -> Callable[[], float]:
    environment = _environment()

    def run() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - start

    run()  # what is not compiled yet is now
    return run


def first_dma() -> float:
    """A daemon, a device bound to a context, a guest's page table nested for it, and a write through both stages."""
    start = time.perf_counter()
    with (
        Daemon("--machine", "vtd") as daemon,
        daemon.open() as iommufd,
        daemon.admin() as admin,
        iommufd.device("vfio1") as device,
        iommufd.guest_memory(2 << 20) as ram,
    ):
        dev = device.bind(iommufd)
        ioas = iommufd.ioas_alloc()
        iommufd.ioas_map(ioas, ram, iova=0)
        parent = iommufd.hwpt_alloc(dev, ioas, flags=uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
        table = PageTable(ram, 0x10_0000)
        table.map(0x7F00_0000_0000, 0x5000)
        device.attach(iommufd.hwpt_alloc(dev, parent, data=uapi.HwptVtdS1(pgtbl_addr=table.root, addr_width=48)))
        admin.endpoint("vfio1", iommufd).write(0x7F00_0000_0000, b"first")
        seconds = time.perf_counter() - start
        if ram.read(0x5000, 5) != b"first":
            raise AssertionError("the DMA went elsewhere")
    return seconds


def first_answer() -> float:
    """The client connects at once, to a socket that the daemon inherits, and waits."""
    with tempfile.TemporaryDirectory(prefix="iommufdd-bench-") as directory:
        path = os.path.join(directory, "socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(path)
            listener.listen()
            number = str(listener.fileno())
            command = [sys.executable, "-m", "iommufdd.cli", "--terminate", "--log-level", "error", "--fd", number]
            start = time.perf_counter()
            process = subprocess.Popen(command, env=_environment(), pass_fds=[listener.fileno()])
        try:
            with Raw(path) as raw:
                length = raw.trip(request(option_get()))
                seconds = time.perf_counter() - start
                check(raw.results(length))
        finally:
            if process.wait(10):
                raise RuntimeError(f"the daemon exited with {process.returncode}")
    return seconds


BENCH = Bench("startup", "starting, everything on one CPU", MS, f"how many times '{FLOOR}'", cases)
