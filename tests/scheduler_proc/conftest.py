"""Fixtures of the model side; what they are made of is in tiny_models.py.

torch and transformers take seconds to import, so they are not imported here: the scheduler's own tests need neither.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tiny_models import Checkpoint, CheckpointMaker


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from threads, which spin while they wait and so slow down whatever runs beside."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointMaker:
    """Makes the checkpoint of a family that tiny_models.py names, once a session."""
    import tiny_models

    made: dict[str, Checkpoint] = {}

    def make(family: str) -> Checkpoint:
        if family not in made:
            families = {**tiny_models.NATIVE_FAMILIES, **tiny_models.GENERIC_FAMILIES}
            module = tiny_models.make_module(*families[family])
            directory = tmp_path_factory.mktemp(family)
            module.save_pretrained(directory)
            made[family] = tiny_models.Checkpoint(directory, module)
        return made[family]

    return make
