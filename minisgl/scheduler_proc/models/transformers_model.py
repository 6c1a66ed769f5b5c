"""Any Hugging Face causal LM that supports transformers' attention interface, on the paged KV pool.

transformers computes everything but attention. The model is told to use an attention implementation of ours by name;
it then calls `TransformersModel._attend` in every layer, with the whole step flattened to one sequence [1, tokens].
Since no mask function is registered under that name, transformers makes no mask, and positions come from us.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from minisgl.scheduler_proc.attention.backend import AttentionSpec, StepAttention
from minisgl.scheduler_proc.attention.kv_pool import KVShape
from minisgl.scheduler_proc.models.config import ModelError
from minisgl.scheduler_proc.models.forward_batch import ForwardBatch
from minisgl.scheduler_proc.models.linear import PLAIN, LinearMakers

logger = logging.getLogger(__name__)

# transformers' own annotations of these are incomplete.
_auto_model: Any = AutoModelForCausalLM
_logging: Any = transformers_logging

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_instances = itertools.count()


class TransformersModel:
    """A transformers model whose attention runs on the pool.

    Its layers' key-value shapes are found by one forward of two tokens without any cache, which also shows whether
    every layer comes to our attention with nothing that we would have to ignore.
    """

    def __init__(self, name: str) -> None:
        """`name` is the model's architecture, for errors. `adopt` completes the construction."""
        self.attention_name = f"minisgl_paged_{next(_instances)}"
        self.kv_shapes: Sequence[KVShape] = []
        self.own_bytes = 0
        self._name = name
        self._probed: dict[int, KVShape] = {}
        self._step: StepAttention | None = None
        self._specs: dict[int, AttentionSpec] = {}
        # transformers keeps attention implementations in a registry by name: one name for each model object.
        AttentionInterface.register(self.attention_name, self._attend)

    def adopt(self, module: Any, hf_config: Any) -> None:
        """Take the loaded model; raises ModelError if it cannot run on the pool."""
        self._module = module
        parameters = inspect.signature(module.forward).parameters
        self._slices_logits = "logits_to_keep" in parameters
        device = next(module.parameters()).device
        with torch.inference_mode():
            ids = torch.zeros((1, 2), dtype=torch.int32, device=device)
            self._module(input_ids=ids, position_ids=torch.arange(2, device=device)[None], use_cache=False)
        layers = hf_config.get_text_config().num_hidden_layers
        if sorted(self._probed) != list(range(layers)):
            raise self._refusal(
                f"{layers - len(self._probed)} of its {layers} layers do not use the attention interface"
            )
        self.kv_shapes = [self._probed[layer] for layer in range(layers)]

    @property
    def weight_bytes(self) -> int:
        return self.own_bytes + int(self._module.get_memory_footprint())

    def forward(self, batch: ForwardBatch, attention: StepAttention) -> torch.Tensor:
        """Logits [rows that sample, vocab] in the model's dtype."""
        self._step = attention
        rows = batch.sampled.long()
        extra = {"logits_to_keep": rows} if self._slices_logits else {}
        try:
            logits: torch.Tensor = self._module(
                input_ids=batch.input_ids[None], position_ids=batch.positions.long()[None], use_cache=False, **extra
            ).logits[0]
        finally:
            self._step = None
        return logits if self._slices_logits else logits[rows]

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """What every attention layer calls.

        Args:
            query: [1, heads, tokens, head_dim]; key and value [1, kv heads, tokens, head_dim].
            attention_mask, others: what other implementations use.

        Returns:
            [1, tokens, heads, value's head_dim], and no attention weights.
        """
        head_dim, value_dim = query.shape[-1], value.shape[-1]
        if self._step is None:
            self._probe(module, query, key, value, attention_mask, others)
            return value.new_zeros(1, query.shape[2], query.shape[1], value_dim), None
        layer = module.layer_idx
        if layer not in self._specs:
            scale = head_dim**-0.5 if scaling is None else float(scaling)
            self._specs[layer] = AttentionSpec(scale, sliding_window, softcap, s_aux)
        # Values narrower than keys (multi-head latent attention) are padded to share the pool's shape.
        key_value = torch.stack((key[0], F.pad(value[0], (0, head_dim - value_dim)))).permute(2, 0, 1, 3)
        attended = self._step.attend(layer, query[0].transpose(0, 1), key_value, self._specs[layer])
        return attended[None, ..., :value_dim], None

    def _probe(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        others: dict[str, Any],
    ) -> None:
        """Note a layer's shapes; raises ModelError for what the pool cannot do."""
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or layer in self._probed:
            raise self._refusal("its attention layers cannot be told apart by a layer_idx")
        if attention_mask is not None or others.get("position_bias") is not None:
            raise self._refusal("it makes attention masks or position biases of its own")
        if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
            raise self._refusal("its attention is not causal")
        if key.shape != (1, key.shape[1], query.shape[2], query.shape[3]) or value.shape[-1] > key.shape[-1]:
            raise self._refusal("its keys and values have shapes that the KV pool cannot keep")
        self._probed[layer] = KVShape(key.shape[1], key.shape[3])

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(f"{self._name} cannot run on the paged KV cache: {reason}")


def load_transformers_model(
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    context_length: int,
    dummy_seed: int | None,
    trust_remote_code: bool,
    linears: LinearMakers = PLAIN,
) -> TransformersModel:
    """Load a model with transformers' own code and weight conversions; raises ModelError."""
    _logging.disable_progress_bar()
    try:
        hf_config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"transformers cannot read the model's config.json: {error}") from None
    name = (hf_config.architectures or [type(hf_config).__name__])[0]
    model = TransformersModel(name)
    _refuse_unsupported(hf_config, name)
    _warn_of_growing_rope(hf_config, name, context_length)
    options = {"attn_implementation": model.attention_name, "dtype": dtype, "trust_remote_code": trust_remote_code}
    try:
        if dummy_seed is not None:
            torch.manual_seed(dummy_seed)
            module = _auto_model.from_config(hf_config, **options)
        else:
            module = _from_checkpoint(directory, name, hf_config, options)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"transformers cannot load {name} from {directory}: {error}") from None
    if getattr(module, "_is_stateful", False):
        raise ModelError(f"{name} cannot run on the paged KV cache: it keeps state besides keys and values")
    module = module.to(device).eval()
    model.own_bytes = _replace_products(module, linears)
    model.adopt(module, hf_config)
    return model


def _replace_products(module: Any, linears: LinearMakers) -> int:
    """Let the linear layers of a model multiply our way; the memory that this takes beside the model's own."""
    own_bytes = 0
    head = module.get_output_embeddings()
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    for part in module.modules():
        if type(part) is not nn.Linear:
            continue
        linear = (linears.head if part is head else linears.layer)(part.weight.detach(), part.bias)
        if linear.own_bytes:
            own_bytes += linear.own_bytes
            part.forward = linear  # type: ignore[method-assign, assignment]
            if id(part.weight) not in embeddings:
                part.weight = nn.Parameter(part.weight.new_empty(0), requires_grad=False)
    return own_bytes


def _refuse_unsupported(hf_config: Any, name: str) -> None:
    """Refuse what is known from the config alone, before any weight is read."""
    text_config = hf_config.get_text_config()
    other_layers = set(getattr(text_config, "layer_types", None) or ()) - _LAYER_TYPES
    if other_layers:
        raise ModelError(f"{name} cannot run on the paged KV cache: it has {min(other_layers)} layers")
    if getattr(hf_config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder; only decoder-only language models are served")
    if hasattr(hf_config, "auto_map"):
        # The model's own code: whether it uses the interface shows when it runs.
        return
    try:
        model_class = _auto_model._model_mapping[type(hf_config)]
    except KeyError:
        raise ModelError(f"{name} is not a causal language model that transformers knows") from None
    if not model_class._supports_attention_backend:
        raise ModelError(
            f"{name} does not support transformers' attention interface, which the paged KV cache needs; "
            f"choose another model"
        )


def _warn_of_growing_rope(hf_config: Any, name: str, context_length: int) -> None:
    """Say so when transformers would change the rotation of a whole step because of one long request in it."""
    text_config = hf_config.get_text_config()
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("dynamic", "longrope"):
        return
    trained = rope.get("original_max_position_embeddings") or text_config.max_position_embeddings
    if context_length > trained:
        logger.warning(
            "%s changes its position encoding beyond %d tokens, for every request that runs beside a longer one; "
            "--context-length %d avoids that",
            name,
            trained,
            trained,
        )


def _from_checkpoint(directory: Path, name: str, hf_config: Any, options: dict[str, Any]) -> Any:
    module, report = _auto_model.from_pretrained(
        directory,
        config=hf_config,
        local_files_only=True,
        # Anything else would be unpickled.
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"the checkpoint in {directory} lacks {len(missing)} tensors of {name}, such as {missing[0]}")
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        raise ModelError(f"tensor {mismatched[0][0]} in {directory} does not have the shape that config.json asks for")
    return module
