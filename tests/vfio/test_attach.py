"""VFIO_DEVICE_ATTACH_IOMMUFD_PT and DETACH: the order of their checks, replace, and PASIDs."""

import errno

from iommufd_uapi import iommufd as uapi
from iommufd_uapi import vfio
from iommufdd.errors import EIO
from iommufdd.user import PAGE_SIZE
from tests.core.harness import DATA, PASID, Client
from tests.core.invariants import check
from tests.core.snapshot import difference, state
from tests.vfio.cdev import PASID_FLAG, Cdev, Lab

ATTACH, DETACH = vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, vfio.VFIO_DEVICE_DETACH_IOMMUFD_PT
Attach, Detach = vfio.VfioDeviceAttachIommufdPt, vfio.VfioDeviceDetachIommufdPt
END = DATA + 15 * PAGE_SIZE  # of the memory there
UNKNOWN = 0xFFFFFFFE


def test_the_order_of_the_checks_of_attach() -> None:
    cdev = Lab().bound()
    cdev.raw(ATTACH, Attach(argsz=4).pack()[:8], errno.EFAULT, at=END - 8)  # 12 bytes are read whatever argsz says
    cdev.ioctl(Attach(argsz=11, flags=UNKNOWN), errno.EINVAL)
    cdev.ioctl(Attach(argsz=12, flags=UNKNOWN, pt_id=99), errno.EINVAL)
    cdev.raw(ATTACH, Attach(argsz=15, flags=PASID_FLAG, pt_id=99).pack()[:12], errno.EINVAL, at=END - 12)
    cdev.raw(ATTACH, Attach(argsz=16, flags=PASID_FLAG, pt_id=99).pack()[:12], errno.EFAULT, at=END - 12)
    cdev.raw(ATTACH, Attach(argsz=12, pt_id=99).pack()[:12], errno.ENOENT, at=END - 12)
    cdev.raw(ATTACH, Attach(argsz=99, pt_id=99).pack() + b"\1" * 8, errno.ENOENT)  # what is behind does not matter
    cdev.attach(99, pasid=1, expect=errno.ENOENT)
    cdev.attach(0xFFFFFFFF, expect=errno.ENOENT)
    cdev.attach(cdev.file.devid, expect=errno.EINVAL)  # a device is no page table


def test_the_order_of_the_checks_of_detach() -> None:
    cdev = Lab().bound()
    cdev.raw(DETACH, Detach(argsz=4).pack()[:4], errno.EFAULT, at=END - 4)
    cdev.ioctl(Detach(argsz=7, flags=UNKNOWN), errno.EINVAL)
    cdev.ioctl(Detach(argsz=12, flags=UNKNOWN), errno.EINVAL)
    cdev.raw(DETACH, Detach(argsz=11, flags=PASID_FLAG).pack()[:8], errno.EINVAL, at=END - 8)
    cdev.raw(DETACH, Detach(argsz=12, flags=PASID_FLAG).pack()[:8], errno.EFAULT, at=END - 8)
    cdev.raw(DETACH, Detach(argsz=8).pack()[:8], at=END - 8)  # it was not attached
    cdev.detach(pasid=7)
    cdev.detach(pasid=0xFFFFFFFF)


def test_an_ioas_then_a_page_table() -> None:
    lab = Lab()
    c, dev = lab.c, lab.vfio0
    cdev = lab.bound()
    ioas = c.ioas_alloc()
    auto = cdev.attach(ioas)
    assert auto == 3
    assert c.ranges(ioas) == [(0, 2**64 - 1)]
    own = c.hwpt(cdev.file.devid, ioas)
    dev.log.clear()
    assert cdev.attach(own) == own
    assert len(dev.log) == 1  # from one to the other, without blocking in between
    c.destroy(auto, errno.ENOENT)  # it went with its last user
    assert cdev.attach(own) == own
    assert cdev.attach(ioas) == auto
    cdev.detach()
    assert not dev.now
    c.destroy(own)
    c.destroy(ioas)
    check(lab.world)


def test_a_replace_that_fails_leaves_the_old_one() -> None:
    lab = Lab()
    cdev = lab.bound()
    ioas = lab.c.ioas_alloc()
    old = cdev.attach(ioas)
    new = lab.c.hwpt(cdev.file.devid, ioas)
    before = state(lab.world)
    lab.vfio0.refuses[lab.iommu.domains[-1]] = EIO
    cdev.attach(new, expect=errno.EIO)
    cdev.attach(77, expect=errno.ENOENT)
    assert not difference(before, state(lab.world))
    lab.vfio0.refuses.clear()
    cdev.attach(new)
    lab.c.destroy(old, errno.ENOENT)


def test_pasids() -> None:
    lab = Lab()
    c, dev = lab.c, lab.vfio0
    cdev = lab.bound()
    ioas = c.ioas_alloc()
    plain, first, second = c.hwpt(1, ioas), c.hwpt(1, ioas, PASID), c.hwpt(1, ioas, PASID)
    cdev.attach(plain, pasid=5, expect=errno.EINVAL)
    cdev.attach(plain)
    cdev.attach(first, pasid=5, expect=errno.EINVAL)  # the device's own is not made for PASIDs
    cdev.attach(first)
    assert cdev.attach(first, pasid=5) == first
    assert cdev.attach(second, pasid=5) == second  # a replace
    cdev.attach(first, pasid=1024, expect=errno.EINVAL)
    cdev.attach(first, pasid=2**31, expect=errno.ENOSPC)
    cdev.attach(plain, expect=errno.EINVAL)
    assert set(dev.now) == {0, 5}
    cdev.detach(pasid=6)
    cdev.detach()
    assert set(dev.now) == {5}
    cdev.detach(pasid=5)
    cdev.attach(second, pasid=5)
    check(lab.world)
    cdev.close()
    assert not dev.now
    for hwpt in (plain, first, second):
        c.destroy(hwpt)


def test_pasid_zero_is_the_device_itself_behind_its_back() -> None:
    lab = Lab()
    cdev = lab.bound()
    hwpt = lab.c.hwpt(1, lab.c.ioas_alloc(), PASID)
    cdev.attach(hwpt, pasid=0)
    cdev.attach(hwpt, expect=errno.EBUSY)
    cdev.detach()  # which has not attached it
    assert set(lab.vfio0.now) == {0}
    check(lab.world)
    cdev.detach(pasid=0)
    cdev.attach(hwpt)
    cdev.attach(hwpt, pasid=0, expect=errno.EBUSY)
    check(lab.world)


def test_an_iommu_without_pasids() -> None:
    c = Client()
    dev = c.world.machine.mock.new_device(0)
    cdev = Cdev(c, dev)
    cdev.bind()
    hwpt = c.hwpt(cdev.file.devid, c.ioas_alloc(), PASID)
    cdev.attach(hwpt, pasid=1, expect=errno.EINVAL)
    cdev.attach(hwpt)
    assert c.ioctl(uapi.HwInfo(dev_id=cdev.file.devid)).out_max_pasid_log2 == 0


def test_an_answer_that_cannot_be_written_detaches_the_device() -> None:
    """quirk: also after a replace, and for a PASID, which stays."""
    lab = Lab()
    c, dev = lab.c, lab.vfio0
    cdev = lab.bound()
    ioas = c.ioas_alloc()
    hwpt, other = c.hwpt(1, ioas, PASID), c.hwpt(1, ioas, PASID)
    before = state(lab.world)
    cdev.raw(ATTACH, None, errno.EFAULT, at=cdev.read_only(Attach(argsz=12, pt_id=hwpt)))
    assert [each for each in difference(before, state(lab.world)) if "memfd" not in each] == []
    cdev.attach(hwpt)
    cdev.raw(ATTACH, None, errno.EFAULT, at=cdev.read_only(Attach(argsz=12, pt_id=other)))
    assert not dev.now
    cdev.attach(hwpt)
    with_pasid = Attach(flags=PASID_FLAG, pt_id=other, pasid=9)
    cdev.raw(ATTACH, None, errno.EFAULT, at=cdev.read_only(with_pasid))
    assert set(dev.now) == {9}
    check(lab.world)
