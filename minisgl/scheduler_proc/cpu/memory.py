"""What a step reads and writes, as addresses: plain numbers are all that compiled functions are given.

Arrays would work, too, but numba then compiles ten times as long: each of their uses counts references and checks
shapes. Elements are read and set with `get_...` and `set_...`, from an address and an index.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from numba import types

from minisgl.scheduler_proc.cpu.intrinsics import loader, storer

get_float, set_float = loader(types.float32), storer(types.float32)
get_byte, set_byte = loader(types.uint8), storer(types.uint8)
get_short, set_short = loader(types.uint16), storer(types.uint16)
get_word, set_word = loader(types.uint32), storer(types.uint32)
get_int, set_int = loader(types.int32), storer(types.int32)
get_long, set_long = loader(types.int64), storer(types.int64)


class Keeper:
    """Holds what has been given to compiled code as an address."""

    def __init__(self) -> None:
        self._held: list[Any] = []

    def address(self, value: npt.NDArray[Any] | torch.Tensor) -> int:
        """The address of a contiguous array's or tensor's first element, which stays valid while this lives."""
        self._held.append(value)
        if isinstance(value, torch.Tensor):
            return value.data_ptr()
        return int(value.ctypes.data)


class Shape(NamedTuple):
    """The model's sizes; `half` is head_dim / 2, `group` the query heads that share a key head.

    `rope_scaling` multiplies sines and cosines.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    group: int
    half: int
    intermediate: int
    vocab: int
    epsilon: float
    rope_scaling: float
    has_head_norms: bool


class Weights(NamedTuple):
    """A model. Matrices are packed (see tiles.pack), and narrow where they can be (see narrow.py).

    Norms and biases are float32; biases that a model lacks are zero.

    Attributes:
        embedding: bfloat16 [vocab, hidden].
        matrices: int64 [4 * layers + 1, 3], of each layer's qkv, output, gate_up and down and of the head the addresses
            of the packed matrix, 0 and 0; of a narrow one those of its data, pairs and patches.
        norms: [layers, 2, hidden], before attention and before the MLP.
        last_norm: [hidden].
        qkv_bias: [layers, (heads + 2 kv heads) * head_dim].
        head_norms: [layers, heads + kv heads, head_dim], if the model has them.
        output_bias, down_bias: [layers, hidden].
        gate_up_bias: [layers, 2 * intermediate].
        windows: int32 [layers], positions that a query sees, its own included.
        frequencies: [half], by which rotary angles grow from one position to the next.
    """

    embedding: int
    matrices: int
    norms: int
    last_norm: int
    qkv_bias: int
    head_norms: int
    output_bias: int
    gate_up_bias: int
    down_bias: int
    windows: int
    frequencies: int


class Screen(NamedTuple):
    """The head once more as bytes, to rule out columns with; see screening.py. Columns go on to a multiple of 32.

    Attributes:
        weight: int8, packed (see tiles.pack_bytes): each column of the head divided by its scale, rounded.
        scales: float32 [columns].
        offsets: int32 [columns], 128 times the sum of a column's bytes.
        errors: float32 [columns], lengths of the difference between the column and its bytes times the scale.
        lengths: float32 [columns], of the columns themselves.
    """

    weight: int
    scales: int
    offsets: int
    errors: int
    lengths: int


class Batch(NamedTuple):
    """A step's tokens, and the parts that they belong to: a decode row, or a chunk of a prompt. Addresses are of int32.

    Attributes:
        tokens, sampled_tokens, items: how many there are.
        input_ids: [tokens].
        token_parts: [tokens], the part that each belongs to.
        sampled: [sampled tokens], those that get logits.
        begins, starts, counts: [parts], a part's first token, that token's position, and how many there are.
        page_begins: [parts], where a part's page ids begin in `pages`.
        item_parts, item_firsts, item_tiles: [items], of each share of attention its part, its first tile of 16 query
            heads, and how many tiles it has.
    """

    tokens: int
    sampled_tokens: int
    items: int
    input_ids: int
    token_parts: int
    sampled: int
    begins: int
    starts: int
    counts: int
    page_begins: int
    pages: int
    item_parts: int
    item_firsts: int
    item_tiles: int


class Pool(NamedTuple):
    """The KV pool: int64 [layers], addresses. For the layout see attention.py."""

    layers: int
    page_size: int


class Buffers(NamedTuple):
    """Memory between phases; rows are filled up to a multiple of 32. What products read lies in tiles.

    Attributes:
        slots: int64 [rows], where keys and values go.
        cos, sin: float32 [rows, half].
        hidden: float32 [rows, hidden], the residual stream; `last_hidden` has the sampled rows' in the last layer.
        normed: bfloat16 [rows, hidden], in tiles.
        qkv: float32 [rows, (heads + 2 kv heads) * head_dim].
        query: bfloat16 [rows, heads * head_dim], rotated.
        attended: bfloat16 [rows, heads * head_dim], in tiles; `last_attended` has the sampled rows' in the last layer.
        activated: bfloat16 [rows, intermediate], in tiles.
        logits: float32 [sampled rows, vocab]; 0 if only the likeliest tokens are wanted.
        digits: uint8 [2 * sampled rows, hidden], in tiles, what the screen is multiplied with; 0 if the whole head is
            computed.
        facts: float32 [sampled rows, 3], of each row the size of a last digit, and what the errors and the lengths of
            columns are multiplied with to bound how far off the screen is.
        highs: int32 [pairs of blocks, sampled rows], the highest that a logit of a pair can be, see screening.ordered.
        lows: float32 [threads, sampled rows, 16], the highest of the values that logits have at least.
        thresholds: int32 [threads, sampled rows], the highest `lows` of all threads, once more for each.
        computed: int64 [threads], pairs of blocks that a thread did not rule out.
        largest: [threads, sampled rows, 2, 16], for each row the largest logits that a thread computed (float32), in
            sixteen columns, and the tokens (int32) whose they are: the first ones if several have them.
        largest_bytes: of one thread.
        likeliest: int64 [2, sampled rows], tokens, and whether their logits are finite.
    """

    slots: int
    cos: int
    sin: int
    hidden: int
    normed: int
    qkv: int
    query: int
    attended: int
    activated: int
    last_hidden: int
    last_attended: int
    logits: int
    digits: int
    facts: int
    highs: int
    lows: int
    thresholds: int
    computed: int
    largest: int
    largest_bytes: int
    likeliest: int


class Scratch(NamedTuple):
    """One thread's own memory.

    Attributes:
        thread: its number.
        instructions: which multiply, see instructions.py.
        sums: float32 [32, 32], a product's outputs.
        wide: room for a pair of blocks of the matrix with most inputs.
        shapes: of AMX's tiles, for products of 0 to 32 rows, 64 bytes each; `attention_shapes` those for attention.
        tiles: states of the tiles of queries that are computed together, see attention.py.
        blocks: int64 [2, blocks], addresses of the keys of a segment's blocks, and of the next one's.
        scores: float32 [2, SEGMENT, 16], of one or two tiles of queries, as all that follows.
        weights: words [2, SEGMENT / 2, 16], the softmax's numerators, two keys' bfloat16 each.
        shrink: float32 [2, 16], what the softmax's earlier sums are multiplied with.
    """

    thread: int
    instructions: int
    sums: int
    wide: int
    shapes: int
    attention_shapes: int
    tiles: int
    blocks: int
    scores: int
    weights: int
    shrink: int
