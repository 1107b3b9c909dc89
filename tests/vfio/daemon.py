"""`python -m tests.vfio.daemon`: iommufdd with the mock devices vfio0, vfio1, vfio2 in every machine.

vfio0 and vfio1 are one group.
"""

from __future__ import annotations

import sys

from iommufd_client.testing import Daemon
from iommufd_uapi.iommufd_test import MOCK_FLAGS_DEVICE_PASID
from iommufdd import cli, wiring
from iommufdd.description import MOCK, MachineDescription
from iommufdd.machine import Machine

GROUPED = ("vfio0", "vfio1")
_bare = wiring.new_machine


def machine_with_devices(name: str, description: MachineDescription = MOCK) -> Machine:
    """A machine whose devices are the selftest's."""
    machine = _bare(name, description)
    for device in (*GROUPED, "vfio2"):
        machine.devices[device] = machine.mock.new_device(MOCK_FLAGS_DEVICE_PASID)
        machine.devices[device].name = device
    first, second = (machine.devices[device] for device in GROUPED)
    second.group = first.group
    first.group.devices.append(second)
    return machine


class LabDaemon(Daemon):
    """This module as a private daemon."""

    def _command(self) -> list[str]:
        return ["tests.vfio.daemon" if word == "iommufdd.cli" else word for word in super()._command()]


if __name__ == "__main__":
    wiring.new_machine = machine_with_devices
    sys.exit(cli.main())
