"""A listing that a backend loads page by page, given out one object at a time. Holds one page and nothing to close."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator

from castore.storage.spi import ObjectInfo


class Pages:
    """The objects of one page after the other, until `next_page` gives an empty one."""

    def __init__(self, next_page: Callable[[], Awaitable[Iterable[ObjectInfo]]]) -> None:
        self._next_page = next_page
        self._page: Iterator[ObjectInfo] = iter(())

    def __aiter__(self) -> Pages:
        return self

    async def __anext__(self) -> ObjectInfo:
        for info in self._page:
            return info
        self._page = iter(await self._next_page())
        for info in self._page:
            return info
        raise StopAsyncIteration
