"""A process of its own that opens a saved adapter on the pretrained model: `python -m sparsify.demo.fresh_process adapter/ < request`.

stdin: {"prompts": [...], "tokens": 32}; stdout, last line: {"adapter": [answers], "base": [answers]}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from sparsify.errors import SparsifyError


def ask_fresh_process(adapter: Path, prompts: list[str], tokens: int) -> dict[str, list[str]]:
    """Answers of a new Python process with the adapter on, and of the same process with it off. Raises SparsifyError."""
    done = subprocess.run(
        [sys.executable, "-m", "sparsify.demo.fresh_process", str(adapter)],
        input=json.dumps({"prompts": prompts, "tokens": tokens}),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode:
        raise SparsifyError(f"the fresh process could not open {adapter}: {done.stderr.strip()[-600:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    import sparsify
    from sparsify.demo.language_training import write
    from sparsify.demo.pretrained import smollm2

    request = json.load(sys.stdin)
    base, tokenizer = smollm2()
    served = sparsify.load(base, sys.argv[1])
    on = write(served, tokenizer, request["prompts"], request["tokens"])
    served.sparsify.set_adapter(None)
    off = write(served, tokenizer, request["prompts"], request["tokens"])
    print(json.dumps({"adapter": on, "base": off}))


if __name__ == "__main__":
    main()
