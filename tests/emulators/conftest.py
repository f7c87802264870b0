"""Fixtures of the tests of the simulator."""

import pytest


@pytest.fixture
def own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests say about seeds and denormals holds whatever the suite runs under."""
    for name in ("SEED", "FTZ", "LOG"):
        monkeypatch.delenv(f"MLX_WELFORD_SIM_{name}", raising=False)
