"""vIOMMU, vDEVICE, nested HWPT, vEVENTQ: who holds whom, whichever model is below (SEMANTICS 0.3, 4)."""

from __future__ import annotations

import errno
import itertools
from typing import Protocol

import pytest

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufd_uapi.smmuv3 import Cmd, Ste
from iommufdd.errors import IommufdError
from iommufdd.user import File
from tests.core.harness import NEST_PARENT, Client
from tests.core.invariants import check

from .cmdqv_lab import CmdqvLab
from .smmu_lab import SmmuLab


class Model(Protocol):
    """Two devices behind one IOMMU; `devices` are their ids, both attached to `ioas`."""

    c: Client
    ioas: int
    devices: list[int]
    absent: int  # the errno of an invalidation whose vDEVICE is not there

    def viommu(self, parent: int) -> int: ...
    def nested(self, viommu: int) -> int: ...
    def replace(self, index: int, pt: int) -> int:
        """The errno, or 0."""
        ...

    def unbind(self, index: int) -> None: ...
    def invalidate(self, viommu: int, virt_id: int, expect: int = 0) -> int: ...
    def veventq(self, viommu: int) -> tuple[int, int]: ...


class MockModel:
    """The selftest's mock."""

    absent = errno.EINVAL

    def __init__(self) -> None:
        self.c = c = Client()
        self.ioas = c.ioas_alloc()
        self.mocks = [c.mock_domain(self.ioas) for _ in range(2)]
        self.devices = [mock.idev for mock in self.mocks]

    def viommu(self, parent: int) -> int:
        return self.c.viommu(self.devices[0], parent)

    def nested(self, viommu: int) -> int:
        return self.c.nested(self.devices[0], viommu)

    def replace(self, index: int, pt: int) -> int:
        try:
            self.c.replace(self.mocks[index].stdev, pt)
        except AssertionError:
            error = self.c.caller.error
            assert error is not None
            return error.errno
        return 0

    def unbind(self, index: int) -> None:
        self.c.destroy(self.mocks[index].stdev)

    def invalidate(self, viommu: int, virt_id: int, expect: int = 0) -> int:
        data = test_uapi.ViommuInvalidateSelftest(vdev_id=virt_id).pack()
        cmd = uapi.HwptInvalidate(
            hwpt_id=viommu, data_uptr=self.c.process.put(data), entry_len=len(data), entry_num=1,
            data_type=test_uapi.IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST,
        )  # fmt: skip
        return self.c.ioctl(cmd, expect).entry_num

    def veventq(self, viommu: int) -> tuple[int, int]:
        return self.c.veventq(viommu)


class SmmuModel:
    """SMMUv3."""

    absent = errno.EIO

    def __init__(self, lab: SmmuLab | None = None) -> None:
        self.lab = lab = lab or SmmuLab()
        self.c = lab.c
        self.ioas = lab.c.ioas_alloc()
        self.bound = [lab.device() for _ in range(2)]
        self.devices = [idev.id for idev in self.bound]
        for idev in self.bound:
            lab.attach(idev, self.ioas)

    def viommu(self, parent: int) -> int:
        return self.lab.viommu(self.bound[0], parent)

    def nested(self, viommu: int) -> int:
        return self.lab.vste(self.bound[0], viommu, Ste.s1(0x1000))

    def replace(self, index: int, pt: int) -> int:
        try:
            self.lab.replace(self.bound[index], pt)
        except IommufdError as error:
            return error.errno
        return 0

    def unbind(self, index: int) -> None:
        self.lab.detach(self.bound[index])
        self.lab.unbind(self.bound[index])

    def invalidate(self, viommu: int, virt_id: int, expect: int = 0) -> int:
        return self.lab.invalidate(viommu, Cmd.cfgi_cd(virt_id), expect=expect)

    def veventq(self, viommu: int) -> tuple[int, int]:
        cmd = uapi.VeventqAlloc(viommu_id=viommu, type=uapi.IOMMU_VEVENTQ_TYPE_ARM_SMMUV3, veventq_depth=4)
        self.c.ioctl(cmd)
        return cmd.out_veventq_id, cmd.out_veventq_fd


class CmdqvModel(SmmuModel):
    """SMMUv3 with a Tegra241 CMDQV."""

    def __init__(self) -> None:
        super().__init__(CmdqvLab())

    def veventq(self, viommu: int) -> tuple[int, int]:
        cmd = uapi.VeventqAlloc(viommu_id=viommu, type=uapi.IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV, veventq_depth=4)
        self.c.ioctl(cmd)
        return cmd.out_veventq_id, cmd.out_veventq_fd


@pytest.fixture(params=[MockModel, SmmuModel, CmdqvModel])
def model(request: pytest.FixtureRequest) -> Model:
    made: Model = request.param()
    return made


def parent_of(model: Model) -> int:
    return model.c.hwpt(model.devices[0], model.ioas, NEST_PARENT)


NAMES = ("parent", "viommu", "vdevice", "nested", "veventq")
NEEDS = {"parent": {"viommu"}, "viommu": {"vdevice", "nested", "veventq"}}


@pytest.mark.parametrize("order", list(itertools.permutations(NAMES)))
def test_destroy_orders(model: Model, order: tuple[str, ...]) -> None:
    """What something alive holds is EBUSY; leaves can go in any order."""
    c = model.c
    ids = {"parent": parent_of(model)}
    ids["viommu"] = model.viommu(ids["parent"])
    ids["vdevice"] = c.vdevice(ids["viommu"], model.devices[0], 7)
    ids["nested"] = model.nested(ids["viommu"])
    ids["veventq"], fd = model.veventq(ids["viommu"])
    c.destroy(ids["veventq"], errno.EBUSY)  # its descriptor is open
    c.fds.close(fd)
    while ids:
        for name in order:
            if name in ids:
                held = NEEDS.get(name, set()) & set(ids)
                c.destroy(ids[name], errno.EBUSY if held else 0)
                if not held:
                    del ids[name]
    check(c.world)


def test_a_device_that_leaves_first_leaves_a_tombstone(model: Model) -> None:
    c = model.c
    viommu = model.viommu(parent_of(model))
    vdevice = c.vdevice(viommu, model.devices[1], 7)
    assert model.invalidate(viommu, 7) == 1
    model.unbind(1)
    c.destroy(vdevice, errno.ENOENT)
    assert model.invalidate(viommu, 7, model.absent) == 0
    again = c.vdevice(viommu, model.devices[0], 7)  # the virt_id is free, the object's id is not
    fresh = [c.ioas_alloc() for _ in range(8)]
    assert vdevice not in (again, *fresh)
    c.destroy(again)
    c.destroy(viommu)
    check(c.world)


def test_a_vdevice_that_leaves_first_can_come_back(model: Model) -> None:
    c = model.c
    viommu = model.viommu(parent_of(model))
    vdevice = c.vdevice(viommu, model.devices[0], 7)
    nested, other = model.nested(viommu), model.nested(viommu)
    assert model.replace(0, nested) == 0
    c.destroy(vdevice)  # although its device is attached through the vIOMMU
    assert model.invalidate(viommu, 7, model.absent) == 0
    assert model.replace(0, other) == errno.ENOENT
    assert c.vdevice(viommu, model.devices[0], 8) == vdevice
    assert model.invalidate(viommu, 8) == 1
    check(c.world)


def test_what_an_attachment_holds(model: Model) -> None:
    c = model.c
    parent = parent_of(model)
    viommu = model.viommu(parent)
    vdevice = c.vdevice(viommu, model.devices[0], 7)
    nested = model.nested(viommu)
    assert model.replace(1, nested) == errno.ENOENT  # it is no vDEVICE
    assert model.replace(0, nested) == 0
    for number in (nested, viommu, parent):
        c.destroy(number, errno.EBUSY)
    assert model.replace(0, model.ioas) == 0
    for number in (nested, vdevice, viommu, parent):
        c.destroy(number)
    check(c.world)


def test_a_device_is_one_vdevice(model: Model) -> None:
    c = model.c
    parent = parent_of(model)
    first, second = model.viommu(parent), model.viommu(parent)
    vdevice = c.vdevice(first, model.devices[0], 7)
    c.vdevice(second, model.devices[0], 8, errno.EEXIST)
    c.vdevice(first, model.devices[1], 7, errno.EEXIST)
    c.vdevice(second, model.devices[1], 7)
    c.destroy(vdevice)
    c.vdevice(second, model.devices[0], 8)
    check(c.world)


def test_one_queue_of_a_type(model: Model) -> None:
    c = model.c
    viommu = model.viommu(parent_of(model))
    queue, fd = model.veventq(viommu)
    with pytest.raises(AssertionError, match="EEXIST"):
        model.veventq(viommu)
    c.fds.close(fd)
    c.destroy(queue)
    model.veventq(viommu)


def test_close_with_everything_alive(model: Model) -> None:
    c = model.c
    viommu = model.viommu(parent_of(model))
    c.vdevice(viommu, model.devices[0], 7)
    assert model.replace(0, model.nested(viommu)) == 0
    _, fd = model.veventq(viommu)
    c.close()
    assert len(c.ictx.objects)  # the queue's descriptor keeps the context
    if isinstance(model, SmmuModel):
        for index in range(2):
            model.unbind(index)
    file = c.fds.fget(fd)
    assert isinstance(file, File)
    c.fds.close(fd)
    assert not len(c.ictx.objects)
