"""Runs inside an environment that has vLLM (see test_vllm.py): one batch over a base and its adapters, as JSON on the last line.

python vllm_engine.py JOB.json, where JOB is {"model", "prompts": [[ids]], "adapters": [name or null, one for each prompt], "folders": {name:
folder}, "tokens", "rank", "options": {of LLM}}.
"""

import json
import logging
import sys
from pathlib import Path


def main(job: dict) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    packed: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            packed.append(record.getMessage())

    ours = logging.getLogger("sparsify.lowering.vllm_plugin")
    ours.setLevel(logging.INFO)
    ours.addHandler(Heard())
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 64,
        "max_num_seqs": 8,
        "skip_tokenizer_init": True,
    }
    if job["folders"]:
        # On CPU vLLM 0.32 takes -1, "no adapter", as an index: the base computes with whatever lies in the last slot. One stays free.
        options |= {"enable_lora": True, "max_loras": len(job["folders"]) + 1, "max_lora_rank": job["rank"]}
    engine = LLM(job["model"], kv_cache_memory_bytes=64 * 2**20, **options | job["options"])
    requests = {n: LoRARequest(n, place + 1, folder) for place, (n, folder) in enumerate(job["folders"].items())}
    sampling = SamplingParams(temperature=0.0, max_tokens=job["tokens"], logprobs=0, ignore_eos=True, detokenize=False)
    found = engine.generate(
        [{"prompt_token_ids": ids} for ids in job["prompts"]],
        sampling,
        lora_request=[requests.get(name) for name in job["adapters"]] if requests else None,
    )
    rows = []
    for each in found:
        (made,) = each.outputs
        ids = list(made.token_ids)
        rows.append({"ids": ids, "logprobs": [step[t].logprob for t, step in zip(ids, made.logprobs, strict=True)]})
    return {"rows": rows, "said": packed}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
