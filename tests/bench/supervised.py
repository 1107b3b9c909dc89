"""Under `iommufdctl run` and `mount`: an ioctl; what other calls cost more where there is a filter, and the start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .measure import US, Aim, Bench, Case, Plan, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOURCE = Path(__file__).with_name("calls.c")
RUN = (sys.executable, "-m", "iommufd_client.cli", "run", "--")
MOUNT = (sys.executable, "-m", "iommufd_client.cli", "mount", "/dev/iommu", "--")
EXACT = (*MOUNT[:-2], "--exact", *MOUNT[-2:])
BARE, UNDER, MOUNTED, EXACTLY = "bare", "under run", "under mount", "under mount --exact"
CALLS = {
    "open and close, O_RDONLY": "rdonly",
    "open and close, O_RDWR (notified by run)": "rdwr",
    "read of an ordinary file": "read",
    "mmap and munmap of a file (notified by mount --exact)": "mmap",
}


@contextmanager
def cases(plan: Plan) -> Iterator[list[Case]]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Unavailable("no C compiler")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with tempfile.TemporaryDirectory(prefix="iommufdd-bench-") as folder:
        program = os.path.join(folder, "calls")
        subprocess.run([compiler, "-O2", "-o", program, SOURCE], check=True)
        if subprocess.run([*RUN, "true"], env=environment, stderr=subprocess.DEVNULL).returncode:
            raise Unavailable("no seccomp user notification here")
        count = plan.count(20_000)

        def timed(*words: str) -> Callable[[], float]:
            command = [*words, str(count)]
            return lambda: float(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)

        def started(*words: str) -> Callable[[], float]:
            def run() -> float:
                start = time.perf_counter()
                subprocess.run(words, env=environment, check=True)
                return time.perf_counter() - start

            return run

        found = [Case("ioctl of /dev/iommu", UNDER, timed(*RUN, program, "ioctl"))]
        ways: dict[str, tuple[str, ...]] = {UNDER: RUN}
        mounts: tuple[tuple[str, tuple[str, ...]], ...] = (MOUNTED, MOUNT), (EXACTLY, EXACT)
        for name, words in mounts:
            if not subprocess.run([*words, "true"], env=environment, stderr=subprocess.DEVNULL).returncode:
                found.append(Case("ioctl of /dev/iommu", name, timed(*words, program, "ioctl")))
                ways[name] = words
        ways.pop(MOUNTED, None)  # it has no filter: all other calls are the kernel's
        for row, what in CALLS.items():
            bare = Case(row, BARE, timed(program, what))
            aim = Aim(ratio=1.05) if what == "rdonly" else None
            found.append(bare)
            for name, words in ways.items():
                found.append(Case(row, name, timed(*words, program, what), base=bare, aim=aim))
        start = Case("start of `true`", BARE, started("true"))
        yield [*found, start, Case("start of `true`", UNDER, started(*RUN, "true"))]


TITLE = "unmodified programs under `iommufdctl run` and `mount`, all on one CPU"
BENCH = Bench("run", TITLE, US, "how many times bare", cases)
