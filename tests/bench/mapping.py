"""IOAS_MAP and IOAS_UNMAP, by how many areas there are: in process, and over the socket."""

from __future__ import annotations

import gc
import random
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from iommufd_client.iommufd import Iommufd
from iommufd_uapi import iommufd as uapi

from .areas import MAP_AUTO, PAGE, Areas
from .core import USER_VA, Core
from .measure import US, Aim, Bench, Case, Plan, When, client_cpu
from .peers import check, cpu_time, daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from iommufd_uapi.layout import Ioctl

AIM = 8.0  # a million areas against a thousand
EACH_ROUND = 500
PACKET = 128
PAIR_SECONDS = 0.05
IN_PROCESS = "in process"
SOCKET = f"over the socket, {PACKET} a packet, CPU time of client and daemon"


class Rows:
    """Cases of one group; the first of each row is the base of the others."""

    def __init__(self, group: str, sizes: Sequence[int]) -> None:
        self.cases: list[Case] = []
        self._group = group
        self._bases: dict[str, Case] = {}
        self._aimed = str_of(sizes[-1])

    def add(self, row: str, size: int, run: Callable[[], float], when: When = When.EVERY) -> None:
        column, base = str_of(size), self._bases.get(row)
        aim = Aim(ratio=AIM) if column == self._aimed and when is not When.LAST else None
        case = Case(row, column, run, self._group, base, aim, when)
        self._bases.setdefault(row, case)
        self.cases.append(case)


def str_of(size: int) -> str:
    return f"{size:,} areas"


@contextmanager
def cases(plan: Plan) -> Iterator[list[Case]]:
    sizes = plan.sizes(1_000, 100_000, 1_000_000)
    with ExitStack() as stack:
        gc.freeze()  # as the daemon does
        stack.callback(gc.unfreeze)
        yield [*_in_process(plan, sizes), *_over_socket(plan, sizes, stack)]


def _fixed(rows: Rows, areas: Areas, *, shuffled: bool) -> None:
    order = "random order" if shuffled else "ascending"
    rows.add(f"map all, {order}", areas.count, lambda: areas.fill(shuffled=shuffled), When.FIRST)
    rows.add("map, random", areas.count, areas.map_random)
    rows.add("unmap, random", areas.count, areas.unmap_random)
    rows.add("map, ascending", areas.count, areas.map_ascending)
    rows.add("unmap, ascending", areas.count, areas.unmap)


# ---- in process ----


def _in_process(plan: Plan, sizes: Sequence[int]) -> list[Case]:
    rows = Rows(IN_PROCESS, sizes)
    for size in sizes:
        core = Core()
        areas = Areas(core.timed, core.ioas_alloc(), size, plan.count(EACH_ROUND))
        _fixed(rows, areas, shuffled=True)
        rows.add("destroy all", size, _destroy(core, areas), When.LAST)
    for size in sizes[:2]:
        _automatic(rows, size, plan)
        _pinned(rows, size, plan)
    return rows.cases


def _destroy(core: Core, areas: Areas) -> Callable[[], float]:
    return lambda: core.timed([uapi.Destroy(id=areas.ioas_id)]) / areas.count


def _pinned(rows: Rows, size: int, plan: Plan) -> None:
    """With a mock domain that shows what is mapped."""
    core = Core()
    areas = Areas(core.timed, core.ioas_alloc(), size, plan.count(EACH_ROUND))
    core.mock_domain(areas.ioas_id)
    rows.add("map all, pinned", size, lambda: areas.fill(shuffled=True), When.FIRST)
    rows.add("map, pinned, random", size, areas.map_random)
    rows.add("unmap, pinned, random", size, areas.unmap_random)
    translate = core.iopt(areas.ioas_id).translate

    def lookup() -> float:
        iovas = areas.some_areas(plan.count(EACH_ROUND))
        start = time.thread_time()
        for iova in iovas:
            translate(iova)
        return (time.thread_time() - start) / len(iovas)

    rows.add("translate, random", size, lookup)


def _automatic(rows: Rows, size: int, plan: Plan) -> None:
    """The kernel chooses the IOVA: first fit."""
    core = Core()
    ioas_id = core.ioas_alloc()
    one = uapi.IoasMap(flags=MAP_AUTO, ioas_id=ioas_id, user_va=USER_VA, length=PAGE)
    rng = random.Random(size)
    iovas: list[int] = []

    def fill() -> float:
        seconds = core.timed([one] * size)
        iovas.extend(area.iova for area in core.iopt(ioas_id).areas)
        return seconds

    def pairs() -> float:
        """One of the areas goes, and the next MAP finds its place."""
        count, seconds = 0, 0.0
        while count < plan.count(EACH_ROUND) and seconds < PAIR_SECONDS:
            gone = uapi.IoasUnmap(ioas_id=ioas_id, iova=rng.choice(iovas), length=PAGE)
            seconds += core.timed([gone]) + core.timed([one])
            count += 1
        return seconds / count

    rows.add("map all, automatic IOVA", size, fill, When.FIRST)
    rows.add("unmap one, map one, automatic", size, pairs)


# ---- over the socket ----


def _over_socket(plan: Plan, sizes: Sequence[int], stack: ExitStack) -> list[Case]:
    """A daemon for each size: their heaps differ."""
    rows = Rows(SOCKET, sizes)
    for size in sizes:
        started = stack.enter_context(daemon(client_cpu()))
        iommufd = stack.enter_context(Iommufd(started.socket_path))
        areas = Areas(_batches(iommufd, started.pid), iommufd.ioas_alloc(), size, plan.count(EACH_ROUND))
        _fixed(rows, areas, shuffled=False)
        rows.add("close", size, _close(iommufd, started.pid, size), When.LAST)
    return rows.cases


def _batches(iommufd: Iommufd, pid: int) -> Callable[[Sequence[Ioctl]], float]:
    def timed(structs: Sequence[Ioctl]) -> float:
        seconds = 0.0
        for at in range(0, len(structs), PACKET):
            some = structs[at : at + PACKET]
            start = cpu_time(pid)
            results = iommufd.batch(some).send()
            seconds += cpu_time(pid) - start
            check(results)
        return seconds / len(structs)

    return timed


def _close(iommufd: Iommufd, pid: int, size: int) -> Callable[[], float]:
    """The last channel takes all areas along."""

    def run() -> float:
        start = cpu_time(pid)
        iommufd.close()
        return (cpu_time(pid) - start) / size

    return run


BENCH = Bench(
    "map",
    "IOAS_MAP and IOAS_UNMAP of 4 KiB, by how many areas the IOAS has",
    US,
    "how many times that with the fewest areas",
    cases,
)
