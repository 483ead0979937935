"""Adapters by name, and who holds which: disk → host memory → slots, each least recently used first out.

    add(name, folder)       known by name; nothing is read yet
    lease(names)            read, checked and packed by the loader thread (host memory, `host_budget`), then put into free slots all at
                            once; held until the lease is closed, and evicted by nobody meanwhile
    evict                   an adapter that no lease holds leaves its slot when another needs it, and host memory when that is full

Leases are served in the order in which they ask, each wholly or not at all, so that no two wait for each other. What cannot be read
refuses the leases that name it, and no others. A slot is filled while no batch names it, so that running forwards go on.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import AdapterError, SparsifyError
from sparsify.serving.addends import KINDS, Image, Mix
from sparsify.serving.modules import added
from sparsify.serving.names import BASE, Unknown, in_folder, listed, unknown
from sparsify.serving.route import Route, Routing
from sparsify.serving.slots import Slots

#: seconds after which a loader without work ends; the next request starts another
IDLE = 5.0
#: how many polite requests for adapters that are live may be served before one that came earlier and has no slot
PASSES = 32
#: seconds after which a request that waits looks for leases that were forgotten
LOOK = 0.5


class SlotTimeout(AdapterError, TimeoutError):
    """All slots were held by others for longer than the request wanted to wait."""


@dataclass(eq=False)
class Entry:
    """One adapter by name. wanted: leases that wait for it; held: leases that have it. error: why the last attempt to read it failed."""

    name: str
    folder: Path | Mix
    image: Image | None = None
    slot: int = 0
    wanted: int = 0
    held: int = 0
    loading: bool = False
    removed: bool = False
    error: AdapterError | None = None


@dataclass
class Counts:
    """What happened since the host was made."""

    loads: int = 0
    evictions: int = 0
    waits: int = 0
    refusals: int = 0


@dataclass(eq=False)
class Pending:
    """A request for slots. entries: distinct, without the base. polite: does not pass by one that was passed by often (`PASSES`).

    passed: how many that came later were served before it.
    """

    entries: list[Entry]
    polite: bool = False
    passed: int = 0
    done: bool = False
    error: AdapterError | None = None
    slots: dict[str, int] = field(default_factory=dict)


class Store:
    """See above. read: makes the image of a folder (called by the loader, without the lock)."""

    def __init__(
        self,
        read: Callable[[Path | Mix], Image],
        slots: Slots,
        host_budget: int,
        timeout: float | None,
        folder: Path | None,
        unmixed: str = "",
    ) -> None:
        self.unmixed = unmixed  # why rows of one batch cannot have different adapters
        self.read, self.slots, self.host_budget = read, slots, host_budget
        self.timeout, self.folder = timeout, folder
        self.entries: dict[str, Entry] = {}
        self.recent: OrderedDict[str, Entry] = OrderedDict()  # with an image, the least recently used first
        self.queue: deque[Pending] = deque()
        self.to_load: deque[Entry] = deque()
        self.changed = threading.Condition(threading.RLock())
        self.reading = threading.Lock()
        self.loader: threading.Thread | None = None
        self.closed = False
        self.counts = Counts()
        self.routing = Routing()
        self.forgotten: deque[Pending] = deque()  # of leases that the garbage collector found
        self.tables: list[dict[str, Tensor]] = []
        self.open_tables()

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles know the same adapters and hold none: slots are empty, nobody waits, the loader is not there."""
        folders = {name: entry.folder for name, entry in self.entries.items()}
        own = (self.read, self.slots.settings, self.host_budget, self.timeout, self.folder, self.unmixed)
        return {"own": own, "folders": folders}

    def __setstate__(self, state: dict[str, Any]) -> None:
        read, settings, *rest = state["own"]
        self.__init__(read, Slots(*settings), *rest)
        self.entries = {name: Entry(name, folder) for name, folder in state["folders"].items()}

    def open_tables(self) -> None:
        self.tables = [self.slots.tables(number) for number in range(self.slots.table.shape[0])]

    # --- what a forward does -------------------------------------------------------------------------------------------------

    def add(self, number: int, route: Route, y: Tensor, x: Tensor) -> Tensor:
        """y of one linear plus what the adapters of the route's rows add there. In a compiled graph all kinds are looked at."""
        kinds = KINDS if torch.compiler.is_compiling() else route.kinds(number)
        if not kinds:
            return y
        rows = route.order.shape[0]
        if x.dim() > 2 and x.shape[0] % rows and not (route.packed and x.shape[:-1].numel() == rows):
            raise AdapterError(
                f"a linear gets {x.shape[0]} rows, and adapters are named for {rows}: rows were dropped or joined on the way (a generate() "
                "that takes finished rows out of the batch does that), so that nobody can tell whose they are; call it with one row at "
                "a time, or with one name for all"
            )
        if x.dtype != y.dtype:
            x = x.to(y.dtype)
        tables = self.tables[number]
        for kind in kinds:
            y = added(kind, y, x, self.slots.values, self.slots.places, tables[kind], route.order, route.offs)
        return y

    # --- the registry --------------------------------------------------------------------------------------------------------

    def find(self, name: str) -> Entry:
        """The entry of a name, from the folder of adapters if it is not known yet. Raises AdapterError. Call it with the lock."""
        found = self.entries.get(name)
        if found is not None:
            return found
        folder = in_folder(self.folder, name) if self.folder is not None else None
        if folder is None:
            raise unknown(name, self.names())
        found = self.entries[name] = Entry(name, folder)
        return found

    def route(self, slots: Sequence[int] | Tensor, leases: Sequence[Lease], packed: bool = True) -> Route:
        """The route of rows with these slots of some leases; packed: they may be tokens of one row.

        Raises AdapterError where a lease is closed, or a slot is none of theirs.
        """
        if not all(lease.open and lease.store is self for lease in leases):
            raise AdapterError("these slots were given back: the lease is closed, or another host's")
        known = {0}.union(*(lease.slots for lease in leases))
        asked = slots.tolist() if isinstance(slots, Tensor) else slots
        if not known.issuperset(asked):
            wrong = next(slot for slot in asked if slot not in known)
            raise AdapterError(f"slot {wrong!r} is in none of these leases (they hold {sorted(known)})")
        bits = 0
        for lease in leases:
            bits |= lease.bits
        route = Route(slots, self.slots.count, bits, self.slots.values.device, packed)
        if self.unmixed and not route.uniform:
            raise AdapterError(
                f"rows of one batch cannot have different adapters, for that was not checked: {self.unmixed}"
            )
        return route

    def names(self) -> list[str]:
        there = listed(self.folder) if self.folder is not None else []
        with self.changed:
            return sorted({*self.entries, *there} - {BASE})

    def register(self, name: str, folder: Path | Mix) -> None:
        with self.changed:
            self.need_open()
            if name in self.entries:
                raise AdapterError(f"add: {name!r} is taken; remove it first")
            self.entries[name] = Entry(name, folder)

    def exchange(self, name: str, folder: Path | Mix, taken: bool) -> None:
        """Read an adapter, and let a name mean it from then on, also to those who wait; where it cannot be read, nothing changes.

        taken: another may have the name; what holds that one goes on. Raises AdapterError.
        """
        image = self.load(name, folder)
        with self.changed:
            self.need_open()
            old = self.entries.get(name)
            if old is not None and not taken:
                raise AdapterError(f"add: {name!r} is taken; remove it first")
            new = self.entries[name] = Entry(name, folder, image)
            self.counts.loads += 1
            if old is not None:
                for pending in self.queue:
                    if old in pending.entries:
                        pending.entries[pending.entries.index(old)] = new
                        old.wanted, new.wanted = old.wanted - 1, new.wanted + 1
                self.retire(old)
            self.recent[name] = new
            self.pump()
            self.trim()

    def remove(self, name: str) -> None:
        """Forget a name. What is held goes on until it is let go of; who waits for it is refused."""
        with self.changed:
            entry = self.entries.pop(name, None)
            if entry is None:
                raise unknown(name, self.names())
            self.retire(entry)
            self.pump()

    def retire(self, entry: Entry) -> None:
        """No name leads to an adapter any more."""
        entry.removed = True
        self.recent.pop(entry.name, None)
        if not entry.held:
            self.empty(entry)
            entry.image = None

    # --- leases ----------------------------------------------------------------------------------------------------------------

    def ask(self, names: Sequence[str], wait: bool, timeout: float | None, polite: bool = False) -> Pending | None:
        """Ask for adapters; with `wait`, until they are live. None: not yet (without `wait`). Raises AdapterError."""
        with self.changed:
            self.need_open()
            self.take_back()
            entries = list({id(e): e for e in (self.find(n) for n in names if n != BASE)}.values())
            if len(entries) > self.slots.count:
                raise AdapterError(
                    f"{len(entries)} adapters in one batch, and the host has {self.slots.count} slots: raise slots=…"
                )
            pending = Pending(entries, polite)
            for entry in entries:
                entry.wanted += 1
                entry.error = None
                self.want(entry)
            self.queue.append(pending)
            self.pump()
            if not wait:
                if not pending.done and pending.error is None:
                    self.give_up(pending)
                    return None
            elif not pending.done and pending.error is None:
                self.wait_for(pending, self.timeout if timeout is None else timeout)
            if pending.error is not None:
                self.counts.refusals += 1
                raise pending.error
            return pending

    def wait_for(self, pending: Pending, timeout: float | None) -> None:
        self.counts.waits += 1
        end = None if timeout is None else time.monotonic() + timeout
        try:
            while not pending.done and pending.error is None:
                left = LOOK if end is None else min(LOOK, end - time.monotonic())
                if left <= 0:
                    raise self.too_late(pending, timeout or 0.0)
                self.changed.wait(left)
                self.take_back()
        except BaseException:
            if pending.done:
                self.let_go(pending)
            else:
                self.give_up(pending)
            raise

    def too_late(self, pending: Pending, timeout: float) -> SlotTimeout:
        names = ", ".join(e.name for e in pending.entries[:3])
        unread = [e.name for e in pending.entries if e.image is None]
        if unread:
            return SlotTimeout(f"{names}: {unread[0]} was not read within {timeout:g} s")
        held = sum(1 for e in self.everyone() if e.held)
        return SlotTimeout(
            f"{names}: no slot was free within {timeout:g} s; {held} of {self.slots.count} slots ({self.slots.used:,} of "
            f"{self.slots.nbytes:,} bytes) are held by requests that run: raise slots=, budget= or timeout="
        )

    def everyone(self) -> list[Entry]:
        live = {id(e): e for e in self.entries.values()}
        for pending in self.queue:
            live.update({id(e): e for e in pending.entries})
        return list(live.values())

    def give_up(self, pending: Pending) -> None:
        """Take a request that is not served out of the queue."""
        if pending in self.queue:
            self.queue.remove(pending)
            for entry in pending.entries:
                entry.wanted -= 1
            self.pump()

    def let_go(self, pending: Pending) -> None:
        """A lease ends."""
        with self.changed:
            self.forgotten.append(pending)
            self.take_back()

    def drop(self, pending: Pending) -> None:
        for entry in pending.entries:
            entry.held -= 1
            if entry.removed and not entry.held:
                self.empty(entry)
                entry.image = None

    def take_back(self) -> None:
        """Let go of what leases that nobody closed still hold. Call it with the lock, where nothing else is under way."""
        if not self.forgotten:
            return
        while self.forgotten:
            self.drop(self.forgotten.popleft())
        self.trim()
        self.pump()

    def pump(self) -> None:
        """Serve the requests that can be, in order: the first that needs slots which are not there holds those behind it that need any.

        Those behind it whose adapters are live already go on; the polite among them only so often, for an adapter that is asked for all
        the time would otherwise never leave its slot.
        """
        blocked: list[Pending] = []
        for pending in list(self.queue):
            refused = next((refusal(e) for e in pending.entries if e.error is not None or e.removed), None)
            if refused is not None:
                self.queue.remove(pending)
                pending.error = refused
                for entry in pending.entries:
                    entry.wanted -= 1
                continue
            missing = [e for e in pending.entries if not e.slot]
            if any(e.image is None for e in missing):
                for entry in missing:
                    self.want(entry)  # what was dropped from host memory meanwhile is read again
                continue
            if pending.polite and any(other.passed >= PASSES for other in blocked):
                continue
            if missing and (blocked or not self.make_live(missing, pending.entries)):
                blocked.append(pending)
                continue
            for other in blocked:
                other.passed += 1
            self.queue.remove(pending)
            for entry in pending.entries:
                entry.wanted -= 1
                entry.held += 1
                pending.slots[entry.name] = entry.slot
                if entry.name in self.recent:
                    self.recent.move_to_end(entry.name)
            pending.done = True
        self.changed.notify_all()

    def make_live(self, missing: list[Entry], together: list[Entry]) -> bool:
        """Put adapters into slots, evicting what nobody holds, the least recently used first; False where they do not fit now."""
        images = [e.image for e in missing if e.image is not None]
        idle = [e for e in self.recent.values() if e.slot and not e.held and e not in together]
        without: list[Entry] = []
        while not self.slots.fits(images, [e.slot for e in without]):
            if len(without) == len(idle):
                return False
            without.append(idle[len(without)])
        for entry in without:
            self.empty(entry)
            self.counts.evictions += 1
        for entry, image in zip(missing, images, strict=True):
            entry.slot = self.slots.publish(image)
        self.trim()
        return True

    def empty(self, entry: Entry) -> None:
        if entry.slot:
            self.slots.release(entry.slot)
            entry.slot = 0

    # --- host memory and the loader ----------------------------------------------------------------------------------------------

    @property
    def host_bytes(self) -> int:
        return sum(e.image.nbytes for e in self.recent.values() if e.image is not None)

    def trim(self) -> None:
        """Forget images that are in no slot and wanted by nobody, the least recently used first, until the rest is within the budget."""
        total = self.host_bytes
        for entry in list(self.recent.values()):
            if total <= self.host_budget:
                return
            if not entry.slot and not entry.wanted and entry.image is not None:
                total -= entry.image.nbytes
                entry.image = None
                del self.recent[entry.name]

    def want(self, entry: Entry) -> None:
        """Let the loader read an adapter that is not in memory."""
        if entry.image is None and not entry.loading and not entry.removed:
            entry.loading = True
            self.to_load.append(entry)
            if self.loader is None or not self.loader.is_alive():  # of a process that was forked it is not
                self.loader = threading.Thread(target=self.load_all, name="sparsify-adapter-loader", daemon=True)
                self.loader.start()
            self.changed.notify_all()

    def load(self, name: str, folder: Path | Mix) -> Image:
        """Read, check and pack an adapter. Raises AdapterError: whatever a hostile file brings about refuses it alone."""
        try:
            with self.reading:  # one file in memory at a time
                image = self.read(folder)
            self.slots.check(name, image)
        except AdapterError:
            raise
        except Exception as cause:
            raise AdapterError(f"{name}: the adapter cannot be read: {type(cause).__name__}: {cause}") from cause
        return image

    def load_all(self) -> None:
        """The loader thread: reads what is wanted, one after another, and ends when nothing was for a while."""
        while True:
            with self.changed:
                if not self.to_load and not self.closed:
                    self.changed.wait(IDLE)
                if not self.to_load or self.closed:
                    self.loader = None
                    return
                entry = self.to_load.popleft()
            image, error = None, None
            try:
                image = self.load(entry.name, entry.folder)
            except AdapterError as cause:
                error = cause
            with self.changed:
                entry.loading = False
                entry.image, entry.error = image, error
                if image is not None:
                    self.counts.loads += 1
                    if entry.removed:
                        entry.image = None
                    else:
                        self.recent[entry.name] = entry
                self.pump()
                self.trim()

    def close(self) -> None:
        """Refuse everything from now on; the loader ends."""
        with self.changed:
            self.closed = True
            for pending in self.queue:
                pending.error = AdapterError("the serving host was closed")
            self.queue.clear()
            self.changed.notify_all()

    def need_open(self) -> None:
        if self.closed:
            raise SparsifyError("the serving host was closed; make another with sparsify.serve")


def refusal(entry: Entry) -> AdapterError:
    if entry.removed:
        return Unknown(f"{entry.name!r} was removed while a request waited for it")
    assert entry.error is not None
    return type(entry.error)(str(entry.error))  # an exception of its own for every request that raises it


class Lease:
    """Slots that are held: `with handle.lease(names) as lease`. slots: of each name in the order that was asked for, 0 for the base."""

    def __init__(self, store: Store, names: Sequence[str], pending: Pending) -> None:
        self.open = False
        self.store, self.names, self.pending = store, tuple(names), pending
        self.slots = [0 if name == BASE else pending.slots[name] for name in names]
        self.open = True

    @property
    def bits(self) -> int:
        """`Image.bits` of all of them."""
        found = 0
        for entry in self.pending.entries:
            assert entry.image is not None
            found |= entry.image.bits
        return found

    def close(self) -> None:
        if self.open:
            self.open = False
            self.store.let_go(self.pending)

    def __del__(self) -> None:
        # A request that forgot it. The garbage collector may come by in the middle of anything, with the lock held or waited for by
        # this very thread: so nothing is done here, and whoever asks next (or waits) takes the slots back.
        if self.open and not sys.is_finalizing():
            self.open = False
            self.store.forgotten.append(self.pending)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


__all__ = ["Counts", "Entry", "Lease", "SlotTimeout", "Store"]
