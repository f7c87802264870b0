"""Settings that every test shares."""

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite",
    deadline=None,  # the first example pays for thread start-up and page faults
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers whichever tests are selected."""
    mx.random.seed(0)
