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

from .measure import MS, Bench, Case, Plan
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
