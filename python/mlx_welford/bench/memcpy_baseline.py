"""The memcpy baseline: a plain copy between warm buffers, with the threads of the others."""

from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

LEAST_SHARE = 2**20
"""Bytes for each thread: fewer are not worth waking it, which takes some 20 microseconds."""

PAGE = 4096


class ThreadedCopy:
    """Copies `size` bytes, each thread a contiguous share of whole pages.

    Both buffers are written before the first run. NumPy releases the GIL during the copy, which is
    one call of memmove for each share.
    """

    def __init__(self, size: int, threads: int) -> None:
        self.source = np.full(size, 1, np.uint8)
        self.target = np.zeros_like(self.source)
        self.target.fill(255)
        count = max(1, min(threads, size // LEAST_SHARE))
        share = -(-size // count // PAGE) * PAGE if count > 1 else size
        starts = range(0, size, max(share, 1))
        self.shares = [slice(start, min(start + share, size)) for start in starts]
        self._helpers = ThreadPoolExecutor(max(1, len(self.shares) - 1))

    def run(self) -> None:
        own, *others = self.shares
        copies = [self._helpers.submit(self._copy, share) for share in others]
        self._copy(own)
        wait(copies)
        for copy in copies:
            copy.result()

    def _copy(self, share: slice) -> None:
        np.copyto(self.target[share], self.source[share])

    def close(self) -> None:
        self._helpers.shutdown()
