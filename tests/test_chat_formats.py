"""What is told from chat templates: the format of tool calls, reasoning, and where answers begin."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from model_templates import DEEPSEEK_R1, HERMES, PREFILLED_THINKING, QWEN3, QWEN25
from sample_tokenizers import CHATML, byte_level, save

from minisgl.chat_formats import ChatFormats, find_chat_formats
from minisgl.config import ServerConfig, WorkerSpec
from minisgl.demo_model import demo_model_dir
from minisgl.model_files import read_model_spec

GLM = "{% if tools %}{{ tools }}<tool_call>name<arg_key>k</arg_key>{% endif %}"


def find(source: str, tools: str = "auto", reasoning: str = "auto", **more: str) -> ChatFormats:
    return find_chat_formats({"default": source, **more}, {"bos_token": "<s>"}, tools, reasoning)


@pytest.mark.parametrize(
    ("source", "tool_calls", "reasoning", "inside"),
    [
        (CHATML, None, None, False),
        (QWEN25, "hermes", None, False),
        (HERMES, "hermes", None, False),
        (QWEN3, "hermes", "qwen3", False),
        (DEEPSEEK_R1, None, "deepseek-r1", True),
        (PREFILLED_THINKING, None, "qwen3", True),
        (GLM, None, None, False),
        ("{{ messages }} tools <tool_call> {# tools #}", None, None, False),
        ("<think>{{ raise_exception('no') }}", None, "qwen3", False),
        ("<think>{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", None, "qwen3", False),
        ("<think>{% for %}", None, "qwen3", False),
    ],
)
def test_formats_are_told_from_the_template(
    source: str, tool_calls: str | None, reasoning: str | None, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisgl.chat_formats.PROBE_SECONDS", 0.3)
    found = find(source)
    assert (found.tool_call_parser, found.reasoning_parser) == (tool_calls, reasoning)
    assert found.begins_inside({}) is inside
    assert bool(found.no_tools) == (tool_calls is None)


def test_a_switch_decides_where_answers_begin() -> None:
    found = find(PREFILLED_THINKING)
    assert [found.begins_inside({"enable_thinking": value}) for value in (True, False)] == [True, False]
    assert found.begins_inside({"something_else": False})
    assert not any(find(QWEN3).begins_inside({"enable_thinking": value}) for value in (True, False))


def test_why_there_are_no_tools() -> None:
    assert "does not show tools" in find(CHATML).no_tools
    assert "a format that this server does not read" in find(GLM).no_tools
    assert "--tool-call-parser none" in find(QWEN25, tools="none").no_tools
    assert "no chat template" in find_chat_formats({}, {}, "auto", "auto").no_tools


def test_the_user_knows_better(caplog: pytest.LogCaptureFixture) -> None:
    assert find(GLM, tools="qwen25").tool_call_parser == "hermes"
    assert find(CHATML, tools="hermes").tool_call_parser is None
    assert "--tool-call-parser hermes has no effect" in caplog.text
    assert find(QWEN3, reasoning="none").reasoning_parser is None
    assert find(QWEN3, reasoning="deepseek-r1").begins_inside({})
    assert find(QWEN3, reasoning="qwen3-thinking").begins_inside({})
    assert not find(QWEN3, reasoning="deepseek-r1").begins_inside({"enable_thinking": False})
    assert find(CHATML, reasoning="deepseek-r1").begins_inside({})
    assert find(CHATML, reasoning="qwen3").reasoning_parser == "qwen3"


def test_a_template_of_its_own_for_tools_counts() -> None:
    assert find(CHATML, tool_use=HERMES).tool_call_parser == "hermes"


def test_it_works_in_any_thread() -> None:
    found: list[ChatFormats] = []
    thread = threading.Thread(target=lambda: found.append(find(DEEPSEEK_R1)))
    thread.start()
    thread.join()
    assert found[0].opens_thinking


def test_which_extras_the_template_reads() -> None:
    assert find("{{ documents }}{{ reasoning_effort }}").extras == ["reasoning_effort", "documents"]
    assert find(QWEN3).extras == []


def test_the_spec_has_it_and_takes_it_to_the_workers(tmp_path: Path) -> None:
    save(tmp_path, byte_level(), chat_template=QWEN3)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 400, "max_position_embeddings": 64}))

    def spec(**config: Any) -> WorkerSpec:
        settings = ServerConfig(load_format="dummy", **config)
        model = read_model_spec(tmp_path, settings, "m", "m")
        return WorkerSpec("http-0", "http", 0, 1, "ipc://a", "ipc://b", 1, settings, model)

    found = WorkerSpec.unpack(spec().pack()).model.chat_formats
    assert found == find(QWEN3)
    assert WorkerSpec.unpack(spec(tool_call_parser="none").pack()).model.chat_formats.tool_call_parser is None


def test_a_model_without_either_costs_no_import() -> None:
    code = (
        "import sys; from pathlib import Path; from minisgl.config import ServerConfig\n"
        "from minisgl.model_files import read_model_spec\n"
        f"read_model_spec(Path({str(demo_model_dir())!r}), ServerConfig(), 'm', 'm')\n"
        "assert not {'jinja2', 'tokenizers', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[1])
