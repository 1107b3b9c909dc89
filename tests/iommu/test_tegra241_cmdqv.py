"""VCMDQs: commands that a guest issues without a call, and what becomes of wrong ones (tegra241-cmdqv.c)."""

from __future__ import annotations

import random

import pytest

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.smmuv3 import Cmd, Command, EventId, Op, Sync
from iommufd_uapi.tegra241_cmdqv import VCMDQ_EN, Cerror, Register
from iommufdd.veventq import Veventq

from .cmdqv_lab import CmdqvGuest, CmdqvLab, Queue
from .smmu_lab import Watch, master

ERRORS = uapi.IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV
VA, PAGE, OTHER = 0x7F12_3456_7000, 0x30_0000, 0x30_1000


class Translated:
    """A guest whose device has used VA, and whose table says something else by now."""

    def __init__(self, *, ats: bool = False) -> None:
        self.lab = lab = CmdqvLab()
        lab.device()  # so that StreamIDs, vSIDs and slots differ
        self.idev = lab.device(ats=ats)
        self.guest = guest = CmdqvGuest(lab, self.idev, vsid=0x77, eats=int(ats))
        guest.start()
        guest.ram.write(PAGE, b"old")
        guest.ram.write(OTHER, b"new")
        guest.table.map(VA, PAGE)
        self.queue = guest.queue()
        assert self.read() == b"old"
        guest.table.map(VA, OTHER)
        assert self.read() == b"old"  # from the caches

    def read(self) -> bytes:
        return self.lab.read(self.idev, VA, 3)


# ---- commands ----


@pytest.mark.parametrize("command", [Cmd.tlbi_nh_va(5, VA), Cmd.tlbi_nh_asid(5), Cmd.tlbi_nh_va(5, VA, vmid=99)])
def test_a_command_drops_what_the_ioctls_drops(command: Command) -> None:
    there = Translated()
    there.queue.put(command, Cmd.sync())
    assert there.read() == b"old"  # until the hardware has come to it
    assert there.queue.vcmdq.poll() == 2
    assert (there.queue.cons, there.queue.error) == (2, Cerror.NONE)
    assert there.read() == b"new"


@pytest.mark.parametrize("command", [Cmd.tlbi_nh_va(6, VA), Cmd.tlbi_nh_asid(6), Cmd.tlbi_nh_va(5, VA + 0x1000)])
def test_a_command_for_something_else_drops_nothing_of_it(command: Command) -> None:
    there = Translated()
    assert there.queue.issue(command) == 1
    assert there.read() == b"old"


def test_an_atc_invalidation_finds_its_device_by_the_vsid() -> None:
    there = Translated(ats=True)
    there.queue.issue(Cmd.tlbi_nh_va(5, VA), Cmd.sync())
    assert there.read() == b"old"  # from the device TLB
    there.queue.issue(Cmd.atc_inv(0x77, VA, 0), Cmd.sync())
    assert there.read() == b"new"


def test_commands_are_told_as_the_ioctls() -> None:
    there = Translated(ats=True)
    watch = Watch(there.lab)
    commands = [Cmd.tlbi_nh_asid(3, 9), Cmd.tlbi_nh_va(3, VA, vmid=9), Cmd.atc_inv(0x77)]
    there.lab.invalidate(there.guest.viommu, *commands)
    there.queue.issue(*commands)
    told = [(what.command, what.tag, what.first, what.last, what.leaf, what.user) for what in watch.invalidations]
    assert told[:3] == told[3:]
    assert [each[-1] for each in told] == [True] * 6


def test_every_ioctl_of_the_context_does_what_was_asked_for_before() -> None:
    there = Translated()
    there.queue.put(Cmd.tlbi_nh_va(5, VA))
    there.lab.c.ioas_alloc()
    assert there.queue.cons == 1
    assert there.read() == b"new"


def test_the_ioctls_own_invalidations_and_events_go_on() -> None:
    there = Translated()
    assert there.lab.invalidate(there.guest.viommu, Cmd.tlbi_nsnh_all(), Cmd.cfgi_cd(0x77)) == 2
    assert there.read() == b"new"
    assert there.lab.fault(there.idev, VA + 0x1000) == EventId.F_TRANSLATION
    assert there.lab.event(there.guest.fd)[2][4:8] == (0x77).to_bytes(4, "little")


@pytest.mark.parametrize("seed", range(8))
def test_whatever_a_guest_writes_the_hardware_goes_on(seed: int) -> None:
    """Random commands, most with opcodes that are known, and random registers."""
    rng = random.Random(seed)
    lab = CmdqvLab()
    idev = lab.device(ats=True)
    guest = CmdqvGuest(lab, idev, vsid=0x77, eats=1)
    guest.start()
    guest.table.map(VA, PAGE)
    queue = guest.queue(entries=64)
    for _ in range(200):
        lab.read(idev, VA, 3)
        for at in range(0, 64 * 16, 16):
            command = bytearray(rng.randbytes(16))
            command[0] = rng.choice((Op.TLBI_NH_ASID, Op.TLBI_NH_VA, Op.ATC_INV, Op.SYNC, command[0]))
            if rng.random() < 0.5:
                command[4:8] = (0x77).to_bytes(4, "little")
            guest.ram.write(queue.base + at, bytes(command))
        queue.registers.write(rng.choice(list(Register)), rng.choice((0, 1, rng.getrandbits(32))))
        queue.registers.write(Register.PROD, rng.getrandbits(32))
        queue.vcmdq.poll()
        queue.registers.acknowledge()
        queue.registers.write(Register.CONFIG, VCMDQ_EN)
        assert queue.vcmdq.poll() < 2 * 128 + 2
    queue.guest.ram.write(queue.base, Cmd.sync().pack() * 64)
    queue.registers.acknowledge()
    queue.registers.write(Register.PROD, queue.cons)
    queue.vcmdq.poll()
    assert (queue.registers.read(Register.STATUS), queue.error) == (VCMDQ_EN, Cerror.NONE)


# ---- the ring ----


@pytest.fixture
def queue() -> Queue:
    lab = CmdqvLab()
    return CmdqvGuest(lab, lab.device()).queue(entries=4)


def test_indexes_wrap_twice(queue: Queue) -> None:
    watch = Watch(queue.guest.lab)
    for number in range(40):
        assert queue.issue(Cmd.tlbi_nh_asid(number)) == 1
        assert queue.registers.read(Register.CONS) == (number + 1) % 8
    assert [what.tag for what in watch.invalidations] == [(1, number) for number in range(40)]


@pytest.mark.parametrize("start", range(8))
def test_a_full_queue_is_not_an_empty_one(queue: Queue, start: int) -> None:
    for _ in range(start):
        queue.issue(Cmd.sync())
    watch = Watch(queue.guest.lab)
    assert queue.vcmdq.poll() == 0
    assert queue.issue(*(Cmd.tlbi_nh_asid(number) for number in range(4))) == 4
    assert [what.tag for what in watch.invalidations] == [(1, number) for number in range(4)]


def test_a_look_does_as_much_as_it_is_told(queue: Queue) -> None:
    queue.put(*[Cmd.sync()] * 4)
    assert [queue.vcmdq.poll(3), queue.cons, queue.vcmdq.poll(3), queue.cons, queue.vcmdq.poll(3)] == [3, 3, 1, 4, 0]


def test_long_queues_are_read_in_parts() -> None:
    lab = CmdqvLab()
    queue = CmdqvGuest(lab, lab.device()).queue(entries=512)
    watch = Watch(lab)
    for _ in range(3):
        assert queue.issue(*(Cmd.tlbi_nh_asid(number) for number in range(500))) == 500
    assert [what.tag for what in watch.invalidations] == [(1, number) for number in [*range(500)] * 3]


def test_a_prod_that_no_driver_writes_means_once_around_at_most(queue: Queue) -> None:
    """More commands than there are entries: the hardware goes on until the indexes are equal."""
    queue.put(Cmd.sync(), Cmd.sync(), Cmd.sync(), Cmd.sync())
    queue.registers.write(Register.PROD, 0xFFFF_FFFF)
    assert queue.vcmdq.poll() == 7
    assert queue.registers.read(Register.CONS) == 7


# ---- enabling ----


def test_a_queue_does_nothing_until_it_is_enabled() -> None:
    lab = CmdqvLab()
    queue = CmdqvGuest(lab, lab.device()).queue(enabled=False)
    queue.put(Cmd.sync())
    assert (queue.vcmdq.poll(), queue.cons, queue.registers.read(Register.STATUS)) == (0, 0, 0)
    queue.registers.write(Register.CONFIG, VCMDQ_EN)
    assert (queue.vcmdq.poll(), queue.cons, queue.registers.read(Register.STATUS)) == (2, 1, VCMDQ_EN)


@pytest.mark.parametrize("start", [0, 1, 3, 6])
def test_a_disabled_queue_starts_where_cons_says(queue: Queue, start: int) -> None:
    queue.issue(Cmd.sync(), Cmd.sync())
    queue.registers.write(Register.CONFIG, 0)
    queue.put(Cmd.sync())
    assert (queue.vcmdq.poll(), queue.cons, queue.registers.read(Register.STATUS)) == (1, 2, 0)
    queue.registers.write(Register.PROD, start)
    queue.registers.write(Register.CONS, start)  # the driver's reset says 0
    assert queue.vcmdq.poll() == 0
    queue.prod = start
    queue.enable()
    assert queue.issue(Cmd.sync()) == 1
    assert queue.cons == start + 1


def test_what_is_the_hardwares_cannot_be_written(queue: Queue) -> None:
    queue.issue(Cmd.sync())
    for register in (Register.CONS, Register.STATUS, Register.GERROR):
        before = queue.registers.read(register)
        queue.registers.write(register, 0xFFFF_FFFF)
        assert queue.vcmdq.poll() == 0
        assert queue.registers.read(register) == before


# ---- errors ----

ILLEGAL = [
    *(Command(op=op) for op in sorted({*range(256)} - {Op.TLBI_NH_ASID, Op.TLBI_NH_VA, Op.ATC_INV, Op.SYNC})),
    Cmd.atc_inv(0x78), Sync(op=Op.SYNC, cs=3),
]  # fmt: skip


def test_every_command_that_is_not_for_a_guests_queue_stops_it() -> None:
    lab = CmdqvLab()
    queue = CmdqvGuest(lab, lab.device(), vsid=0x77).queue()
    for command in ILLEGAL:
        at = queue.cons
        assert queue.issue(command, Cmd.sync()) == 1, str(command)
        assert (queue.error, queue.cons) == (Cerror.ILL, at)
        queue.guest.ram.write(queue.base + 16 * (at % 8), Cmd.sync().pack())
        queue.registers.acknowledge()
        assert queue.vcmdq.poll() == 2
        assert queue.error == Cerror.NONE
    assert lab.error_maps(queue.guest.errors) == [1] * len(ILLEGAL)


def test_a_queue_stands_still_until_the_error_is_acknowledged() -> None:
    there = Translated()
    queue, guest, lab = there.queue, there.guest, there.lab
    assert queue.issue(Cmd.sync(), Cmd.cfgi_cd(0x77), Cmd.tlbi_nh_va(5, VA)) == 2
    assert (queue.cons, queue.error) == (1, Cerror.ILL)
    assert queue.registers.read(Register.CONS) == 1 | 1 << 24
    assert lab.error_maps(guest.errors) == [1]
    assert [queue.vcmdq.poll(), queue.issue(Cmd.sync()), queue.cons] == [0, 0, 1]
    assert there.read() == b"old"
    guest.ram.write(queue.base + 16, Cmd.sync().pack())  # __arm_smmu_cmdq_skip_err()
    queue.registers.acknowledge()
    assert (queue.vcmdq.poll(), queue.cons, queue.error) == (3, 4, Cerror.NONE)
    assert queue.registers.read(Register.CONS) == 4
    assert there.read() == b"new"
    assert lab.error_maps(guest.errors) == []


def test_acknowledged_without_a_cure_it_fails_again() -> None:
    lab = CmdqvLab()
    guest = CmdqvGuest(lab, lab.device())
    queue = guest.queue()
    queue.issue(Cmd.cfgi_all())
    for _ in range(3):
        assert queue.error == Cerror.ILL
        queue.registers.acknowledge()
        assert queue.error == Cerror.NONE
        assert queue.vcmdq.poll() == 1
    assert lab.error_maps(guest.errors) == [1] * 4


def test_a_file_that_was_cut_aborts_the_fetch(queue: Queue) -> None:
    lab, file, base = queue.guest.lab, queue.guest.ram.file, queue.base
    size = file.size()
    queue.issue(Cmd.sync())
    queue.put(Cmd.sync(), Cmd.sync())
    kept = file.pread(base, 64)
    file.truncate(base + 40)  # in the middle of the third command
    assert (queue.vcmdq.poll(), queue.cons, queue.error) == (2, 2, Cerror.ABT)
    queue.registers.acknowledge()
    assert (queue.vcmdq.poll(), queue.cons, queue.error) == (1, 2, Cerror.ABT)
    assert lab.error_maps(queue.guest.errors) == [1, 1]
    file.truncate(size)
    file.pwrite(base, kept)
    queue.registers.acknowledge()
    assert (queue.vcmdq.poll(), queue.cons, queue.error) == (1, 3, Cerror.NONE)


def test_the_error_map_has_all_that_are_not_acknowledged() -> None:
    lab = CmdqvLab(vintfs_log2=1, vcmdqs_log2=7)  # 64 LVCMDQs
    guest = CmdqvGuest(lab, lab.device())
    queues = [guest.queue(index, entries=2) for index in range(64)]
    wrong = Cmd.cfgi_all()
    for index in (3, 63, 0):
        queues[index].issue(wrong)
    assert lab.error_maps(guest.errors) == [1 << 3, 1 << 3 | 1 << 63, 1 << 3 | 1 << 63 | 1]
    queues[63].registers.acknowledge()
    queues[5].issue(wrong)
    assert lab.error_maps(guest.errors) == [1 << 3 | 1 << 5 | 1]
    assert queues[4].issue(Cmd.sync()) == 1  # the others go on


def test_the_second_half_of_the_map() -> None:
    lab = CmdqvLab(vintfs_log2=0, vcmdqs_log2=7)
    lab.iommu.cmdqv.vintfs.append(None)  # type: ignore[union-attr]  # with one VINTF there is none for guests
    guest = CmdqvGuest(lab, lab.device())
    queues = [guest.queue(index, entries=2) for index in range(128)]
    queues[127].issue(Cmd.cfgi_all())
    assert lab.error_maps(guest.errors) == [1 << 127]


def test_errors_that_nobody_listens_to(queue: Queue) -> None:
    c, guest = queue.guest.lab.c, queue.guest
    c.fds.close(guest.errors)
    (number,) = (obj.id for obj in c.ictx.objects if isinstance(obj, Veventq) and obj.event_type == ERRORS)
    c.destroy(number)
    assert queue.issue(Cmd.cfgi_all()) == 1
    assert queue.error == Cerror.ILL


def test_an_error_does_not_outlive_its_queue(queue: Queue) -> None:
    queue.issue(Cmd.cfgi_all())
    c, guest = queue.guest.lab.c, queue.guest
    c.destroy(queue.id)
    assert [queue.registers.read(register) for register in Register] == [0, 0, 0, 0, 1, 1]
    again = guest.queue(entries=4)
    assert (again.issue(Cmd.sync()), again.cons, again.error) == (1, 1, Cerror.NONE)
    again.issue(Cmd.cfgi_all())
    assert [again.registers.read(Register.GERROR), again.error] == [0, Cerror.ILL]


def test_a_vdevice_that_is_gone_takes_no_atc_invalidation() -> None:
    lab = CmdqvLab()
    idev = lab.device(ats=True)
    guest = CmdqvGuest(lab, idev, vsid=0x77)
    queue = guest.queue()
    assert queue.issue(Cmd.atc_inv(0x77)) == 1
    lab.c.destroy(guest.vdevice)
    queue.issue(Cmd.atc_inv(0x77))
    assert queue.error == Cerror.ILL
    lab.c.vdevice(guest.viommu, idev.id, 0x77)
    queue.registers.acknowledge()
    assert (queue.vcmdq.poll(), queue.error) == (1, Cerror.NONE)
    assert lab.driver_half(guest.viommu).replace_sid(0x77) == master(idev).sid
