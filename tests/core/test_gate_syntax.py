"""Acquisitions are made in a few functions, and those go through the fault gate: the syntax tree says so.

A new call site fails here until it is listed, so that somebody asks whether the sweep can reach it.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import iommufdd

CORE = Path(iommufdd.__file__).parent
GATED = "gated"  # the function passes a gate itself
CALLER = "the caller's gate"  # a function that has passed one calls it for that

# What is called, as its last two names: where, and what goes through the gate.
SITES: dict[str, dict[str, str]] = {
    "memory.read": {
        "context.Context._ioctl": GATED,
        "user.Caller.copy_from_user": GATED,
        "user_data.copy_struct_from_user": "check_zeroed_user() of the tail; the struct itself is gated",
    },
    "memory.write": {"user.Caller.copy_to_user": GATED},
    "mm.read": {"pages.UserPages._rw_current": "copy_from_user() in iopt_pages_rw_access() has no fail point"},
    "mm.write": {"pages.UserPages._rw_current": "copy_to_user() in iopt_pages_rw_access() has no fail point"},
    "mm.resolve": {"user.Caller.get_user_pages": GATED, "pages.UserPages.resolve": CALLER},
    "self.resolve": {
        "pages.Pages._pin": GATED,
        "pages.Pages._rw_slow": GATED,
        "pages.UserPages._rw_page": GATED,
        "user.Mm.faultin": "a fault of KVM's, which is in no call that could fail",
    },
    "files.get_unused_fd": {"user.Caller.get_unused_fd": GATED},
    "objects.alloc": {
        "ucmd.Ucmd.alloc": "ObjectTable.alloc() passes it",
        "selftest_access.SelftestAccess.__init__": "ObjectTable.alloc() passes it",
        "device.bind": "ObjectTable.alloc() passes it",
        "hw_pagetable.finish_nested": "ObjectTable.alloc() passes it",
        "hw_pagetable.paging_alloc": "ObjectTable.alloc() passes it",
        "viommu.HwQueue.pin": "ObjectTable.alloc() passes it",
    },
    "heapq.heappop": {"objects.ObjectTable.alloc": GATED, "eventq.Fault._give": CALLER},
    "iommu.domain_alloc_paging": {"hw_pagetable.paging_alloc": GATED},
    "iommu.domain_alloc_nested": {"hw_pagetable._nested_alloc": "finish_nested() calls it behind its gate"},
    "driver.alloc_domain_nested": {"viommu.Viommu.hwpt_nested_alloc": "finish_nested() calls it behind its gate"},
    "alloc_domain": {"hw_pagetable.finish_nested": GATED},
    "self._alloc_nested": {"mock_viommu.MockViommu.alloc_domain_nested": CALLER},
    "iommu.viommu_init": {"viommu.viommu_alloc": "behind the gate of its object"},
    "core.alloc_mmap": {
        "mock_viommu.MockViommu._set_up_mmap": "Viommu.alloc_mmap() passes it",
        "tegra241_cmdqv.Vintf.__init__": "Viommu.alloc_mmap() passes it",
    },
    "mmaps.alloc": {"viommu.Viommu.alloc_mmap": GATED},
    "AttachHandle": {"attach._attach_hw": GATED, "attach._replace_hw": GATED},
    "Area": {"io_pagetable.IoPagetable._insert_areas": GATED, "io_pagetable.IoPagetable._split": GATED},
    "reserved.add": {"iova.IovaSpace.reserve": GATED},
    "EventqFile": {"eventq.open_eventq": GATED},
    "mock.new_device": {"selftest._new_mock": GATED},
    "run.file.get": {"pages.Pages._pin": GATED, "pages.Pages._unpin": "splits a run that is held already"},
    "charge": {"change_process._charge_current": CALLER, "pages.Pages.update_pinned": CALLER},
    "self.update_pinned": {"pages.Pages.fill": GATED, "pages.Pages.unfill": "gives back"},
    "pages.update_pinned": {"change_process.ioas_change_process": GATED},
    "dev.resv_regions": {"iova.IovaSpace.enforce_dev_resv_regions": GATED},
}


def functions() -> Iterator[tuple[str, ast.AST]]:
    """module.Class.function and its tree, for all of the core."""
    for path in sorted([*CORE.glob("*.py"), *(CORE / "iommu").glob("*.py")]):
        yield from _within(ast.parse(path.read_text()), path.stem)


def _within(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _within(child, f"{name}.{child.name}")
        elif isinstance(child, ast.FunctionDef):
            yield f"{name}.{child.name}", child
        else:
            yield from _within(child, name)


def calls(function: ast.AST) -> set[str]:
    """The dotted names that are called, those of nested functions too."""
    return {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}


FUNCTIONS = dict(functions())


@pytest.mark.parametrize("what", SITES)
def test_acquisitions_are_where_the_table_says(what: str) -> None:
    found = {
        name
        for name, function in FUNCTIONS.items()
        if any(called == what or called.endswith(f".{what}") for called in calls(function))
    }
    assert found == set(SITES[what])


def test_the_functions_called_gated_pass_a_gate() -> None:
    gated = {name for sites in SITES.values() for name, reason in sites.items() if reason == GATED}
    for name in gated:
        assert any(called.split(".")[-1] == "gate" for called in calls(FUNCTIONS[name])), name


def test_nobody_looks_an_id_up_past_the_gate() -> None:
    """`objects.get()` belongs to Ucmd; the others pass the gate themselves, or are no iommufd_get_object()."""
    found: dict[str, bool] = defaultdict(bool)
    for name, function in FUNCTIONS.items():
        called = calls(function)
        if any(call.endswith("objects.get") for call in called):
            found[name] = any(call.split(".")[-1] == "gate" for call in called)
    assert {name for name, passes in found.items() if passes} == {
        "ucmd.Ucmd.get",
        "ucmd.Ucmd.get_any",
        "attach._change_pt",
        "selftest_access.access_replace_ioas",
    }
    assert {name for name, passes in found.items() if not passes} == {"ioas._syz_conv_iova"}


def test_only_the_dispatcher_catches_everything() -> None:
    """Elsewhere an `except Exception` could swallow a gate, or a mistake of ours."""
    broad = [
        name
        for name, function in FUNCTIONS.items()
        for node in ast.walk(function)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException", "OSError"))
    ]
    assert broad == ["context.Context._ioctl"]
