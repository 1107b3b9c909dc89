"""What all tests share: Hypothesis must not judge a loaded machine, and does the same thing every time in CI."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "iommufdd",
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("iommufdd")
