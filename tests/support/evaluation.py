"""Evaluations that fail."""

import threading
from collections.abc import Callable

import mlx.core as mx
import pytest


def error_of(compute: Callable[[], object]) -> str:
    """The text of the RuntimeError with which the evaluation of `compute()` ends.

    Both happen on a thread of its own; what `compute` uses has to be evaluated before. In the main
    thread MLX can raise the error while it still queues work, just after it counted a task that it
    then never queues. Such a task stays active for ever, and with a memory limit the next
    evaluation waits for its end (MLX 0.32.4, CommandEncoder::dispatch, Scheduler::wait_for_one).
    """
    texts: list[str] = []

    def work() -> None:
        with mx.stream(mx.new_stream(mx.default_device())), pytest.raises(RuntimeError) as error:
            mx.eval(compute())
        texts.append(str(error.value))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    assert texts, "the evaluation did not fail, or did not end"
    return texts[0]
