"""The demo model that ships inside the package: a tiny chat model in Qwen2 form.

The folder holds both the model (``config.json``, ``model.safetensors``, the tokenizer files) and
the programs that made it (``text_generator.py``, ``train.py``, ``evaluate.py``). The server needs
nothing but the folder's path, so importing this package stays free of heavy dependencies.
"""

from __future__ import annotations

import pathlib


def demo_model_dir() -> pathlib.Path:
    """Return the folder that holds the demo model's configuration, weights and tokenizer."""
    return pathlib.Path(__file__).resolve().parent
