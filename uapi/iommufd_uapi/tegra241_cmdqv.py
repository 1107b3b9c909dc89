"""Room uapi (mirrors drivers/iommu/arm/arm-smmu-v3/tegra241-cmdqv.c): page 0 of a VINTF, the registers a guest maps.

IOMMU_VIOMMU_ALLOC of type TEGRA241_CMDQV gives their offset and length for mmap(2). Commands are those of
`iommufd_uapi.smmuv3`; an index (PROD, CONS) counts entries and has one bit more than the queue needs, which tells a
full queue from an empty one.

    queue = Lvcmdq(mapping.view, 0)
    queue.write(Register.CONFIG, VCMDQ_EN)       # and STATUS follows
    queue.write(Register.PROD, 3)                # three commands are in the queue's memory; CONS follows
"""

import struct
from enum import IntEnum

VINTF_PAGE0_SIZE = 0x10000
LVCMDQ_SIZE = 0x80  #: bytes of page 0 for each logical VCMDQ
VCMDQ_EN = 1  #: CONFIG; and VCMDQ_ENABLED of STATUS
VCMDQ_GERROR_ERR = 1  #: GERROR: an error is active while it differs from GERRORN
VIRT_SID_MAX = 0xF_FFFF  #: VINTF_SID_MATCH_VIRT_SID
CMDQV_VERSION = 1  #: PARAM.VER
_CONS_ERR_SHIFT = 24
_U32 = struct.Struct("@I")  # native: one load or store of four bytes, as registers need


class Register(IntEnum):
    """Registers of a logical VCMDQ: offsets in its 128 bytes"""

    CONS = 0x00  #: the hardware's: the next command it will do, and why it stopped
    PROD = 0x04  #: the guest's: where its next command will go; writing it is the doorbell
    CONFIG = 0x08
    STATUS = 0x0C
    GERROR = 0x10  #: the hardware's: a bit toggles when an error becomes active
    GERRORN = 0x14  #: the guest's: the same value acknowledges


class Cerror(IntEnum):
    """Why a queue stopped: CONS.ERR (VCMDQ_CONS_ERR)"""

    NONE = 0
    ILL = 1  #: an illegal command
    ABT = 2  #: the command cannot be fetched
    ATC_INV_SYNC = 3  #: an ATC invalidation has timed out


class Lvcmdq:
    """The registers of one logical VCMDQ in page 0, wherever that is mapped. Each access is one of 32 bits."""

    __slots__ = ("_base", "_page")

    def __init__(self, page0: memoryview, index: int) -> None:
        self._page = page0
        self._base = LVCMDQ_SIZE * index

    def read(self, register: Register) -> int:
        """Its value."""
        return int(_U32.unpack_from(self._page, self._base + register)[0])

    def write(self, register: Register, value: int) -> None:
        """Store a value; struct.error unless it has 32 bits."""
        _U32.pack_into(self._page, self._base + register, value)

    @property
    def error(self) -> int:
        """Why it stopped; NONE unless an error is active. One of Cerror."""
        if not (self.read(Register.GERROR) ^ self.read(Register.GERRORN)) & VCMDQ_GERROR_ERR:
            return Cerror.NONE
        return self.read(Register.CONS) >> _CONS_ERR_SHIFT & 0x7F

    def acknowledge(self) -> None:
        """Let it go on, from the command that it stopped at."""
        self.write(Register.GERRORN, self.read(Register.GERROR))


def cons(index: int, error: int = Cerror.NONE) -> int:
    """The CONS register."""
    return error << _CONS_ERR_SHIFT | index
