"""A bad scenario is refused before any client trains, in one message that says what is right."""

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.attack import Attack
from fedsim.client_app import app
from fedsim.defense import Defense, Rank
from fedsim.engines.inline import run_inline
from fedsim.errors import ScenarioError
from fedsim.parts import Parts, check, check_writable
from fedsim.scenario import Scenario, _flatten, known_keys, parse_override
from fedsim.threat import Capability
from tests.fedsim.bad_scenarios import BAD
from tests.fedsim.small import Watching, plug_in, scenario, watching

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class LinearOnly(Defense):
    rank = Rank.CLIP

    def check(self, model: torch.nn.Module, kind: str) -> None:
        if kind != "gradient":
            raise ValueError("acts on gradients; use federation.local = 'fedsgd(...)'")


@dataclass(frozen=True, kw_only=True)
class Late(Defense):
    rank = Rank.NOISE


@dataclass(frozen=True, kw_only=True)
class Choosy(Watching):
    """Needs more than its threat model may give, or a model it can read."""

    needs = frozenset({Capability.UPDATES, Capability.STATISTICS})


@dataclass(frozen=True, kw_only=True)
class Oracular(Watching):
    @property
    def oracles(self) -> frozenset[str]:
        return frozenset({"labels"})


@dataclass(frozen=True, kw_only=True)
class ConvolutionReader(Watching):
    def check(self, model: torch.nn.Module, kind: str) -> None:
        raise ValueError("reads a convolution, and this model has none; use model.name = 'lenet'")


@pytest.fixture
def _plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, defense in (("linear-only", LinearOnly), ("late", Late)):
        plug_in(monkeypatch, "defense", name, defense)
    attacks: dict[str, type[Attack]] = {
        "watching": watching(lambda views, knowledge: None),
        "choosy": Choosy,
        "oracular": Oracular,
        "convolution-reader": ConvolutionReader,
    }
    for name, attack in attacks.items():
        plug_in(monkeypatch, "attack", name, attack)


@pytest.mark.parametrize("case", BAD)
@pytest.mark.usefixtures("_plugins")
def test_a_bad_scenario_is_refused_in_one_message(case: str, tmp_path: Path) -> None:
    changes, key, said = BAD[case]
    with pytest.raises(ScenarioError) as refused:
        check(Parts(scenario(tmp_path / "runs", changes)))
    message = str(refused.value)
    assert message.startswith(f"{key} = ")
    assert said in message
    assert "\n" not in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"^federation\.device = 'cuda': no CUDA"):
        check(Parts(scenario(tmp_path, {"federation.device": "cuda"})))


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"attack": "nothing-like-it"}, "attack"), ({"output.dir": "/proc/runs"}, "output.dir")],
)
def test_a_refused_run_trains_nobody_and_writes_nothing(
    changes: dict[str, Any], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(*_: object) -> None:
        raise AssertionError("a client was asked to train")

    monkeypatch.setattr(type(app), "__call__", nobody)
    wanted = scenario(tmp_path / "runs").with_changes(**changes)
    with pytest.raises(ScenarioError, match=f"^{key} = "):
        run_inline(wanted, "a test")
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(ScenarioError, match="name another folder"):
            check_writable(folder)


def test_checking_the_output_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_defaults_are_those_that_flower_is_told() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    config = _flatten(declared["tool"]["flwr"]["app"]["config"])
    assert config == Scenario.from_flat({}).flat()
    assert list(config) == known_keys()
    types = {key: type(value) for key, value in config.items()}
    assert types == {key: type(value) for key, value in Scenario.from_flat({}).flat().items()}


@pytest.mark.parametrize("key", known_keys())
def test_a_value_of_a_wrong_type_is_refused_with_what_would_be_right(key: str) -> None:
    with pytest.raises(ScenarioError) as refused:
        Scenario.from_flat({key: [None]})
    assert re.fullmatch(r"write .+(, for instance .+| or .+)", refused.value.remedy)


def test_the_default_scenario_is_valid() -> None:
    check(Parts(Scenario.from_flat({})))


@pytest.mark.parametrize("file", sorted((ROOT / "scenarios").glob("*.toml")), ids=lambda p: p.stem)
def test_every_scenario_that_ships_is_valid(file: Path) -> None:
    check(Parts(Scenario.load(file)))


def test_a_scenario_survives_its_file(tmp_path: Path) -> None:
    wanted = scenario(tmp_path, {"title": 'quotes " and | bars \\', "seed": 2**62})
    (tmp_path / "scenario.toml").write_text(wanted.to_toml())
    assert Scenario.load(tmp_path / "scenario.toml") == wanted
    assert Scenario.from_flat(wanted.flat()) == wanted


@pytest.mark.parametrize(
    ("content", "said"),
    [("seed =", "not readable as TOML"), ("seed = 1\nseed = 2", "not readable as TOML")],
)
def test_a_file_that_is_no_toml_is_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "scenario.toml").write_text(content)
    with pytest.raises(ScenarioError, match=said):
        Scenario.load(tmp_path / "scenario.toml")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="no such file"):
        Scenario.load(tmp_path / "absent.toml")
    with pytest.raises(ScenarioError, match="not readable as TOML"):
        Scenario.load(tmp_path)


def test_a_key_is_overridden_in_place(tmp_path: Path) -> None:
    (tmp_path / "scenario.toml").write_text("[federation]\nclients = 3\nrounds = 2\n")
    overrides = parse_override("federation={rounds=5}")
    changed = Scenario.load(tmp_path / "scenario.toml", overrides).federation
    assert (changed.clients, changed.rounds) == (3, 5)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("seed=3", 3),
        ("federation.fraction=0.5", 0.5),
        ("audit.baseline=true", True),
        ("attack=robbing-the-fed(units=512)", "robbing-the-fed(units=512)"),
        ("attack='none'", "none"),
        ("threat-model=G", "G"),
        ("defenses=clip(norm=1.0) | gaussian(std=0.1)", "clip(norm=1.0) | gaussian(std=0.1)"),
    ],
)
def test_an_override_is_toml_or_plain_text(text: str, value: object) -> None:
    assert list(parse_override(text).values()) == [value]


def test_an_override_without_a_value_is_refused() -> None:
    with pytest.raises(ScenarioError, match="write key=value"):
        parse_override("seed")


def fedsim(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    code = "import sys; from fedsim.cli import main; sys.argv[0] = 'fedsim'; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("command", "override", "said"),
    [
        ("validate", "federation.client=3", "did you mean 'federation.clients'?"),
        ("validate", "federation.clients=eight", "write a whole number of at least 1, for in"),
        ("run", "threat-model=F", "robbing-the-fed needs surrogate; the least threat model is G"),
    ],
)
def test_the_command_refuses_with_status_2_and_writes_nothing(
    command: str, override: str, said: str, tmp_path: Path
) -> None:
    quickstart = str(ROOT / "scenarios" / "quickstart.toml")
    done = fedsim(command, quickstart, override, "output.dir=runs", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("fedsim: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
