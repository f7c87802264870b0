"""The stand-in for Metal finds what Apple's validation layers would: each of these, planted."""

import macos_host  # type: ignore[import-not-found]
import pytest

from macos_runtime.children import run

# What is done wrongly, and what is said of it.
IN_ERRORS = {
    "no pipeline": "a dispatch without a pipeline",
    "a binding before the pipeline": "an argument is bound before the pipeline is set",
    "a binding of the pipeline before": "nothing is bound to 0 'out'",
    "a missing argument": "nothing is bound to 1 'n'",
    "too many bytes": "setBytes of 4097 bytes",
    "an index too high": "there is no buffer 31",
    "an offset behind the end": "bound at an offset behind its end",
    "too many threads": "a threadgroup of 1056 x 1 x 1 threads",
    "too many positions": "2^32 threads or more",
    "no threadgroups": "a grid that is empty",
    "threadgroup memory of a part of 16 bytes": "24 bytes, which is no multiple of 16",
    "too much threadgroup memory": "more than 32 KB of threadgroup memory",
    "a function constant of another size": "function constant 1 'factor' has 4 bytes but got 8",
    "a buffer released before the dispatch": "buffer 0 was released before the dispatch",
    "a buffer that is too small": "out of bounds",
    "no barrier": "a hazard: buffer 0 'in' of g reads what buffer 0 'out' of f writes",
}
IN_REPORTS = {
    "a buffer released too early": "is released while a command buffer uses it",
    "a dispatch after the end": "a dispatch after the encoding has ended",
    "a handler after the commit": "a completion handler is added after",
    "a wait before the commit": "waits for a command buffer that was not committed",
    "commands that are never committed": "a command buffer with dispatches is never committed",
    "a second commit": "commit after the command buffer was committed",
    "a second encoder": "while an encoder of the command buffer has not ended",
    "an encoder that does not end": "is released before its encoding ends",
    "a pool drained out of order": "is drained out of order",
    "a pool that is not drained": "a thread ends with 1 autorelease pools that were not drained",
    "a function constant that is missing": "h needs the function constants added, factor",
    "a function constant of an unknown type": "a function constant of MTLDataType 4",
    "no pool": "autoreleased where there is no pool",
}
FATAL = {
    "a release too many": "is sent to a released object",
    "a message that nobody understands": "no method -[MTLDevice newSampler]",
}


def test_right_use_is_not_complained_of() -> None:
    assert macos_host.misuse("nothing") == ""
    assert macos_host.reports() == []


@pytest.mark.parametrize("what", IN_ERRORS)
def test_the_command_buffer_fails(what: str) -> None:
    assert IN_ERRORS[what] in macos_host.misuse(what)
    (report,) = macos_host.reports()
    assert IN_ERRORS[what] in report


def test_unordered_dispatches_run_in_another_order() -> None:
    """Otherwise g would read, after f has written."""
    macos_host.configure("order", "reversed")
    try:
        assert "buffer 0 'out' of f writes what buffer 0 'in' of g reads" in macos_host.misuse(
            "no barrier"
        )
    finally:
        macos_host.configure("order", "")
        macos_host.reports()


@pytest.mark.parametrize("what", IN_REPORTS)
def test_it_is_reported(what: str) -> None:
    macos_host.misuse(what)
    assert any(IN_REPORTS[what] in report for report in macos_host.reports())


def test_objects_that_are_not_released_are_counted() -> None:
    before = macos_host.alive()["MTLBuffer"]
    macos_host.misuse("nothing")
    assert macos_host.alive()["MTLBuffer"] == before
    macos_host.misuse("a retain too many")
    assert macos_host.alive()["MTLBuffer"] == before + 1


@pytest.mark.parametrize("what", FATAL)
def test_the_process_ends(what: str) -> None:
    done = run(f"import macos_host; macos_host.misuse({what!r})")
    assert done.returncode == 86
    assert FATAL[what] in done.stderr
