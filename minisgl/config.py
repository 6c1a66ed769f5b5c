"""Everything the user can set, as one frozen dataclass; command_line.py makes the flags and `--help` from it.

Flags carry sglang's names where they mean the same. The launcher parses a ServerConfig once and finds a ModelSpec once;
every worker gets both inside its WorkerSpec and changes neither.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from minisgl.chat_formats import REASONING_PARSERS, TOOL_CALL_PARSERS, ChatFormats

DEFAULT_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
DEMO_MODEL = "demo"


class ConfigError(ValueError):
    """A setting is wrong; the message says what to change."""


def _flag(
    default: Any,
    help: str,
    *aliases: str,
    group: str = "",
    env: str = "",
    choices: Sequence[str] = (),
    spellings: Mapping[str, str] | None = None,
    secret: bool = False,
) -> Any:
    """A ServerConfig field: its flag is the field's name with dashes, `env` overrides its default.

    Args:
        group: begins a group of flags in `--help`, up to the next field that names one.
        spellings: other words for some of the choices.
        secret: leave it out of `repr` and `public`.
    """
    metadata = {
        "help": help,
        "aliases": aliases,
        "group": group,
        "env": env,
        "choices": tuple(choices),
        "spellings": dict(spellings or {}),
        "secret": secret,
    }
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True)
class ServerConfig:
    """The settings of one server. None means "chosen automatically"."""

    model: str | None = _flag(
        None,
        f"model to serve: a hub name, a local directory, or '{DEMO_MODEL}' for the embedded demo model "
        f"(default: {DEFAULT_MODEL}, and the demo model when no hub can be reached)",
        "--model-path",
        env="MODEL_NAME",
        group="model",
    )
    model_local_dir: str | None = _flag(None, "directory that holds the model; no hub is asked", env="MODEL_LOCAL_DIR")
    modelscope_model_name: str | None = _flag(
        None, "the model's name on ModelScope, when it differs", env="MODELSCOPE_MODEL_NAME"
    )
    revision: str | None = _flag(None, "branch, tag or commit of the hub repository")
    download_dir: str | None = _flag(None, "where downloads are kept (default: the hub client's cache)")
    served_model_name: str | None = _flag(None, "name shown to clients (default: the model's name)")
    load_format: str = _flag("auto", "'dummy' makes random weights from config.json alone", choices=("auto", "dummy"))
    trust_remote_code: bool = _flag(False, "allow a model repository to run its own Python code")
    context_length: int | None = _flag(None, "longest prompt plus answer in tokens (default: the model's own)")
    tool_call_parser: str = _flag(
        "auto",
        "how the model writes tool calls; auto reads it off the chat template, 'none' refuses tools",
        choices=("auto", "none", *TOOL_CALL_PARSERS),
    )
    reasoning_parser: str = _flag(
        "auto",
        "how the model writes reasoning, which is split from its answers; auto reads it off the chat template",
        choices=("auto", "none", *REASONING_PARSERS),
    )

    device: str = _flag(
        "auto", "where the model runs", choices=("auto", "cuda", "mps", "cpu"), group="device and precision"
    )
    dtype: str = _flag(
        "auto",
        "weights and KV precision; auto is bfloat16 where that is fast, else float32",
        choices=("auto", "bfloat16", "float16", "float32"),
        spellings={"half": "float16", "float": "float32"},
    )
    quantization: str | None = _flag(
        None,
        "keep the weights of linear layers in fewer bits: less memory for less precise answers, on CPUs only",
        choices=("int8", "int4"),
    )
    cpu_threads: int | None = _flag(None, "threads of a CPU scheduler (default: all cores it may use)")
    dp_size: int | None = _flag(
        None,
        "replicas, one scheduler process each (default: one per CUDA device, else 1; ENABLE_MULTI_DEVICE=0 means 1)",
        "--data-parallel-size",
        "--dp",
    )
    base_gpu_id: int = _flag(0, "first CUDA device to use")
    random_seed: int = _flag(0, "seed of --load-format dummy weights")

    host: str = _flag("127.0.0.1", "address to listen on", group="http")
    port: int = _flag(30000, "port to listen on; 0 takes a free one")
    max_body_bytes: int = _flag(4 * 2**20, "largest request body")
    api_key: str | None = _flag(
        None,
        "key that clients must send as 'Authorization: Bearer API_KEY', on every route but /health and /metrics; "
        "the environment variable keeps it out of the process list",
        env="MINISGL_API_KEY",
        secret=True,
    )
    admin_api_key: str | None = _flag(
        None,
        "key for operators: /flush_cache, /reset_prefix_cache and /abort_request then take this key alone; it opens "
        "all other routes too",
        env="MINISGL_ADMIN_API_KEY",
        secret=True,
    )
    cors_origin: str | None = _flag(
        None,
        "web origins whose pages may use the API, such as https://chat.example.com, separated by commas; '*' is any",
    )
    otlp_endpoint: str | None = _flag(
        None,
        "send an OpenTelemetry span of every request to this collector, such as http://127.0.0.1:4318 "
        "(OTLP over HTTP; needs the extra 'otel')",
        "--otlp-traces-endpoint",
    )
    log_level: str = _flag("info", "log level", choices=("debug", "info", "warning", "error"))
    narrate: bool = _flag(False, "log the whole life of every request: prefill, every decode step, every chunk")

    http_workers: int = _flag(
        0,
        "http processes; 0 chooses: one per four CPUs on a GPU host, at most four per GPU, elsewhere one",
        group="processes and their patience",
    )
    tokenizer_workers: int = _flag(
        0,
        "tokenizer processes; 0 chooses: one per eight CPUs on a GPU host, at most two per GPU, elsewhere one",
        "--tokenizer-worker-num",
    )
    detokenizer_workers: int = _flag(
        0, "detokenizer processes; 0 chooses: one per eight CPUs on a GPU host, at most one per GPU, elsewhere one"
    )
    busy_poll_ms: int | None = _flag(
        None,
        "how long each process looks for messages without sleeping after its last request or tokens, which saves the "
        "time that an idle CPU takes to wake up (default: 100 on a GPU host with two CPUs for each process, else 0)",
    )
    load_balance_method: str = _flag("round_robin", "which replica takes the next request", choices=("round_robin",))
    startup_timeout: float = _flag(600.0, "seconds a worker may take to load and warm up")
    grammar_timeout: float = _flag(10.0, "seconds that compiling a grammar (JSON schema, regex, ...) may take")
    drain_timeout: float = _flag(60.0, "seconds running requests get to finish after SIGTERM")
    hang_timeout: float = _flag(10.0, "seconds of silence after which a worker is killed and restarted")
    watchdog_timeout: float = _flag(300.0, "seconds one scheduler step may take before its worker is restarted")

    page_size: int | None = _flag(None, "tokens per KV page (default: 16)", group="memory and scheduling")
    mem_fraction_static: float | None = _flag(
        None, "fraction of a GPU's memory for weights and KV cache (default: 0.85)"
    )
    max_total_tokens: int | None = _flag(None, "KV cache size in tokens (default: what the memory allows)")
    max_running_requests: int | None = _flag(None, "requests decoded together (default: 256 on CUDA, else 64)")
    max_queued_requests: int = _flag(2048, "requests accepted and not finished; past it clients get 503")
    chunked_prefill_size: int | None = _flag(
        None,
        "prompt tokens computed per step at most (default: 8192 on CUDA, else 512; fewer of a long prompt beside "
        "running streams: at most 512 on CUDA, on CPUs as many as double their step time)",
    )
    disable_radix_cache: bool = _flag(False, "do not reuse the keys and values of prompt prefixes seen before")
    attention_backend: str = _flag(
        "auto",
        "attention implementation; for the models that decoder.py covers auto is triton on CUDA, and on x86 CPUs that "
        "have it amx or else avx512_bf16; torch_sdpa otherwise",
        choices=("auto", "triton", "amx", "avx512_bf16", "torch_sdpa"),
    )
    enable_deterministic_inference: bool = _flag(
        False,
        "answers that do not depend on what else is computed beside them, to the bit (slower; for the models that "
        "decoder.py covers)",
    )
    disable_cuda_graph: bool = _flag(False, "run every step kernel by kernel (slower; for debugging)")

    def __post_init__(self) -> None:
        for name in ("http_workers", "tokenizer_workers", "detokenizer_workers"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in (
            "max_queued_requests",
            "dp_size",
            "page_size",
            "max_total_tokens",
            "max_running_requests",
            "chunked_prefill_size",
        ):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "at least 1", value)
        for name in ("cpu_threads", "context_length"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "at least 1", value)
        busy_poll = self.busy_poll_ms
        _require(busy_poll is None or busy_poll >= 0, "busy_poll_ms", "at least 0", busy_poll)
        for name in ("startup_timeout", "grammar_timeout", "drain_timeout", "hang_timeout", "watchdog_timeout"):
            _require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        fraction = self.mem_fraction_static
        _require(fraction is None or 0 < fraction < 1, "mem_fraction_static", "between 0 and 1", fraction)
        _require(0 <= self.port < 65536, "port", "between 0 and 65535", self.port)
        _require(self.http_workers <= 128, "http_workers", "at most 128", self.http_workers)
        _require(self.max_body_bytes >= 1024, "max_body_bytes", "at least 1024", self.max_body_bytes)
        for name in ("api_key", "admin_api_key"):
            key = getattr(self, name)
            # The key itself is not for the message.
            if key is not None and not re.fullmatch(r"[!-~]+", key):
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} must consist of visible ASCII characters without spaces")
        for origin in self.cors_origins():
            known = origin == "*" or re.fullmatch(r"https?://[^/\s]+", origin)
            _require(bool(known), "cors_origin", "'*' or origins such as https://chat.example.com", origin)

        endpoint = self.otlp_endpoint
        _require(
            endpoint is None or bool(re.fullmatch(r"https?://[^/\s]\S*", endpoint)),
            "otlp_endpoint",
            "a URL such as http://127.0.0.1:4318",
            endpoint,
        )

    def cors_origins(self) -> list[str]:
        """--cors-origin as a list."""
        return [origin.strip() for origin in (self.cors_origin or "").split(",") if origin.strip()]

    @property
    def has_keys(self) -> bool:
        """Whether some route asks for a key."""
        return self.api_key is not None or self.admin_api_key is not None

    def public(self) -> dict[str, Any]:
        """The settings that may be shown to clients and in logs: all but the secret ones."""
        specs = dataclasses.fields(self)
        return {spec.name: getattr(self, spec.name) for spec in specs if not spec.metadata["secret"]}


def _require(ok: bool, name: str, what: str, value: object) -> None:
    if not ok:
        raise ConfigError(f"--{name.replace('_', '-')} must be {what}, got {value}")


@dataclass(frozen=True)
class ModelSpec:
    """What the launcher found out about the model, from its files alone."""

    directory: str
    """Local directory with config.json, tokenizer files and (unless dummy) weights."""
    name: str
    """The name clients see."""
    source: str
    """The name it was resolved from (hub name, directory, or 'demo')."""
    context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    """Union of the ids named by generation_config.json, config.json and the tokenizer's eos_token, sorted."""
    architecture: str
    sampling_defaults: dict[str, Any] = field(default_factory=dict)
    """What generation_config.json recommends, as fields of SamplingParams; chats use it where the client is silent."""
    chat_formats: ChatFormats = field(default_factory=ChatFormats)
    """How it writes tool calls and reasoning."""


@dataclass(frozen=True)
class WorkerSpec:
    """All that one worker process needs to know; travels to it as msgpack."""

    name: str
    """`kind-index`, such as scheduler-0."""
    kind: str
    index: int
    epoch: int
    """Counts the lives of this worker, from 1."""
    inbox_address: str
    control_address: str
    """The supervisor's inbox."""
    replicas: int
    """Number of scheduler processes (dp_size resolved)."""
    config: ServerConfig
    model: ModelSpec

    def pack(self) -> bytes:
        data: bytes = msgpack.packb(dataclasses.asdict(self))
        return data

    @classmethod
    def unpack(cls, data: bytes) -> WorkerSpec:
        fields = msgpack.unpackb(data)
        model = {
            **fields["model"],
            "eos_token_ids": tuple(fields["model"]["eos_token_ids"]),
            "chat_formats": ChatFormats(**fields["model"]["chat_formats"]),
        }
        return cls(**{**fields, "config": ServerConfig(**fields["config"]), "model": ModelSpec(**model)})
