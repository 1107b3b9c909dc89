"""What must be true after every call: counts equal what they count, and nothing is left over."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from iommufdd.access import Access
from iommufdd.context import Context
from iommufdd.device import IommufdDevice
from iommufdd.dmabuf import Dmabuf, DmabufPages
from iommufdd.eventq import EventqFile
from iommufdd.hw_pagetable import HwptPaging
from iommufdd.ioas import Ioas
from iommufdd.iommu.mock import MockDevice
from iommufdd.objects import Holder
from iommufdd.pages import Account, FilePages, Pages
from iommufdd.selftest_access import SelftestAccess
from iommufdd.user import PAGE_SIZE, File
from iommufdd.vfio.device_cdev import VfioDeviceFile
from iommufdd.vfio.iommufd import vfio_device
from iommufdd.viommu import HwQueue, Viommu

from .snapshot import use_counts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iommufdd.io_pagetable import IoPagetable
    from iommufdd.iova import Area
    from iommufdd.user import PageFile

    from .world import World


def check(world: World) -> None:
    """All invariants of a world at rest."""
    contexts = world.contexts
    _check_edges(world)
    for ictx in contexts:
        _check_ids(ictx)
        _check_groups(ictx)
        for obj in ictx.objects:
            if isinstance(obj, Ioas):
                _check_areas(obj.iopt)
                _check_domains(obj)
    pages = _all_pages(world)
    for one in pages.values():
        _check_pages(one, [area for area in _areas(world) if area.pages is one])
    _check_vfio(world)
    _check_accesses(world)
    _check_pins(world, list(pages.values()))
    _check_accounts(world, list(pages.values()))
    _check_files(world, list(pages.values()))


# ---- holders ----


def _check_edges(world: World) -> None:
    """users equal edges: both ends of each edge know it, and all ends are alive."""
    holders = list(_holders(world))
    known = {id(holder) for holder in holders}
    objects = {id(obj): obj for ictx in world.contexts for obj in ictx.objects}
    out: Counter[tuple[int, int]] = Counter()
    for holder in holders:
        for obj in holder.held:
            assert id(obj) in objects, f"{holder} holds {obj}, which is gone"
            out[id(holder), id(obj)] += 1
    back: Counter[tuple[int, int]] = Counter()
    for obj in objects.values():
        for holder in obj.holders:
            assert id(holder) in known, f"{obj} is held by {holder}, which is gone"
            back[id(holder), id(obj)] += 1
    assert out == back


def _holders(world: World) -> Iterator[Holder]:
    for ictx in world.contexts:
        yield from ictx.objects
        for igroup in ictx._groups.values():
            for attach in igroup.pasid_attach.values():
                yield from attach.devices.values()
    yield from world.vmas
    yield from world.drivers
    yield from (vfio_device(dev) for dev in world.machine.devices.values())
    for file in {id(file): file for file in _open_files(world)}.values():
        if isinstance(file, Holder):
            yield file


def _open_files(world: World) -> Iterator[File]:
    for process in world.processes:
        yield from (file for file in process.fds.files.values() if file is not None)


def _check_ids(ictx: Context) -> None:
    """The next id is the lowest that is free, and no id is neither free nor taken."""
    objects = ictx.objects
    if not ictx.refs:
        assert not len(objects)
        return
    taken = set(objects._entries)
    free = set(objects._free)
    assert len(free) == len(objects._free)
    assert not taken & free
    assert taken | free == set(range(1, objects._next))
    for obj_id, obj in objects._entries.items():
        assert obj is None or obj.id == obj_id


# ---- IOAS ----


def _check_areas(iopt: IoPagetable) -> None:
    """Areas are apart, aligned, outside what is reserved, and shown whenever there is a domain."""
    end = -1
    mask = iopt.iova_alignment - 1
    for area in iopt.areas:
        assert area.iova > end
        assert area.last >= area.iova
        assert not (area.iova | area.length | area.start_byte % PAGE_SIZE) & mask
        assert iopt.reserved.first(area.iova, area.last) is None
        assert area.filled == bool(iopt.domains)
        assert area.num_accesses >= area.num_locks >= 0
        assert area.start_byte + area.length <= area.pages.npages * PAGE_SIZE
        end = area.last
    sizes = [domain.pgsize_bitmap & -domain.pgsize_bitmap for domain in iopt.domains]
    pinning = [access.iova_alignment for access in iopt.accesses if access is not None]
    assert iopt.iova_alignment == max([1, PAGE_SIZE * iopt.disable_large_pages, *sizes, *pinning])
    for span in iopt.allowed:
        assert iopt.reserved.first(span.start, span.last) is None


def _check_domains(ioas: Ioas) -> None:
    """An IOAS has the domains of its HWPTs, and reserves for them, for attached devices, and for tests."""
    iopt = ioas.iopt
    assert iopt.domains == [hwpt.domain for hwpt in ioas.hwpt_list]
    hwpts = [obj for obj in ioas.ictx.objects if isinstance(obj, HwptPaging) and obj.ioas is ioas]
    assert {id(hwpt) for hwpt in hwpts} == {id(hwpt) for hwpt in ioas.hwpt_list}
    assert all(hwpt.domain.translation is iopt for hwpt in hwpts)
    attached = {
        id(part.idev.dev)
        for igroup in ioas.ictx._groups.values()
        for pasid, attach in igroup.pasid_attach.items()
        if not pasid and attach.hwpt.paging is not None and attach.hwpt.paging.ioas is ioas
        for part in attach.devices.values()
    }
    owners = {id(span.owner) for span in iopt.reserved if span.owner is not None}
    assert owners <= {id(domain) for domain in iopt.domains} | attached
    assert all(hwpt.holders for hwpt in hwpts if hwpt.auto_domain)


# ---- pages ----


def _areas(world: World) -> Iterator[Area]:
    for ictx in world.contexts:
        for obj in ictx.objects:
            if isinstance(obj, Ioas):
                yield from obj.iopt.areas


def _all_pages(world: World) -> dict[int, Pages]:
    return {id(area.pages): area.pages for area in _areas(world)}


def _check_pages(pages: Pages, areas: list[Area]) -> None:
    """What is pinned is what areas with domains and accesses need, and not a page more."""
    assert pages.refs == len(areas)
    if isinstance(pages, DmabufPages):
        assert not pages.pinned
        return
    users: Counter[int] = Counter()
    for area in areas:
        if area.filled:
            first, last = area.indices()
            users.update(range(first, last + 1))
    access_users = pages.access_users or {}
    for (first, last), count in access_users.items():
        assert count > 0
        users.update(range(first, last + 1))
    assert sum(access_users.values()) == sum(area.num_accesses for area in areas)
    have = Counter({n: count for lo, hi, count in use_counts(pages.use) for n in range(lo, hi + 1)})
    assert have == users
    pinned = [at + n for at, run in pages.pinned or () for n in range(run.npages)]
    assert pinned == sorted(users)
    assert pages.npinned == len(users)


def _check_accesses(world: World) -> None:
    """num_accesses and num_locks of an area are what open accesses and hardware queues have pinned there."""
    expected: Counter[int] = Counter()
    locks: Counter[int] = Counter()
    for ictx in world.contexts:
        for obj in ictx.objects:
            if isinstance(obj, HwQueue):
                assert obj.access is not None
                assert obj.access.ioas is obj.viommu.hwpt.ioas
                start = obj.base_addr // PAGE_SIZE * PAGE_SIZE
                last = -(-(obj.base_addr + obj.length) // PAGE_SIZE) * PAGE_SIZE - 1
                _count(locks, obj.access.ioas, start, last)
            if isinstance(obj, Access):
                assert obj.ioas is obj.ioas_unpin
    for file in {id(file): file for file in _open_files(world) if isinstance(file, SelftestAccess)}.values():
        for iova, length in file.items.values():
            _count(expected, file.access.ioas, iova, iova + length - 1)
    for area in _areas(world):
        assert area.num_locks == locks[id(area)]
        assert area.num_accesses == expected[id(area)] + locks[id(area)]


def _count(counter: Counter[int], ioas: Ioas | None, iova: int, last: int) -> None:
    assert ioas is not None
    for area in ioas.iopt.areas:
        if area.iova <= last and area.last >= iova:
            counter[id(area)] += 1


def _check_pins(world: World, pages: list[Pages]) -> None:
    """A page's pin count is the number of struct iopt_pages that have it pinned."""
    counts: dict[int, Counter[int]] = {}
    for one in pages:
        for _, run in one.pinned or ():
            counts.setdefault(id(run.file), Counter()).update(range(run.page, run.page + run.npages))
    for file in _page_files(world):
        have = Counter({n: count for lo, hi, count in use_counts(file.pins) for n in range(lo, hi + 1)})
        assert have == counts.get(id(file), Counter()), file


def _page_files(world: World) -> list[PageFile]:
    return [*world.memfds, *(file for file in _open_files(world) if isinstance(file, Dmabuf))]


def _check_accounts(world: World, pages: list[Pages]) -> None:
    """Who pays: the sum of charges. A process that is gone keeps what it could not be given back."""
    for process in world.processes:
        mm = process.mm
        if mm.alive and not world.lost_count:
            mine = [one for one in pages if one.mm is mm]
            assert all(one.last_npinned == one.npinned for one in mine)
            assert mm.pinned_vm == sum(one.last_npinned for one in mine)
            assert mm.locked_vm == sum(one.last_npinned for one in mine if one.account is Account.MM)
    for user in world.machine._users.values():
        paid = [one.last_npinned for one in pages if one.user is user and one.account is Account.USER]
        assert user.locked_vm == sum(paid)


def _check_files(world: World, pages: list[Pages]) -> None:
    """References of files: descriptors, mappings, areas, pinned pages, and for a context what it gave out."""
    refs: Counter[int] = Counter()
    for file in _open_files(world):
        refs[id(file)] += 1
    for process in world.processes:
        refs.update(id(region.file) for region in process.mm.regions())
    for one in pages:
        refs.update(id(run.file) for _, run in one.pinned or ())
        if isinstance(one, FilePages):
            refs[id(one.file)] += 1
        if isinstance(one, DmabufPages):
            refs[id(one.dmabuf)] += 1
    for file in {id(file): file for file in _open_files(world)}.values():
        if isinstance(file, EventqFile | SelftestAccess):
            refs[id(file.ictx)] += 1
        if isinstance(file, VfioDeviceFile) and file.iommufd is not None:
            refs[id(file.iommufd)] += 1
    refs.update(id(vma.ictx) for vma in world.vmas)
    for memfd in world.memfds:
        assert memfd.refs == refs[id(memfd)] + 1, memfd.name
    for file in _open_files(world):
        assert file.refs == refs[id(file)] + (file in world.memfds), file


# ---- devices ----


def _check_groups(ictx: Context) -> None:
    """A group is owned once per bound device, and its hardware translates through what is attached."""
    idevs = [obj for obj in ictx.objects if isinstance(obj, IommufdDevice)]
    assert {id(igroup) for igroup in ictx._groups.values()} == {id(idev.igroup) for idev in idevs}
    for igroup in ictx._groups.values():
        group = igroup.group
        assert igroup.refs == group.owner_count == sum(idev.igroup is igroup for idev in idevs)
        assert group.owner is ictx
        assert group.handles.keys() == igroup.pasid_attach.keys()
        for pasid, attach in igroup.pasid_attach.items():
            assert group.handles[pasid].domain is attach.hwpt.domain
            assert attach.devices
            for obj_id, part in attach.devices.items():
                assert part.idev.id == obj_id
                assert set(map(id, part.held)) == {id(attach.hwpt), id(part.idev)}
        assert group.domain is (group.handles[0].domain if 0 in group.handles else group.blocking)
        for dev in group.devices:
            if isinstance(dev, MockDevice):
                assert (dev.domain or group.blocking) is group.domain
                faulting = [handle for handle in group.handles.values() if handle.domain.iopf_handler is not None]
                assert dev.iopf._users == len(faulting)
    for idev in idevs:
        assert idev.vdev is None or idev.vdev.idev is idev
    for obj in ictx.objects:
        if isinstance(obj, Viommu):
            assert all(vdev.viommu is obj and vdev.virt_id == virt_id for virt_id, vdev in obj.vdevs.items())


def _check_vfio(world: World) -> None:
    """A device is bound through exactly the one open file that has access, and knows what it has attached."""
    files = {id(file): file for file in _open_files(world) if isinstance(file, VfioDeviceFile)}.values()
    for dev in world.machine.devices.values():
        device = vfio_device(dev)
        bound = [file for file in files if file.device is device and file.iommufd is not None]
        assert device.open_count == len(bound) == (device.iommufd_device is not None)
        if not bound:
            assert not device.held
            assert not device.pasids
            assert not device.iommufd_attached
            continue
        idev = device.iommufd_device
        assert idev is not None
        assert (idev.ictx, idev.id) == (bound[0].iommufd, bound[0].devid)
        attached = {pasid for pasid, attach in idev.igroup.pasid_attach.items() if idev.id in attach.devices}
        assert attached == device.pasids | ({0} if device.iommufd_attached else set())


def check_empty(world: World) -> None:
    """After every file is closed and every process gone, nothing is left."""
    for ictx in world.contexts:
        assert not list(ictx.objects)
        assert not len(ictx.objects)
        assert not ictx._groups
        assert not ictx.mmaps._regions
        assert ictx.refs == 0
    for memfd in world.memfds:
        assert memfd.refs == 1, memfd.name
        assert not memfd.pins
    for process in world.processes:
        assert not process.fds.files
    for user in world.machine._users.values():
        assert user.locked_vm == 0
    for dev in world.machine.devices.values():
        assert not vfio_device(dev).open_count
        assert not dev.group.owner_count
        assert not dev.group.handles
    assert not world.machine.mock._numbers  # type: ignore[attr-defined]
