"""Requests from an event loop to the thread of the steps and back: admission, slots that are waited for, clients that go away.

    answer(adapter, ids, sampling)
      ├─ more requests than `queue` are in the house           Busy: nothing is kept of it
      ├─ the adapter is not live: waits for a slot             AdapterError (unknown, damaged), SlotTimeout
      └─ runs among the others                                 pieces of text, then why it ended

Whoever stops listening (the generator is closed) ends the request, wherever it stands.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsify.errors import SparsifyError
from sparsify.serving.continuous import STEP_TOKENS, RoutedManager, ends_of
from sparsify.serving.sampling import Sampling
from sparsify.serving.text_stream import TextStream

if TYPE_CHECKING:
    from sparsify.serving.host import ServingHandle
    from sparsify.serving.store import Lease


START = 120.0
"""Seconds until keys and values have their place."""


class Busy(SparsifyError):
    """As many requests as may wait do; come back later."""


class Failed(SparsifyError):
    """A request that ran could not go on."""

    exit_code = 1


@dataclass(frozen=True)
class Piece:
    """Some text of an answer. tokens: how many are in it. end: "stop" or "length" in the last piece."""

    text: str
    tokens: int
    end: str | None = None


class Engine:
    """A serving host that answers many requests at once. Its methods are called from one event loop."""

    def __init__(
        self,
        host: Any,
        tokenizer: Any,
        *,
        running: int = 16,
        queue: int = 64,
        cache_tokens: int = 16384,
        step_tokens: int = STEP_TOKENS,
        longest: int | None = None,
        timeout: float = 60.0,
    ) -> None:
        """host: what `sparsify.serve` made. running: requests in one step; queue: in the house, waiting ones among them.

        cache_tokens: keys and values that are kept, of all requests together. longest: tokens of one prompt and its answer.
        timeout: seconds that a request waits for its adapter.
        """
        self.host, self.tokenizer, self.queue, self.timeout = host, tokenizer, queue, timeout
        self.handle: ServingHandle = host.sparsify
        self.manager = RoutedManager(host, running=running, cache_tokens=cache_tokens, step_tokens=step_tokens)
        positions = getattr(host.config.get_text_config(), "max_position_embeddings", None)
        limits = (cache_tokens, longest, positions)
        self.longest = min(each for each in limits if isinstance(each, int) and each > 0)
        looked_up = getattr(
            host.get_input_embeddings(), "weight", None
        )  # a tokenizer may know tokens that the model does not
        self.vocabulary = min(len(tokenizer), len(tokenizer) if looked_up is None else looked_up.shape[0])
        self.ends = frozenset(ends_of(host))
        self.inside = 0
        self.waiters = ThreadPoolExecutor(max_workers=queue, thread_name_prefix="sparsify-slot")
        self.stopping, self.ending = False, threading.Lock()

    def start(self) -> None:
        """Begin to make steps, if that was not done. Blocks until the first can be made. Raises SparsifyError where none can."""
        if self.manager.is_running():
            return
        self.manager.start()
        end = time.monotonic() + START
        while self.manager.batch_processor is None and self.alive and time.monotonic() < end:
            time.sleep(0.01)
        if self.manager.batch_processor is None or not self.alive:
            error = self.manager.background_thread_status.fatal_error
            raise SparsifyError(f"no step can be made: {error or 'it took too long to begin'}") from error

    def stop(self, grace: float | None = None) -> None:
        """Refuse what comes, let what runs end within `grace` seconds, and stop. Blocks."""
        self.stopping = True
        with self.ending:  # a second caller waits for the first
            self.manager.close(grace)
        self.handle.close()
        self.waiters.shutdown(wait=False, cancel_futures=True)

    @property
    def alive(self) -> bool:
        return self.manager.alive and not self.stopping

    async def answer(self, adapter: str, ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """The answer to a prompt, as it is written. The first step of the generator returns an empty piece once the request is admitted.

        Raises Busy, AdapterError (SlotTimeout among them) and Failed.
        """
        if not self.alive:
            raise Busy("the server is stopping" if self.stopping else "the server is broken: a step failed")
        if self.inside >= self.queue:
            raise Busy(f"{self.inside} requests are here already, which is as many as may wait; try again later")
        self.inside += 1
        request, ended = None, False
        try:
            lease = await self.lease(adapter)
            loop, told = asyncio.get_running_loop(), asyncio.Queue[int | None | Failed]()

            def tell(token: int | None) -> None:
                loop.call_soon_threadsafe(told.put_nowait, token)

            def fail(reason: str) -> None:
                loop.call_soon_threadsafe(told.put_nowait, Failed(reason))

            request = self.manager.submit(ids, sampling, lease, tell, fail)
            yield Piece("", 0)
            text, count, last = TextStream(self.tokenizer, sampling.stop), 0, -1
            while True:
                told_now = await told.get()
                if isinstance(told_now, Failed):
                    ended = True
                    raise Busy("the server is stopping") if self.stopping else told_now
                if told_now is None:
                    ended = True
                    break
                count, last = count + 1, told_now
                said = text.push([told_now])
                if text.stopped:
                    yield Piece(said, 1, "stop")
                    return
                yield Piece(said, 1)
            left = text.finish()
            ended_itself = count < sampling.tokens or (last in self.ends and not sampling.endless)
            yield Piece(left, 0, "stop" if text.stopped or ended_itself else "length")
        finally:
            self.inside -= 1
            if request is not None and not ended:
                self.manager.withdraw(request)

    async def lease(self, adapter: str) -> Lease:
        """The slot of an adapter, waited for outside of the event loop; given back if nobody waits any more when it comes."""
        found = self.handle.try_lease([adapter], polite=True)
        if found is not None:
            return found
        waiting = self.waiters.submit(self.handle.lease, [adapter], self.timeout, polite=True)
        found_later = asyncio.wrap_future(waiting)
        try:
            return await asyncio.shield(found_later)
        except asyncio.CancelledError:
            found_later.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody asks any more
            waiting.add_done_callback(give_back)
            raise


def give_back(waiting: Future[Lease]) -> None:
    if not waiting.cancelled() and waiting.exception() is None:
        waiting.result().close()


__all__ = ["Busy", "Engine", "Failed", "Piece"]
