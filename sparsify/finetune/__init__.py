"""From a plan file to an adapter, in Python what `sparsify plan`, `finetune` and `eval` do: rows, a run, its estimate and its evaluation.

file = sparsify.plan.plan_file.read("plan.yaml")
outcome = finetune(model, tokenizer, file)                       writes file.output.dir
scores = evaluate(host, tokenizer, read_rows("test.jsonl", tokenizer, length=1024))
"""

from sparsify.finetune.rows import Collator, Rows, Sample, read_rows
from sparsify.finetune.run import Outcome, Prepared, finetune, prepare

__all__ = ["Collator", "Outcome", "Prepared", "Rows", "Sample", "finetune", "prepare", "read_rows"]
