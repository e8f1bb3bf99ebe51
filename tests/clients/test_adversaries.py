"""The attack that a defense names as the one that knows of it can act on it."""

from pathlib import Path
from typing import Any

import pytest

from fedsim import registry
from fedsim.attack import Manipulation
from fedsim.parts import Parts, check
from tests.fedsim.small import scenario

NAMED = {n: made for n, made in registry.components("defense").items() if made.adversary}
#: What a defense asks for.
ASKED: dict[str, dict[str, Any]] = {
    "dropout": {"model.batchnorm": "private"},
    "lr-perturbation": {"federation.local": "fedavg(epochs=3, batch_size=1, lr=0.01)"},
}


@pytest.mark.parametrize("name", NAMED)
def test_it_passes_every_check_against_the_middle_strength(tmp_path: Path, name: str) -> None:
    made = NAMED[name]
    strengths = made.strengths or (name,)
    attack = registry.components("attack")[registry.parse(made.adversary, "attack")[0].name]
    active = issubclass(attack, Manipulation)
    changes = {
        "threat-model": "G" if active else "E",
        "attack": made.adversary,
        "defenses": strengths[len(strengths) // 2],
        "data.dataset": "photo-tiles",
        "model.name": "convnet(stride=2)",
        "federation.local": f"fedsgd(batch_size={8 if active else 1}, lr=0.1)",
    }
    check(Parts(scenario(tmp_path, {**changes, **ASKED.get(name, {})})))
