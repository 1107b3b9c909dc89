"""A machine made of its description: IOMMUs, devices, groups; and the selftest's mock besides."""

import os
import subprocess
import sys

import pytest

import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.context import Context
from iommufdd.description import MachineDescription
from iommufdd.device import bind, unbind
from iommufdd.errors import EPERM
from iommufdd.machine_file import MachineFile, built_in
from iommufdd.objects import Holder
from iommufdd.wiring import new_machine
from tests.core.world import World

MOCKS = """\
name = "mocks"
[[iommu]]
name = "m0"
model = "mock"
[[iommu]]
name = "m1"
model = "mock"
[[device]]
name = "a"
bdf = "00:00.0"
iommu = "m0"
group = 3
pasid-width = 20
[[device]]
name = "b"
bdf = "00:00.1"
iommu = "m0"
group = 3
[[device]]
name = "c"
bdf = "00:01.0"
iommu = "m1"
"""


@pytest.fixture
def mocks() -> MachineDescription:
    return MachineFile("mocks.toml", MOCKS).description()


def test_the_default_has_the_selftests_mock_alone() -> None:
    machine = new_machine("x")
    assert (machine.description.name, machine.iommus, machine.devices) == ("mock", {}, {})
    assert machine.mock.new_device(0).name == "iommufd_mock0"


def test_devices_and_groups(mocks: MachineDescription) -> None:
    machine = new_machine("", mocks)
    assert list(machine.iommus) == ["m0", "m1"]
    a, b, c = (machine.devices[name] for name in "abc")
    assert [dev.name for dev in (a, b, c)] == ["a", "b", "c"]
    assert [dev.iommu for dev in (a, b, c)] == [machine.iommus[name] for name in ("m0", "m0", "m1")]
    assert a.group is b.group is not c.group
    assert (a.group.devices, c.group.devices) == ([a, b], [c])
    assert a.group.blocking is machine.iommus["m0"].blocked_domain
    assert (a.max_pasids, b.max_pasids) == (1 << test_uapi.MOCK_PASID_WIDTH, 1)


def test_the_selftest_counts_its_own_devices(mocks: MachineDescription) -> None:
    machine = new_machine("", mocks)
    assert machine.mock not in machine.iommus.values()
    assert [machine.mock.new_device(0).name for _ in range(2)] == ["iommufd_mock0", "iommufd_mock1"]


def test_devices_of_a_group_have_one_owner(mocks: MachineDescription) -> None:
    machine = new_machine("", mocks)
    caller = World().process().caller
    first, second, driver = Context(machine), Context(machine), Holder()
    idev = bind(first, caller, machine.devices["a"], driver)
    with pytest.raises(EPERM):
        bind(second, caller, machine.devices["b"], driver)
    other = bind(second, caller, machine.devices["c"], driver)
    unbind(other, driver)
    unbind(idev, driver)
    unbind(bind(second, caller, machine.devices["b"], driver), driver)


def test_vtd() -> None:
    machine = new_machine("", built_in("vtd"))
    assert list(machine.iommus) == ["dmar0"]
    groups = {name: dev.group for name, dev in machine.devices.items()}
    assert groups["vfio2"] is groups["vfio3"]
    assert len({id(group) for group in groups.values()}) == 3
    for dev in machine.devices.values():
        assert dev in dev.group.devices
        assert dev.iommu is machine.iommus["dmar0"]


def test_instances_share_nothing() -> None:
    one, two = (new_machine("", built_in("vtd")) for _ in range(2))
    assert one.devices["vfio0"] is not two.devices["vfio0"]
    assert one.iommus["dmar0"] is not two.iommus["dmar0"]


def test_the_default_machine_costs_no_toml() -> None:
    script = """
import sys
import iommufdd.server.serve
from iommufdd.machine_file import Machines
from iommufdd.wiring import new_machine
new_machine("", Machines().describe())
print(sorted({"tomllib", "iommufdd.machine_rules", "iommufdd.iommu.vtd"} & set(sys.modules)))
"""
    path = os.pathsep.join(each or os.getcwd() for each in sys.path)
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "[]\n"
