"""Flags that scripts written for sglang may hold and that this server does not have: what to do instead of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForeignFlag:
    """A flag of sglang's.

    Attributes:
        instead: how it is here, as the rest of a sentence.
        harmless: the values that ask for what this server does anyway; "" is a switch that does.
    """

    instead: str
    harmless: tuple[str, ...] = ()

    @property
    def takes_value(self) -> bool:
        return "" not in self.harmless


_ONE_DEVICE = "each replica runs on one device; --dp-size sets the number of replicas"
_ONE_HOST = "all processes run on one host"
_ALWAYS_METRICS = "/metrics always answers"
_LORA = "LoRA adapters are not served; merge them into the model"

_ANYWAY = {
    "--enable-metrics": _ALWAYS_METRICS,
    "--enable-cache-report": "every answer says how many of its prompt's tokens were cached",
    "--skip-server-warmup": "the schedulers warm up by themselves before the server says that it is ready",
    "--enable-http-worker-reuseport": "several http workers always share the port so",
    "--sleep-on-idle": "idle processes always sleep",
}
"""Switches for what this server always does."""

FOREIGN_FLAGS: dict[str, ForeignFlag] = {
    **{name: ForeignFlag(instead, ("",)) for name, instead in _ANYWAY.items()},
    **dict.fromkeys(
        ("--tp-size", "--tensor-parallel-size", "--tp", "--pp-size", "--pipeline-parallel-size", "--ep-size", "--ep"),
        ForeignFlag(_ONE_DEVICE, ("1",)),
    ),
    "--enable-dp-attention": ForeignFlag(_ONE_DEVICE),
    "--gpu-id-step": ForeignFlag("replicas take consecutive devices from --base-gpu-id on", ("1",)),
    "--nnodes": ForeignFlag(_ONE_HOST, ("1",)),
    "--node-rank": ForeignFlag(_ONE_HOST, ("0",)),
    **dict.fromkeys(("--dist-init-addr", "--nccl-init-addr", "--nccl-port"), ForeignFlag(_ONE_HOST)),
    "--tokenizer-path": ForeignFlag("the tokenizer is read from the model's own directory"),
    "--tokenizer-mode": ForeignFlag("there is one tokenizer, the fast one", ("auto",)),
    "--skip-tokenizer-init": ForeignFlag("the tokenizer always runs; send `input_ids` to /generate to do without it"),
    "--chat-template": ForeignFlag("the chat template is the model's own (chat_template.jinja in its directory)"),
    "--trust-request-chat-template": ForeignFlag("a chat template is never taken from a request"),
    "--kv-cache-dtype": ForeignFlag("the KV cache has the precision of the model; see --dtype", ("auto",)),
    "--max-prefill-tokens": ForeignFlag("--chunked-prefill-size bounds the prompt tokens of a step"),
    "--schedule-policy": ForeignFlag("requests are served first come, first served", ("fcfs",)),
    "--schedule-conservativeness": ForeignFlag(
        "a request is admitted when its prompt fits, and preempted when memory runs out", ("1.0", "1")
    ),
    "--enable-priority-scheduling": ForeignFlag("requests are served first come, first served"),
    "--enable-mixed-chunk": ForeignFlag("a step always holds decodes and a chunk of prompts together", ("",)),
    "--radix-eviction-policy": ForeignFlag("the prefix cache forgets what was used longest ago", ("lru",)),
    "--disable-overlap-schedule": ForeignFlag("--disable-cuda-graph also keeps steps from being launched ahead"),
    "--disable-cuda-graph-padding": ForeignFlag("batches are padded to the next captured size"),
    **dict.fromkeys(
        ("--cuda-graph-backend-decode", "--cuda-graph-backend-prefill"),
        ForeignFlag("--disable-cuda-graph runs without CUDA graphs"),
    ),
    **dict.fromkeys(
        ("--cuda-graph-max-bs", "--cuda-graph-bs", "--cuda-graph-max-bs-decode", "--cuda-graph-bs-decode"),
        ForeignFlag("the sizes follow --max-running-requests; --disable-cuda-graph runs without CUDA graphs"),
    ),
    "--enable-torch-compile": ForeignFlag("the kernels are written by hand, or captured in CUDA graphs"),
    "--enable-hierarchical-cache": ForeignFlag("the KV cache is in the device's memory alone"),
    "--enable-lora": ForeignFlag(_LORA),
    "--log-level-http": ForeignFlag("--log-level holds for all processes"),
    "--log-requests": ForeignFlag("one line a request is always logged; --narrate logs its whole life"),
    "--log-requests-level": ForeignFlag("one line a request is always logged; --narrate logs its whole life"),
    "--log-requests-format": ForeignFlag("log lines are text", ("text",)),
    "--decode-log-interval": ForeignFlag("--narrate logs every decode step, and /metrics has the figures"),
    "--enable-trace": ForeignFlag("--otlp-endpoint sends OpenTelemetry spans"),
    "--crash-dump-folder": ForeignFlag("a failed process logs its traceback"),
    "--stream-interval": ForeignFlag("every token is sent as soon as it is there", ("1",)),
    "--incremental-streaming-output": ForeignFlag(
        "sglang's streams carry the text so far; POST /generate with `prompt` streams deltas"
    ),
    "--stream-response-default-include-usage": ForeignFlag('ask with stream_options: {"include_usage": true}'),
    "--warmups": ForeignFlag("the schedulers warm up by themselves"),
    "--sampling-defaults": ForeignFlag("chats take the model's recommended sampling", ("model",)),
    "--preferred-sampling-params": ForeignFlag("generation_config.json in the model's directory is where it goes"),
    "--allow-auto-truncate": ForeignFlag("a prompt that is too long is refused, never cut"),
    "--json-model-override-args": ForeignFlag("edit config.json in the model's directory"),
    "--is-embedding": ForeignFlag("embeddings are not served"),
    "--enable-multimodal": ForeignFlag("text is all that is served"),
    "--config": ForeignFlag("settings are flags and environment variables"),
    "--fastapi-root-path": ForeignFlag("the routes are at the root"),
}
"""By flag; those with a common beginning are in FOREIGN_PREFIXES."""

FOREIGN_PREFIXES: dict[str, ForeignFlag] = {
    "--speculative-": ForeignFlag("speculative decoding is not served"),
    "--lora-": ForeignFlag(_LORA),
    "--max-lora": ForeignFlag(_LORA),
    "--disaggregation-": ForeignFlag("prefill and decode run on the same device"),
    "--hicache-": ForeignFlag("the KV cache is in the device's memory alone"),
    "--moe-": ForeignFlag("mixtures of experts run as transformers runs them"),
    "--mm-": ForeignFlag("text is all that is served"),
    "--ssl-": ForeignFlag("put a proxy that speaks TLS before it"),
    "--grpc-": ForeignFlag("the server speaks HTTP"),
    "--enable-lora": ForeignFlag(_LORA),
}


def foreign_flag(name: str) -> ForeignFlag | None:
    """What is known of a flag that this server does not have."""
    if name in FOREIGN_FLAGS:
        return FOREIGN_FLAGS[name]
    return next((flag for prefix, flag in FOREIGN_PREFIXES.items() if name.startswith(prefix)), None)
