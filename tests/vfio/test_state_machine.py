"""Devices opened, bound, attached, replaced, detached and closed in any order: all invariants hold after every step."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from iommufd_uapi import vfio
from iommufdd.hw_pagetable import HwptPaging
from iommufdd.ioas import Ioas
from tests.core.harness import PASID, Client
from tests.core.invariants import check, check_empty
from tests.vfio.cdev import EndpointDevice, Lab

if TYPE_CHECKING:
    from tests.vfio.cdev import Cdev

NAMES = ("vfio0", "vfio1", "vfio2", "vfio3")  # 0 to 2 share a group
PASIDS = st.sampled_from([None, None, 0, 1, 5])


class Devices(RuleBasedStateMachine):
    """Two contexts and four devices; the model is who is bound to what."""

    def __init__(self) -> None:
        super().__init__()
        self.lab = Lab(max_pasids=8)
        for name in NAMES[1:]:
            self.lab.device(name, self.lab.vfio0 if name != "vfio3" else None)
        self.clients = [self.lab.c, Client(self.lab.c.process)]
        self.files: list[Cdev] = []
        for client in self.clients:
            client.ioas_alloc()

    def bound(self) -> list[Cdev]:
        return [file for file in self.files if file.file.iommufd is not None]

    def tables(self, file: Cdev) -> list[int]:
        ictx = file.file.iommufd
        assert ictx is not None
        return [obj.id for obj in ictx.objects if isinstance(obj, Ioas | HwptPaging)]

    @rule(name=st.sampled_from(NAMES))
    @precondition(lambda self: len(self.files) < 8)
    def open(self, name: str) -> None:
        self.files.append(self.lab.open(name))

    @rule(data=st.data(), client=st.sampled_from([0, 1]))
    @precondition(lambda self: self.files)
    def bind(self, data: st.DataObject, client: int) -> None:
        file = data.draw(st.sampled_from(self.files))
        ictx = self.clients[client].ictx
        group = file.file.device.dev.group
        others = [each for each in self.bound() if each.file.device is file.file.device]
        owners = {each.file.iommufd for each in self.bound() if each.file.device.dev.group is group}
        expect = errno.EINVAL if others else errno.EPERM if owners - {ictx} else 0
        file.bind(self.clients[client].fd, expect)
        assert (file.file.iommufd is ictx) == (not expect or (file in others and owners == {ictx}))

    @rule(data=st.data(), pasid=PASIDS)
    @precondition(lambda self: self.bound())
    def attach(self, data: st.DataObject, pasid: int | None) -> None:
        """Any answer that the kernel could give; what it means is the invariants' business."""
        file = data.draw(st.sampled_from(self.bound()))
        pt = data.draw(st.sampled_from([*self.tables(file), 77]))
        flags = 0 if pasid is None else vfio.VFIO_DEVICE_ATTACH_PASID
        cmd = vfio.VfioDeviceAttachIommufdPt(flags=flags, pt_id=pt, pasid=pasid or 0)
        at = self.lab.c.process.put(cmd.pack())
        rc = file.file.ioctl(self.lab.c.caller, cmd.CMD, at)
        assert -rc in (0, errno.ENOENT, errno.EINVAL, errno.EBUSY)
        assert (rc == -errno.ENOENT) == (pt == 77)

    @rule(data=st.data(), pasid=PASIDS)
    @precondition(lambda self: self.bound())
    def detach(self, data: st.DataObject, pasid: int | None) -> None:
        data.draw(st.sampled_from(self.bound())).detach(pasid)

    @rule(data=st.data(), flags=st.sampled_from([0, PASID]))
    @precondition(lambda self: self.bound())
    def hwpt_alloc(self, data: st.DataObject, flags: int) -> None:
        file = data.draw(st.sampled_from(self.bound()))
        client = next(client for client in self.clients if client.ictx is file.file.iommufd)
        ioas = next(obj.id for obj in client.ictx.objects if isinstance(obj, Ioas))
        client.hwpt(file.file.devid, ioas, flags)

    @rule(data=st.data())
    @precondition(lambda self: self.files)
    def close(self, data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(self.files))
        self.files.remove(file)
        file.close()

    @invariant()
    def the_world_is_right(self) -> None:
        check(self.lab.world)
        for file in self.bound():
            dev = file.file.device.dev
            assert isinstance(dev, EndpointDevice)
            assert dev.now == {pasid: handle.domain for pasid, handle in dev.group.handles.items()}

    def teardown(self) -> None:
        self.lab.c.process.exit()
        check_empty(self.lab.world)


TestDevices = Devices.TestCase
TestDevices.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
