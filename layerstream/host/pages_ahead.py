"""Page mappings whose pages are there by the time they are needed: another thread touches the next one meanwhile.

Touching new pages is most of what packing a model, and unpacking it, takes (5.5 GB/s with four threads). It asks the
driver for nothing, so it may run beside copies.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from layerstream.host.memory import PageMapping, touch

_MOST_SLACK = 0.05  # of a mapping that is larger than was asked for


class PagesAhead:
    """Gives page mappings, and prepares one ahead."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[PageMapping]] | None = None

    def prepare(self, num_bytes: int) -> None:
        """A mapping of about so many bytes is asked for next."""
        if self._next is None and num_bytes:
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="layerstream-pages")
            self._next = num_bytes, self._pool.submit(_touched, num_bytes)

    def take(self, num_bytes: int, *, may_be_larger: bool = False) -> PageMapping:
        """A mapping of `num_bytes`, with its pages there.

        Args:
            may_be_larger: by a little, since a mapping was prepared for about as much.
        """
        ready, self._next = self._next, None
        if ready is not None:
            size, future = ready
            pages = future.result()
            if num_bytes <= size <= (1 + may_be_larger * _MOST_SLACK) * num_bytes:
                return pages
        return _touched(num_bytes)

    def close(self) -> None:
        """Nothing more is asked for. No thread is left."""
        self._next = None
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()


def _touched(num_bytes: int) -> PageMapping:
    pages = PageMapping(num_bytes)
    touch([pages.range], is_new=True)
    return pages
