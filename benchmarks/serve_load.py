"""`sparsify serve` under load: requests for many adapters at once, beside one adapter for all, and beside one adapter at a time.

    mixed            every request names the next of `--adapters` adapters
    one              all name the same one
    one at a time    as a server must that switches: those of an adapter are sent when those of the one before are answered

All requests of an arm are there at its beginning, so that the time of a request counts from then, waiting included. The server is a process of
its own on the loopback interface. Every reply is compared with what `generate()` writes alone under its adapter; one that is another
adapter's is counted as mixed up, one that is nobody's (two tokens as likely as each other, chosen otherwise after rounding) as
different. Adapters are S2FT's in size, 63 columns of every Down, with random values that change what is written.

    python benchmarks/serve_load.py --save
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsify
from benchmarks.harness import Bar, begin, parser, report
from sparsify.adapters.adapter import Adapter, Delta, save, tensor_hash

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = (
    "The three most important things about a good name are",
    "Once upon a time a small robot wanted to learn how to cook, and so",
    "To sort a list of numbers in Python you can",
    "The weather in the mountains changes quickly because",
)


@dataclass(frozen=True)
class Ask:
    """A request. place: of its prompt."""

    adapter: str
    place: int


def write_model(folder: Path, fast: bool) -> Any:
    """A model folder, and the model."""
    if not fast:
        from sparsify.demo.pretrained import smollm2

        model, tokenizer = smollm2()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return model
    sys.path.insert(0, str(ROOT / "tests"))
    import small_folder
    from transformers import LlamaForCausalLM

    small_folder.write_model(folder, max_position_embeddings=256)
    return LlamaForCausalLM.from_pretrained(folder).eval()


def write_adapter(model: Any, folder: Path, columns: int, size: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    deltas, bases = [], {}
    for name, weight in model.named_parameters():
        if name.endswith("down_proj.weight"):
            places = torch.randperm(weight.shape[1], generator=random)[:columns].sort().values
            values = size * float(weight.detach().std()) * torch.randn(weight.shape[0], columns, generator=random)
            deltas.append(Delta(name, "column", places, values))
            bases[name] = tensor_hash(weight)
    save(Adapter(tuple(deltas), bases), folder)


@contextmanager
def server(model: Path, adapters: Path, running: int, queue: int, threads: int) -> Iterator[int]:
    """The port of a server."""
    command = [sys.executable, "-m", "sparsify.cli", "serve", str(model), "--adapter-dir", str(adapters), "--port", "0",
               "--max-running", str(running), "--max-queue", str(queue), "--max-context", "256", "--budget", "256MiB"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    made = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert made.stderr is not None
        said = ""
        for line in made.stderr:
            said += line
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/", line):
                break
        else:
            raise SystemExit(f"the server did not start: {said}")
        yield int(found[1])
    finally:
        made.send_signal(signal.SIGTERM)
        try:
            made.wait(60)
        except subprocess.TimeoutExpired:
            made.kill()


def send(port: int, ask: Ask, tokens: int) -> tuple[str, int]:
    """The reply, and how many tokens it has."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    document = {
        "model": ask.adapter,
        "prompt": PROMPTS[ask.place],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    try:
        connection.request("POST", "/v1/completions", json.dumps(document), {"Content-Type": "application/json"})
        response = connection.getresponse()
        found = json.loads(response.read())
    finally:
        connection.close()
    if response.status != 200:
        raise SystemExit(f"{response.status}: {found}")
    return found["choices"][0]["text"], found["usage"]["completion_tokens"]


def arm(
    port: int, groups: Sequence[Sequence[Ask]], tokens: int
) -> tuple[list[tuple[Ask, str, int]], list[float], float]:
    """Replies, seconds of each since the beginning, and of all. A group is sent when the one before is answered."""
    replies: list[tuple[Ask, str, int]] = []
    seconds: list[float] = []
    began = time.perf_counter()

    def one(ask: Ask) -> None:
        text, count = send(port, ask, tokens)
        seconds.append(time.perf_counter() - began)
        replies.append((ask, text, count))

    for group in groups:
        threads = [threading.Thread(target=one, args=(ask,)) for ask in group]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return replies, seconds, time.perf_counter() - began


def written_alone(model: Any, tokenizer: Any, folders: dict[str, Path], tokens: int) -> dict[Ask, str]:
    """What `generate()` writes, one after another."""
    host: Any = sparsify.serve(model, folders, slots=2, budget="256MiB")
    found = {}
    for place, prompt in enumerate(PROMPTS):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        for name in folders:
            made = host.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
                adapter_names=[name],
            )  # fmt: skip
            found[Ask(name, place)] = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    host.sparsify.close()
    return found


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--adapters", type=int, default=8)
    options.add_argument("--requests", type=int, default=64)
    options.add_argument("--tokens", type=int, default=24, help="of a reply")
    options.add_argument("--running", type=int, default=16, help="requests that the server computes together")
    options.add_argument("--rounds", type=int, default=3)
    arguments = options.parse_args()
    begin(arguments)
    count = 4 if arguments.fast else arguments.adapters
    asked = 16 if arguments.fast else arguments.requests
    tokens = 8 if arguments.fast else arguments.tokens
    rounds = 1 if arguments.fast else arguments.rounds
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        model = write_model(root / "model", arguments.fast)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(root / "model")
        folders = {f"a{number}": root / "adapters" / f"a{number}" for number in range(count)}
        for number, folder in enumerate(folders.values()):
            write_adapter(model, folder, 7 if arguments.fast else 63, 3.0, number)
        alone = written_alone(model, tokenizer, folders, tokens)
        del model
        texts = [alone[Ask(name, place)] for place in range(len(PROMPTS)) for name in folders]
        distinct = len(set(texts)) / len(texts)
        names = list(folders)
        mixed = [Ask(names[n % count], n // count % len(PROMPTS)) for n in range(asked)]
        arms = {
            "mixed": [mixed],
            "one": [[Ask(names[0], ask.place) for ask in mixed]],
            "one at a time": [[ask for ask in mixed if ask.adapter == name] for name in names],
        }
        found: dict[str, list[Any]] = {name: [] for name in arms}
        with server(root / "model", root / "adapters", arguments.running, asked, arguments.threads) as port:
            for name in names:
                send(port, Ask(name, 0), 2)
            for _ in range(rounds):
                for name, groups in arms.items():
                    found[name].append(arm(port, groups, tokens))
    table, wrong, confused, lost = [], 0, 0, 0
    whole: dict[str, float] = {}
    for name, runs in found.items():
        seconds = sorted(each for _, times, _ in runs for each in times)
        replies = [reply for run, _, _ in runs for reply in run]
        lost += rounds * asked - len(replies)
        bad = [(ask, text) for ask, text, _ in replies if text != alone[ask]]
        others = [
            text
            for ask, text in bad
            if text in {alone[Ask(other, ask.place)] for other in names if other != ask.adapter}
        ]
        wrong, confused = wrong + len(bad), confused + len(others)
        whole[name] = statistics.median(total for _, _, total in runs)
        table.append(
            {
                "arm": name,
                "p50 s": seconds[len(seconds) // 2],
                "p99 s": seconds[min(len(seconds) - 1, len(seconds) * 99 // 100)],
                "all s": whole[name],
                "tokens/s": sum(n for _, _, n in replies) / rounds / whole[name],
                "different": len(bad),
                "mixed up": len(others),
            }
        )
    notes = [
        f"{asked} requests of {tokens} tokens, {count} adapters, {arguments.running} at once; {100 * distinct:.0f} % of what they write alone is "
        f"distinct; {lost} lost, {wrong} of {rounds * asked * len(arms)} other than alone, {confused} another adapter's"
    ]
    bars = [
        Bar("replies that are another adapter's", confused, 0),
        Bar("replies that were lost", lost, 0),
        Bar("mixed over one, time of all", whole["mixed"] / whole["one"], 1.3),
        Bar("one at a time over mixed, time of all", whole["one at a time"] / whole["mixed"], 1.0, at_least=True),
    ]
    report("serve_load", arguments, table, bars=bars, notes=notes)


if __name__ == "__main__":
    main()
