"""What would sparsify find in a model? Prints structures, report and program, and draws the SVG.

    python examples/inspect_graph.py llama                     # a small random model of a family
    python examples/inspect_graph.py path/to/config.json       # any Hugging Face config (a file or its folder)
    python examples/inspect_graph.py gpt2 --svg gpt2.svg --text gpt2.txt

Weights are never downloaded: the model is built from its config, with random weights; with `--meta` without any memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import sparsify
from sparsify import S2FT, Plan

SMALL: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 8, "num_key_value_heads": 2},
    "qwen3": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "gpt2": {"n_embd": 64, "n_head": 4},
    "bert": {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4},
    "vit": {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
    "bloom": {"hidden_size": 64, "n_head": 4},
}


def build(source: str, layers: int, meta: bool) -> torch.nn.Module:
    """A model with random weights from a family name, or from a config file as it stands."""
    if source in SMALL:
        small = {"vocab_size": 128, **SMALL[source]} if source != "vit" else SMALL[source]
        config = AutoConfig.for_model(source, **small)
        for name in ("num_hidden_layers", "n_layer"):
            if hasattr(config, name):
                setattr(config, name, layers)
    else:
        config = AutoConfig.from_pretrained(source, local_files_only=True)
    causal = type(config) in AutoModelForCausalLM._model_mapping and getattr(config, "architectures", None) != [
        "BertModel"
    ]
    factory = AutoModelForCausalLM if causal and source != "bert" else AutoModel
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        return factory.from_config(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="llama", help=f"a family ({', '.join(SMALL)}), or a config file")
    parser.add_argument("--layers", type=int, default=2, help="depth, for a family")
    parser.add_argument("--meta", action="store_true", help="no memory for weights: find structures only")
    parser.add_argument("--svg", type=Path, default=Path("graph.svg"))
    parser.add_argument("--text", type=Path, help="also write the whole program as text")
    parser.add_argument("--fast", action="store_true", help="(nothing to shorten here)")
    options = parser.parse_args()

    model = build(options.config, options.layers, options.meta)
    program = sparsify.analyse(model)
    kinds = {structure.kind for structure in program.structures}
    for declined in program.declined:
        print(f"declined {declined}")
    rules = [S2FT(structure=kind, fraction=0.1) for kind in ("ffn", "attention") if kind in kinds]
    if rules and not options.meta:
        compiled = sparsify.compile(model, Plan(rules, seed=0))
        program = compiled.sparsify.program
        print(compiled.sparsify.report)
    else:
        for structure in program.structures:
            print(structure)
    text = str(program)
    for line in text[text.index("graph(") :].splitlines():
        if "sparsify." in line:
            print(line)
    if options.text:
        options.text.write_text(text, encoding="utf-8")
    program.svg(str(options.svg))
    print(f"drawn in {options.svg}")


if __name__ == "__main__":
    main()
