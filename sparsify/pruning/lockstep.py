"""Many forwards in lockstep: each calibration batch's forward stops at the next unit and waits for the driver.

    batch 0  embeddings ─▶ ‖block 0‖ ─▶ ‖block 1‖ …        every forward is one Python thread of its own, exactly one of
    batch 1  embeddings ─▶ ‖block 0‖ ─▶ ‖block 1‖ …        which (or the driver) runs at any time
                             │ (args, kwargs) of all batches: prune the block here, run it once more, hand its output back

So whatever lies between blocks (masks, position tables, cross-attention inputs, early scaling) is the model's own code with the model's own
values; nothing about a block's signature is assumed, every block's inputs come from the already pruned part, and the whole
model runs once per batch however many blocks it has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

_CURRENT = threading.local()


class Abandoned(BaseException):
    """Raised inside of a forward that nobody needs any more; unwinds its thread."""


class LockstepForward:
    """One forward in a thread. `unit`, `args`, `kwargs`: where it waits; `finished` when it has returned."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.run = run
        self.unit: str | None = None
        self.args: tuple[object, ...] = ()
        self.kwargs: dict[str, object] = {}
        self.finished = False
        self.error: BaseException | None = None
        self._abandon = False
        self._output: object = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, daemon=True, name="sparsify-calibration")
        self._thread.start()

    def _main(self) -> None:
        self._go.acquire()
        _CURRENT.forward = self
        try:
            if not self._abandon:
                with torch.no_grad():
                    self.run()
        except Abandoned:
            pass
        except BaseException as error:  # handed to the driver's thread by `advance`
            self.error = error
        finally:
            self.finished, self.unit, self.args, self.kwargs = True, None, (), {}
            self._stopped.release()

    def suspend(self, unit: str, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Called in the forward's thread at a unit: wait, and return the unit's output that the driver hands over."""
        self.unit, self.args, self.kwargs = unit, args, kwargs
        self._stopped.release()
        self._go.acquire()
        if self._abandon:
            raise Abandoned
        output, self._output = self._output, None
        return output

    def advance(self, output: object = None) -> None:
        """Called by the driver: go on (with the output of the unit) until the next unit or the end. Raises the forward's error."""
        self.unit, self.args, self.kwargs = None, (), {}
        self._output = output
        self._go.release()
        self._stopped.acquire()
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        """Unwind the thread where it waits."""
        if not self.finished:
            self._abandon = True
            self._go.release()
            self._stopped.acquire()
        self._thread.join()


@contextmanager
def intercepted(units: Mapping[str, nn.Module]) -> Iterator[dict[str, Callable[..., object]]]:
    """While open, a unit called in a lockstep thread waits for the driver; elsewhere it runs. Gives the original forwards."""
    originals: dict[str, Callable[..., object]] = {}
    overridden: dict[str, object] = {}
    for name, module in units.items():
        original = module.forward
        originals[name] = original
        if "forward" in module.__dict__:
            overridden[name] = module.__dict__["forward"]

        def stop(
            *args: object, _name: str = name, _original: Callable[..., object] = original, **kwargs: object
        ) -> object:
            forward: LockstepForward | None = getattr(_CURRENT, "forward", None)
            return _original(*args, **kwargs) if forward is None else forward.suspend(_name, args, kwargs)

        setattr(module, "forward", stop)  # noqa: B010  what it returns is the forward's
    try:
        yield originals
    finally:
        for name, module in units.items():
            if name in overridden:
                setattr(module, "forward", overridden[name])  # noqa: B010
            else:
                module.__dict__.pop("forward", None)
