"""A Hugging Face folder as the commands take it: looked through first, then read by transformers, never from a network.

    folder ──▶ check_folder: regular files, config.json, indices that stay inside ──▶ load_config, load_model, load_tokenizer

No code from the folder runs (`trust_remote_code=False`), and pickled weights are read by torch's restricted reader (`weights_only=True`).
Whatever is wrong with the folder is an InputError that names the file.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sparsify.cli.rule import reading
from sparsify.errors import InputError
from sparsify.files import strict_json
from sparsify.files.regular import check_regular, kind_of

CONFIG, PEFT_CONFIG = "config.json", "adapter_config.json"
ADAPTER_FILE, SPARSE_FILE = "adapter.safetensors", "model.sparse"
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
LARGEST_JSON = 512 << 20
MOST_LAYERS = 10_000
DEPTHS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
)  # fmt: skip


def check_folder(folder: Path) -> dict[str, Any]:
    """The document in `config.json` of a folder that holds a model. Nothing in it is a FIFO or a device.

    Raises InputError for other kinds of folder, saying which command takes them, and for damaged configs and indices.
    """
    if not folder.is_dir():
        check_regular(folder, InputError, "folder")
        if folder.suffix == ".gguf":
            raise InputError(gguf_advice(folder))
        raise InputError(f"{folder}: a file, not a folder with a model in it{hint_for_file(folder)}")
    check_kinds(folder)
    if (folder / PEFT_CONFIG).exists():
        raise InputError(
            f"{folder}: holds a PEFT adapter ({PEFT_CONFIG}), not a model: `sparsify adapter {folder}` looks at it; give the folder "
            "of the model that it was trained on here"
        )
    if (folder / ADAPTER_FILE).exists() and not (folder / CONFIG).exists():
        raise InputError(
            f"{folder}: holds an adapter of sparsify, not a model: `sparsify adapter {folder}` looks at it"
        )
    if not (folder / CONFIG).exists() and (packed := sorted(folder.glob("*.gguf"))):
        raise InputError(gguf_advice(packed[0]))
    if not (folder / CONFIG).exists():
        raise InputError(f"{folder} has no {CONFIG}: it is not a Hugging Face checkpoint")
    config = read_object(folder / CONFIG)
    check_depth(folder / CONFIG, config)
    if "auto_map" in config and not known_type(config.get("model_type")):
        raise InputError(f"{folder / CONFIG}: the model brings code of its own ('auto_map'), which is never run here")
    for name in INDICES:
        if (folder / name).exists():
            read_index(folder / name)
    return config


def gguf_advice(file: Path) -> str:
    """What to do with a GGUF file, whose weights stand in blocks of few bits and are unpacked when transformers opens it."""
    return (
        f"{file}: a GGUF file, not a folder of a model. Make one: in Python, model = AutoModelForCausalLM.from_pretrained("
        f"{str(file.parent)!r}, gguf_file={file.name!r}), del model.hf_quantizer, model.config.quantization_config, then "
        "save_pretrained of it and of the AutoTokenizer opened alike. (sparsify.compile takes such a model as it is.)"
    )


def hint_for_file(path: Path) -> str:
    return f": `sparsify checkpoint {path}` looks at it" if path.suffix in (".sparse", ".safetensors") else ""


def check_kinds(folder: Path) -> None:
    """Raises InputError when something that a reader of the folder might open would never end, such as a FIFO."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        try:
            mode = entry.stat().st_mode
        except OSError:
            continue  # a link to nothing: whoever needs it says so
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise InputError(f"{folder / entry.name}: {kind_of(mode)}, not a file")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder; configurations of transformers may hold infinities. Raises InputError."""
    return strict_json.read_object(path, InputError, LARGEST_JSON, infinite=True)


def known_type(name: Any) -> bool:
    """Whether transformers itself has this model type."""
    from transformers import CONFIG_MAPPING

    return isinstance(name, str) and name in CONFIG_MAPPING


def check_depth(path: Path, config: dict[str, Any]) -> None:
    """Raises InputError for a number of layers that no model has: building it would never end."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in DEPTHS:
            value = part.get(name)
            if isinstance(value, int | float) and not 0 <= value <= MOST_LAYERS:
                raise InputError(f"{path}: {name} is {value!r}, expected 0 to {MOST_LAYERS:,}")


def read_index(path: Path) -> dict[str, Path]:
    """Tensor name → file, of a sharded checkpoint. Raises InputError for an index that is damaged or points outside of its folder."""
    places = read_object(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise InputError(f"{path}: expected a 'weight_map' from tensor names to file names")
    for file in dict.fromkeys(places.values()):
        if not file or any(
            kind(file).is_absolute() or kind(file).drive or ".." in kind(file).parts
            for kind in (PurePosixPath, PureWindowsPath)
        ):
            raise InputError(f"{path}: names the file {file!r}, which lies outside of the folder")
        check_regular(path.parent / file, InputError)
    return {name: path.parent / file for name, file in places.items()}


def load_config(folder: Path) -> Any:
    """The configuration of the model in a checked folder."""
    from transformers import AutoConfig

    quiet()
    with reading(f"{folder / CONFIG}"):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checked folder; None when it has none."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    quiet()
    with reading(f"{folder}: its tokenizer cannot be read"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_model(folder: Path, kind: Any = None, dtype: Any = "auto") -> tuple[Any, list[str], list[str]]:
    """`(model in eval mode, tensors that the files lack, tensors that the model has no place for)`.

    kind: a model class; None: what transformers' AutoModel takes. dtype: of floating weights; "auto": as stored.
    """
    from transformers import AutoModel

    check_folder(folder)
    quiet()
    own = {"trust_remote_code": False} if kind is None else {}
    with reading(f"{folder}: its model cannot be read"):
        model, info = (kind or AutoModel).from_pretrained(
            folder, dtype=dtype, local_files_only=True, weights_only=True, output_loading_info=True, **own
        )
    missing, unexpected = (sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected"))
    if missing and {name for name, _ in model.named_parameters()} <= set(missing):
        raise InputError(
            f"{folder}: its files hold no tensor of {type(model).__name__}, the model that {CONFIG} describes"
        )
    return model.eval(), missing, unexpected


def config_of_type(name: str) -> Any:
    """The default configuration of a model type that transformers knows by name, such as "llama"."""
    from transformers import AutoConfig

    known = name.isprintable() and name.strip() == name != ""
    try:
        if known:
            return AutoConfig.for_model(name)
    except (ValueError, KeyError):
        known = False
    except Exception as error:
        raise InputError(f"model type {name!r}: {type(error).__name__}: {error}") from error
    if name and os.path.lexists(name):
        check_folder(Path(name))  # says what it is instead
    raise InputError(
        f"{name!r} is neither a folder nor a model type that transformers knows (nothing is downloaded: give a local folder)"
    )


def is_folder(name: str) -> bool:
    """Whether a word names a folder and not a model type. The empty word names nothing (and not this folder)."""
    return bool(name) and os.path.isdir(name)


def quiet() -> None:
    """What transformers has to say about a folder, we say ourselves."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
