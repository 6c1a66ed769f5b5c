"""Turns generated documents into packed rows of token ids, in parallel processes.

A row is an array of 16-bit words: the token id, one bit for "the model learns this token" and one
for "a document starts here". Documents never straddle rows, so no document loses its beginning.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pathlib
from functools import partial

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .text_generator import END_OF_TEXT, Segment, documents

LEARNED_BIT = 1 << 15
START_BIT = 1 << 14
ID_MASK = START_BIT - 1
OPEN_ROWS = 24
SHARDS = 64


def encode(tokenizer: Tokenizer, batch: list[list[Segment]]) -> list[NDArray[np.uint16]]:
    """Encode documents; segments meet at special tokens or newlines, so they encode alone."""
    flat = [segment for document in batch for segment in document]
    encodings = iter(tokenizer.encode_batch_fast([segment.text for segment in flat]))
    encoded = []
    for document in batch:
        words: list[int] = []
        for segment in document:
            ids = next(encodings).ids
            words.extend([word | LEARNED_BIT for word in ids] if segment.learned else ids)
        words[0] |= START_BIT
        encoded.append(np.array(words, dtype=np.uint16))
    return encoded


def pack_shard(shard: int, *, seed: int, tokenizer_path: pathlib.Path, context: int, rows: int) -> NDArray[np.uint16]:
    """Generate documents of one shard and fill its rows; gaps are padded and not learned."""
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    padding = tokenizer.token_to_id(END_OF_TEXT)
    stream = documents(seed * 100_003 + shard)
    finished: list[NDArray[np.uint16]] = []
    open_rows: list[list[NDArray[np.uint16]]] = [[] for _ in range(OPEN_ROWS)]
    room = [context] * OPEN_ROWS
    while len(finished) < rows:
        for words in encode(tokenizer, list(itertools.islice(stream, 256))):
            # The cut-off end of an overlong conversation is lost, its beginning is not.
            words = words[:context]
            fitting = [index for index in range(OPEN_ROWS) if room[index] >= len(words)]
            if fitting:
                index = min(fitting, key=room.__getitem__)
            else:
                index = min(range(OPEN_ROWS), key=room.__getitem__)
                gap = np.full(room[index], padding, dtype=np.uint16)
                gap[:1] |= START_BIT
                finished.append(np.concatenate([*open_rows[index], gap]))
                open_rows[index], room[index] = [], context
            open_rows[index].append(words)
            room[index] -= len(words)
    return np.stack(finished[:rows])


class RowBuilder:
    """Builds rows in the background; the result does not depend on the number of workers.

    Start it before anything uses the GPU: the processes are forked, which saves each of them from
    loading PyTorch anew.
    """

    def __init__(self, *, seed: int, tokenizer_path: pathlib.Path, context: int, rows: int, workers: int) -> None:
        self._rows = rows
        pack = partial(
            pack_shard,
            seed=seed,
            tokenizer_path=tokenizer_path,
            context=context,
            rows=-(-rows // SHARDS),
        )
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._pool = multiprocessing.get_context("fork").Pool(workers)
        self._result = self._pool.map_async(pack, range(SHARDS), chunksize=1)

    def result(self) -> NDArray[np.uint16]:
        """Wait for the rows."""
        rows = np.concatenate(self._result.get())[: self._rows]
        self._pool.close()
        self._pool.join()
        return rows
