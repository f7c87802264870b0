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
    "a buffer that is too small": "out of bounds",
    "no barrier": "a hazard: buffer 0 'in' of g reads what buffer 0 'out' of f writes",
}
IN_REPORTS = {
    "a buffer released too early": "is released while a command buffer uses it",
    "a dispatch after the end": "a dispatch after the encoding has ended",
    "a handler after the commit": "a completion handler is added after",
    "a second commit": "commit after the command buffer was committed",
    "a second encoder": "while an encoder of the command buffer has not ended",
    "an encoder that does not end": "is released before its encoding ends",
    "a pool drained out of order": "is drained out of order",
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


@pytest.mark.parametrize("what", IN_REPORTS)
def test_it_is_reported(what: str) -> None:
    macos_host.misuse(what)
    assert any(IN_REPORTS[what] in report for report in macos_host.reports())


@pytest.mark.parametrize("what", FATAL)
def test_the_process_ends(what: str) -> None:
    done = run(f"import macos_host; macos_host.misuse({what!r})")
    assert done.returncode == 86
    assert FATAL[what] in done.stderr
