"""The registers of a logical VCMDQ: where they lie, and that each is one access."""

from __future__ import annotations

import struct

import pytest

from iommufd_uapi import tegra241_cmdqv as uapi
from iommufd_uapi.tegra241_cmdqv import Cerror, Lvcmdq, Register

NAMES = ("CONS", "PROD", "CONFIG", "STATUS", "GERROR", "GERRORN")  # TEGRA241_VCMDQ_*, 4 bytes each from 0 on


@pytest.mark.parametrize("index", [0, 1, 2, 127, 511])
def test_where_they_lie(index: int) -> None:
    page = bytearray(uapi.VINTF_PAGE0_SIZE)
    registers = Lvcmdq(memoryview(page), index)
    for number, name in enumerate(NAMES):
        registers.write(Register[name], 0x1000_0000 + number)
        assert struct.unpack_from("<I", page, 0x80 * index + 4 * number)[0] == 0x1000_0000 + number
        assert registers.read(Register[name]) == 0x1000_0000 + number
    assert sum(map(bool, page)) == 6 + 5  # and nothing else; the first number is 0
    with pytest.raises(struct.error):
        registers.write(Register.PROD, 1 << 32)


def test_an_error_is_what_two_registers_differ_in() -> None:
    registers = Lvcmdq(memoryview(bytearray(0x10000)), 3)
    registers.write(Register.CONS, uapi.cons(5, Cerror.ABT))
    assert registers.read(Register.CONS) == 0x0200_0005
    assert registers.error == 0
    for gerror in (1, 0):
        registers.write(Register.GERROR, gerror)
        assert registers.error == Cerror.ABT
        registers.acknowledge()
        assert (registers.error, registers.read(Register.GERRORN)) == (Cerror.NONE, gerror)
