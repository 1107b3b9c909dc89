"""Everything there is, as plain comparable data: what a failed call must leave as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from iommufdd.access import Access
from iommufdd.context import Context
from iommufdd.device import IommufdDevice
from iommufdd.dmabuf import Dmabuf, DmabufPages
from iommufdd.eventq import EventqFile, Fault
from iommufdd.hw_pagetable import HwPagetable, HwptNested, HwptPaging
from iommufdd.ioas import Ioas
from iommufdd.iommu.mock import MockDevice, MockNested, MockPaging
from iommufdd.iommu.mock_viommu import MockViommu
from iommufdd.mmap import Vma
from iommufdd.pages import FilePages, Pages
from iommufdd.selftest import SelftestObj
from iommufdd.selftest_access import SelftestAccess
from iommufdd.user import File
from iommufdd.veventq import Veventq
from iommufdd.vfio.device_cdev import VfioDeviceFile
from iommufdd.vfio.iommufd import VfioDevice, vfio_device
from iommufdd.viommu import HwQueue, Vdevice, Viommu

from .world import Memfd

if TYPE_CHECKING:
    from iommufdd.attach import Attach
    from iommufdd.device import IommufdGroup
    from iommufdd.io_pagetable import IoPagetable
    from iommufdd.iommu.group import Fault as IopfFault
    from iommufdd.iommu.group import IommuGroup, IopfGroup
    from iommufdd.iommu.ops import Device, Domain
    from iommufdd.objects import IommufdObject
    from iommufdd.spans import UseCounts

    from .world import World

State = dict[str, Any]


def state(world: World) -> State:
    """The whole world. What is only a cache, or memory's contents, is not in it."""
    return _Snapshot(world).take()


def difference(before: State, after: State, path: str = "") -> list[str]:
    """Where two states differ, one line each."""
    lines: list[str] = []
    for key in sorted({*before, *after}, key=str):
        where = f"{path}/{key}"
        old, new = before.get(key, "nothing"), after.get(key, "nothing")
        if isinstance(old, dict) and isinstance(new, dict):
            lines += difference(old, new, where)
        elif old != new:
            lines.append(f"{where}: {old} -> {new}")
    return lines


def use_counts(counts: UseCounts | None) -> list[tuple[int, int, int]]:
    """(first, last, users) of every stretch that has users."""
    return list(counts.steps()) if counts is not None else []


class _Snapshot:
    def __init__(self, world: World) -> None:
        self.world = world
        self.pages: dict[int, str] = {}  # id(pages): its name
        self.domains: dict[int, str] = {}  # id(domain): its name
        self.all_pages: dict[str, Pages] = {}

    def take(self) -> State:
        contexts = {f"ctx{n}": ictx for n, ictx in enumerate(self.world.contexts)}
        for name, ictx in contexts.items():
            for obj in ictx.objects:
                if isinstance(obj, HwPagetable):
                    self.domains[id(obj.domain)] = f"{name} {obj}"
        result: State = {name: self.context(ictx) for name, ictx in contexts.items()}
        result["pages"] = {name: self.one_pages(pages) for name, pages in self.all_pages.items()}
        result["memfds"] = {file.name: (file.refs, use_counts(file.pins)) for file in self.world.memfds}
        result["processes"] = {
            n: {
                "mm": (process.mm.alive, process.mm.locked_vm, process.mm.pinned_vm),
                "fds": {fd: self.file(file) for fd, file in process.fds.files.items()},
            }
            for n, process in enumerate(self.world.processes)
        }
        machine = self.world.machine
        result["machine"] = {
            "users": {uid: user.locked_vm for uid, user in machine._users.items() if user.locked_vm},
            "temp_memory_limit": machine.temp_memory_limit,
            "mock numbers": sorted(machine.mock._numbers),  # type: ignore[attr-defined]
            "devices": {name: self.vfio_device(vfio_device(dev)) for name, dev in machine.devices.items()},
            "vmas": [(vma.region.offset, vma.refs) for vma in self.world.vmas],
        }
        return result

    def context(self, ictx: Context) -> State:
        objects = ictx.objects
        return {
            "refs": ictx.refs,
            "account": ictx.account_mode,
            "vfio_ioas": ictx.vfio_ioas and ictx.vfio_ioas.id,
            "next id": objects._free[0] if objects._free else objects._next,
            "reserved ids": sorted(obj_id for obj_id, obj in objects._entries.items() if obj is None),
            "objects": {str(obj): self.one_object(obj) for obj in objects},
            "mmaps": {offset: (region.length, str(region.owner), bytes(region.data[:4]))
                      for offset, region in ictx.mmaps._regions.items()},
            "groups": [self.igroup(igroup) for igroup in ictx._groups.values()],
        }  # fmt: skip

    # ---- objects ----

    def one_object(self, obj: IommufdObject) -> State:
        result: State = {
            "holders": sorted(str(holder) for holder in obj.holders),
            "held": sorted(str(held) for held in obj.held),
        }
        kind = _KINDS.get(type(obj))
        return result | (kind(self, obj) if kind is not None else {})

    def ioas(self, ioas: Ioas) -> State:
        return {"hwpt_list": [str(hwpt) for hwpt in ioas.hwpt_list], **self.iopt(ioas.iopt)}

    def iopt(self, iopt: IoPagetable) -> State:
        accesses = [access and access.id for access in iopt.accesses]
        while accesses and accesses[-1] is None:
            accesses.pop()
        return {
            "areas": [
                (area.iova, area.last, area.start_byte, area.readable, area.writable, area.filled, area.prevent_access,
                 area.num_accesses, area.num_locks, self.name_pages(area.pages))
                for area in iopt.areas
            ],
            "reserved": [(span.start, span.last, self.owner(span.owner)) for span in iopt.reserved],
            "allowed": [(span.start, span.last) for span in iopt.allowed],
            "domains": [self.domain(domain) for domain in iopt.domains],
            "accesses": accesses,
            "alignment": iopt.iova_alignment,
            "disable_large_pages": iopt.disable_large_pages,
        }  # fmt: skip

    def owner(self, owner: object) -> str:
        return getattr(owner, "name", "") or self.domains.get(id(owner), "-")

    def hwpt(self, hwpt: HwptPaging) -> State:
        domain = hwpt.domain
        dirty = domain.dirty_bits if isinstance(domain, MockPaging) else None
        return {
            "ioas": hwpt.ioas.id,
            "flags": (hwpt.auto_domain, hwpt.pasid_compat, hwpt.nest_parent, hwpt.enforce_cache_coherency),
            "fault": hwpt.fault and hwpt.fault.id,
            "handler": domain.iopf_handler is not None,
            "dirty": dirty and (dirty.tracking, dict(dirty._entries)),
        }

    def nested(self, hwpt: HwptNested) -> State:
        domain = hwpt.domain
        return {
            "parent": hwpt.parent.id,
            "viommu": hwpt.viommu and hwpt.viommu.id,
            "pasid": hwpt.pasid_compat,
            "fault": hwpt.fault and hwpt.fault.id,
            "iotlb": list(domain.iotlb) if isinstance(domain, MockNested) else None,
        }

    def access(self, access: Access) -> State:
        return {
            "ioas": access.ioas and access.ioas.id,
            "ioas_unpin": access.ioas_unpin and access.ioas_unpin.id,
            "alignment": access.iova_alignment,
        }

    def idev(self, idev: IommufdDevice) -> State:
        return {"vdev": idev.vdev and idev.vdev.id, "destroying": idev.destroying, "dev": idev.dev.name}

    def viommu(self, viommu: Viommu) -> State:
        driver = viommu.driver
        mock = driver if isinstance(driver, MockViommu) else None
        return {
            "vdevs": {virt_id: str(vdev) for virt_id, vdev in viommu.vdevs.items()},
            "veventqs": [str(veventq) for veventq in viommu.veventqs],
            "queues": mock and [queue and str(queue) for queue in mock._queues],
            "region": mock and mock._region and mock._region.offset,
        }

    def fault(self, fault: Fault) -> State:
        return {
            "deliver": [_group(group) for group in fault.deliver],
            "response": {cookie: _group(group) for cookie, group in fault.response.items()},
            "next cookie": fault._free[0] if fault._free else fault._next,
            "open": fault.file is not None,
        }

    def veventq(self, veventq: Veventq) -> State:
        return {
            "deliver": list(veventq.deliver),
            "counts": (veventq.sequence, veventq.num_events, veventq.depth),
            "open": veventq.file is not None,
        }

    # ---- groups and devices ----

    def vfio_device(self, device: VfioDevice) -> State:
        idev = device.iommufd_device
        return {
            "open_count": device.open_count,
            "bound": idev and (self.world.contexts.index(idev.ictx), idev.id),
            "attached": (device.iommufd_attached, sorted(device.pasids)),
            "held": sorted(str(held) for held in device.held),
            "group": self.group(device.dev.group),
        }

    def igroup(self, igroup: IommufdGroup) -> State:
        return {
            "refs": igroup.refs,
            "attach": {pasid: _attach(attach) for pasid, attach in igroup.pasid_attach.items()},
            **self.group(igroup.group),
        }

    def group(self, group: IommuGroup) -> State:
        return {
            "domain": self.domain(group.domain),
            "handles": {pasid: (self.domain(handle.domain), handle.idev.id) for pasid, handle in group.handles.items()},
            "owner": (group.owner_count, getattr(group.owner, "refs", None) is not None),
            "devices": {dev.name: self.device(dev) for dev in group.devices},
        }

    def device(self, dev: Device) -> State:
        if not isinstance(dev, MockDevice):
            return {pasid: self.domain(domain) for pasid, domain in vars(dev).get("now", {}).items()}
        return {
            "domain": self.domain(dev.domain),
            "cache": list(dev.cache),
            "viommu": dev.viommu and str(dev.viommu.core),
            "vdev_id": dev.vdev_id,
            "pasid_fake_error": dev.pasid_fake_error,
            "iopf": (dev.iopf._users, [_fault(fault) for fault in dev.iopf._partial]),
            "answers": [(_fault(fault), code) for fault, code in dev.iopf.responses],
        }

    def domain(self, domain: Domain | None) -> str | None:
        return None if domain is None else self.domains.get(id(domain), domain.type.name)

    # ---- pages and files ----

    def name_pages(self, pages: Pages) -> str:
        name = self.pages.setdefault(id(pages), f"pages{len(self.pages)}")
        self.all_pages[name] = pages
        return name

    def one_pages(self, pages: Pages) -> State:
        result: State = {
            "place": (type(pages).__name__, pages.start, pages.npages, pages.writable),
            "payer": (pages.account, self.mm_number(pages), pages.user.uid),
            "refs": pages.refs,
            "npinned": (pages.npinned, pages.last_npinned),
            "use": use_counts(pages.use),
            "pinned": _runs(pages),
            "access": pages.access_users or {},
        }
        if isinstance(pages, FilePages):
            result["file"] = self.file(pages.file)
        if isinstance(pages, DmabufPages):
            result["file"] = (self.file(pages.dmabuf), pages.revoked, len(pages.dmabuf.importers))
        return result

    def mm_number(self, pages: Pages) -> int:
        return next(n for n, process in enumerate(self.world.processes) if process.mm is pages.mm)

    def file(self, file: File | None) -> Any:
        if isinstance(file, Memfd):
            return file.name
        if isinstance(file, Context):
            return f"ctx{self.world.contexts.index(file)}"
        if isinstance(file, SelftestAccess):
            return str(file), file.refs, file.next_id, dict(file.items)
        if isinstance(file, Dmabuf):
            return "dmabuf", file.refs, file.revoked, use_counts(file.pins)
        if isinstance(file, VfioDeviceFile):
            return str(file), file.refs, self.file(file.iommufd)
        if isinstance(file, EventqFile | Vma):
            return str(file), file.refs
        return file and (type(file).__name__, file.refs)


_KINDS: dict[type[IommufdObject], Any] = {
    Ioas: _Snapshot.ioas,
    HwptPaging: _Snapshot.hwpt,
    HwptNested: _Snapshot.nested,
    Access: _Snapshot.access,
    IommufdDevice: _Snapshot.idev,
    Viommu: _Snapshot.viommu,
    Fault: _Snapshot.fault,
    Veventq: _Snapshot.veventq,
    Vdevice: lambda _, vdev: {"of": (vdev.viommu.id, vdev.idev.id, vdev.virt_id)},
    HwQueue: lambda _, queue: {"place": (queue.base_addr, queue.length), "access": queue.access and queue.access.id},
    SelftestObj: lambda _, sobj: {"idev": sobj.idev and sobj.idev.id},
}


def _attach(attach: Attach) -> State:
    return {"hwpt": attach.hwpt.id, "devices": {n: [str(obj) for obj in p.held] for n, p in attach.devices.items()}}


def _fault(fault: IopfFault) -> tuple[int, ...]:
    return fault.flags, fault.pasid, fault.grpid, fault.perm, fault.addr


def _group(group: IopfGroup) -> Any:
    return group.handle.idev.id, [_fault(fault) for fault in group.faults]


def _runs(pages: Pages) -> list[tuple[int, str, int, int]]:
    """(index, file, page, npages), runs that continue each other joined."""
    runs: list[tuple[int, str, int, int]] = []
    for index, run in pages.pinned or ():
        name = getattr(run.file, "name", type(run.file).__name__)
        if runs:
            at, file, page, npages = runs[-1]
            if (at + npages, file, page + npages) == (index, name, run.page):
                runs[-1] = at, file, page, npages + run.npages
                continue
        runs.append((index, name, run.page, run.npages))
    return runs


