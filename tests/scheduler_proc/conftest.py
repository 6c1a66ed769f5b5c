"""Fixtures of the model side; what they are made of is in tiny_models.py."""

from __future__ import annotations

import pytest
from tiny_models import GENERIC_FAMILIES, NATIVE_FAMILIES, Checkpoint, CheckpointMaker, make_module


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointMaker:
    """Makes the checkpoint of a family named above, once a session."""
    made: dict[str, Checkpoint] = {}

    def make(family: str) -> Checkpoint:
        if family not in made:
            module = make_module(*{**NATIVE_FAMILIES, **GENERIC_FAMILIES}[family])
            directory = tmp_path_factory.mktemp(family)
            module.save_pretrained(directory)
            made[family] = Checkpoint(directory, module)
        return made[family]

    return make
