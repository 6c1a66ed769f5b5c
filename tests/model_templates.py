"""Chat templates of real models, and chats that use all they can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_DIRECTORY = Path(__file__).parent / "tokenizer_proc" / "chat_templates"
QWEN25, QWEN3, DEEPSEEK_R1 = (
    (_DIRECTORY / f"{name}.jinja").read_text(encoding="utf-8") for name in ("qwen2_5", "qwen3", "deepseek_r1_distill")
)
HERMES = """\
{{- bos_token }}
{%- if tools %}
{{- '<|im_start|>system\\nHere are the functions: <tools> ' }}
{%- for tool in tools %}
    {{- tool.function | tojson }}{{ ' ' if not loop.last else '' }}
{%- endfor %}
{{- ' </tools> Call one with <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>tool\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.tool_calls is defined %}
        {{- '<|im_start|>assistant' }}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
"""In the manner of Hermes 2 Pro's template for tools: functions without their wrapper, trimmed messages."""
PREFILLED_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
    "{% endif %}"
)
"""In the manner of models that always think unless they are told not to."""

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city – today",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
ROUND_TRIP: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Köln?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}},
            {"id": "call_2", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}},
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "grey"}'},
    {"role": "tool", "tool_call_id": "call_2", "content": "3"},
]
