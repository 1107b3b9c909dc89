"""VFIO devices on the socket: which machine, which descriptor names the context, and what ends with whom."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from iommufd_uapi import admin, iommufd, vfio, wire
from iommufdd.server.census import counts, tree
from tests.server.conftest import Local, eventually
from tests.server.peer import Peer, Reply, body, hello, ioctl, memfd, request
from tests.vfio.daemon import LabDaemon, machine_with_devices

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iommufd_uapi.layout import VfioIoctl

DEVICE = wire.Kind.DEVICE
BIND_ID = vfio.VfioDeviceBindIommufd.offsetof("out_devid")


@pytest.fixture
def lab() -> Iterator[Local]:
    """A server whose machines have devices; at the end nothing is left."""
    before = len(os.listdir("/proc/self/fd"))
    made = Local(machine_with_devices, nofile=4096)
    yield made
    made.close()
    assert len(os.listdir("/proc/self/fd")) == before


def device(local: Local, name: str = "vfio0", **options: object) -> Peer:
    return local.connect(kind=DEVICE, device=name.encode(), **options)


def call(peer: Peer, cmd: VfioIoctl, fds: list[int] | None = None) -> Reply:
    return peer.one(ioctl(cmd, flags=wire.Flag.REASON), fds)


def bind(peer: Peer, context: Peer) -> int:
    reply = call(peer, vfio.VfioDeviceBindIommufd(iommufd=0), [context.identity])
    return reply.u32(BIND_ID) if reply.result == 0 else reply.result


def error_of_hello(local: Local, packet: bytes, fds: list[int] | None = None) -> int:
    peer = local.connect(greet=False)
    peer.send(packet, fds)
    error = peer.welcome().error
    assert peer.hung_up()
    return error


# ---- hello ----


def test_a_device_of_a_contexts_machine(lab: Local) -> None:
    context = lab.connect()
    peer = device(lab, fds=[context.identity])
    assert peer.identity == -1  # a device is named by nothing
    assert peer.mm not in (0, context.mm)
    assert bind(peer, context) == 1
    elsewhere = device(lab)  # a private machine's
    assert bind(elsewhere, context) == -errno.EBADFD


def test_a_device_of_a_machine_by_name(lab: Local) -> None:
    first = device(lab, machine=b"lab")  # before any context is
    context = lab.connect(machine=b"lab")
    assert bind(first, context) == 1
    assert bind(device(lab, machine=b"lab"), context) == -errno.EINVAL
    assert bind(device(lab, "vfio2", machine=b"lab"), context) == 2
    context.close()
    assert len(list(lab.server.instances)) == 1
    assert bind(device(lab, "vfio1", machine=b"lab"), lab.connect(machine=b"lab")) == -errno.EPERM


def test_the_errors_of_the_hello(lab: Local) -> None:
    context, fd = lab.connect(), memfd(4096)
    ours = context.identity
    cases: list[tuple[dict[str, object], list[int], int]] = [
        ({"device": b"vfio9"}, [], errno.ENOENT),
        ({}, [], errno.ENOENT),
        ({"device": b"vfio9"}, [ours], errno.ENOENT),
        ({"device": b"vfio0", "machine": b"lab"}, [ours], errno.EINVAL),
        ({"device": b"vfio0"}, [ours, ours], errno.EINVAL),
        ({"device": b"vfio0"}, [fd], errno.EBADFD),
        ({"device": b"vfio0", "flags": 1}, [], errno.EINVAL),
        ({"device": b"vfio0", "mm": 5}, [], errno.ENOENT),
        ({"device": b"vf\0io0"}, [], errno.EINVAL),
    ]
    for fields, fds, error in cases:
        assert error_of_hello(lab, hello(kind=DEVICE, **fields), fds) == error, fields
    os.close(fd)
    assert not lab.server.instances.devices


# ---- requests ----


def test_descriptors_in_bind(lab: Local) -> None:
    context = lab.connect()
    peer = device(lab, fds=[context.identity])
    for number, error in ((wire.NONE, errno.EINVAL), (wire.CLOSED, errno.EBADF)):
        cmd = vfio.VfioDeviceBindIommufd(iommufd=number - (1 << 32) if number >> 31 else number)
        assert call(peer, cmd).result == -error
    fd = memfd(4096)
    assert call(peer, vfio.VfioDeviceBindIommufd(iommufd=0), [fd]).result == -errno.EBADFD
    os.close(fd)
    assert call(peer, vfio.VfioDeviceBindIommufd(iommufd=1), [context.identity, context.identity]).result == 0
    peer.send(ioctl(vfio.VfioDeviceBindIommufd(iommufd=1)), [context.identity])
    assert peer.hung_up()  # an index past the descriptors sent


def test_a_closed_number_in_other_ioctls(lab: Local) -> None:
    context = lab.connect()
    struct = iommufd.IoasMapFile(flags=7, ioas_id=context.ioas(), fd=wire.CLOSED, length=4096, iova=0)
    assert context.one(ioctl(struct)).result == -errno.EBADF
    struct.fd = 5
    context.send(ioctl(struct))
    assert context.hung_up()


def test_ioctls_and_what_is_none(lab: Local) -> None:
    context = lab.connect()
    peer = device(lab, fds=[context.identity])
    before = call(peer, vfio.VfioDeviceInfo())
    assert (before.result, before.reason) == (
        -errno.EINVAL, "vfio device vfio0 is not bound: VFIO_DEVICE_BIND_IOMMUFD comes first",
    )  # fmt: skip
    assert peer.one(ioctl(iommufd.IoasAlloc())).result == -errno.EINVAL
    bind(peer, context)
    assert peer.one(ioctl(iommufd.IoasAlloc())).result == -errno.ENOTTY
    assert call(context, vfio.VfioDeviceInfo()).result == -errno.ENOTTY
    ioas = context.ioas()
    assert call(peer, vfio.VfioDeviceAttachIommufdPt(pt_id=ioas)).u32(8) == ioas + 1
    assert context.destroy(ioas) == -errno.EBUSY
    assert peer.one(body(wire.Op.MMAP, length=4096, offset=0, prot=3, flags=1)).result == -errno.EINVAL


# ---- ends ----


@pytest.mark.parametrize("first", ["context", "device"])
def test_hang_ups_in_both_orders(lab: Local, first: str) -> None:
    context = lab.connect()
    peer = device(lab, fds=[context.identity])
    bind(peer, context)
    assert call(peer, vfio.VfioDeviceAttachIommufdPt(pt_id=context.ioas())).result == 0
    one, other = (context, peer) if first == "context" else (peer, context)
    one.close()
    now = counts(lab.server, classes=False)
    assert (now.contexts, now.devices) == (1, int(first == "context"))
    assert now.objects_by_type == ({"DEVICE": 1, "IOAS": 1, "HWPT_PAGING": 1} if first == "context" else {"IOAS": 1})
    other.close()
    now = counts(lab.server, classes=False)
    assert (now.instances, now.contexts, now.devices, now.objects, now.charged_fds) == (0, 0, 0, 0, 0)


def test_close_unbinds_before_it_answers(lab: Local) -> None:
    context = lab.connect()
    peer = device(lab, fds=[context.identity])
    bind(peer, context)
    again = device(lab, fds=[context.identity])
    assert bind(again, context) == -errno.EINVAL
    assert peer.one(request(wire.Op.CLOSE)).result == 0
    assert bind(again, context) == 1


def test_the_tree_names_devices(lab: Local) -> None:
    context = lab.connect(machine=b"lab")
    peer, idle = device(lab, "vfio2", machine=b"lab"), device(lab, machine=b"lab")
    bind(peer, context)
    (instance,) = tree(lab.server).instances
    inode = os.fstat(context.identity).st_ino
    shown = [(each.name, each.context, each.devid) for each in instance.devices]
    assert shown == [("vfio0", 0, 0), ("vfio2", inode, 1)]
    assert [len(each.channels) for each in instance.devices] == [1, 1]
    (obj,) = instance.contexts[0].objects
    assert (obj.type, obj.name, obj.holders) == ("DEVICE", "vfio2", ["vfio device vfio2"])
    idle.close()


CHILD = """
import sys, time
from iommufd_client import Iommufd, VfioDevice
iommufd = Iommufd(sys.argv[1], machine="lab")
device = iommufd.device("vfio0")
device.bind(iommufd)
device.attach(iommufd.ioas_alloc())
print("bound", flush=True)
time.sleep(600)
"""


def test_a_client_that_is_killed_leaves_nothing() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with LabDaemon(terminate=False) as daemon, daemon.admin() as ask:
        before = ask.stats(classes=True)
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, daemon.socket_path], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "bound\n"
        bound = ask.stats(classes=False)
        assert (bound.devices, bound.objects_by_type["DEVICE"]) == (1, 1)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        eventually(lambda: not ask.stats().channels)
        after = ask.stats(classes=True)
    assert isinstance(after, admin.Counts)
    for count in ("contexts", "devices", "channels", "address_spaces", "objects", "charged_fds", "open_fds"):
        assert getattr(after, count) == getattr(before, count), count
    grown = {name for name, count in after.classes.items() if count > before.classes.get(name, 0)}
    assert not [name for name in grown if "vfio" in name or "device" in name.lower()]
