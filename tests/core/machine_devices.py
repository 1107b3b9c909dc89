"""State machine: devices, HWPTs, vIOMMUs, queues and what is read from them."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import rule

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.device import IommufdDevice
from iommufdd.dmabuf import Dmabuf
from iommufdd.eventq import EventqFile, Fault
from iommufdd.hw_pagetable import HwPagetable, HwptNested, HwptPaging
from iommufdd.ioas import Ioas
from iommufdd.selftest import SelftestObj
from iommufdd.user import PAGE_SIZE, File
from iommufdd.viommu import Viommu

from .harness import DATA, Client
from .machine import RESPOND, CoreMachine, bits, fault, flag, length, number, offset

hwpt_flags = st.integers(0, 15)
pasids = st.sampled_from([1, 2, 1024, 0, 1 << 20])
data = st.sampled_from([8, 8, 4, 4, 0, 3, 9])
MAX_DEVICES = 4


class DeviceRules(CoreMachine):
    """0x89 to 0x94, and what the selftest does with its devices."""

    def pick_pt(self, client: Client, n: int) -> int:
        return self.pick(client, (Ioas, HwPagetable), n)

    # ---- attaching ----

    @rule(who=number, to=number, flags=bits, nth=fault)
    def mock_domain(self, who: int, to: int, flags: int, nth: int) -> None:
        client = self.client(who)
        if sum(isinstance(obj, SelftestObj) for obj in client.ictx.objects) < MAX_DEVICES:
            op = test_uapi.MockDomainFlags(dev_flags=flags & ~2)
            self.test(client, op, nth, id=self.pick_pt(client, to))

    @rule(who=number, n=number, to=number, nth=fault)
    def mock_domain_replace(self, who: int, n: int, to: int, nth: int) -> None:
        client = self.client(who)
        op = test_uapi.MockDomainReplace(self.pick_pt(client, to))
        self.test(client, op, nth, unless=RESPOND, id=self.pick(client, SelftestObj, n))

    @rule(who=number, n=number, to=number, pasid=pasids, replace=flag, nth=fault)
    def pasid_attach(self, who: int, n: int, to: int, pasid: int, replace: bool, nth: int) -> None:
        client = self.client(who)
        kind = test_uapi.PasidReplace if replace else test_uapi.PasidAttach
        unless = "mock_domain_set_dev_pasid_nop()" if pasid == 1024 else RESPOND if replace else ""
        op = kind(pasid, self.pick(client, HwPagetable, to, having="pasid_compat" if to % 4 else ""))
        self.test(client, op, nth, unless=unless, id=self.pick(client, SelftestObj, n))

    @rule(who=number, n=number, pasid=pasids, nth=fault)
    def pasid_detach(self, who: int, n: int, pasid: int, nth: int) -> None:
        client = self.client(who)
        self.test(client, test_uapi.PasidDetach(pasid), nth, id=self.pick(client, SelftestObj, n))

    @rule(who=number, n=number, to=number, pasid=pasids, nth=fault)
    def pasid_check(self, who: int, n: int, to: int, pasid: int, nth: int) -> None:
        client = self.client(who)
        op = test_uapi.PasidCheck(pasid, self.pick(client, HwPagetable, to))
        self.test(client, op, nth, id=self.pick(client, SelftestObj, n))

    # ---- HWPTs ----

    @rule(who=number, n=number, to=number, flags=hwpt_flags, queue=number, nth=fault)
    def hwpt_alloc(self, who: int, n: int, to: int, flags: int, queue: int, nth: int) -> None:
        client = self.client(who)
        cmd = uapi.HwptAlloc(flags=flags, dev_id=self.pick(client, IommufdDevice, n), pt_id=self.pick(client, Ioas, to))
        cmd.fault_id = self.pick(client, Fault, queue)
        self.call(client, cmd, nth, new="out_hwpt_id")

    @rule(who=number, n=number, to=number, flags=hwpt_flags, queue=number, size=data, huge=flag, nth=fault)
    def hwpt_alloc_with_data(
        self, who: int, n: int, to: int, flags: int, queue: int, size: int, huge: bool, nth: int
    ) -> None:
        client = self.client(who)
        cmd = uapi.HwptAlloc(
            flags=flags & 8 if to % 3 else flags,
            dev_id=self.pick(client, IommufdDevice, n),
            pt_id=self.pick(client, (HwptPaging, Viommu, Ioas), to),
            fault_id=self.pick(client, Fault, queue),
            data_type=test_uapi.IOMMU_HWPT_DATA_SELFTEST,
            data_len=size,
            data_uptr=client.process.put(test_uapi.HwptSelftest(0xBEEF, huge).pack()),
        )
        self.call(client, cmd, nth, new="out_hwpt_id")

    @rule(who=number, n=number, at=offset, size=length, step=bits, nth=fault)
    def dirty(self, who: int, n: int, at: int, size: int, step: int, nth: int) -> None:
        client = self.client(who)
        hwpt = self.pick(client, HwptPaging, n)
        self.call(client, uapi.HwptSetDirtyTracking(flags=step % 2, hwpt_id=hwpt), nth)
        iova = self.pick_iova(client, 0, at)
        uptr = client.process.put(b"\x5a" * 64)
        op = test_uapi.Dirty(iova=iova, length=size, page_size=PAGE_SIZE >> step % 3, uptr=uptr)
        self.test(client, op, nth, unless=RESPOND, id=hwpt)
        get = uapi.HwptGetDirtyBitmap(
            hwpt_id=hwpt, flags=step >> 2, iova=iova, length=size, page_size=PAGE_SIZE, data=DATA + 100
        )
        self.call(client, get, nth)

    @rule(who=number, n=number, count=bits, entry=bits, flags=bits, nth=fault)
    def invalidate(self, who: int, n: int, count: int, entry: int, flags: int, nth: int) -> None:
        client = self.client(who)
        hwpt = self.pick(client, (HwptNested, Viommu), n)
        if isinstance(client.ictx.objects.get(hwpt), Viommu):
            entries = [test_uapi.ViommuInvalidateSelftest(flags & 1, entry, at).pack() for at in range(count)]
        else:
            entries = [test_uapi.HwptInvalidateSelftest(flags & 1, at).pack() for at in range(count)]
        cmd = uapi.HwptInvalidate(
            hwpt_id=hwpt,
            data_uptr=client.process.put(b"".join(entries)),
            data_type=test_uapi.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST,
            entry_len=len(entries[0]) if entries else 8,
            entry_num=count,
        )
        self.call(client, cmd, nth, unless="cache_invalidate() goes entry by entry")

    @rule(who=number, n=number, size=data, nth=fault)
    def hw_info(self, who: int, n: int, size: int, nth: int) -> None:
        client = self.client(who)
        dev = self.pick(client, IommufdDevice, n)
        self.call(client, uapi.HwInfo(dev_id=dev, data_len=size, data_uptr=DATA), nth)

    @rule(who=number, n=number, entry=bits, nth=fault)
    def check_caches(self, who: int, n: int, entry: int, nth: int) -> None:
        client = self.client(who)
        self.test(client, test_uapi.CheckIotlb(entry, 0), nth, id=self.pick(client, HwptNested, n))
        dev = self.pick(client, IommufdDevice, n)
        self.test(client, test_uapi.CheckDevCache(entry, 0), nth, id=dev)

    # ---- vIOMMU ----

    @rule(who=number, n=number, to=number, mapped=flag, nth=fault)
    def viommu_alloc(self, who: int, n: int, to: int, mapped: bool, nth: int) -> None:
        client = self.client(who)
        cmd = uapi.ViommuAlloc(type=test_uapi.IOMMU_VIOMMU_TYPE_SELFTEST, dev_id=self.pick(client, IommufdDevice, n))
        cmd.hwpt_id = self.pick(client, HwptPaging, to, having="nest_parent")
        if mapped:
            content = test_uapi.ViommuSelftest(in_data=n).pack()
            cmd.data_len, cmd.data_uptr = len(content), client.process.put(content)
        self.call(client, cmd, nth, new="out_viommu_id")

    @rule(who=number, n=number, to=number, virt_id=bits, nth=fault)
    def vdevice_alloc(self, who: int, n: int, to: int, virt_id: int, nth: int) -> None:
        client = self.client(who)
        cmd = uapi.VdeviceAlloc(viommu_id=self.pick(client, Viommu, to), dev_id=self.pick(client, IommufdDevice, n))
        cmd.virt_id = virt_id
        self.call(client, cmd, nth, new="out_vdevice_id")

    @rule(who=number, to=number, depth=bits, kind=flag, nth=fault)
    def veventq_alloc(self, who: int, to: int, depth: int, kind: bool, nth: int) -> None:
        client = self.client(who)
        event_type = test_uapi.IOMMU_VEVENTQ_TYPE_SELFTEST + kind
        cmd = uapi.VeventqAlloc(viommu_id=self.pick(client, Viommu, to), type=event_type, veventq_depth=depth)
        self.call(client, cmd, nth, new="out_veventq_id")

    @rule(who=number, to=number, index=bits, at=offset, size=length, nth=fault)
    def hw_queue_alloc(self, who: int, to: int, index: int, at: int, size: int, nth: int) -> None:
        client = self.client(who)
        viommu = client.ictx.objects.get(self.pick(client, Viommu, to))
        ioas = viommu.hwpt.ioas.id if isinstance(viommu, Viommu) else 0
        cmd = uapi.HwQueueAlloc(
            viommu_id=viommu.id if viommu is not None else to,
            type=test_uapi.IOMMU_HW_QUEUE_TYPE_SELFTEST,
            index=index % 3,
            nesting_parent_iova=self.pick_iova(client, ioas, at) + at % 3,
            length=size,
        )
        self.call(client, cmd, nth, new="out_hw_queue_id")

    # ---- queues and files ----

    @rule(who=number, nth=fault)
    def fault_alloc(self, who: int, nth: int) -> None:
        client = self.client(who)
        if len(client.fds.files) < 20:
            self.call(client, uapi.FaultAlloc(), nth, new="out_fault_id")

    @rule(who=number, n=number, pasid=pasids, group=bits, nth=fault)
    def trigger(self, who: int, n: int, pasid: int, group: int, nth: int) -> None:
        client = self.client(who)
        dev = self.pick(client, IommufdDevice, n)
        self.test(client, test_uapi.TriggerIopf(dev_id=dev, pasid=pasid, grpid=group, addr=PAGE_SIZE), nth)
        self.test(client, test_uapi.TriggerVevent(dev), nth)

    @rule(who=number, n=number, count=st.sampled_from([40, 80, 4, 12, 24, 8, 0]), nth=fault)
    def read(self, who: int, n: int, count: int, nth: int) -> None:
        client = self.client(who)
        file = client.fds.fget(self.pick_fd(client, EventqFile, n))
        if file is not None:
            readable = file
            self.system_call(client, lambda: readable.read(client.caller, DATA, count), nth)
            assert readable.poll() >= 0

    @rule(who=number, n=number, cookie=bits, code=bits, nth=fault)
    def write(self, who: int, n: int, cookie: int, code: int, nth: int) -> None:
        client = self.client(who)
        file = client.fds.fget(self.pick_fd(client, EventqFile, n))
        answers = b"".join(uapi.HwptPageResponse(cookie ^ at, code >> 2).pack() for at in range(code % 3))
        client.process.put(answers)
        if file is not None:
            writable: File = file
            unless = "xa_erase(0) of an allocating array" if not cookie else ""
            self.system_call(client, lambda: writable.write(client.caller, DATA, len(answers)), nth, unless)

    @rule(who=number, n=number, pages=bits, prot=bits)
    def mmap(self, who: int, n: int, pages: int, prot: int) -> None:
        client = self.client(who)
        offsets = [*client.ictx.mmaps._regions, 0]
        place = offsets[n % len(offsets)]
        self.system_call(client, lambda: client.mmap(place, pages * PAGE_SIZE, prot).refs, 0)

    @rule(n=number)
    def munmap(self, n: int) -> None:
        if self.world.vmas:
            self.clients[0].munmap(self.world.vmas[n % len(self.world.vmas)])

    @rule(who=number, pages=bits, nth=fault)
    def dmabuf_get(self, who: int, pages: int, nth: int) -> None:
        client = self.client(who)
        if len(client.fds.files) < 20:
            self.test(client, test_uapi.DmabufGet(pages * PAGE_SIZE), nth)

    @rule(who=number, n=number, revoked=flag, nth=fault)
    def dmabuf_revoke(self, who: int, n: int, revoked: bool, nth: int) -> None:
        client = self.client(who)
        self.test(client, test_uapi.DmabufRevoke(self.pick_fd(client, Dmabuf, n), revoked), nth)

    @rule(who=number, limit=number, op=number, nth=fault)
    def rest(self, who: int, limit: int, op: int, nth: int) -> None:
        client = self.client(who)
        self.test(client, test_uapi.MemoryLimit(limit), nth)
        self.call(client, test_uapi.TestCmd(op=op + 24), nth)
