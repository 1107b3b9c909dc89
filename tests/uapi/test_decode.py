"""Arguments as text: the kernel's words for values, what lies behind pointers, and an answer for any bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd_uapi import decode, iommufd, iommufd_test, names, vfio
from iommufd_uapi.layout import Layout

if TYPE_CHECKING:
    from iommufd_uapi.layout import Ioctl, VfioIoctl

COMMANDS = [
    *(struct.CMD for struct in iommufd.IOCTLS),
    *(struct.CMD for struct in (*vfio.CONTAINER_IOCTLS, *vfio.DEVICE_IOCTLS)),
    iommufd_test.TestCmd.CMD,
    *names.PLAIN,
    0x3BFF,
]
DATA = 0x5000


class Memory:
    """A `View` with some bytes at DATA, and one object."""

    def __init__(self, data: bytes = b"", kinds: dict[int, str] | None = None) -> None:
        self.data = data
        self.kinds = kinds or {}

    def kind(self, object_id: int) -> str:
        return self.kinds.get(object_id, "")

    def read(self, addr: int, length: int) -> bytes:
        at = addr - DATA
        return self.data[at : at + length] if 0 <= at < len(self.data) else b""


def passed(struct: Ioctl | VfioIoctl, view: Memory | None = None, *, device: bool = False) -> dict[str, str]:
    return decode.arguments(struct.CMD, 1, struct.pack(), view or Memory(), device=device)


@pytest.mark.parametrize(
    ("data_type", "data", "text"),
    [
        (
            iommufd.IOMMU_HWPT_DATA_VTD_S1,
            iommufd.HwptVtdS1(flags=5, pgtbl_addr=0x1000, addr_width=48),
            "{flags=IOMMU_VTD_S1_SRE|IOMMU_VTD_S1_WPE, pgtbl_addr=0x1000, addr_width=48}",
        ),
        (2, iommufd.HwptArmSmmuv3(ste=(11, 2)), "{ste={v config=S1_TRANS s1dss=SSID0}}"),
        (2, iommufd.HwptArmSmmuv3(ste=(1, 1 << 63)), "{ste=[0x1, 0x8000000000000000]}"),
        (iommufd.IOMMU_HWPT_DATA_AMD_GUEST, iommufd.HwptAmdGuest(dte=(1, 2, 3, 4)), "{dte=[0x1, 0x2, 0x3, 0x4]}"),
        (77, iommufd.IovaRange(1, 2), "01000000 00000000 02000000 00000000"),
    ],
)
def test_data_of_a_page_table(data_type: int, data: Layout, text: str) -> None:
    cmd = iommufd.HwptAlloc(data_type=data_type, data_len=data.SIZEOF, data_uptr=DATA)
    assert passed(cmd, Memory(data.pack()))["data"] == text
    assert passed(cmd) | {"data_uptr": "0x5000"} == passed(cmd), "memory that cannot be read is an address"


def test_data_that_is_too_short_is_bytes() -> None:
    cmd = iommufd.HwptAlloc(data_type=iommufd.IOMMU_HWPT_DATA_VTD_S1, data_len=4, data_uptr=DATA)
    assert passed(cmd, Memory(b"\1\2\3\4"))["data"] == "01020304"


def test_the_first_entries_of_an_invalidation() -> None:
    entry = iommufd.HwptVtdS1Invalidate(addr=0x1000, npages=4, flags=1)
    cmd = iommufd.HwptInvalidate(hwpt_id=4, data_uptr=DATA, entry_len=32, entry_num=900)
    found = passed(cmd, Memory(entry.pack().ljust(32, b"\0") * 900, {4: "hwpt_nested"}))
    one = "{addr=0x1000, npages=4, flags=IOMMU_VTD_INV_FLAGS_LEAF}"
    assert found["data"] == f"[{one}, {one}, {one}, {one}, ...]"
    assert (found["hwpt_id"], found["data_type"]) == ("hwpt_nested:4", "IOMMU_HWPT_INVALIDATE_DATA_VTD_S1")


def test_an_invalidation_of_a_viommu() -> None:
    entry = iommufd.ViommuArmSmmuv3Invalidate(cmd=(0x11, 0x22))
    cmd = iommufd.HwptInvalidate(hwpt_id=4, data_uptr=DATA, data_type=1, entry_len=16, entry_num=1)
    assert passed(cmd, Memory(entry.pack(), {4: "viommu"}))["data"] == "[{cmd=[0x11, 0x22]}]"


@pytest.mark.parametrize(
    ("data_type", "info", "text"),
    [
        (1, iommufd.HwInfoVtd(flags=1, cap_reg=5), "{flags=IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17, cap_reg=0x5, "),
        (2, iommufd.HwInfoArmSmmuv3(idr=(1, 2, 3, 4, 5, 6)), "{flags=0, idr=[0x1, 0x2, 0x3, 0x4, 0x5, 0x6], iidr=0x0"),
        (3, iommufd.HwInfoTegra241Cmdqv(version=1, log2vcmdqs=2), "{flags=0, version=1, log2vcmdqs=2, log2vsids=0}"),
        (4, iommufd.HwInfoAmd(efr=0x10, efr2=0x20), "{efr=0x10, efr2=0x20}"),
    ],
)
def test_what_the_hardware_says_of_itself(data_type: int, info: Layout, text: str) -> None:
    asked = iommufd.HwInfo(data_len=info.SIZEOF, data_uptr=DATA)
    answer = iommufd.HwInfo(data_len=info.SIZEOF, data_uptr=DATA, data_type=data_type)
    back = decode.written(asked.CMD, asked.pack(), answer.pack(), Memory(info.pack()), ok=True)
    assert back["data"].startswith(text)
    assert back["data_type"] == names.NAMES[iommufd.HwInfo, "data_type"].known[data_type]


def test_size_and_reserved_fields_only_when_they_are_unusual() -> None:
    assert passed(iommufd.Destroy(id=3)) == {"id": "3"}
    assert passed(iommufd.Destroy(size=16, id=3)) == {"size": "16", "id": "3"}
    assert passed(iommufd.Destroy(size=4, id=3)) == {"size": "4", "id": "0"}, "what the size leaves out is 0"
    assert passed(iommufd.HwInfo(reserved=b"\0\1\0"))["reserved"] == "000100"
    assert "reserved" not in passed(iommufd.HwInfo())


def test_bits_and_values_without_a_name() -> None:
    found = passed(iommufd.IoasMap(flags=0x84, ioas_id=9))
    assert (found["flags"], found["ioas_id"]) == ("IOMMU_IOAS_MAP_READABLE|0x80", "9")
    assert passed(iommufd.Option(option_id=7, op=1)) | {"option_id": "7", "op": "IOMMU_OPTION_OP_GET"} == passed(
        iommufd.Option(option_id=7, op=1)
    )


def test_numbers_that_a_container_and_a_device_share() -> None:
    number = vfio.VFIO_DEVICE_FEATURE
    assert number == vfio.VFIO_IOMMU_DIRTY_PAGES
    assert decode.name_of(number, b"") == "VFIO_IOMMU_DIRTY_PAGES"
    assert decode.name_of(number, b"", device=True) == "VFIO_DEVICE_FEATURE"
    bind = passed(vfio.VfioDeviceBindIommufd(iommufd=7), device=True)
    assert bind == {"flags": "0", "iommufd": "7", "token_uuid_ptr": "0x0"}
    attach = vfio.VfioDeviceAttachIommufdPt(flags=1, pt_id=4, pasid=9)
    found = passed(attach, Memory(kinds={4: "ioas"}), device=True)
    assert found == {"flags": "VFIO_DEVICE_ATTACH_PASID", "pt_id": "ioas:4", "pasid": "9"}


def test_records_of_a_veventq() -> None:
    data = iommufd.IommufdVeventHeader(sequence=3).pack() + iommufd.VeventArmSmmuv3(evt=(1, 2, 3, 4)).pack()
    found = decode.records("veventq", iommufd.IOMMU_VEVENTQ_TYPE_ARM_SMMUV3, data, Memory(), write=False)
    assert found == ["{flags=0, sequence=3} {evt=[0x1, 0x2, 0x3, 0x4]}"]
    data = iommufd.VeventArmSmmuv3(evt=(0x100 << 32 | 0x10, 1 << 35, 0x1000, 0)).pack()
    header = iommufd.IommufdVeventHeader(sequence=4).pack()
    found = decode.records("veventq", iommufd.IOMMU_VEVENTQ_TYPE_ARM_SMMUV3, header + data, Memory(), write=False)
    assert found == ["{flags=0, sequence=4} {evt={F_TRANSLATION sid=0x100 rnw addr=0x1000}}"]
    (unknown,) = decode.records("veventq", 99, header + data, Memory(), write=False)
    assert unknown.startswith("{flags=0, sequence=4} 10000000 00010000")


def test_many_records_are_a_few() -> None:
    data = iommufd.HwptPageResponse(cookie=1, code=1).pack() * 20
    found = decode.records("fault", 0, data, Memory(), write=True)
    assert found == ["{cookie=1, code=IOMMUFD_PAGE_RESP_INVALID}"] * 4 + ["..."]


# ---- any bytes ---------------------------------------------------------------------------------------------

BYTES = st.binary(max_size=96)
SIZED = st.builds(lambda size, data: size.to_bytes(4, "little") + data, st.integers(0, 96), st.binary(max_size=92))
VIEWS: st.SearchStrategy[Any] = st.builds(
    Memory, st.binary(max_size=300), st.dictionaries(st.integers(0, 5), st.sampled_from(["ioas", "viommu"]))
)
POINTED = st.builds(
    lambda data, at: data[:at] + DATA.to_bytes(8, "little") + data[at + 8 :],
    SIZED,
    st.sampled_from([8, 16, 24, 32, 40]),
)


@given(
    st.sampled_from(COMMANDS), st.integers(0, 2**64 - 1), BYTES | SIZED | POINTED, BYTES | SIZED, VIEWS, st.booleans()
)
def test_any_bytes_have_an_answer(
    cmd: int, arg: int, before: bytes, after: bytes, view: Memory, device: bool
) -> None:
    assert decode.name_of(cmd, before, device=device)
    fields = decode.arguments(cmd, arg, before, view, device=device)
    for ok in (True, False):
        fields |= decode.written(cmd, before, after, view, ok=ok, device=device)
    assert all(text and text.isprintable() for text in fields.values())
    assert sum(map(len, fields.values())) < 4000


@given(st.sampled_from(["fault", "veventq"]), st.integers(0, 3), st.binary(max_size=300), st.booleans(), VIEWS)
def test_any_records_have_an_answer(kind: str, event_type: int, data: bytes, write: bool, view: Memory) -> None:
    assert len(decode.records(kind, event_type, data, view, write=write)) <= 5


def test_every_name_is_of_a_field_that_exists() -> None:
    for struct, field in names.NAMES:
        assert field in struct.MEMBERS
    layouts = [struct for struct in _layouts(Layout) if struct.MEMBERS]
    fields = {name for struct in layouts for name in struct.MEMBERS}
    assert fields >= names.IDS
    assert fields >= names.HEX
    assert fields >= names.PADS


def _layouts(base: type[Layout]) -> list[type[Layout]]:
    return [base, *(found for sub in base.__subclasses__() for found in _layouts(sub))]
