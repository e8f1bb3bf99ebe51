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
from fedsim.defense import Defense
from fedsim.engines.inline import run_inline
from fedsim.errors import ScenarioError
from fedsim.parts import Parts, check, check_writable
from fedsim.scenario import Scenario, _flatten, known_keys, parse_override
from fedsim.threat import Capability
from tests.fedsim.small import Watching, plug_in, scenario, watching

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class LinearOnly(Defense):
    rank = 3

    def check(self, model: torch.nn.Module, kind: str) -> None:
        if kind != "gradient":
            raise ValueError("acts on gradients; use federation.local = 'fedsgd(...)'")


@dataclass(frozen=True, kw_only=True)
class Late(Defense):
    rank = 5


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


FEDAVG = {"federation.local": "fedavg(epochs=1, batch_size=8, lr=0.1)"}
# changes, the key that the message names, what it says
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown key": ({"federation.client": 3}, "federation.client", "'federation.clients'"),
    "unknown top-level key": ({"atack": "none"}, "atack", "did you mean 'attack'?"),
    "underscore for hyphen": ({"threat_model": "A"}, "threat_model", "'threat-model'"),
    "unknown table": ({"audits.criterion": "psnr>=20"}, "audits", "there is no such key"),
    "value for a table": ({"audit": 3}, "audit", "table, [audit]; there is: audit.criterion"),
    "key inside a value": ({"title.first": 3}, "title.first", "table; did you mean 'title'?"),
    "unknown attack": ({"attack": "wathcing"}, "attack", "did you mean 'watching'?"),
    "unknown defense": ({"defenses": "clpi"}, "defenses", "did you mean 'clip'?"),
    "unknown channel": ({"channel": "secag"}, "channel", "did you mean 'secagg'?"),
    "unknown model": ({"model.name": "convent"}, "model.name", "did you mean 'convnet'?"),
    "unknown data set": ({"data.dataset": "digit"}, "data.dataset", "did you mean 'digits'?"),
    "unknown partition": (
        {"data.partition": "dirichle(alpha=1.0)"},
        "data.partition",
        "did you mean 'dirichlet'?",
    ),
    "unknown strategy": (
        {"federation.strategy": "fedavgg"},
        "federation.strategy",
        "did you mean 'fedavg'?",
    ),
    "unknown local rule": (
        {"federation.local": "fedsdg()"},
        "federation.local",
        "did you mean 'fedsgd'?",
    ),
    "unknown threat model": ({"threat-model": "Z"}, "threat-model", "'A', 'B'"),
    "unknown policy": ({"model.batchnorm": "free"}, "model.batchnorm", "'frozen', 'shared'"),
    "unknown precision": ({"federation.precision": "half"}, "federation.precision", "'float32'"),
    "text for a number": ({"seed": "seven"}, "seed", "write a whole number of at least 0"),
    "number for text": ({"attack": 3}, "attack", "write text, for instance 'none'"),
    "truth for a number": ({"federation.rounds": True}, "federation.rounds", "a whole number"),
    "list": ({"defenses": ["clip"]}, "defenses", "write text"),
    "no clients": (
        {"federation.clients": 0},
        "federation.clients",
        "of at least 1, for instance 4",
    ),
    "threads that would crash the process": (
        {"federation.threads": 100_000},
        "federation.threads",
        "write a whole number of at least 0 and at most 1024, for instance 0",
    ),
    "no rounds": ({"federation.rounds": 0}, "federation.rounds", "of at least 1, for instance 1"),
    "negative seed": ({"seed": -1}, "seed", "of at least 0 and at most"),
    "too large a share": (
        {"federation.fraction": 1.5},
        "federation.fraction",
        "above 0 and at most 1",
    ),
    "share is no number": (
        {"federation.fraction": float("nan")},
        "federation.fraction",
        "above 0 and",
    ),
    "endless timeout": (
        {"federation.timeout": float("inf")},
        "federation.timeout",
        "most 31536000",
    ),
    "cohort of zero": ({"federation.fraction": 0.2}, "federation.fraction", "at least 0.25"),
    "argument of wrong type": (
        {"federation.local": "fedsgd(batch_size='two')"},
        "federation.local: fedsgd(batch_size)",
        "write a whole number of at least 1, for instance 8",
    ),
    "argument out of range": (
        {"defenses": "clip(norm=-1.0)"},
        "defenses: clip(norm)",
        "write a finite number above 0, for instance 1.0",
    ),
    "argument unknown": (
        {"model.name": "mlp(hiden=[3])"},
        "model.name: mlp(hiden)",
        "did you mean 'hidden'?",
    ),
    "argument without a name": (
        {"defenses": "clip(1.0)"},
        "defenses",
        "arguments need their names",
    ),
    "argument is an expression": (
        {"defenses": "clip(norm=abs(-1))"},
        "defenses",
        "must be a literal",
    ),
    "argument twice": ({"defenses": "clip(norm=1.0, norm=2.0)"}, "defenses", "stands there twice"),
    "strategy's argument unknown": (
        {"federation.strategy": "fedadam(eta_g=0.1)"},
        "federation.strategy: fedadam(eta_g)",
        "did you mean 'eta'? there is: eta, beta_1, beta_2, tau",
    ),
    "strategy's argument that Flower never reads": (
        {"federation.strategy": "fedadam(eta_l=0.5)"},
        "federation.strategy: eta_l",
        "Flower keeps it and never reads it; leave it out: clients train with the lr of "
        "federation.local",
    ),
    "strategy's argument out of range": (
        {"federation.strategy": "fedyogi(tau=0.0)"},
        "federation.strategy: fedyogi(tau)",
        "write a finite number above 0, for instance 0.001",
    ),
    "momentum that Flower would ignore": (
        {"federation.strategy": "fedavgm(server_momentum=-0.5)"},
        "federation.strategy: fedavgm(server_momentum)",
        "of at least 0 and below 1",
    ),
    "momentum that is none": (
        {"federation.strategy": "fedavgm"},
        "federation.strategy",
        "write fedavgm(server_momentum=0.9)",
    ),
    "trimming nobody": (
        {"federation.strategy": "fedtrimmedavg"},
        "federation.strategy",
        "of 4 uploads it trims none; let beta be at least 0.25",
    ),
    "trimming two": (
        {"federation.strategy": "fedtrimmedavg", "federation.clients": 2},
        "federation.strategy",
        "needs 3 uploads a round, not 2",
    ),
    "too few for Krum": (
        {"federation.strategy": "krum(num_malicious_nodes=50)"},
        "federation.strategy",
        "needs 103 uploads a round (2 num_malicious_nodes + 3), not 4",
    ),
    "fewer than nobody for Krum": (
        {"federation.strategy": "krum(num_malicious_nodes=-1)"},
        "federation.strategy: krum(num_malicious_nodes)",
        "of at least 0",
    ),
    "MultiKrum of more than there are": (
        {
            "federation.strategy": "multikrum(num_malicious_nodes=1, num_nodes_to_select=99)",
            "federation.clients": 6,
        },
        "federation.strategy",
        "choosing 99 of 6 uploads is averaging all; let num_nodes_to_select be at most 5",
    ),
    "MultiKrum with a malicious upload": (
        {
            "federation.strategy": "multikrum(num_malicious_nodes=2, num_nodes_to_select=6)",
            "federation.clients": 7,
        },
        "federation.strategy",
        "takes in a malicious one; let num_nodes_to_select be at most 5",
    ),
    "batch that no client can fill": (
        {"federation.local": "fedsgd(batch_size=1000)", "federation.clients": 10},
        "federation.local",
        "no client holds 1000 examples; let batch_size be at most 145",
    ),
    "policy for statistics that there are not": (
        {"model.batchnorm": "private"},
        "model.batchnorm",
        "mlp(hidden=[8]) has no BatchNorm; write 'frozen', or use a model that has it",
    ),
    "baseline of nothing": (
        {"audit.baseline": True},
        "audit.baseline",
        "the run is its own baseline; write false",
    ),
    "no output folder": ({"output.dir": ""}, "output.dir", "write text, not empty, for instance"),
    "seed beyond 64 bits": (
        {"seed": 2**63},
        "seed",
        "of at least 0 and at most 9223372036854775807, for instance 7",
    ),
    "strategy's argument is the range's": (
        {"federation.strategy": "fedavg(fraction_train=0.5)"},
        "federation.strategy: fraction_train",
        "federation.fraction",
    ),
    "partition's argument is the range's": (
        {"data.partition": "iid(num_partitions=3)"},
        "data.partition: iid(num_partitions)",
        "federation.clients",
    ),
    "proximal term that would be zero": (
        {"federation.strategy": "fedprox(proximal_mu=0.1)"},
        "federation.strategy",
        "fedavg(...)",
    ),
    "proximal term that is zero": (
        {"federation.strategy": "fedprox", **FEDAVG},
        "federation.strategy",
        "write fedprox(proximal_mu=0.1)",
    ),
    "too few for Bulyan": (
        {"federation.strategy": "bulyan(num_malicious_nodes=1)"},
        "federation.strategy",
        "needs 7 uploads a round",
    ),
    "median of one aggregate": (
        {"federation.strategy": "fedmedian", "channel": "secagg"},
        "federation.strategy",
        "one aggregate",
    ),
    "two attacks": ({"attack": "watching | watching"}, "attack", "one attack a run"),
    "attack stronger than its threat model": (
        {"attack": "choosy", "threat-model": "C"},
        "threat-model",
        "choosy needs statistics; the least threat model is E",
    ),
    "manipulation by an eavesdropper": (
        {"attack": "robbing-the-fed", "threat-model": "D"},
        "threat-model",
        "the least threat model is G",
    ),
    "attack on a model it cannot read": (
        {"attack": "convolution-reader"},
        "attack",
        "use model.name = 'lenet'",
    ),
    "oracle not granted": (
        {"attack": "oracular"},
        "oracles",
        "write oracles = 'labels', and the report wears a badge",
    ),
    "oracle granted and unused": ({"attack": "watching", "oracles": "labels"}, "oracles", "leave"),
    "oracle unknown": ({"attack": "watching", "oracles": "lables"}, "oracles", "'labels'"),
    "defense that cannot act": (
        {"defenses": "linear-only", **FEDAVG},
        "defenses",
        "use federation.local = 'fedsgd(...)'",
    ),
    "guarantee that shared statistics void": (
        {
            "defenses": "clip(norm=1.0) | gaussian(std=1.0)",
            "model.name": "resnet20(width=4)",
            "model.batchnorm": "shared",
        },
        "model.batchnorm",
        "void its guarantee; use 'frozen' or 'private'",
    ),
    "defenses in the wrong order": (
        {"defenses": "late | linear-only"},
        "defenses",
        "linear-only must come before late",
    ),
    "defense twice": ({"defenses": "late | late"}, "defenses", "late stands there twice"),
    "missing data folder": (
        {"data.dataset": "image-folder(path='/nowhere')"},
        "data.dataset",
        "/nowhere",
    ),
    "missing data file": (
        {"data.dataset": "tensors(path='/nowhere.safetensors')"},
        "data.dataset",
        "/nowhere.safetensors",
    ),
    "more clients than examples": (
        {"federation.clients": 100_000},
        "data.partition",
        "cannot be split among 100000 clients",
    ),
    "client without an example": (
        {"data.partition": "dirichlet(alpha=0.01)", "federation.clients": 40},
        "data.partition",
        "min_partition_size",
    ),
    "secure aggregation of one": (
        {"channel": "secagg", "federation.clients": 1},
        "channel",
        "at least 2 clients",
    ),
    "secure sum that overflows": (
        {"channel": "secagg(quantization_range=2147483648)"},
        "channel",
        "at most 1 clients, or a quantization_range of at most 1073741823",
    ),
    "batch too heavy for the secure sum": (
        {"channel": "secagg(max_weight=4)", "federation.local": "fedsgd(batch_size=16)"},
        "channel",
        "let max_weight be at least 16",
    ),
    "partition too heavy for the secure sum": (
        {"channel": "secagg(max_weight=8)", **FEDAVG},
        "channel",
        "let max_weight be at least 3",
    ),
    "bad criterion": ({"audit.criterion": "psnr=20"}, "audit.criterion", "psnr>=20"),
    "criterion of an unknown metric": ({"audit.criterion": "pnsr>=20"}, "audit.criterion", "psnr"),
}


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
