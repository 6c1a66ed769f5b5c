"""Loading tokenizer files as transformers does, whatever odd state they are in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sample_tokenizers
from sample_tokenizers import CHATML, save
from transformers import AutoTokenizer

from minisgl.config import ConfigError
from minisgl.demo_model import demo_model_dir
from minisgl.model_files import read_chat_templates, read_named_tokens
from minisgl.tokenizer_proc.tokenizer_files import load_tokenizer


def test_truncation_and_padding_in_the_file_are_switched_off(tmp_path: Path) -> None:
    tokenizer = sample_tokenizers.byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20)
    loaded = load_tokenizer(save(tmp_path, tokenizer))
    text = "hello hello world"
    assert loaded.encode(text).ids == sample_tokenizers.byte_level().encode(text).ids


@pytest.mark.parametrize("add_bos", [True, False])
def test_tokenizer_json_alone_decides_about_bos(tmp_path: Path, add_bos: bool) -> None:
    """As in transformers since version 5, where these switches of the config are for other file formats."""
    directory = save(
        tmp_path, sample_tokenizers.llama_style(), add_bos_token=add_bos, add_eos_token=True, bos_token="<s>"
    )
    ids = load_tokenizer(directory).encode("hello the world").ids
    assert ids == AutoTokenizer.from_pretrained(directory).encode("hello the world")
    assert ids[0] == 1


def test_added_tokens_of_the_config_are_added(tmp_path: Path) -> None:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    listed = {
        "402": {"content": "<think>", "special": False, **flags},
        "400": {"content": "<tool>", "special": True, **flags},
    }
    directory = save(tmp_path, sample_tokenizers.byte_level(), added_tokens_decoder=listed)
    loaded, reference = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    text = "hello <think>the world</think> <tool>"
    ids = loaded.encode(text).ids
    assert ids == reference.encode(text)
    assert loaded.token_to_id("<think>") in ids
    for skip in (True, False):
        assert loaded.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)


def test_named_tokens_come_as_texts_or_as_objects(tmp_path: Path) -> None:
    directory = save(
        tmp_path, sample_tokenizers.byte_level(), bos_token=None, eos_token={"content": "<|im_end|>", "lstrip": False}
    )
    (directory / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    assert read_named_tokens(directory) == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


@pytest.mark.parametrize("place", ["jinja", "config", "named", "processor"])
def test_chat_templates_are_found_wherever_they_are(tmp_path: Path, place: str) -> None:
    in_config = {"named": [{"name": "rag", "template": "x"}, {"name": "default", "template": CHATML}], "config": CHATML}
    # A file of its own wins over the config's.
    in_config["jinja"] = "not this one"
    directory = save(tmp_path, sample_tokenizers.byte_level(), chat_template=in_config.get(place))
    if place == "jinja":
        (directory / "chat_template.jinja").write_text(CHATML)
    if place == "processor":
        (directory / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    assert read_chat_templates(directory)["default"] == CHATML


def test_no_chat_template(tmp_path: Path) -> None:
    assert read_chat_templates(save(tmp_path, sample_tokenizers.byte_level())) == {}


@pytest.mark.parametrize(("content", "sentence"), [("{", "fetch it again"), ("{}", "fetch it again")])
def test_a_damaged_tokenizer_file_is_named(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json.*" + sentence):
        load_tokenizer(tmp_path)


def test_older_formats_are_converted_by_transformers(tmp_path: Path) -> None:
    tokenizer = sample_tokenizers.byte_level()
    tokenizer.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert not (tmp_path / "tokenizer.json").exists()
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("hello the world").ids == tokenizer.encode("hello the world").ids


def test_what_cannot_be_converted_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_neither_process_imports_torch_or_transformers() -> None:
    program = (
        "import sys, minisgl.tokenizer_proc.main, minisgl.detokenizer_proc.main\n"
        "from minisgl.tokenizer_proc.encode import PromptEncoder\n"
        "PromptEncoder.from_directory(sys.argv[1], 4096, 2560).warm_up()\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(demo_model_dir())], capture_output=True, text=True, timeout=60
    )
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
