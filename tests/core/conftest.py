"""Hypothesis: the same examples every time where CI is set, and no deadline on a machine that others use too."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "core", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("core")
