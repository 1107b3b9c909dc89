"""DMA that has to wait, over real sockets: page faults, and who goes away meanwhile, the client or whoever asked."""

from __future__ import annotations

import functools
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import iommufd_uapi.iommufd as uapi
from iommufd_client import DmaError
from iommufd_uapi import admin
from tests.server.conftest import eventually
from tests.server.hardware import Guest, Served

PAGE = 4096
IOVA = 0x7F12_3456_7000


class Thread(threading.Thread):
    """A call that may take its time; what it returns or raises."""

    def __init__(self, function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        super().__init__(daemon=True)
        self._call = functools.partial(function, *args, **kwargs)
        self.result: object = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._call()
        except (DmaError, OSError) as error:
            self.result = error

    def done(self) -> object:
        self.join(60)
        assert not self.is_alive()
        return self.result


# ---- page faults -------------------------------------------------------------------------------------------


def test_a_page_fault_holds_up_nobody_else(served: Served) -> None:
    with Guest(served, faults=True) as guest, served.admin() as one, served.admin() as other:
        guest.table.map(IOVA + PAGE, 0x6000)
        write = Thread(one.endpoint("vfio0", guest.iommufd).write, IOVA, b"late")
        guest.asked()
        assert served.state().waiting == 1
        assert other.endpoint("vfio0", guest.iommufd).read(IOVA + PAGE, 1) == b"\0"  # the same device
        assert guest.iommufd.ioas_alloc() > 0
        record = guest.request()
        assert (record.addr, record.perm, record.dev_id) == (IOVA, uapi.IOMMU_PGFAULT_PERM_WRITE, guest.driver.idev.id)
        guest.table.map(IOVA, 0x5000)
        guest.respond(record.cookie)
        assert write.done() is None
        assert guest.ram.read(0x5000, 4) == b"late"
        shown = served.state()
        assert (shown.page_requests, shown.waiting, shown.completed, shown.faults) == (1, 0, 2, 0)


def test_answered_invalid(served: Served) -> None:
    with Guest(served, faults=True) as guest, served.admin() as one:
        read = Thread(one.endpoint("vfio0", guest.iommufd).read, IOVA, 4)
        guest.asked()
        guest.respond(guest.request().cookie, uapi.IOMMUFD_PAGE_RESP_INVALID)
        error = read.done()
        assert isinstance(error, DmaError)
        assert error.reason == (
            "the page request was answered INVALID (fault 0x71: a first-stage entry is not present, "
            f"stage 1 level 4, iova {IOVA:#x})"
        )
        assert served.state().invalid == 1


def test_a_page_that_never_comes(tmp_path: Path) -> None:
    with Served(tmp_path, patience=0.05) as served, Guest(served, faults=True) as guest, served.admin() as one:
        endpoint = one.endpoint("vfio0", guest.iommufd)
        with pytest.raises(DmaError, match="the page request was not answered in time"):
            endpoint.read(IOVA, 4)
        with pytest.raises(DmaError, match="not answered in time"):
            endpoint.read(IOVA, 4, page_timeout=0.0)
        assert served.state().timeouts == 2
        guest.table.map(IOVA, 0x5000)
        assert endpoint.read(IOVA, 4) == bytes(4)


@pytest.mark.parametrize("how", ["dies", "detaches", "replaces"])
def test_the_client_goes_while_its_dma_waits(served: Served, how: str) -> None:
    with Guest(served, faults=True) as guest, served.admin() as one:
        read = Thread(one.endpoint("vfio0", guest.iommufd).read, IOVA, 4)
        guest.asked()
        dev: Any = guest.driver.idev.dev
        if how == "dies":
            guest.die()
        elif how == "detaches":
            served.close(guest.driver)
            guest.driver = served.bind(guest.iommufd)
        else:
            served.replace(guest.driver, guest.ioas)
        error = read.done()
        assert isinstance(error, DmaError)
        assert error.reason.startswith("the page request was answered INVALID: its attachment ended")
        assert (dev.counters.withdrawn, len(dev.queue.parked), dev.iopf.enabled) == (1, 0, False)
        if how == "dies":
            eventually(lambda: not served.server.instances.contexts)


# ---- whoever asks goes away --------------------------------------------------------------------------------


def test_dma_is_cancelled_when_nobody_waits_for_it(served: Served) -> None:
    with Guest(served, faults=True) as guest:
        sock = served.ask(admin.Dma("vfio0", "read", IOVA, 4, page_timeout=3600.0))
        guest.asked()
        assert served.state().waiting == 1
        sock.close()
        eventually(lambda: served.state().waiting == 0)
        assert served.state().failed == 1
        guest.respond(guest.request().cookie)  # too late, and nobody minds
        assert served.state().failed == 1


def test_who_has_said_all_still_hears_the_answer(served: Served) -> None:
    with Guest(served, faults=True) as guest:
        sock = served.ask(admin.Dma("vfio0", "read", IOVA, 4, page_timeout=3600.0))
        sock.shutdown(socket.SHUT_WR)  # as socat does at the end of its input
        guest.asked()
        guest.table.map(IOVA, 0x5000)
        guest.respond(guest.request().cookie)
        with sock, sock.makefile("rb") as lines:
            assert admin.decode_reply(lines.readline()) == admin.Moved(4, bytes(4))
            assert lines.readline() == b""


def test_places_are_given_back(served: Served) -> None:
    with Guest(served, faults=True) as guest:
        for _ in range(3):
            socks = [served.ask(admin.Dma("vfio0", "read", IOVA, 4, page_timeout=3600.0)) for _ in range(10)]
            eventually(lambda: served.state().waiting == 10)
            for sock in socks:
                sock.close()
            eventually(lambda: served.state().waiting == 0)
        assert served.state().failed == 30
        del guest
