"""Every fault reason that a DMA can raise, by a DMA that raises it. The numbers are the specification's (7.1.3)."""

from collections.abc import Callable

import pytest

from iommufdd.iommu.dma import Dma, Op, State
from iommufdd.iommu.vtd_regs import RECOVERABLE, TEXT, Reason
from iommufdd.iommu.walk import EXEC
from tests.core.harness import READ

from .board import HOLE, PASID, POOL, READ_ONLY, Board
from .lab import Lab
from .tables import X86Table, flags
from .walk_checks import LOW, guest

CASES: dict[int, Callable[[], Dma]] = {}
EDGE = 0x00F000  # its bytes are the last of the memory's file, which is cut off before them


def raises(code: int) -> Callable[[Callable[[], Dma]], Callable[[], Dma]]:
    def add(function: Callable[[], Dma]) -> Callable[[], Dma]:
        CASES[code] = function
        return function

    return add


def crafted(op: Op = Op.READ, iova: int = LOW, pasid: int | None = PASID, *, xor: int = 0, **fields: int) -> Dma:
    """A DMA through an entry made by hand over a table that maps LOW."""
    board = Board()
    table = guest(board, ere=1)
    table.map(LOW, 0x5000)
    board.publish(board.fields(**{"fspt": table.root, **fields}) ^ xor)
    return board.dma(op, iova, 8, pasid)


def mapped(rights: str = "rwu", gpa: int = 0x5000, op: Op = Op.READ) -> Dma:
    """A DMA through a good entry and a page with these rights."""
    board = Board()
    guest(board).map(LOW, gpa, rights)
    return board.dma(op, LOW, 8)


def pointing(target: int, *, level: int = 1, op: Op = Op.READ) -> Dma:
    """A DMA whose walk is led to a table at `target`."""
    board = Board()
    table = guest(board)
    if level == 4:
        board.publish(board.fields(fspt=target))
    else:
        table.set(table.slot(LOW, level + 1), target | flags("rwua"))
    return board.dma(op, LOW, 8)


def cut(level: int) -> Dma:
    """A DMA whose table of this level lies where the memory's file has been cut off."""
    board = Board()
    table = guest(board)
    table.map(LOW, 0x5000)
    if level < 4:
        table.set(table.slot(LOW, level + 1), EDGE | flags("rwua"))
    board.publish(board.fields(fspt=EDGE if level == 4 else table.root))
    board.file.truncate(0x8F000)
    return board.dma(Op.READ, LOW, 8)


def unattached(pasids: int, pasid: int | None) -> Dma:
    lab = Lab()
    dma = lab.dma(lab.device(pasids=pasids), Op.READ, 0x1000, pasid=pasid)
    dma.run()
    return dma


@raises(0x45)
def a_pasid_from_a_device_without() -> Dma:
    return unattached(0, 1)


@raises(0x46)
def a_pasid_too_large() -> Dma:
    return unattached(4, 16)


@raises(0x51)
def a_device_never_attached() -> Dma:
    return unattached(4, 15)


@raises(0x59)
def a_device_detached() -> Dma:
    lab = Lab()
    idev = lab.device()
    lab.attach(idev, lab.ram()[0])
    lab.detach(idev)
    dma = lab.dma(idev, Op.READ, 0x1000)
    dma.run()
    return dma


@raises(0x5A)
def a_reserved_bit_in_the_pasid_entry() -> Dma:
    return crafted(xor=1 << 5)


@raises(0x5B)
def no_such_type_of_translation() -> Dma:
    return crafted(pgtt=5)


@raises(0x5C)
def an_execute_request() -> Dma:
    board = Board()
    guest(board, ere=0).map(LOW, 0x5000)
    dma = Dma(board.dev, Op.READ, LOW, 8, pasid=PASID, priv=EXEC)
    dma.run()
    return dma


@raises(0x5D)
def a_privileged_request() -> Dma:
    board = Board()
    guest(board, sre=0).map(LOW, 0x5000)
    return board.dma(Op.READ, LOW, 8, priv=True)


@raises(0x70)
def a_table_that_is_gone() -> Dma:
    return cut(1)


@raises(0x71)
def a_page_that_is_not_there() -> Dma:
    return crafted(iova=LOW + 0x1000)


@raises(0x72)
def a_reserved_bit_in_a_table() -> Dma:
    return mapped(gpa=1 << 51)


@raises(0x73)
def a_root_that_is_gone() -> Dma:
    return cut(4)


@raises(0x74)
def a_table_beyond_the_second_stage() -> Dma:
    return pointing(1 << 48)


@raises(0x75)
def a_root_that_the_second_stage_has_not() -> Dma:
    return pointing(HOLE, level=4)


@raises(0x76)
def a_table_that_the_second_stage_has_not() -> Dma:
    return pointing(HOLE)


@raises(0x77)
def an_accessed_bit_in_read_only_memory() -> Dma:
    board = Board()
    table = guest(board)
    table.set(table.slot(LOW, 2), READ_ONLY | flags("rwua"))
    board.write(READ_ONLY + 8 * (LOW >> 12 & 511), (0x5000 | flags("rwu")).to_bytes(8, "little"))
    return board.dma(Op.READ, LOW, 8)


@raises(0x79)
def memory_that_cannot_be_written() -> Dma:
    return mapped(gpa=0x200000, op=Op.WRITE)


@raises(0x7B)
def a_second_stage_that_is_none() -> Dma:
    return crafted(sspt=0x1234000)


@raises(0x7C)
def a_dirty_bit_without_snooping() -> Dma:
    return crafted(Op.WRITE, 0x5000, pgtt=2, ssade=1, pwsnp=0)


@raises(0x80)
def an_address_that_is_not_canonical() -> Dma:
    return crafted(iova=1 << 47)


@raises(0x81)
def a_page_of_the_supervisor() -> Dma:
    return mapped("rw")


@raises(0x82)
def a_page_without_execution() -> Dma:
    board = Board()
    guest(board).map(LOW, 0x5000, "rwux")
    dma = Dma(board.dev, Op.READ, LOW, 8, pasid=PASID, priv=EXEC)
    dma.run()
    return dma


@raises(0x83)
def pass_through_to_host_memory_that_is_not_there() -> Dma:
    return crafted(pgtt=4)


@raises(0x84)
def an_address_beyond_the_second_stage() -> Dma:
    return crafted(iova=1 << 48, pgtt=2)


@raises(0x85)
def a_page_that_cannot_be_written() -> Dma:
    return mapped("ru", op=Op.WRITE)


@raises(0x87)
def the_interrupts_range() -> Dma:
    return crafted(iova=0xFEE00000, pasid=None)


@raises(0x90)
def an_accessed_bit_without_snooping() -> Dma:
    lab = Lab(coherent_walk=False)
    idev = lab.device()
    hwpt, _, table = lab.guest(idev)
    lab.attach(idev, hwpt)
    table.map(LOW, 0x5000)
    dma = lab.dma(idev, Op.READ, LOW)
    dma.run()
    return dma


@pytest.mark.parametrize("code", CASES, ids=hex)
def test_reason(code: int) -> None:
    dma = CASES[code]()
    assert dma.state is State.FAILED
    assert dma.fault is not None
    assert dma.fault.code == code, f"{dma.fault.code:#x}"
    assert dma.fault.name == TEXT[Reason(code)]
    assert dma.done == 0
    iommu = dma.dev.iommu
    assert iommu.faults[-1][:3] == (dma.dev, dma.pasid, dma.iova)  # type: ignore[attr-defined]
    assert iommu.fault_count == {code: 1}  # type: ignore[attr-defined]
    assert iommu.recoverable(dma.fault) == (code in RECOVERABLE)


def test_every_reason_has_a_dma() -> None:
    """Here, but for those of a second stage that is bytes: tests/kvm/test_vtd_ept.py."""
    there = {Reason.SS_ACCESS, Reason.SS_RESERVED}
    assert set(CASES) == {int(reason) for reason in Reason} - there == {int(reason) for reason in TEXT} - there


def test_a_kernels_first_stage() -> None:
    """Read-only is 0x85, a hole 0x71, beyond the lower half not canonical, and all of it is executable."""
    lab = Lab()
    idev = lab.device()
    ioas, _ = lab.ram()
    file = lab.c.world.memfd(1)
    lab.c.map(ioas, lab.c.process.map(file), 4096, 1 << 30, READ)
    lab.attach(idev, ioas)
    assert lab.fault(idev, 1 << 31) == 0x71
    assert lab.fault(idev, 1 << 30, Op.WRITE) == 0x85
    assert lab.read(idev, 1 << 30) == bytes(8)
    assert lab.fault(idev, 1 << 56) == 0x80
    assert lab.fault(idev, 0x1000, Op.READ, priv=EXEC) == 0x5C


def test_the_tables_writer_is_not_the_walkers() -> None:
    """What it writes are the bytes of the format."""
    board = Board()
    table = X86Table(board, POOL)
    addr = table.map(0x1000, 0x5000, "rwuadxe")
    assert board.read(addr, 8).hex() == "6754000000000080"
    addr = table.map(0x40000000, 0x40000000, "r", level=3)
    assert board.read(addr, 8).hex() == "8100004000000000"
