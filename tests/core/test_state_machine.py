"""Every ioctl in any order, with right and wrong arguments, two contexts, forks, and acquisitions that fail."""

from hypothesis import settings

from .machine_devices import DeviceRules
from .machine_ioas import IoasRules


class Everything(IoasRules, DeviceRules):
    pass


TestEverything = Everything.TestCase
TestEverything.settings = settings(max_examples=120, stateful_step_count=60)
