"""The sampling that a model's makers recommend, as generation_config.json says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minisgl.config import ServerConfig
from minisgl.model_files import ModelNotFound, read_model_spec


def model(directory: Path, generation_config: dict[str, Any] | None) -> Path:
    config = {"model_type": "qwen2", "vocab_size": 100, "max_position_embeddings": 64}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    if generation_config is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation_config))
    return directory


def defaults(directory: Path, generation_config: dict[str, Any] | None) -> dict[str, Any]:
    config = ServerConfig(load_format="dummy")
    return read_model_spec(model(directory, generation_config), config, "m", "m").sampling_defaults


@pytest.mark.parametrize(
    ("generation_config", "expected"),
    [
        (None, {}),
        ({"eos_token_id": 2}, {}),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1},
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1},
        ),
        ({"temperature": None, "top_k": 0, "min_p": 0.05}, {"top_k": -1, "min_p": 0.05}),
        ({"do_sample": False, "temperature": 0.7, "top_k": 20}, {"temperature": 0.0}),
        ({"do_sample": False, "repetition_penalty": 1.05}, {"temperature": 0.0, "repetition_penalty": 1.05}),
    ],
)
def test_what_is_read(tmp_path: Path, generation_config: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    assert defaults(tmp_path, generation_config) == expected


@pytest.mark.parametrize("wrong", [{"top_p": 7}, {"temperature": "hot"}, {"top_k": -5}, {"repetition_penalty": 3}])
def test_nonsense_is_named_at_the_start(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ModelNotFound, match=r"generation_config\.json"):
        defaults(tmp_path, wrong)
