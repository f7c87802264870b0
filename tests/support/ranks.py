"""Processes of a group on this machine: MLX's ring over loopback, and what became of each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
TIMEOUT = 90  # seconds until all ranks are ended by force


class Ended(NamedTuple):
    """A rank's process: its status, negative for a signal, and all that it wrote."""

    status: int
    text: str


def run_ranks(
    ranks: int,
    script: Path,
    *arguments: str,
    directory: Path,
    timeout: float = TIMEOUT,
    **variables: str,
) -> list[Ended]:
    """Runs a script as every rank of a group, and waits for all of them.

    MLX's default device is the CPU. One rank is a process without a group. Ports are free when they
    are chosen; should one be taken by the time a rank listens, there are two more attempts.

    Raises:
        AssertionError: If one still runs after `timeout` seconds. All are ended, and what they
            wrote is in the message.
    """
    for _ in range(3):
        ended = _run_ranks_once(ranks, script, arguments, directory, timeout, variables)
        if not any("Couldn't bind socket" in rank.text for rank in ended):
            break
    return ended


def _run_ranks_once(
    ranks: int,
    script: Path,
    arguments: Sequence[str],
    directory: Path,
    timeout: float,
    variables: dict[str, str],
) -> list[Ended]:
    kept = "MLX_WELFORD_BACKEND"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLX_") or k == kept}
    environment |= {"PYTHONPATH": str(TESTS), "MLX_WELFORD_NUM_THREADS": "1", **variables}
    if ranks > 1:
        hosts = directory / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
        environment["MLX_HOSTFILE"] = str(hosts)
    processes: list[subprocess.Popen[bytes]] = []
    logs = [directory / f"rank{rank}.log" for rank in range(ranks)]
    to_read, to_write = os.pipe()  # closed by the system if this process is killed
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(TESTS / "on_cpu.py"), str(script), *arguments],
                        env=environment | {"MLX_RANK": str(rank)},
                        stdin=to_read,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # a process group of its own, to be ended whole
                    )
                )
        deadline = time.monotonic() + timeout
        late = []
        for rank, process in enumerate(processes):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.append(rank)
    finally:
        for process in processes:
            # PermissionError is what macOS says of a group of which nothing but a zombie is left.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(to_read)
        os.close(to_write)
    ended = [
        Ended(process.returncode, log.read_text(errors="replace"))
        for process, log in zip(processes, logs, strict=True)
    ]
    texts = "\n".join(f"-- rank {i}, status {e.status}\n{e.text}" for i, e in enumerate(ended))
    assert not late, f"ranks {late} still ran after {timeout} seconds.\n{texts}"
    return ended


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def assert_all_succeeded(ended: Sequence[Ended]) -> None:
    for rank, process in enumerate(ended):
        assert process.status == 0, f"rank {rank}: status {process.status}\n{process.text}"
