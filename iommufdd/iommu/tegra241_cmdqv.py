"""Tegra241 CMDQV beside an SMMUv3: vIOMMUs whose guests issue commands themselves (arm-smmu-v3/tegra241-cmdqv.c).

A guest writes commands to its own memory and their number to a register that it has mapped. Nothing traps, so each
queue is a Doorbell, which the core has looked at.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.smmuv3 import AtcInv, Cmd, Command, Op, Sync, Tlbi
from iommufd_uapi.tegra241_cmdqv import (
    CMDQV_VERSION,
    LVCMDQ_SIZE,
    VCMDQ_EN,
    VCMDQ_GERROR_ERR,
    VINTF_PAGE0_SIZE,
    VIRT_SID_MAX,
    Cerror,
    Register,
    cons,
)
from iommufdd.errors import EEXIST, EINVAL, EIO, ENOSPC, EOPNOTSUPP, IommufdError
from iommufdd.user import PAGE_SIZE

from .smmuv3_cmdq import IllegalCommand
from .smmuv3_hw import master_of
from .smmuv3_master import Master
from .smmuv3_regs import QUEUE_SIZE
from .smmuv3_viommu import Vsmmu, one_stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufdd.description import SmmuV3Iommu
    from iommufdd.user import PageRun
    from iommufdd.user_data import UserData

    from .ops import Device, HwQueuePort, MmapRegion, ViommuPort
    from .smmuv3 import SmmuV3
    from .smmuv3_domain import SmmuPaging

TYPE = uapi.IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV
ENTRY = Command.SIZEOF
BATCH = 64  # commands read from memory at once
_REGISTERS = struct.Struct("@6I")  # native, so that each is one load
_U32 = struct.Struct("@I")


class Cmdqv:
    """struct tegra241_cmdqv: how many of each there are, and which VINTFs are taken. VINTF 0 is the host's own."""

    def __init__(self, description: SmmuV3Iommu) -> None:
        self.lvcmdqs = 1 << description.vcmdqs_log2 - description.vintfs_log2  # of one VINTF
        self.sids = 1 << description.vintf_sids_log2  # of one VINTF
        self.vintfs: list[Vintf | None] = [None] * (1 << description.vintfs_log2)

    def hw_info(self) -> bytes:
        """tegra241_cmdqv_hw_info()"""
        return uapi.HwInfoTegra241Cmdqv(
            version=CMDQV_VERSION, log2vcmdqs=self.lvcmdqs.bit_length() - 1, log2vsids=self.sids.bit_length() - 1
        ).pack()

    def take(self, vintf: Vintf) -> int:
        """The lowest VINTF that is free. ENOSPC."""
        for idx in range(1, len(self.vintfs)):
            if self.vintfs[idx] is None:
                self.vintfs[idx] = vintf
                return idx
        raise ENOSPC(f"all {len(self.vintfs) - 1} VINTFs for guests are taken")


class SidMatch(NamedTuple):
    """VINTF_SID_MATCH and VINTF_SID_REPLACE: a vSID, and the StreamID put in its place."""

    vsid: int
    sid: int


class Vintf(Vsmmu):
    """struct tegra241_vintf: a vIOMMU with a page of registers, logical VCMDQs, and StreamIDs to replace."""

    def __init__(self, smmu: SmmuV3, core: ViommuPort, parent: SmmuPaging, user_data: UserData | None) -> None:
        """tegra241_cmdqv_init_vintf_user(): EINVAL, EFAULT, ENOSPC (VINTFs), ENOMEM (the region)."""
        super().__init__(smmu, core, parent)
        assert smmu.cmdqv is not None
        if user_data is None:
            raise EINVAL("this type of vIOMMU needs its data, to tell where the registers are")
        data = user_data.copy_struct(uapi.ViommuTegra241Cmdqv, TYPE, "out_vintf_mmap_length")
        self.cmdqv = smmu.cmdqv
        self.lvcmdqs: list[Vcmdq | None] = [None] * self.cmdqv.lvcmdqs
        self.sids: list[SidMatch | None] = [None] * self.cmdqv.sids
        self.page0: MmapRegion | None = None
        self.idx = self.cmdqv.take(self)
        try:
            self.page0 = core.alloc_mmap(VINTF_PAGE0_SIZE)
            data.out_vintf_mmap_offset, data.out_vintf_mmap_length = self.page0.offset, self.page0.length
            user_data.copy_struct_to_user(data, TYPE, "out_vintf_mmap_length")
        except IommufdError:
            self.destroy()
            raise

    def destroy(self) -> None:
        """tegra241_cmdqv_destroy_vintf_user()"""
        if self.page0 is not None:
            self.core.destroy_mmap(self.page0)
            self.page0 = None
        self.cmdqv.vintfs[self.idx] = None

    @property
    def registers(self) -> memoryview:
        """Page 0, wherever it is shown now."""
        assert self.page0 is not None
        return self.page0.data

    # ---- vDEVICEs ----

    def vdevice_init(self, dev: Device, virt_id: int) -> Callable[[], None]:
        """tegra241_vintf_init_vsid(): EINVAL, EOPNOTSUPP (streams), ENOSPC (slots)."""
        if virt_id > VIRT_SID_MAX:
            raise EINVAL(f"the vSID {virt_id:#x} has more than 20 bits")
        one_stream(dev)
        if None not in self.sids:
            raise ENOSPC(f"all {len(self.sids)} StreamIDs of the VINTF are taken")
        slot = self.sids.index(None)
        assert isinstance(dev, Master)
        self.sids[slot] = SidMatch(virt_id, master_of(dev).sid)

        def destroy() -> None:
            self.sids[slot] = None

        return destroy

    def replace_sid(self, vsid: int) -> int | None:
        """The StreamID in the place of a vSID; None when no slot matches."""
        return next((match.sid for match in self.sids if match is not None and match.vsid == vsid), None)

    # ---- HW queues ----

    def hw_queue_supported(self, queue_type: int) -> bool:
        """tegra241_vintf_get_vcmdq_size()"""
        return queue_type == uapi.IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV

    def hw_queue_init(self, queue: HwQueuePort, index: int, base: tuple[PageRun, int]) -> Callable[[], None]:
        """tegra241_vintf_alloc_lvcmdq_user(): EINVAL, EEXIST, EIO (the queue before it is missing)."""
        if index >= len(self.lvcmdqs):
            raise EINVAL(f"there is no LVCMDQ {index}")
        if self.lvcmdqs[index] is not None:
            raise EEXIST(f"LVCMDQ {index} exists")
        before = self.lvcmdqs[index - 1] if index else None
        if index and before is None:
            raise EIO(f"LVCMDQ {index} needs LVCMDQ {index - 1}")
        length = queue.length
        if length & length - 1 or not 2 * ENTRY <= length <= ENTRY << QUEUE_SIZE:
            raise EINVAL(f"{length:#x} bytes are no power of two from {2 * ENTRY:#x} to {ENTRY << QUEUE_SIZE:#x}")
        run, offset = base
        pos = run.page * PAGE_SIZE + offset
        if pos % length or pos >> 48:
            raise EINVAL(f"the memory at byte {pos:#x} of its file is not aligned to {length:#x} bytes")
        if before is not None:
            queue.depend(before.queue)
        vcmdq = self.lvcmdqs[index] = Vcmdq(self, index, queue, run, pos)
        self.core.add_doorbell(vcmdq)

        def destroy() -> None:
            """tegra241_vintf_destroy_lvcmdq_user()"""
            self.core.remove_doorbell(vcmdq)
            vcmdq.reset()
            self.lvcmdqs[index] = None
            if before is not None:
                queue.undepend(before.queue)

        return destroy

    def report_errors(self) -> None:
        """tegra241_vintf_user_handle_error(): which LVCMDQs have an error that is not acknowledged."""
        failed = sum(1 << vcmdq.lidx for vcmdq in self.lvcmdqs if vcmdq is not None and vcmdq.failed)
        data = uapi.VeventTegra241Cmdqv(lvcmdq_err_map=(failed & 2**64 - 1, failed >> 64)).pack()
        try:
            self.core.report_event(uapi.IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV, data)
        except EOPNOTSUPP:
            pass  # nobody listens; the interrupt handler does not look

    def execute(self, command: Command) -> None:
        """What a VINTF without HYP_OWN can do (tegra241_guest_vcmdq_supports_cmd), and CMD_SYNC. IllegalCommand."""
        if command.op in (Op.TLBI_NH_ASID, Op.TLBI_NH_VA):
            assert isinstance(command, Tlbi)
            command.vmid = self.vmid
        elif isinstance(command, AtcInv):
            sid = self.replace_sid(command.sid)
            if sid is None:
                raise IllegalCommand(f"no vDEVICE has the StreamID {command.sid:#x}")
            command.sid = sid
        elif not isinstance(command, Sync) or command.cs == 3:
            raise IllegalCommand(f"{command} is not for a guest's queue")
        self.smmu.execute(command, user=True)


class Vcmdq:
    """struct tegra241_vcmdq: a logical VCMDQ with its memory. Commands are over when CONS has passed them."""

    def __init__(self, vintf: Vintf, lidx: int, queue: HwQueuePort, run: PageRun, pos: int) -> None:
        self.vintf = vintf
        self.lidx = lidx
        self.queue = queue
        self._file, self._pos = run.file, pos
        self._entries = queue.length // ENTRY
        self._mask = 2 * self._entries - 1  # of an index with its wrap bit
        self._offset = LVCMDQ_SIZE * lidx
        self._gerror = self._read(Register.GERROR) & VCMDQ_GERROR_ERR
        self.cons = 0
        self.error = Cerror.NONE
        self.enabled = False
        self.reset()

    def reset(self) -> None:
        """tegra241_vcmdq_hw_deinit(): disabled and empty, its error acknowledged."""
        self.enabled = False
        self.cons, self.error = 0, Cerror.NONE
        for register in (Register.CONFIG, Register.STATUS, Register.PROD, Register.CONS):
            self._write(register, 0)
        for register in (Register.GERROR, Register.GERRORN):
            self._write(register, self._gerror)

    @property
    def failed(self) -> bool:
        """It has an error that the guest has not acknowledged, and stands still."""
        return bool((self._gerror ^ self._read(Register.GERRORN)) & VCMDQ_GERROR_ERR)

    def poll(self, commands: int | None = None) -> int:
        """Do what the guest has asked for, at most `commands` of it; 0 if it has asked for nothing."""
        before = _REGISTERS.unpack_from(self.vintf.registers, self._offset)
        _, prod, config, _, _, gerrorn = before
        done = int(self._enable(bool(config & VCMDQ_EN), before[0]))
        error = Cerror.NONE
        if self.enabled and not (self._gerror ^ gerrorn) & VCMDQ_GERROR_ERR:
            waiting = prod - self.cons & self._mask
            count, error = self._consume(waiting if commands is None else min(waiting, commands))
            self.error = error
            self._gerror ^= VCMDQ_GERROR_ERR * (error is not Cerror.NONE)
            done += count + (error is not Cerror.NONE)
        self._show(before)
        if error is not Cerror.NONE:
            self.vintf.report_errors()
        return done

    def _enable(self, enable: bool, start: int) -> bool:
        """Follow CONFIG; it starts from the CONS that the guest has left. True if that is a change."""
        if enable == self.enabled:
            return False
        self.enabled = enable
        if enable:
            self.cons = start & self._mask
        return True

    def _show(self, before: tuple[int, ...]) -> None:
        """What the hardware's own registers say now; CONS before GERROR, which makes the guest look at it."""
        if self.enabled:
            self._update(Register.CONS, cons(self.cons, self.error), before[0])
        self._update(Register.STATUS, VCMDQ_EN * self.enabled, before[3])
        self._update(Register.GERROR, self._gerror, before[4])

    def _consume(self, count: int) -> tuple[int, Cerror]:
        """Do `count` commands: (how many were done, why not all)."""
        done = 0
        while done < count:
            first = self.cons & self._entries - 1
            batch = min(count - done, self._entries - first, BATCH)
            data = self._file.pread(self._pos + ENTRY * first, ENTRY * batch)
            for at in range(0, len(data) - ENTRY + 1, ENTRY):
                try:
                    self.vintf.execute(Cmd.decode(data[at : at + ENTRY]))
                except IllegalCommand:
                    return done, Cerror.ILL
                self.cons = self.cons + 1 & self._mask
                done += 1
            if len(data) < ENTRY * batch:  # the file has been cut
                return done, Cerror.ABT
        return done, Cerror.NONE

    def _read(self, register: Register) -> int:
        return int(_U32.unpack_from(self.vintf.registers, self._offset + register)[0])

    def _write(self, register: Register, value: int) -> None:
        _U32.pack_into(self.vintf.registers, self._offset + register, value)

    def _update(self, register: Register, value: int, before: int) -> None:
        if value != before:
            self._write(register, value)
