"""The commands as people type them: what they print, what they refuse, what they leave alone."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedsim import cli, registry
from fedsim.reconstructions import slug
from fedsim.run_folder import RunFolder
from fedsim.scenario import Scenario
from fedsim.threat import Capability
from tests.fedsim.small import latest, meddling, nudge, plug_in, scenario, watching

ROOT = Path(__file__).parents[2]
ONE_LAYER = "linear-inversion(layer='1')"


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str


Fedsim = Callable[..., Said]


@pytest.fixture
def fedsim(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fedsim:
    """Run one ``fedsim`` command in this process."""

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["fedsim", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Said(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def run(tmp_path: Path, fedsim: Fedsim) -> Callable[..., Path]:
    """Run a small scenario; return its folder."""

    def run(**changes: Any) -> Path:
        given = {
            "attack": "linear-inversion",
            **{k.replace("_", "-"): v for k, v in changes.items()},
        }
        file = tmp_path / "small.toml"
        file.write_text(scenario(tmp_path / "runs", given).to_toml())
        said = fedsim("run", file)
        assert said.status == 0, said.err
        folder = latest(tmp_path / "runs").path
        assert said.out.splitlines()[-1] == str(folder / "report.html")
        return folder

    return run


def kept(folder: Path) -> dict[str, bytes]:
    """Return every file of a run but those of other attacks on it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: content for name, content in found.items() if not name.startswith("attacks/")}


def report_of(said: Said) -> dict[str, Any]:
    assert said.status == 0, said.err
    page = Path(said.out.splitlines()[-1])
    found: dict[str, Any] = json.loads(page.with_name("report.json").read_text())
    return found


def refused(said: Said, *words: str, status: int = 2) -> None:
    assert said.status == status, said
    assert said.err.splitlines()[-1].startswith("fedsim: ")
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err


# -- list, explain, validate -----------------------------------------------------------------------


def test_list_names_methods_and_filters_them(fedsim: Fedsim) -> None:
    every = fedsim("list", "attacks").out.splitlines()
    assert any(line.startswith("linear-inversion ") for line in every)
    some = fedsim("list", "attacks", "LINEAR-inversion").out.splitlines()
    assert some
    assert set(some) < set(every)


def names(said: Said) -> set[str]:
    return {line.split()[0] for line in said.out.splitlines()}


@pytest.mark.parametrize("what", ["attacks", "defenses"])
def test_every_method_is_listed_with_its_family_and_its_paper(what: str, fedsim: Fedsim) -> None:
    """The family is where its file lies; the paper's authors may be cut to the first."""
    kind = what.removesuffix("s")
    for line in fedsim("list", what).out.splitlines():
        method: Any = registry.components(kind)[line.split()[0]]
        family = "/".join(method.__module__.split(".")[2:-1])
        assert f"  {family} " in line
        first = method.paper.authors.split(", ")[0].split()[-1]
        assert re.search(rf" \[{first}.*, {method.paper.venue} {method.paper.year}\]$", line)
        assert f"\nfamily     {family}\n" in fedsim("explain", method.name).out


def test_methods_are_filtered_by_family_and_threat_model(fedsim: Fedsim) -> None:
    every = {
        line.split()[0]: line.split()[1:3] for line in fedsim("list", "attacks").out.splitlines()
    }
    analytic = {name for name, (_, family) in every.items() if family.startswith("analytic/")}
    manipulating = {name for name, (letter, _) in every.items() if letter == "G"}
    assert "linear-inversion" in analytic - manipulating
    assert "robbing-the-fed" in analytic & manipulating
    assert names(fedsim("list", "attacks", "analytic")) == analytic < every.keys()
    assert names(fedsim("list", "attacks", "G")) == manipulating < every.keys()
    assert names(fedsim("list", "attacks", "G", "analytic")) == analytic & manipulating
    assert "robbing-the-fed" in names(fedsim("list", "attacks", "analytic/isolation"))
    assert "gaussian" in names(fedsim("list", "defenses", "formal"))
    assert "clip" not in names(fedsim("list", "defenses", "formal"))
    assert "clip" in names(fedsim("list", "defenses", "A"))  # which have no threat model: text
    assert "quickstart.toml" in names(fedsim("list", "scenarios", "G"))
    assert "honest.toml" not in names(fedsim("list", "scenarios", "G"))


@pytest.mark.parametrize("what", [what.value for what in cli.Listed])
def test_there_is_something_of_every_kind(what: str, fedsim: Fedsim) -> None:
    said = fedsim("list", what)
    assert said.status == 0
    assert said.out.strip()


def test_explain_gives_paper_threat_model_and_parameters(fedsim: Fedsim) -> None:
    said = fedsim("explain", "inverting-gradients")
    assert said.status == 0
    for word in ("paper ", "threat     B", "parameters ", "iterations = "):
        assert word in said.out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "FedAdam",
            (
                "fedadam  (strategy; Flower's FedAdam, flwr ",
                'scenario   federation.strategy = "fedadam"\n',
                "parameters eta = 0.1                            Server-side learning rate\n",
                "beta_2 = 0.99",
            ),
        ),
        (
            "dirichlet",
            (
                "dirichlet  (partitioner; Flower's DirichletPartitioner, flwr_datasets ",
                'scenario   data.partition = "dirichlet(alpha=0.5)"\n',
                "parameters alpha = required                     Concentration parameter",
                "min_partition_size = 10",
            ),
        ),
        ("dirichlet(alpha=0.5)", ("alpha = required",)),
        ("iid", ("Flower's IidPartitioner",)),
        ("convnet", ("width = 32",)),
        ("image-folder", ("path = required",)),
        ("fedavg", ("(local; clients.trainer)", "(strategy; Flower's FedAvg")),
    ],
)
def test_explain_knows_all_that_a_scenario_names(
    name: str, words: tuple[str, ...], fedsim: Fedsim
) -> None:
    said = fedsim("explain", name)
    assert said.status == 0
    for word in words:
        assert word in said.out
    assert "num_partitions = " not in said.out  # the range's own
    assert "fraction_train" not in said.out


def test_explain_knows_all_that_is_listed(fedsim: Fedsim) -> None:
    for what in set(cli.Listed) - {cli.Listed.SCENARIOS}:
        for line in fedsim("list", what.value).out.splitlines():
            assert fedsim("explain", line.split()[0]).status == 0


def test_explain_helps_with_a_misspelled_name(fedsim: Fedsim) -> None:
    refused(fedsim("explain", "linear-inversoin"), "did you mean 'linear-inversion'?")
    refused(fedsim("explain", "FedAdm"), "did you mean 'fedadam'?")
    refused(fedsim("explain", "dirichlt"), "did you mean 'dirichlet'?")


def test_validate_accepts_and_runs_nothing(fedsim: Fedsim, tmp_path: Path) -> None:
    file = tmp_path / "small.toml"
    file.write_text(scenario(tmp_path / "runs", {"attack": "linear-inversion"}).to_toml())
    assert fedsim("validate", file).out == f"{file}: a valid scenario\n"
    assert not (tmp_path / "runs").exists()
    refused(fedsim("validate", file, "federation.client=3"), "did you mean 'federation.clients'?")
    refused(fedsim("validate", file, "seed"), "write key=value")
    refused(fedsim("validate", tmp_path / "none.toml"), "no such file")


# -- attack, report --------------------------------------------------------------------------------


def test_another_attack_has_a_report_of_its_own_and_changes_nothing(
    run: Callable[..., Path], fedsim: Fedsim
) -> None:
    folder = run()
    before = kept(folder)
    said = fedsim("attack", folder, ONE_LAYER)
    page = Path(said.out.splitlines()[-1])
    assert page == folder / "attacks" / slug(ONE_LAYER) / "report.html"
    found = report_of(said)
    assert found["attack"]["expression"] == ONE_LAYER
    assert found["title"] == f"small: {ONE_LAYER}"
    assert found["leak"]["private_examples"] == 8
    assert found["environment"]["repeat"].startswith(f"fedsim attack {folder} ")
    assert found["environment"]["repeat"] == found["environment"]["command"]
    assert kept(folder) == before


def test_a_capture_is_attacked_under_another_threat_model_and_criterion(
    run: Callable[..., Path], fedsim: Fedsim
) -> None:
    folder = run(threat_model="A")
    expression = "inverting-gradients(iterations=2)"
    refused(fedsim("attack", folder, expression), "the least threat model is B")
    changes = ["threat-model=B", "audit.criterion=psnr>=5"]
    found = report_of(fedsim("attack", folder, expression, *changes))
    assert found["threat_model"]["letter"] == "B"
    assert found["scenario"]["audit"]["criterion"] == "psnr>=5"
    assert Scenario.load(folder / "scenario.toml").threat_model == "A"
    again = report_of(fedsim("attack", folder, expression, "threat-model=C"))
    assert again["threat_model"]["letter"] == "C"
    assert len(list((folder / "attacks").iterdir())) == 2


@pytest.mark.parametrize("change", ["seed=3", "federation.clients=2", "defenses=none", "title=x"])
def test_what_the_capture_was_made_with_is_fixed(
    change: str, run: Callable[..., Path], fedsim: Fedsim
) -> None:
    refused(fedsim("attack", run(), ONE_LAYER, change), "the capture is fixed")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("attack.layer=0", ["attack.layer = 0", "write 'linear-inversion(layer=0)'"]),
        ("attack.steps=5", ["write \"linear-inversion(layer='1', steps=5)\""]),
        ("attack=dlg", ["attack = 'dlg'", ONE_LAYER, "leave this out"]),
    ],
)
def test_parameters_of_another_attack_belong_in_its_expression(
    change: str, says: list[str], run: Callable[..., Path], fedsim: Fedsim
) -> None:
    refused(fedsim("attack", run(), ONE_LAYER, change), *says)


def test_no_attack_is_no_attack(run: Callable[..., Path], fedsim: Fedsim) -> None:
    folder = run()
    refused(fedsim("attack", folder, "none"), "attack = 'none'", "name an attack")
    assert not (folder / "attacks").exists()


def test_a_manipulation_works_only_on_the_capture_it_made(
    run: Callable[..., Path], fedsim: Fedsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(
        monkeypatch, "attack", "meddling", meddling(lambda arrays, k: (nudge(arrays), k.surrogate))
    )
    plug_in(monkeypatch, "attack", "other", meddling(lambda arrays, knowledge: None))
    folder = run(attack="meddling", threat_model="G")
    said = fedsim("attack", folder, "other")
    refused(said, "the capture was made by another attack (meddling)", "run it anew")
    used = json.loads((folder / "report.json").read_text())["threat_model"]["used"]
    assert used == [Capability.SURROGATE.value, Capability.MANIPULATION.value]
    assert report_of(fedsim("attack", folder, "meddling()"))["threat_model"]["used"] == used


def test_grants_used_to_make_the_capture_stay_used(
    run: Callable[..., Path], fedsim: Fedsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(
        monkeypatch, "attack", "meddling", meddling(lambda arrays, k: (nudge(arrays), k.surrogate))
    )
    folder = run(attack="meddling", threat_model="G")
    used = report_of(fedsim("attack", folder, "linear-inversion"))["threat_model"]["used"]
    made = {Capability.MANIPULATION.value, Capability.SURROGATE.value}
    assert made | {Capability.UPDATES.value} <= set(used)
    said = fedsim("attack", folder, "linear-inversion", "threat-model=F")
    refused(said, "the capture was made with", "the least threat model is G")


def test_an_attack_that_cannot_work_says_so_without_a_traceback(
    run: Callable[..., Path], fedsim: Fedsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(views: object, knowledge: object) -> None:
        raise ValueError("seven labels for eight images")

    plug_in(monkeypatch, "attack", "cannot", watching(cannot))
    folder = run()
    before = kept(folder)
    said = fedsim("attack", folder, "cannot")
    refused(said, "cannot work on these views: seven labels for eight images", status=1)
    assert kept(folder) == before


def test_attacks_stand_beside_each_other_not_inside(
    run: Callable[..., Path], fedsim: Fedsim
) -> None:
    folder = run()
    fedsim("attack", folder, ONE_LAYER)
    inner = folder / "attacks" / slug(ONE_LAYER)
    refused(fedsim("attack", inner, ONE_LAYER), "name the run's folder itself")


def test_report_judges_a_run_and_an_attack_on_it_again(
    run: Callable[..., Path], fedsim: Fedsim
) -> None:
    folder = run()
    report_of(fedsim("attack", folder, ONE_LAYER))
    for again in (folder, folder / "attacks" / slug(ONE_LAYER)):
        before = json.loads((again / "report.json").read_text())
        (again / "report.json").unlink()
        assert report_of(fedsim("report", again)) == before
    refused(fedsim("report", folder.parent), "not a run folder")


# -- how to repeat a run ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "command", "start"),
    [
        ("inline", "fedsim run x.toml", "fedsim run {} --engine inline"),
        ("simulation", "fedsim run x.toml", "fedsim run {} --engine simulation"),
        ("simulation", "flwr run", "flwr run . --run-config {}"),
        ("cluster", "flwr run", "flwr run . --run-config {}"),
    ],
)
def test_a_run_is_repeated_the_way_it_was_run(
    engine: str, command: str, start: str, tmp_path: Path
) -> None:
    made = RunFolder.create(scenario(tmp_path), run_id=1, engine=engine, command=command)
    assert made.environment["repeat"] == start.format(made.path / "scenario.toml")


def test_the_command_repeats_a_run_as_its_report_says(run: Callable[..., Path]) -> None:
    """In a process of its own, as a shell would."""
    folder = run()
    words = RunFolder.open(folder).environment["repeat"].split()
    assert words[0] == "fedsim"
    code = "import sys; from fedsim.cli import main; sys.argv[0] = 'fedsim'; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words[1:]],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = json.loads(Path(done.stdout.splitlines()[-1]).with_name("report.json").read_text())
    before = json.loads((folder / "report.json").read_text())
    assert again["run"] != before["run"]
    assert again["leak"]["psnr"] == before["leak"]["psnr"]
