"""A batcher for code that runs on an event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NoReturn, Self

from fastfsl.errors import ConfigError
from fastfsl.runtime.batcher import is_interruption

if TYPE_CHECKING:
    from types import TracebackType

    from fastfsl.images import ImageSource
    from fastfsl.runtime.batcher import Batcher
    from fastfsl.runtime.prediction import Prediction


class AsyncBatcher:
    """Awaits a batcher's answers; `Classifier.async_batcher` makes it. It is what `predict` calls itself.

    Nothing is decoded or computed on the event loop, and leaving the context does not block it.

    Args:
        batcher: is closed with this.
    """

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher

    async def predict(self, image: ImageSource, *, top_k: int | None = None) -> Prediction:
        """Classify one image; arguments and errors as for `Batcher.submit`.

        A task that is cancelled while it waits takes its request back, if its batch has not begun.
        """
        return await asyncio.wrap_future(self._batcher.submit(image, top_k=top_k))

    __call__ = predict

    @property
    def queue_depth(self) -> int:
        """Requests accepted and not yet answered."""
        return self._batcher.queue_depth

    async def close(self, *, cancel_pending: bool = False) -> None:
        """As `Batcher.close`, while the loop goes on. A task that is cancelled meanwhile cancels what is pending."""
        try:
            await asyncio.to_thread(self._batcher.close, cancel_pending=cancel_pending)
        except BaseException:
            self._batcher.close(cancel_pending=True, wait=False)
            raise

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ConfigError(
            "a batcher belongs to its process and can be neither pickled nor copied; send the Classifier, and make a "
            "batcher of it there"
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(cancel_pending=is_interruption(kind))
