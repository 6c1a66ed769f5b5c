"""Trains the demo model and writes ``model.safetensors`` and its configuration files.

Run as ``python -m minisgl.demo_model.train --out FOLDER``; README.md gives the command that made
the committed weights. The tokenizer must have been trained before (``train_tokenizer.py``).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import time

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from . import demo_model_dir
from .network import Mask, Network, NetworkConfig
from .packing import ID_MASK, LEARNED_BIT, START_BIT, RowBuilder
from .text_generator import END_OF_TEXT, IM_END


def unpack(words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids, labels (next token, -100 where nothing is learned) and document numbers."""
    words = words.to(torch.int32) & 0xFFFF
    ids = (words & ID_MASK).long()
    owner = ((words & START_BIT) != 0).cumsum(-1)
    learned = (words[:, 1:] & LEARNED_BIT) != 0
    learned &= owner[:, 1:] == owner[:, :-1]
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = torch.where(learned, ids[:, 1:], -100)
    return ids, labels, owner


def document_mask(owner: Tensor) -> Mask:
    """Return the mask that lets each token see the earlier tokens of its own document."""
    rows, length = owner.shape
    if owner.device.type == "cpu":
        same = owner[:, None, :, None] == owner[:, None, None, :]
        return same & torch.ones(length, length, dtype=torch.bool).tril()

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (owner[row, query] == owner[row, key])

    return create_block_mask(visible, rows, None, length, length, device=owner.device)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate: a linear warm-up, then a cosine down to a fiftieth of the peak."""
    warm_up = min(200, steps // 10 + 1)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class Trainer:
    """Holds the network, its optimizer and, on a GPU, their compiled forms."""

    def __init__(self, network: Network, device: str, peak_rate: float) -> None:
        self.device = device
        self.network = network.to(device)
        matrices = [p for p in network.parameters() if p.dim() == 2]
        others = [p for p in network.parameters() if p.dim() != 2]
        on_gpu = device != "cpu"
        self.peak_rate = peak_rate
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=peak_rate,
            betas=(0.9, 0.95),
            fused=on_gpu,
        )
        self._forward = torch.compile(network) if on_gpu else network
        self._mask = torch.compile(document_mask) if on_gpu else document_mask

    def gradients(self, words: Tensor) -> Tensor:
        """Compute the gradients for a batch of packed rows and return the loss."""
        ids, labels, owner = unpack(words)
        mask = self._mask(owner)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            loss: Tensor = self._forward(ids, labels, mask)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        return loss.detach()

    def compile(self, rows: int, context: int) -> None:
        """Compile by running one batch, whose gradients the next batch discards."""
        word = 1 - LEARNED_BIT  # as a signed number: token 1, learned
        self.gradients(torch.full((rows, context), word, dtype=torch.int16, device=self.device))
        if self.device != "cpu":
            torch.cuda.synchronize()

    def train(self, data: Tensor, steps: int, rows: int, seed: int, report_every: int) -> None:
        """Run the training steps over shuffled rows."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(data), generator=generator)
        place = 0
        started = time.perf_counter()
        total = torch.zeros((), device=self.device)
        for step in range(steps):
            if place + rows > len(order):
                order, place = torch.randperm(len(data), generator=generator), 0
            chosen = order[place : place + rows].to(self.device)
            place += rows
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, self.peak_rate)
            total += self.gradients(data[chosen])
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            if (step + 1) % report_every == 0:
                mean = total.item() / report_every
                total.zero_()
                seconds = time.perf_counter() - started
                print(f"step {step + 1} loss {mean:.4f} after {seconds:.0f} s", flush=True)


def export(network: Network, config: NetworkConfig, tokenizer: Tokenizer, out: pathlib.Path) -> None:
    """Write the weights in bfloat16 and the configuration files."""
    weights = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in network.state_dict().items()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    pad_id, im_end_id = (tokenizer.encode(token).ids[0] for token in (END_OF_TEXT, IM_END))
    end_ids = [im_end_id, pad_id]
    generation = {
        "bos_token_id": pad_id,
        "do_sample": False,
        "eos_token_id": end_ids,
        "pad_token_id": pad_id,
    }
    files = {
        "config.json": config.to_transformers(end_ids, pad_id),
        "generation_config.json": generation,
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="ascii")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--steps", type=int, default=7800)
    parser.add_argument("--rows", type=int, default=16, help="rows in a step")
    parser.add_argument("--context", type=int, default=4096, help="tokens in a row")
    parser.add_argument("--total-rows", type=int, default=32_768, help="rows generated")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--report-every", type=int, default=250)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Generate, train and export."""
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer_path = demo_model_dir() / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    started = time.perf_counter()
    builder = RowBuilder(
        seed=arguments.seed,
        tokenizer_path=tokenizer_path,
        context=arguments.context,
        rows=arguments.total_rows,
        workers=arguments.workers,
    )
    config = NetworkConfig(vocabulary_size=tokenizer.get_vocab_size())
    network = Network(config)
    print(f"{sum(p.numel() for p in network.parameters())} parameters", flush=True)
    trainer = Trainer(network, arguments.device, arguments.rate)
    trainer.compile(arguments.rows, arguments.context)
    print(f"compiled after {time.perf_counter() - started:.0f} s", flush=True)
    rows = builder.result()
    print(f"generated {rows.size} tokens after {time.perf_counter() - started:.0f} s", flush=True)
    # PyTorch indexes signed 16-bit integers on every device, unsigned ones not.
    data = torch.from_numpy(rows.view("int16")).to(arguments.device)
    trainer.train(data, arguments.steps, arguments.rows, arguments.seed, arguments.report_every)
    export(network, config, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
