"""The client's writer of LPAE tables, against walks of the daemon's hardware."""

from __future__ import annotations

import pytest

from iommufd_client import GuestMemory
from iommufd_client.lpae import LpaeTable
from iommufd_uapi.smmuv3 import Cd
from iommufdd.iommu import lpae
from iommufdd.iommu.walk import READ, WRITE, TranslationFault

SIZES = {4: 1 << 12, 16: 1 << 14, 64: 1 << 16}
BLOCKS = {4: 1 << 21, 16: 1 << 25, 64: 1 << 29}
IOVA = 0x7F12_3456_0000
POOL = 0x1_1000


def walked(table: LpaeTable, iova: int, access: int = READ) -> int:
    """Where a walk that begins at the CD ends."""
    cd = Cd.unpack(table.cd(asid=5).pack())
    assert not lpae.bad_stage1(cd, 48)
    rules = lpae.stage1(cd, 48)[0]
    leaf = lpae.walk(table.descriptor, None, lpae.root(cd.ttb0, rules), rules, iova, access, [])
    return leaf.out + iova - leaf.first


@pytest.mark.parametrize("granule", [4, 16, 64])
def test_a_table(granule: int) -> None:
    page, block = SIZES[granule], BLOCKS[granule]
    with GuestMemory(8 << 20) as ram:
        table = LpaeTable(ram, POOL, granule)
        assert (table.root % page, table.levels) == (0, 3 if granule == 64 else 4)
        iova = IOVA & -page
        table.map(iova, 5 * page)
        table.map(iova + page, 6 * page, writable=False)
        table.map((iova & -block) + block, 2 * block, level=2)
        assert walked(table, iova + 5, WRITE) == 5 * page + 5
        assert walked(table, iova + page) == 6 * page
        assert walked(table, (iova & -block) + block + 77) == 2 * block + 77
        with pytest.raises(TranslationFault):
            walked(table, iova + page, WRITE)
        table.map(1 << 47, page)
        assert walked(table, 1 << 47) == page
        table.unmap(iova)
        with pytest.raises(TranslationFault):
            walked(table, iova)
