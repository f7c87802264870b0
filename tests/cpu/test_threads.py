"""Thread counts, several streams at once, and fork: in processes of their own."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_welford as mw
import pytest
from processes import compute, run
from reference import Array
from tolerance import assert_same_bits


@pytest.fixture(scope="module")
def by_one_thread(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Array]:
    return compute(tmp_path_factory.mktemp("one"), threads="1")


@pytest.mark.parametrize("threads", ["2", "3", "8"])
def test_results_do_not_depend_on_the_number_of_threads(
    threads: str, by_one_thread: dict[str, Array], tmp_path: Path
) -> None:
    """Not in one bit: what is split, and the order of sums, follow from the problem alone."""
    found = compute(tmp_path, threads=threads)
    assert found.keys() == by_one_thread.keys()
    for name, expected in by_one_thread.items():
        assert found[name].tobytes() == expected.tobytes(), name


COUNT = """
    import os
    import sys
    import threading
    import time
    import mlx.core as mx
    import mlx_welford as mw

    def count():
        return len(os.listdir("/proc/self/task"))

    x = mx.random.normal((16, 128, 128, 32))
    mx.eval(x)
    mx.eval(x + 1)
    before, most = count(), 0
    done = False

    def watch():
        global most
        while not done:
            most = max(most, count())
            time.sleep(0.0002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        mx.eval(mw.batch_norm(x)[0], mw.instance_norm(x))
    done = True
    watcher.join()
    print(most - before - 1)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in Linux's /proc")
@pytest.mark.parametrize("threads", ["1", "2", "4"])
def test_as_many_threads_as_allowed(threads: str) -> None:
    """Besides the thread of the stream, which works too: N - 1 more for so large an array."""
    assert int(run(COUNT, threads=threads)) == int(threads) - 1


needs_fork = pytest.mark.skipif(
    sys.platform == "darwin",
    reason="MLX for macOS allocates through Metal, which a forked process cannot use",
)

FORK = """
    import os
    import signal
    import sys
    import mlx.core as mx
    import mlx_welford as mw
    import numpy as np

    data = np.random.default_rng(0).normal(size=(8, 64, 64, 32)).astype(np.float32)
    proc = "/proc/self/task"

    def count():
        return len(os.listdir(proc)) if os.path.isdir(proc) else None  # Linux alone has it

    def compute():
        x = mx.array(data)
        y, _, _ = mw.batch_norm(x)
        gx = mx.grad(lambda x: (mw.instance_norm(x) ** 3).sum())(x)
        return np.array(y), np.array(gx)

    expected = compute()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs must not outlive the test
        # MLX's own threads do not survive a fork: the child needs a stream of its own.
        with mx.stream(mx.new_stream(mx.cpu)):
            mx.eval(mx.zeros(4) + 1)
            before = count()
            got = compute()
            after = count()
        if before is not None and after - before != int(sys.argv[1]) - 1:
            os._exit(4)  # it has no threads of its own, or too many
        os._exit(0 if all(np.array_equal(a, b) for a, b in zip(got, expected)) else 3)
    _, status = os.waitpid(child, 0)
    again = compute()
    assert all(np.array_equal(a, b) for a, b in zip(again, expected)), "the parent changed"
    sys.exit(os.waitstatus_to_exitcode(status) % 256)
"""


@needs_fork
@pytest.mark.parametrize("threads", ["1", "4"])
def test_a_forked_child_computes_the_same(threads: str) -> None:
    """With as many threads as its parent, whose pool it cannot use."""
    run(FORK, threads, threads=threads)


MULTIPROCESSING = """
    import multiprocessing
    import mlx.core as mx
    import mlx_welford as mw

    def work(seed):
        with mx.stream(mx.new_stream(mx.cpu)):
            x = mx.random.normal((4, 64, 64, 16), key=mx.random.key(seed))
            return float(mw.batch_norm(x)[0].square().mean().item())

    if __name__ == "__main__":
        mx.eval(mw.batch_norm(mx.random.normal((8, 64, 64, 32)))[0])
        with multiprocessing.get_context("fork").Pool(2) as pool:
            values = pool.map_async(work, range(6)).get(timeout=60)
        assert all(abs(v - 1) < 1e-3 for v in values), values
"""


@needs_fork
def test_a_pool_of_forked_workers() -> None:
    """What a data loader does after the parent has trained for a while."""
    run(MULTIPROCESSING, threads="2")


def test_several_streams_at_once() -> None:
    """Independent work on four streams of one thread, evaluated together."""
    inputs = [mx.random.normal((4, 4099, 33)) * (i + 1) for i in range(4)]
    mx.eval(inputs)
    expected = [(mw.batch_norm(x)[0], mw.instance_norm(x)) for x in inputs]
    mx.eval(expected)
    for _ in range(5):
        results = []
        for x in inputs:
            with mx.stream(mx.new_stream(mx.default_device())):
                results.append((mw.batch_norm(x)[0], mw.instance_norm(x)))
        mx.eval(results)
        for got, want in zip(results, expected, strict=True):
            assert_same_bits(got[0], want[0], "batch_norm")
            assert_same_bits(got[1], want[1], "instance_norm")


CALLS: dict[str, Callable[[mx.array, mx.Stream], list[mx.array]]] = {
    "instance_norm": lambda x, s: [mw.instance_norm(x, stream=s)],
    "batch_norm": lambda x, s: list(mw.batch_norm(x, stream=s)),
    "batch_norm-strided": lambda x, s: [mw.batch_norm(x, axis=1, stream=s)[0]],
    "moments": lambda x, s: list(mw.moments(x, (0, 1), stream=s)),
    "moments-strided": lambda x, s: list(mw.moments(x, (0, 2), stream=s)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_given_stream_is_used(name: str) -> None:
    """A new stream gives the same; another thread's stream, which MLX refuses, is refused."""
    x = mx.random.uniform(1.0, 2.0, (4, 33, 7))
    expected = CALLS[name](x, mx.default_stream(mx.default_device()))
    got = CALLS[name](x, mx.new_stream(mx.default_device()))
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)

    streams: list[mx.Stream] = []
    thread = threading.Thread(target=lambda: streams.append(mx.new_stream(mx.default_device())))
    thread.start()
    thread.join()
    with pytest.raises(RuntimeError, match="no Stream"):
        mx.eval(CALLS[name](x, streams[0]))


def test_several_python_threads_at_once() -> None:
    """Each with a stream of its own, all of them computing values and gradients."""
    inputs = [mx.random.normal((4, 4099, 33)) * (i + 1) for i in range(4)]
    mx.eval(inputs)

    def compute(x: mx.array) -> list[mx.array]:
        y, mean, var = mw.batch_norm(x)
        gx = mx.grad(lambda x: (mw.instance_norm(x) ** 3).sum())(x)
        mx.eval(y, mean, var, gx)
        return [y, mean, var, gx]

    expected = [compute(x) for x in inputs]
    results: list[list[mx.array]] = [[] for _ in inputs]
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            with mx.stream(mx.new_stream(mx.default_device())):
                for _ in range(5):
                    results[i] = compute(inputs[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    for got, want in zip(results, expected, strict=True):
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b)
