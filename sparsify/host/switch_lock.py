"""Many forwards or one switch: while a thread runs the model, no other thread exchanges the adapter under it.

    root forward, generate(), save_adapter …     reading: any number of threads at once
    set_adapter, merge, restore, set_masks …     writing: alone; new readers wait for a writer that waits

A reader sees the adapter before the switch or the one after it, never a mixture. A thread may take what it holds again, so a
`generate` counts as one reader from its first token to its last. A switch from inside the thread's own forward is an error: the rest
of that pass would compute with another adapter than its beginning.

`model.compile()` takes the lock around the compiled call (`Compile`). A graph that is being traced or exported takes none, so that it is
one graph: what `torch.compile(model)` returns, and calls that go round the root module (`model.model(x)`, `model.forward(x)`), are
guarded by whoever calls them, with `model.sparsify.reading()`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sparsify.errors import SparsifyError
from sparsify.host.live_state import OnHost

#: how often a waiting writer looks whether the readers are still inside of the model, in seconds
LOOK_AGAIN = 0.5


@dataclass
class Reader:
    """One thread that reads: how many blocks (`with`, always left) and how many forwards (hooks) it is in."""

    blocks: int = 0
    forwards: int = 0


class SwitchLock:
    """A readers–writer lock, re-entrant: a waiting writer goes before new readers, and the readers that waited for it before the
    next writer, so that neither starves. Copies and pickles are fresh locks.

    A forward that is left by KeyboardInterrupt runs no hook that would let go: writers look at the stacks of such readers.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.readers: dict[threading.Thread, Reader] = {}
        self.writer: threading.Thread | None = None
        self.depth = 0
        self.waiting = 0  # writers
        self.queued = 0  # readers
        self.owed = 0  # readers that waited for a writer that is gone, and go before the next one

    def __deepcopy__(self, memo: dict[int, object]) -> SwitchLock:
        return SwitchLock()

    def __reduce__(self) -> tuple[type[SwitchLock], tuple[()]]:
        return SwitchLock, ()

    def join_readers(self) -> Reader:
        """This thread's entry, after waiting for writers unless it reads or writes already. Call it with `changed` held."""
        me = threading.current_thread()
        if me not in self.readers and self.writer is not me and (self.writer is not None or self.waiting):
            self.queued += 1
            try:
                while self.writer is not None or (self.waiting and not self.owed):
                    self.changed.wait()
            finally:
                self.queued -= 1
                self.owed = max(0, min(self.owed - 1, self.queued))
                self.changed.notify_all()
        return self.readers.setdefault(me, Reader())

    def leave_if_done(self) -> None:
        me = threading.current_thread()
        reader = self.readers.get(me)
        if reader is not None and reader.blocks <= 0 and reader.forwards <= 0:
            del self.readers[me]
            self.changed.notify_all()

    def enter_forward(self) -> None:
        with self.changed:
            self.join_readers().forwards += 1

    def leave_forward(self) -> None:
        with self.changed:
            reader = self.readers.get(threading.current_thread())
            if reader is not None and reader.forwards:
                reader.forwards -= 1
            self.leave_if_done()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold off writers. What an interrupted forward inside of the block left behind goes, too."""
        with self.changed:
            reader = self.join_readers()
            before = reader.forwards
            reader.blocks += 1
        try:
            yield
        finally:
            with self.changed:
                reader.blocks -= 1
                reader.forwards = before
                self.leave_if_done()

    @contextmanager
    def writing(self, verb: str, host: nn.Module) -> Iterator[None]:
        """Be alone with the model. Raises SparsifyError inside of this thread's own forward."""
        me = threading.current_thread()
        with self.changed:
            if self.writer is not me:
                self.forget_left(host)
                if me in self.readers:
                    raise SparsifyError(
                        f"{verb}: this thread is inside of the model's own forward or generate(), and the rest of that pass would "
                        f"compute with other weights than its beginning; call {verb} before or after it"
                    )
                self.waiting += 1
                try:
                    while self.writer is not None or self.readers or self.owed:
                        if not self.changed.wait(LOOK_AGAIN):
                            self.forget_left(host)
                    self.writer = me
                finally:
                    self.waiting -= 1
                    self.changed.notify_all()
            self.depth += 1
        try:
            yield
        finally:
            with self.changed:
                self.depth -= 1
                if not self.depth:
                    self.writer, self.owed = None, self.queued
                    self.changed.notify_all()

    def forget_left(self, host: nn.Module) -> None:
        """Drop readers that are not in the model any more: interrupted, or their thread has ended."""
        frames = sys._current_frames()
        for thread, reader in list(self.readers.items()):
            frame = frames.get(thread.ident or 0)
            if not thread.is_alive() or (not reader.blocks and not inside(frame, host)):
                del self.readers[thread]


def inside(frame: FrameType | None, host: nn.Module) -> bool:
    """Whether a stack runs the host's forward."""
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is host:
            return True
        frame = frame.f_back
    return False


@dataclass
class EnterForward:
    """Root forward pre-hook. An object, so that it deep-copies with the host's lock."""

    lock: SwitchLock

    def __call__(self, _module: nn.Module, _args: object) -> None:
        if not torch.compiler.is_compiling():
            self.lock.enter_forward()


@dataclass
class LeaveForward:
    """Root forward hook, called also when the forward raises."""

    lock: SwitchLock

    def __call__(self, _module: nn.Module, _args: object, _output: object) -> None:
        if not torch.compiler.is_compiling():
            self.lock.leave_forward()


class Generate(OnHost):
    """`host.generate`: one reader for the whole call."""

    method = "generate"

    def __init__(self, host: nn.Module, lock: SwitchLock) -> None:
        super().__init__(host)
        self.lock = lock

    def __call__(self, *args: object, **kwargs: object) -> object:
        with self.lock.reading():
            return self.of_class(self.host, *args, **kwargs)


class Compile(OnHost):
    """`host.compile`: the compiled call is one reader, too, though its hooks are traced away."""

    method = "compile"

    def __init__(self, host: nn.Module, lock: SwitchLock) -> None:
        super().__init__(host)
        self.lock = lock

    def __call__(self, *args: object, **kwargs: object) -> None:
        self.of_class(self.host, *args, **kwargs)
        self.host._compiled_call_impl = CompiledCall(self.host._compiled_call_impl, self.lock)  # type: ignore[assignment]


@dataclass
class CompiledCall:
    """What `model.compile()` calls instead of the forward, under the lock."""

    call: Callable[..., object]
    lock: SwitchLock

    def __call__(self, *args: object, **kwargs: object) -> object:
        if torch.compiler.is_compiling():
            return self.call(*args, **kwargs)
        with self.lock.reading():
            return self.call(*args, **kwargs)


def guard(host: nn.Module) -> tuple[SwitchLock, list[RemovableHandle]]:
    """Let the host's forwards and `generate` take a lock; returns it and the handles of the hooks."""
    lock = SwitchLock()
    handles = [
        host.register_forward_pre_hook(EnterForward(lock), prepend=True),
        host.register_forward_hook(LeaveForward(lock), always_call=True),
    ]
    if callable(getattr(type(host), "generate", None)):
        host.__dict__["generate"] = Generate(host, lock)
    host.__dict__["compile"] = Compile(host, lock)
    return lock, handles
