"""A daemon whose machines come with a stale translation used already; in machine "ended" the device has left."""

from __future__ import annotations

import sys

from iommufdd import wiring
from iommufdd.cli import main
from iommufdd.description import MOCK, MachineDescription
from iommufdd.machine import Machine
from tests.iommu.vmm import forgetful

new_machine = wiring.new_machine


def seeded(name: str, description: MachineDescription = MOCK) -> Machine:
    machine = new_machine(name, description)
    vmm = forgetful()
    machine.iommus["dmar0"] = vmm.lab.iommu
    machine.sanitizer = vmm.sanitizer
    if name == "ended":
        vmm.end()
    return machine


if __name__ == "__main__":
    wiring.new_machine = seeded
    sys.exit(main())
