"""What a model's files say: is the directory complete, and the facts every worker needs, without loading any weight.

Nothing here imports torch or transformers: the launcher reads these files before any worker starts.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minisgl.chat_formats import find_chat_formats
from minisgl.config import ConfigError, ModelSpec, ServerConfig
from minisgl.sampling_params import InvalidSamplingParams, SamplingParams

WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model")
"""One of these must be there."""

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TEXT_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".tiktoken")
_FOREIGN_WEIGHTS = (".bin", ".pth", ".pt", ".gguf", ".ckpt", ".h5", ".msgpack")
_CONTEXT_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "model_max_length",
)


class ModelNotFound(ConfigError):
    """There is no usable model where the user pointed; the message says what was tried and what to do."""


# ---- which files ----------------------------------------------------------------------------------------------------


def is_weights(name: str) -> bool:
    """Whether this file holds weights to load. Mistral's `consolidated` files are a second copy of the same weights."""
    return name.endswith(".safetensors") and not name.startswith("consolidated")


def needed_files(names: Iterable[str], weights: bool, code: bool) -> list[str]:
    """The files of a hub repository that serving needs: those at its top level, sorted.

    Args:
        names: paths inside the repository.
        weights: False for `--load-format dummy`.
        code: True for `--trust-remote-code`.

    Raises:
        ModelNotFound: the repository holds nothing that can be served.
    """
    top = sorted(name for name in names if "/" not in name)
    if "config.json" not in top:
        raise ModelNotFound("the repository has no config.json, so it is not a model in Hugging Face format")
    if weights and not any(map(is_weights, top)):
        raise ModelNotFound(_no_weights(top))
    return [
        name
        for name in top
        if name.endswith(_TEXT_SUFFIXES) or (weights and is_weights(name)) or (code and name.endswith(".py"))
    ]


def _no_weights(names: Iterable[str]) -> str:
    foreign = sorted(name for name in names if name.endswith(_FOREIGN_WEIGHTS))
    if foreign:
        return (
            f"it has weights only as {foreign[0]}, and only safetensors are loaded: convert them, "
            "or choose a repository with .safetensors files"
        )
    return "it has no weights (*.safetensors); --load-format dummy serves random ones"


def check_directory(directory: Path, weights: bool) -> None:
    """Raise ModelNotFound, naming the file, unless the directory holds a whole model (`weights`: with its weights)."""
    names = {path.name for path in directory.iterdir()}
    if "config.json" not in names:
        raise ModelNotFound(f"{directory} has no config.json, so it is not a model directory")
    if names.isdisjoint(TOKENIZER_FILES):
        raise ModelNotFound(f"{directory} has no tokenizer (tokenizer.json): copy it from the model's repository")
    if not weights:
        return
    shards = {name for name in names if is_weights(name)}
    if WEIGHTS_INDEX in names:
        listed = set(read_json(directory / WEIGHTS_INDEX).get("weight_map", {}).values())
        if listed - shards:
            raise ModelNotFound(f"{directory} lacks {min(listed - shards)}, which {WEIGHTS_INDEX} lists")
        shards = listed or shards
    if not shards:
        raise ModelNotFound(f"{directory} cannot be served: {_no_weights(names)}")
    for shard in sorted(shards):
        _check_safetensors(directory / shard)


def _check_safetensors(path: Path) -> None:
    """Compare the file's size with what its header promises, so that a cut download is found before a worker starts."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        header = file.read(header_bytes) if header_bytes < size else b""
    try:
        tensors = json.loads(header)
        expected = 8 + header_bytes + max(tensors[name]["data_offsets"][1] for name in tensors if name[:2] != "__")
    except (ValueError, TypeError, KeyError, IndexError):
        raise ModelNotFound(f"{path} is damaged (no safetensors header): delete it and fetch it again") from None
    if size != expected:
        raise ModelNotFound(
            f"{path} is damaged ({size} bytes, its header says {expected}): delete it and fetch it again"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} if there is no such file; raises ModelNotFound when it is not a JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelNotFound(f"{path} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise ModelNotFound(f"{path} does not hold a JSON object: fetch it again")
    return value


def read_chat_templates(directory: Path) -> dict[str, str]:
    """The model's chat templates by name, from whichever file holds them: `default`, and maybe one for `tool_use`."""
    own_file = directory / "chat_template.jinja"
    if own_file.exists():
        return {"default": own_file.read_text(encoding="utf-8")}
    found: Any = read_json(directory / "tokenizer_config.json").get("chat_template")
    if found is None:
        found = read_json(directory / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    named = found if isinstance(found, dict) else {"default": found}
    return {name: source for name, source in named.items() if isinstance(source, str)}


def read_named_tokens(directory: Path) -> dict[str, str]:
    """The texts of the special tokens that have a role, such as {"bos_token": "<s>"}: chat templates use them."""
    config = read_json(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config = {**config, **read_json(directory / "special_tokens_map.json")}
    values = {name: config.get(name) for name in NAMED_TOKENS}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


# ---- facts ----------------------------------------------------------------------------------------------------------


def read_model_spec(directory: Path, config: ServerConfig, name: str, source: str) -> ModelSpec:
    """Check the directory and read what every worker needs to know of the model.

    Args:
        name: what clients see unless --served-model-name says otherwise.
        source: what the model was resolved from.

    Raises:
        ModelNotFound: a file is missing or damaged.
        ConfigError: --context-length does not fit the model.
    """
    check_directory(directory, weights=config.load_format != "dummy")
    model_config = read_json(directory / "config.json")
    # Multimodal wrappers keep the language model's settings one level down.
    text_config = {**model_config, **_dict(model_config.get("text_config"))}
    vocab_size = text_config.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ModelNotFound(f"{directory / 'config.json'} has no vocab_size, so it is not a language model")
    architectures = model_config.get("architectures") or [model_config.get("model_type", "unknown")]
    return ModelSpec(
        directory=str(directory.resolve()),
        name=config.served_model_name or name,
        source=source,
        context_length=_context_length(text_config, config.context_length),
        vocab_size=vocab_size,
        eos_token_ids=_eos_token_ids(directory, text_config),
        architecture=str(architectures[0]),
        sampling_defaults=_sampling_defaults(directory),
        chat_formats=find_chat_formats(
            read_chat_templates(directory),
            read_named_tokens(directory),
            config.tool_call_parser,
            config.reasoning_parser,
        ),
    )


def _sampling_defaults(directory: Path) -> dict[str, Any]:
    """The sampling that the model's makers recommend. `do_sample: false` is greedy, and top_k 0 means all tokens."""
    path = directory / "generation_config.json"
    given = read_json(path)
    greedy = given.get("do_sample") is False
    names = ("repetition_penalty",) if greedy else ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
    values = {name: given[name] for name in names if given.get(name) is not None}
    if values.get("top_k") == 0:
        values["top_k"] = -1
    if greedy:
        values["temperature"] = 0.0
    try:
        SamplingParams(**values).validate()
    except (InvalidSamplingParams, TypeError) as error:
        raise ModelNotFound(f"{path} cannot be used: {error}; correct it") from None
    return values


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _context_length(model_config: dict[str, Any], wanted: int | None) -> int:
    lengths = [model_config[key] for key in _CONTEXT_LENGTH_KEYS if isinstance(model_config.get(key), int)]
    if not lengths:
        if wanted is None:
            raise ConfigError("config.json does not say how long the model's context is: give it with --context-length")
        return wanted
    own = _stretched_by_rope(lengths[0], model_config)
    if wanted is not None and wanted > own:
        raise ConfigError(
            f"--context-length {wanted} is above the {own} tokens the model was made for: lower it, "
            "or add rope scaling to the model's config.json"
        )
    return own if wanted is None else wanted


def _stretched_by_rope(length: int, model_config: dict[str, Any]) -> int:
    """Positions that the model's own rope scaling reaches.

    yarn, linear and dynamic scaling are added to a config that keeps the unscaled max_position_embeddings; llama3 and
    longrope (and gemma3's linear scaling) come in configs that already give the scaled length.
    """
    rope = _dict(model_config.get("rope_scaling")) or _dict(model_config.get("rope_parameters"))
    kind = rope.get("rope_type") or rope.get("type")
    factor = rope.get("factor")
    if kind not in ("yarn", "linear", "dynamic") or not isinstance(factor, int | float):
        return length
    if str(model_config.get("model_type", "")).startswith("gemma3"):
        return length
    unscaled = rope.get("original_max_position_embeddings") or length
    return max(length, int(unscaled * factor))


def _eos_token_ids(directory: Path, model_config: dict[str, Any]) -> tuple[int, ...]:
    """Every id that ends the text: files of one model often name different ones (`<|endoftext|>`, `<|im_end|>`)."""
    ids: set[int] = set()
    for named in (
        read_json(directory / "generation_config.json").get("eos_token_id"),
        model_config.get("eos_token_id"),
    ):
        ids.update(item for item in (named if isinstance(named, list) else [named]) if isinstance(item, int))
    token = read_json(directory / "tokenizer_config.json").get("eos_token")
    if token is None:
        token = read_json(directory / "special_tokens_map.json").get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    if isinstance(content, str):
        token_id = _token_id(directory, content)
        if token_id is not None:
            ids.add(token_id)
    return tuple(sorted(ids))


def _token_id(directory: Path, content: str) -> int | None:
    """The id of a special token; the small files are read first, tokenizer.json (megabytes) last."""
    decoder = _dict(read_json(directory / "tokenizer_config.json").get("added_tokens_decoder"))
    for token_id, token in decoder.items():
        if _dict(token).get("content") == content and token_id.isdigit():
            return int(token_id)
    added = read_json(directory / "added_tokens.json").get(content)
    if isinstance(added, int):
        return added
    tokenizer = read_json(directory / "tokenizer.json")
    for token in tokenizer.get("added_tokens") or []:
        if _dict(token).get("content") == content and isinstance(token.get("id"), int):
            return int(token["id"])
    vocab = _dict(tokenizer.get("model")).get("vocab") or read_json(directory / "vocab.json")
    if isinstance(vocab, dict):
        found = vocab.get(content)
        return found if isinstance(found, int) else None
    # Unigram vocabularies are lists of [token, score].
    return next((index for index, entry in enumerate(vocab) if entry and entry[0] == content), None)
