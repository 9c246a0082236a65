"""A checkpoint on the way in: what can be seen from its config before its weights are read, and whether they were all
there. What transformers would make up, leave out or wrap in silence is refused."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.peft_utils import find_adapter_config_file

# Arguments of from_pretrained that say which files are meant.
WHICH_FILES = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
# transformers sets variables of the process while it loads (the default dtype, torch.nn.init): one thread at a time.
_LOADING = threading.Lock()


def read_config(path: str | os.PathLike[str], **options: Any) -> PretrainedConfig:
    """The config of a checkpoint whose weights are those of a whole model, not quantised.

    Args:
        options: transformers' arguments of ``from_pretrained``.

    Raises:
        ValueError: a GGUF file, an adapter, quantised weights; the message says what to do instead. OSError: not found.
    """
    which = {k: options[k] for k in WHICH_FILES if k in options}
    _refuse_gguf(path, options.get("gguf_file"))
    _check_there(path)
    for name in ("load_in_8bit", "load_in_4bit"):
        if options.get(name):
            raise ValueError(
                f"{name}=True: quantised weights are not supported, as steering acts on the full-precision residual "
                f"stream. Leave it out; dtype=torch.bfloat16 takes two bytes a weight"
            )
    adapter = _adapter(path, which)
    if adapter is not None:
        raise ValueError(
            f"{str(path)!r} holds an adapter ({adapter}), not a whole model: merge it into its base model first "
            f"(peft: AutoPeftModelForCausalLM.from_pretrained(path).merge_and_unload().save_pretrained(folder)) and "
            f"give that folder. Where that was done already, take adapter_config.json away"
        )
    try:
        config = AutoConfig.from_pretrained(path, **which)
    except OSError as error:
        if os.path.isdir(path):
            raise
        raise OSError(
            f"there is no folder {str(path)!r} here, and as a hub id it could not be loaded: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    asked = options.get("quantization_config")
    # A config that asks transformers to de-quantise while it loads; what comes out is looked at again.
    dequantises = getattr(asked, "dequantize", False) or getattr(asked, "run_compressed", True) is False
    quantised = asked if asked is not None else getattr(config, "quantization_config", None)
    if quantised is not None and not dequantises:
        raise ValueError(
            f"{str(path)!r} is quantised ({quantisation_method(quantised)}), and quantised weights are not supported: "
            f"steering acts on the full-precision residual stream. Give the original checkpoint, with "
            f"dtype=float32, bfloat16 or float16"
        )
    return config


def quantisation_method(quantization_config: Any) -> str:
    """Its name as the checkpoint has it ("awq", "gptq", "bitsandbytes" …)."""
    method = (
        quantization_config.get("quant_method")
        if isinstance(quantization_config, dict)
        else getattr(quantization_config, "quant_method", None)
    )
    return str(getattr(method, "value", method) or "by a method that its config does not name")


def architecture_of(config: PretrainedConfig) -> str:
    """The class that transformers builds for this config: its own table decides, whatever ``architectures`` says."""
    built = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if isinstance(built, str):
        return built
    named = config.architectures or [type(config).__name__]
    return str(named[0])


def load_model(path: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
    """transformers' model of a checkpoint, every weight of it read from there.

    Raises:
        ValueError: weights are missing, unexpected or of another size, by name; a file is damaged.
    """
    try:
        with _LOADING:
            loaded: Any = AutoModelForCausalLM.from_pretrained(path, **{**options, "output_loading_info": True})
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in options:
            raise
        raise TypeError(
            f"unknown option {unknown[1]!r}: neither the runtime has it nor transformers' from_pretrained"
        ) from error
    except SafetensorError as error:
        raise ValueError(
            f"a file of weights of {str(path)!r} is damaged or was not copied whole ({error}): get it again"
        ) from error
    model: PreTrainedModel
    model, found = loaded
    wrong = [
        f"{len(keys)} {what} ({_some(keys)})"
        for what, keys in (
            ("missing", found["missing_keys"]),
            ("that it has no place for", found["unexpected_keys"]),
            ("of another size", [key[0] if isinstance(key, tuple) else key for key in found["mismatched_keys"]]),
        )
        if keys
    ]
    if wrong or found.get("error_msgs"):
        raise ValueError(
            f"the weights in {str(path)!r} are not those of a {type(model).__name__} with this config.json: "
            f"{'; '.join(wrong) or found['error_msgs']}. transformers would draw missing ones at random and leave "
            f"others out. Get the checkpoint again, or mend the names or the config; if the model is right as "
            f"transformers loads it, pass it as Runtime(model, tokenizer)"
        )
    return model


def _check_there(path: str | os.PathLike[str]) -> None:
    """Refuse what can only be a path and is not there; a name of the form "owner/name" may be a hub id."""
    text = os.fspath(path)
    path_like = not isinstance(path, str) or text.startswith(("/", ".", "~", os.sep)) or text.count("/") > 1
    if path_like and not os.path.exists(text):
        raise FileNotFoundError(
            f"there is no folder {os.path.abspath(text)}: give a checkpoint's folder (with config.json and "
            f"safetensors), or a hub id such as 'Qwen/Qwen2.5-7B-Instruct'"
        )
    if not path_like and not os.path.isdir(text) and not _HUB_ID.fullmatch(text):
        raise FileNotFoundError(f"{text!r} is neither a folder here nor a hub id such as 'Qwen/Qwen2.5-7B-Instruct'")


def _refuse_gguf(path: str | os.PathLike[str], gguf_file: object) -> None:
    folder = Path(path)
    found = [str(gguf_file)] if gguf_file is not None else [folder.name] if folder.suffix == ".gguf" else []
    if not found and folder.is_dir() and not (folder / "config.json").exists():
        found = sorted(file.name for file in folder.glob("*.gguf"))
    if found:
        raise ValueError(
            f"{found[0]} is a GGUF file, and GGUF files are not read here: give the original checkpoint (a folder with "
            f"config.json and safetensors, or a hub id), or load the file with transformers "
            f"(AutoModelForCausalLM.from_pretrained(folder, gguf_file=...)) and pass it as Runtime(model, tokenizer)"
        )


def _adapter(path: str | os.PathLike[str], which: dict[str, Any]) -> str | None:
    """The base model of an adapter at ``path`` in words, None where there is none."""
    try:
        file = find_adapter_config_file(str(path), **which)
        if file is None:
            return None
        base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError):
        return None
    return f"of {base}" if base else "of a model that it does not name"


def _some(keys: Collection[str], most: int = 4) -> str:
    named = sorted(keys)
    return ", ".join(named[:most]) + (" …" if len(named) > most else "")
