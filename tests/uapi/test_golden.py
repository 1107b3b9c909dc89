"""The layouts against what a C compiler says about the headers of Linux 7.2 (uapi/golden)."""

import json
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from iommufd_uapi import iommufd, iommufd_test, vfio
from iommufd_uapi.layout import Ioctl, Layout, VfioIoctl

GOLDEN = json.loads((Path(__file__).parents[2] / "uapi/golden/linux-7.2.json").read_text())

#: All of vfio.h that has a layout; the rest of that header is none of iommufd's business.
VFIO_STRUCTS = {
    "vfio_info_cap_header",
    "vfio_device_info",
    "vfio_region_info",
    "vfio_region_sparse_mmap_area",
    "vfio_region_info_cap_sparse_mmap",
    "vfio_region_info_cap_type",
    "vfio_irq_info",
    "vfio_irq_set",
    "vfio_device_feature",
    "vfio_device_bind_iommufd",
    "vfio_device_attach_iommufd_pt",
    "vfio_device_detach_iommufd_pt",
    "vfio_iommu_type1_info",
    "vfio_iova_range",
    "vfio_iommu_type1_info_cap_iova_range",
    "vfio_iommu_type1_info_cap_migration",
    "vfio_iommu_type1_info_dma_avail",
    "vfio_iommu_type1_dma_map",
    "vfio_bitmap",
    "vfio_iommu_type1_dma_unmap",
    "vfio_iommu_type1_dirty_bitmap",
    "vfio_iommu_type1_dirty_bitmap_get",
}
VFIO_IOCTLS = {
    "VFIO_GET_API_VERSION",
    "VFIO_CHECK_EXTENSION",
    "VFIO_SET_IOMMU",
    "VFIO_DEVICE_GET_INFO",
    "VFIO_DEVICE_GET_REGION_INFO",
    "VFIO_DEVICE_GET_IRQ_INFO",
    "VFIO_DEVICE_SET_IRQS",
    "VFIO_DEVICE_RESET",
    "VFIO_DEVICE_FEATURE",
    "VFIO_DEVICE_BIND_IOMMUFD",
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT",
    "VFIO_DEVICE_DETACH_IOMMUFD_PT",
    "VFIO_IOMMU_GET_INFO",
    "VFIO_IOMMU_MAP_DMA",
    "VFIO_IOMMU_UNMAP_DMA",
    "VFIO_IOMMU_ENABLE",
    "VFIO_IOMMU_DISABLE",
    "VFIO_IOMMU_DIRTY_PAGES",
}
HEADERS = {"iommufd": iommufd, "iommufd_test": iommufd_test, "vfio": vfio}


def layouts(module: ModuleType) -> dict[str, type[Layout]]:
    found = [cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, Layout)]
    return {cls.C_NAME: cls for cls in found if cls.__module__ == module.__name__ and cls.MEMBERS}


def numbers(module: ModuleType) -> dict[str, int]:
    """Constants with the name of a C constant."""
    return {name: value for name, value in vars(module).items() if type(value) is int and name[0] in "IMV_"}


def fields(name: str) -> dict[str, list[int]]:
    """A golden struct's fields under our names, those of the two unions as one."""
    found: dict[str, Any] = GOLDEN[header_of(name)]["structs"][name]["fields"]
    ours = {"in_data_type": "data_type", "out_data_type": "data_type"}
    return {
        ours.get(field, field).removeprefix("__"): place for field, place in found.items() if "." not in field
    }


def header_of(name: str) -> str:
    return next(header for header in HEADERS if name in GOLDEN[header]["structs"])


STRUCTS = [
    pytest.param(name, cls, id=name)
    for module in HEADERS.values()
    for name, cls in layouts(module).items()
    if "." not in name
]


def test_every_struct_has_a_layout_and_every_layout_a_struct() -> None:
    for header in ("iommufd", "iommufd_test"):
        declared = {name for name in layouts(HEADERS[header]) if "." not in name}
        assert declared == set(GOLDEN[header]["structs"])
    assert set(layouts(vfio)) == VFIO_STRUCTS
    assert set(GOLDEN["vfio"]["structs"]) >= VFIO_STRUCTS


@pytest.mark.parametrize(("name", "cls"), STRUCTS)
def test_struct(name: str, cls: type[Layout]) -> None:
    golden = fields(name)
    tail = cls.TAIL.name if cls.TAIL else None
    if name == "iommu_test_cmd":  # the union
        golden["u"] = [16, 48]
    if flexible := golden.pop(tail, None) if tail else None:  # a C flexible array
        assert flexible == [cls.SIZEOF, 0]
    assert GOLDEN[header_of(name)]["structs"][name]["size"] == cls.SIZEOF
    assert {field: [cls.offsetof(field), cls.sizeof(field)] for field in cls.MEMBERS} == golden
    assert cls.__doc__ is not None
    assert cls.__doc__.splitlines()[0] == f"struct {name}"


def test_union_of_test_cmd() -> None:
    golden: dict[str, dict[str, list[int]]] = {}
    for name, place in GOLDEN["iommufd_test"]["structs"]["iommu_test_cmd"]["fields"].items():
        union, dot, field = name.partition(".")
        if dot:
            golden.setdefault(f"iommu_test_cmd.{union}", {})[field] = place
    start = iommufd_test.TestCmd.offsetof("u")
    unions = {name: cls for name, cls in layouts(iommufd_test).items() if "." in name}
    ours = {
        name: {field: [start + cls.offsetof(field), cls.sizeof(field)] for field in cls.MEMBERS}
        for name, cls in unions.items()
    }
    assert ours == golden
    assert {op.union for op in iommufd_test.TEST_OPS.values()} == set(unions.values())


def test_every_operation_of_test_cmd() -> None:
    golden = GOLDEN["iommufd_test"]["constants"]
    ours = {op.name: number for number, op in iommufd_test.TEST_OPS.items()}
    assert ours == {name: value for name, value in golden.items() if name.startswith("IOMMU_TEST_OP_")}


def test_ioctls() -> None:
    ours = {cls.MACRO: cls.CMD for cls in iommufd.IOCTLS}
    assert ours == GOLDEN["iommufd"]["ioctls"]
    test_cmd = {iommufd_test.TestCmd.MACRO: iommufd_test.TestCmd.CMD}
    assert test_cmd == GOLDEN["iommufd_test"]["ioctls"]
    assert sorted(iommufd.IOCTLS, key=lambda cls: cls.NR) == list(iommufd.IOCTLS)
    with_struct = {cls.MACRO: cls.CMD for cls in vfio.DEVICE_IOCTLS + vfio.CONTAINER_IOCTLS}
    golden = {name: value for name, value in GOLDEN["vfio"]["ioctls"].items() if name in VFIO_IOCTLS}
    assert set(golden) == VFIO_IOCTLS
    assert {name: vars(vfio)[name] for name in golden} == golden
    assert with_struct.items() <= golden.items()


def test_every_ioctl_struct_is_in_a_table() -> None:
    tables = {*iommufd.IOCTLS, iommufd_test.TestCmd, *vfio.DEVICE_IOCTLS, *vfio.CONTAINER_IOCTLS}
    for module in HEADERS.values():
        for cls in layouts(module).values():
            assert issubclass(cls, Ioctl | VfioIoctl) == (cls in tables)


@pytest.mark.parametrize("header", ["iommufd", "iommufd_test"])
def test_constants(header: str) -> None:
    golden = GOLDEN[header]["constants"] | GOLDEN[header]["ioctls"]
    imported = {"IOMMUFD_CMD_BASE"} if header == "iommufd_test" else set()
    ours = {name: value for name, value in numbers(HEADERS[header]).items() if name not in imported}
    assert ours == golden


def test_vfio_constants() -> None:
    golden = GOLDEN["vfio"]["constants"] | GOLDEN["vfio"]["ioctls"]
    ours = {name: value for name, value in numbers(vfio).items() if name != "IOC_TYPE"}
    assert {name: golden.get(name) for name in ours} == ours


def test_enums() -> None:
    ours = {
        (cls.__doc__ or "").removeprefix("enum "): cls
        for cls in vars(iommufd).values()
        if isinstance(cls, type) and issubclass(cls, Enum) and cls.__module__ == iommufd.__name__
    }
    golden = GOLDEN["iommufd"]["enums"]
    assert {name: list(cls.__members__) for name, cls in ours.items()} == golden
    for name, cls in ours.items():
        assert cls.__name__ == "".join(word.capitalize() for word in name.split("_"))
        values = {member: value.value for member, value in cls.__members__.items()}
        assert values.items() <= GOLDEN["iommufd"]["constants"].items()


#: IOCTL_OP() and its last field, drivers/iommu/iommufd/main.c
LAST = {
    "IOMMU_DESTROY": "id",
    "IOMMU_FAULT_QUEUE_ALLOC": "out_fault_fd",
    "IOMMU_GET_HW_INFO": "__reserved",
    "IOMMU_HW_QUEUE_ALLOC": "length",
    "IOMMU_HWPT_ALLOC": "__reserved",
    "IOMMU_HWPT_GET_DIRTY_BITMAP": "data",
    "IOMMU_HWPT_INVALIDATE": "__reserved",
    "IOMMU_HWPT_SET_DIRTY_TRACKING": "__reserved",
    "IOMMU_IOAS_ALLOC": "out_ioas_id",
    "IOMMU_IOAS_ALLOW_IOVAS": "allowed_iovas",
    "IOMMU_IOAS_CHANGE_PROCESS": "__reserved",
    "IOMMU_IOAS_COPY": "src_iova",
    "IOMMU_IOAS_IOVA_RANGES": "out_iova_alignment",
    "IOMMU_IOAS_MAP": "iova",
    "IOMMU_IOAS_MAP_FILE": "iova",
    "IOMMU_IOAS_UNMAP": "length",
    "IOMMU_OPTION": "val64",
    "IOMMU_VDEVICE_ALLOC": "virt_id",
    "IOMMU_VEVENTQ_ALLOC": "out_veventq_fd",
    "IOMMU_VFIO_IOAS": "__reserved",
    "IOMMU_VIOMMU_ALLOC": "out_viommu_id",
    "IOMMU_TEST_CMD": "last",
}


def test_minimum_sizes() -> None:
    ours: dict[str, type[Ioctl]] = {cls.MACRO: cls for cls in iommufd.IOCTLS}
    ours["IOMMU_TEST_CMD"] = iommufd_test.TestCmd
    assert set(ours) == set(LAST)
    for macro, last in LAST.items():
        header = "iommufd_test" if macro == "IOMMU_TEST_CMD" else "iommufd"
        offset, size = GOLDEN[header]["structs"][ours[macro].C_NAME]["fields"][last]
        assert offset + size == ours[macro].MIN_SIZE
