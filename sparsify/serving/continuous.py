"""transformers' continuous batching with an adapter and sampling parameters for each request: all that we change of it is in this file.

    requests_in_batch   a (3 tokens of its prompt)   b (1 token)   c (1 token)
    slots               [2, 2, 2,                     0,            5]           followed by the forward of this step
    scores              row of a, of b, of c  ──▶  each drawn by its own sampler

Scheduling, paged keys and values and admission are transformers'. Blocks of keys and values are never shared between requests
(`allow_block_sharing=False`): a block's hash covers its tokens and not the adapter that computed it, so that the same prompt under two
adapters would share what differs. A request holds its adapter's slot (`Lease`) until no step can name it any more: when it is cancelled,
that is only known to the thread of the steps, which therefore lets go of it.

Tried with transformers 5.23. `check_installed` says which of its parts are missing in another.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import FutureRequestState

from sparsify.errors import SparsifyError
from sparsify.ops.adapter_tables import KINDS
from sparsify.serving.sampling import Sampler, Sampling, SamplingError

if TYPE_CHECKING:
    from sparsify.serving.host import ServingHandle
    from sparsify.serving.store import Lease

#: tokens of one step, when nothing else is said
STEP_TOKENS = 256
#: tokens whose keys and values lie together
PAGE = 32
#: seconds that a step which runs is given to end
STEP_TIME = 60.0


@dataclass(eq=False)
class Ticket:
    """A request that runs. tell: gets each token, and None at the end; fail: why there is no more."""

    lease: Lease
    sampler: Sampler
    tell: Callable[[int | None], None]
    fail: Callable[[str], None]

    @property
    def slot(self) -> int:
        return self.lease.slots[0]


def check_installed() -> None:
    """Raises SparsifyError where transformers' continuous batching is not the one that this file changes."""
    import transformers

    needed = {
        ContinuousBatchingManager: ("_create_batch_processor", "add_request", "cancel_request", "start", "stop"),
        ContinuousBatchProcessor: ("_generation_step", "prepare_next_batch", "_handle_request_error"),
        ModelRunner: ("_sample", "supports_logits_to_keep"),
    }
    for kind, names in needed.items():
        for name in names:
            if not callable(getattr(kind, name, None)):
                raise SparsifyError(
                    f"serving: transformers {transformers.__version__} has no {kind.__name__}.{name}; 5.23 is what this was made for"
                )


def in_step(of: ModelRunner | ContinuousBatchProcessor) -> list[FutureRequestState]:
    """The requests of this step, in the order of their tokens. (Without `use_async_batching` there is one such list.)"""
    return of.inputs_and_outputs.requests_in_batch  # type: ignore[union-attr]


class SamplingRunner(ModelRunner):
    """Draws each row by its own request's parameters."""

    processor: RoutedProcessor

    def supports_logits_to_keep(self, model: torch.nn.Module) -> bool:
        """Whether the head may get the last tokens alone: not where an adapter of this step changes it, for slots are of all."""
        return super().supports_logits_to_keep(model) and not self.processor.head_changes

    def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """scores (1, rows, vocabulary): of the requests that get a token in this step, in their order."""
        rows = scores[0]
        asking = [f.state.request_id for f in in_step(self) if f.has_new_token]
        likeliest = rows.argmax(-1).tolist()
        best = rows.gather(-1, torch.tensor(likeliest, device=rows.device)[:, None])[:, 0].isfinite().tolist()
        drawn = []
        for place, request in enumerate(asking):
            ticket = self.processor.tickets.get(request)
            if ticket is None:  # of transformers' own warm-up, or cancelled just now
                drawn.append(likeliest[place])
                continue
            try:
                if ticket.sampler.sampling.plain and best[place]:
                    token = ticket.sampler.takes(likeliest[place])
                else:
                    token = ticket.sampler.draw(rows[place])
            except SamplingError as error:  # this request ends; the others of the step have nothing to do with it
                self.processor.refuse(request, str(error))
                token = likeliest[place]
            drawn.append(token)
        output_ids[0, : len(drawn)].copy_(torch.tensor(drawn, dtype=output_ids.dtype))


class RoutedProcessor(ContinuousBatchProcessor):
    """Lets every token of a step compute with its request's slot."""

    handle: ServingHandle
    tickets: dict[str, Ticket]
    leaving: queue.SimpleQueue[str]
    withdraw: Callable[[str], None]
    steps: int
    heads: int
    head_changes: bool

    def prepare_next_batch(self) -> bool:
        gone = []
        while not self.leaving.empty():
            gone.append(self.leaving.get())
        ready = super().prepare_next_batch()  # takes what was cancelled out of the batch, before it makes one
        for request in gone:
            self.let_go(request)
        return ready

    def let_go(self, request: str) -> None:
        ticket = self.tickets.pop(request, None)
        if ticket is not None:
            ticket.lease.close()

    def refuse(self, request: str, reason: str) -> None:
        """End one request with an error, from within a step."""
        ticket = self.tickets[request]
        self.withdraw(request)
        ticket.fail(reason)

    def _generation_step(self, model: torch.nn.Module) -> None:
        self.steps += 1
        slots, leases = self.slots()
        self.head_changes = any(lease.bits & self.heads for lease in leases)
        with self.handle.using_slots(slots, *leases) if leases else nullcontext():
            super()._generation_step(model)

    def slots(self) -> tuple[list[int], list[Lease]]:
        """One slot for each token of the step, and the leases that hold them."""
        found = [(self.tickets.get(f.state.request_id), f.query_length) for f in in_step(self)]
        leases = {t.slot: t.lease for t, _ in found if t is not None and t.slot}
        return [t.slot if t is not None else 0 for t, length in found for _ in range(length)], list(leases.values())


class RoutedManager(ContinuousBatchingManager):
    """Requests under adapters, over a serving host. `submit`, `cancel` and `close` may be called from any thread."""

    def __init__(self, host: Any, *, running: int, cache_tokens: int, step_tokens: int = STEP_TOKENS) -> None:
        """host: what `sparsify.serve` made. running: requests in one step at most. cache_tokens: that keys and values are kept of.

        step_tokens: in one step at most; longer prompts take several.
        """
        check_installed()
        self.handle: ServingHandle = host.sparsify
        self.tickets: dict[str, Ticket] = {}
        self.leaving: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.numbers = 0
        self.lock = threading.Lock()
        pages = -(-cache_tokens // PAGE) + 1
        config = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=pages, max_batch_tokens=step_tokens, max_requests_per_batch=running, allow_block_sharing=False,
            use_async_batching=False, use_cuda_graph=False, auto_switch_to_flash=False, max_blocks_per_request=0,
        )  # fmt: skip
        # what a folder's generation_config.json asks for is not applied behind the request's own parameters
        plain = GenerationConfig(do_sample=False, eos_token_id=ends_of(host) or -1, max_new_tokens=None)
        super().__init__(of_its_own(host), plain, config)

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        made: Any = super()._create_batch_processor()
        made.__class__, made.model_runner.__class__ = RoutedProcessor, SamplingRunner
        made.model_runner.processor = made
        made.handle, made.tickets, made.leaving, made.withdraw = self.handle, self.tickets, self.leaving, self.withdraw
        made.steps, made.heads, made.head_changes = 0, self.heads(), False
        return made

    def heads(self) -> int:
        """`Image.bits` of all that may be added behind the model's body, where only some tokens may come."""
        body = f"{self.model.base_model_prefix}."
        behind = [t.number for param, t in self.handle.base.targets.items() if not param.startswith(body)]
        return sum((1 << len(KINDS)) - 1 << len(KINDS) * number for number in behind)

    @property
    def steps(self) -> int:
        return getattr(self.batch_processor, "steps", 0)

    def submit(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        lease: Lease,
        tell: Callable[[int | None], None],
        fail: Callable[[str], None],
    ) -> str:
        """Let a prompt run under the adapter that `lease` holds (one name). Returns what `cancel` takes.

        tell: gets each token, and None after the last; fail: gets why there is none. Both are called by the thread of the steps. From here
        on the lease is closed when nothing names its slot any more.
        """
        with self.lock:
            self.numbers += 1
            request = f"r{self.numbers}"
        ticket = Ticket(lease, Sampler(sampling), tell, fail)
        self.tickets[request] = ticket
        with self.output_router._lock:
            self.output_router.result_handlers[request] = (Told(self, request, ticket), Directly())  # type: ignore[assignment]
        ends = [-1] if sampling.endless else None
        if not self.alive or self.add_request(list(ids), request, sampling.tokens, True, eos_token_id=ends) is None:
            self.forget(request)
            fail("the server is stopping")
        return request

    @property
    def alive(self) -> bool:
        """Whether steps are made; False once one of them failed."""
        return self.is_running() and self.background_thread_status.fatal_error is None

    def withdraw(self, request: str) -> None:
        """Stop a request; nothing is told of it any more, and its slot is free once no step names it."""
        with self.output_router._lock:
            self.output_router.result_handlers.pop(request, None)
        if request in self.tickets:
            self.cancel_request(request)
            self.leaving.put(request)
            if not self.is_running():
                self.forget(request)

    def forget(self, request: str) -> None:
        with self.output_router._lock:
            self.output_router.result_handlers.pop(request, None)
        ticket = self.tickets.pop(request, None)
        if ticket is not None:
            ticket.lease.close()

    def close(self, grace: float | None = None) -> None:
        """Let what runs end, for `grace` seconds at most (None: as long as it takes), fail the rest, and stop."""
        thread = self._generation_thread
        if thread is not None:
            self.background_thread_status.request_stop(BackgroundThreadStatus.FLUSH_AND_STOP, 0)
            thread.join(grace)
            self.stop(block=True, timeout=STEP_TIME, hard_stop=True)
        for request in list(self.tickets):
            ticket = self.tickets[request]
            self.forget(request)
            ticket.fail("the server is stopping")


class Directly:
    """Stands where transformers expects an event loop: what is delivered is called where it is delivered."""

    def call_soon_threadsafe(self, call: Callable[..., object], *arguments: object) -> None:
        call(*arguments)


class Told:
    """What transformers says of a request, as tokens. A request that was put back (soft reset) tells nothing twice."""

    def __init__(self, manager: RoutedManager, request: str, ticket: Ticket) -> None:
        self.manager, self.request, self.ticket = manager, request, ticket
        self.told = 0

    def __call__(self, output: Any) -> None:
        for token in output.generated_tokens[self.told :]:
            self.told += 1
            self.ticket.tell(token)
        if output.error is not None:
            self.manager.forget(self.request)
            self.ticket.fail(output.error)
        elif output.is_finished():
            self.manager.forget(self.request)
            self.ticket.tell(None)


def of_its_own(host: Any) -> Any:
    """The same modules over the same tensors with a config of their own.

    transformers writes `is_causal` into the model's config for the time of every forward, and an attention implementation for as long as a
    manager lives: another thread that generates with the same config meanwhile would compute without a causal mask.
    """
    made: dict[int, torch.nn.Module] = {}
    copies: dict[int, Any] = {}

    def mirror(module: torch.nn.Module) -> torch.nn.Module:
        if id(module) not in made:
            new = made[id(module)] = object.__new__(type(module))
            new.__dict__.update(module.__dict__)
            if isinstance(config := module.__dict__.get("config"), PreTrainedConfig):
                new.__dict__["config"] = copy.deepcopy(config, copies)
            new.__dict__["_modules"] = {n: None if m is None else mirror(m) for n, m in module._modules.items()}
        return made[id(module)]

    top = mirror(host)
    for name in ("forward", "generate", "compile", "sparsify"):  # of the host that it mirrors
        top.__dict__.pop(name, None)
    return top


def ends_of(host: Any) -> list[int]:
    """Tokens that end a text."""
    for config in (getattr(host, "generation_config", None), host.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


__all__ = ["RoutedManager", "check_installed", "ends_of"]
