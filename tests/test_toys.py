"""Registering is being tested: every attack and defense must land in its declared band."""

import json
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from fedsim import registry
from fedsim.attack import ToyCase
from fedsim.engines.inline import run_inline
from fedsim.parts import Parts
from fedsim.scenario import Scenario

METHODS = [
    pytest.param(component.toy, id=f"{kind} {name}")
    for kind in ("attack", "defense")
    for name, component in registry.components(kind).items()
]


def part_of(whole: Any, key: str) -> Any:
    return whole[int(key)] if isinstance(whole, list) else whole[key]


@pytest.mark.parametrize("toy", METHODS)
def test_every_method_lands_in_its_band(toy: ToyCase, tmp_path: Path) -> None:
    scenario = Scenario.from_flat({**toy.scenario, "output.dir": str(tmp_path)})
    page = run_inline(scenario, "toy case")
    report = json.loads((page.parent / "report.json").read_text())
    figure: Any = reduce(part_of, toy.figure.split("."), report)
    assert toy.low <= figure <= toy.high, f"{toy.figure} = {figure}, not {toy.low} to {toy.high}"
    if attack := Parts(scenario).attack:
        assert set(report["threat_model"]["used"]) <= {need.value for need in attack.required}
