"""For pytest in the emulated CPython: a test fails if the stand-ins recorded a mistake in it."""

from collections.abc import Iterator

import macos_host  # type: ignore[import-not-found]
import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    macos_host.reports()
    try:
        yield
    finally:
        found = macos_host.reports()
        if found:
            pytest.fail("\n".join(found), pytrace=False)
