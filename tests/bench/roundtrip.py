"""One ioctl, there and back: what the daemon adds to a bare exchange of packets."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from iommufd_client.admin import Admin
from iommufd_client.iommufd import Iommufd

from .measure import US, Aim, Bench, Case, Plan, client_cpu, server_cpu
from .peers import OPTION_REPLY, Pinger, Raw, daemon, option_get, pinger, request, timed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

AIM = 1.9
FLOOR = "C to C, no daemon"


class Placement(NamedTuple):
    """Who runs where."""

    name: str
    cpu: int  # of the daemon
    options: tuple[str, ...] = ()
    aim: Aim | None = None


def placements(*, spin: bool = True) -> list[Placement]:
    """One CPU for both, a CPU for each, and the daemon polling a while before it sleeps."""
    found = [Placement("one CPU", client_cpu(), aim=Aim(ratio=AIM))]
    if (other := server_cpu()) is not None:
        found.append(Placement("two CPUs", other))
        if spin:
            found.append(Placement("two CPUs, --spin-us 60", other, ("--spin-us", "60")))
    return found


@contextmanager
def cases(plan: Plan) -> Iterator[list[Case]]:
    found: list[Case] = []
    with ExitStack() as stack:
        c = stack.enter_context(pinger())
        for place in placements():
            path = stack.enter_context(daemon(place.cpu, *place.options)).socket_path
            found += _cases(plan, c, place, path)
        yield found


def _cases(plan: Plan, c: Pinger, place: Placement, path: str) -> list[Case]:
    """Each with one client at a time, which is what most daemons have, but for the last."""
    count = plan.count(5_000 if place.cpu == client_cpu() else 1_500)
    floor = Case(FLOOR, place.name, c.pair(place.cpu, count))
    call = c.call(path, count)
    return [
        floor,
        Case("C client, daemon", place.name, call, base=floor, aim=place.aim),
        Case("Python client, daemon", place.name, _python(path, count), base=floor),
        Case("C client, daemon with an idle one", place.name, _beside_another(path, call), base=floor),
        Case("C client, traced by one who does not read", place.name, _traced(path, call), base=floor),
    ]


def _python(path: str, count: int) -> Callable[[], float]:
    struct = option_get()

    def run() -> float:
        with Iommufd(path) as iommufd:
            return timed(lambda: iommufd.ioctl(struct), count)

    return run


def _beside_another(path: str, call: Callable[[], float]) -> Callable[[], float]:
    def run() -> float:
        with Raw(path):
            return call()

    return run


def _traced(path: str, call: Callable[[], float]) -> Callable[[], float]:
    """All other cases are those of a daemon that nobody follows, or no longer."""

    def run() -> float:
        with Admin(path + ".admin") as admin:
            admin.trace()
            return call()

    return run


BENCH = Bench(
    "roundtrip",
    f"one IOMMU_OPTION GET: {len(request(option_get()))} bytes there, {OPTION_REPLY} back",
    US,
    f"how many times '{FLOOR}'",
    cases,
)
