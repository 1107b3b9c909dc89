"""Many ioctls in one packet."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from iommufd_client.iommufd import Iommufd

from .measure import PER_SECOND, Aim, Bench, Case, Plan, client_cpu
from .peers import Raw, check, daemon, option_get, pinger, request, timed
from .roundtrip import FLOOR, placements

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEPTHS = (1, 8, 128)
AIM = 300_000.0


@contextmanager
def cases(plan: Plan) -> Iterator[list[Case]]:
    found: list[Case] = []
    with ExitStack() as stack:
        c = stack.enter_context(pinger())
        for place in placements(spin=False):
            path = stack.enter_context(daemon(place.cpu)).socket_path
            floor = Case(FLOOR, str(DEPTHS[0]), c.pair(place.cpu, plan.count(3_000)), place.name)
            found.append(floor)
            for depth in DEPTHS:
                count = max(plan.count(12_000) // depth, 1)
                aim = Aim(rate=AIM) if place.cpu == client_cpu() and depth == DEPTHS[-1] else None
                made, batch = _made(path, depth, count), _batch(path, depth, count)
                found.append(Case("packets made beforehand", str(depth), made, place.name, floor, aim))
                found.append(Case("batch() of the client", str(depth), batch, place.name, floor, aim))
        yield found


def _made(path: str, depth: int, count: int) -> Callable[[], float]:
    packet = request(option_get()) * depth

    def run() -> float:
        with Raw(path) as raw:
            check(raw.results(raw.trip(packet)))
            return timed(lambda: raw.trip(packet), count) / depth

    return run


def _batch(path: str, depth: int, count: int) -> Callable[[], float]:
    structs = [option_get() for _ in range(depth)]

    def run() -> float:
        with Iommufd(path) as iommufd:
            check(iommufd.batch(structs).send())
            return timed(lambda: iommufd.batch(structs).send(), count) / depth

    return run


BENCH = Bench(
    "depth",
    "ioctls a second, by how many travel in one packet (IOMMU_OPTION GET)",
    PER_SECOND,
    f"how many times as many as '{FLOOR}'",
    cases,
)
