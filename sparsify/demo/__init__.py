"""The demo: a real pretrained encoder fine-tuned on the standard library's own text. Run `python -m sparsify.demo`."""
