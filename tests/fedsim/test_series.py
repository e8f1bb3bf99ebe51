"""A folder of scenarios in one command, each starting from what an earlier one trained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedsim import cli
from fedsim.engines.inline import run_inline
from fedsim.errors import RunFailed, ScenarioError
from fedsim.parts import Parts, check
from fedsim.report.series_page import write_series
from fedsim.resume import resume
from fedsim.run_folder import RunFolder
from fedsim.scenario import Scenario
from fedsim.series import run_series
from fedsim.view import SavedViews
from tests.fedsim.small import federated, latest, scenario
from tests.fedsim.test_cli import Fedsim, fedsim, refused  # noqa: F401 - a fixture

FEDAVG = {"federation.local": "fedavg(epochs=1, batch_size=8, lr=0.1)"}


def trained(folder: Path) -> Path:
    """Train two rounds; return the run's folder."""
    return federated(folder, {"federation.rounds": 2, **FEDAVG}).folder.path


def test_a_run_leaves_its_model_and_another_starts_from_it(tmp_path: Path) -> None:
    first = trained(tmp_path)
    weights = load_file(first / "model.safetensors")
    for named in (first, first / "model.safetensors"):
        changed = scenario(tmp_path, {"model.weights": str(named), "threat-model": "B"})
        model = Parts(changed).model()
        for name, tensor in model.named_parameters():
            assert torch.equal(tensor, weights[name])
    fresh = Parts(scenario(tmp_path)).model()
    assert not torch.equal(next(fresh.parameters()), next(model.parameters()))
    again = federated(tmp_path, {"model.weights": str(first), "threat-model": "B"})
    before = again.federation["accuracy"]["before"]
    told = json.loads((first / "federation.json").read_text())
    assert before == told["accuracy"]["after"]


@pytest.mark.parametrize(
    ("weights", "changes", "said"),
    [
        ("nowhere", {}, "name a .safetensors file or a run's folder"),
        ("here", {"model.name": "mlp(hidden=[9])"}, "not the weights of mlp"),
        ("garbage", {}, "cannot be read"),
        ("lost", {}, "body.0.bias is not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, weights: str, changes: dict[str, Any], said: str
) -> None:
    (tmp_path / "garbage").write_bytes(b"no tensors")
    save_file({"body.0.bias": torch.tensor([torch.nan])}, tmp_path / "lost")
    if weights == "here":
        (tmp_path / "here").symlink_to(trained(tmp_path))
    wanted = scenario(tmp_path, {"model.weights": str(tmp_path / weights), **changes})
    with pytest.raises(ScenarioError, match=said) as error:
        check(Parts(wanted))
    assert error.value.key == "model.weights"


NORMED = {
    "data.dataset": "photo-tiles",
    "model.name": "convnet(stride=2, width=4, norm='batch')",
    "federation.clients": 2,
}


def test_a_capture_outlives_the_file_its_model_began_with(tmp_path: Path) -> None:
    shared = {**FEDAVG, "model.batchnorm": "shared"}
    first = federated(tmp_path / "first", {**NORMED, **shared}).folder.path
    start = {"model.weights": str(first / "model.safetensors"), "threat-model": "E"}
    wanted = scenario(tmp_path, {**NORMED, **start, "attack": "inverting-gradients(iterations=2)"})
    folder = run_inline(wanted, "a test").parent
    (first / "model.safetensors").unlink()
    with pytest.raises(ScenarioError, match="cannot be read"):
        check(Parts(wanted))
    # It matches the statistics that were sent, which a network drawn anew does not have.
    normed = "see-through-gradients(iterations=51, seeds=1)"
    cli.attack(folder, normed)
    assert (folder / "attacks").is_dir()
    events = (folder / "events.jsonl").read_text().splitlines()
    short = [line for line in events if '"reconstructed"' not in line]
    (folder / "events.jsonl").write_text("\n".join(short) + "\n")
    assert resume(RunFolder.open(folder)).exists()
    at_first, sent = (Parts(wanted).sent_model(v) for v in ([], SavedViews(folder / "views")))
    assert not torch.equal(next(at_first.parameters()), next(sent.parameters()))


def test_a_capture_is_of_the_network_that_defenses_made(tmp_path: Path) -> None:
    changes = {**NORMED, "model.name": "convnet(stride=2, width=4)", "threat-model": "B"}
    changes |= {"attack": "inverting-gradients(iterations=2)", "defenses": "precode(bottleneck=8)"}
    folder = run_inline(scenario(tmp_path, changes), "a test").parent
    cli.attack(folder, "inverting-gradients(iterations=2, without=['bottleneck', 'fc.layer'])")
    assert (folder / "attacks").is_dir()


def test_a_view_whose_arrays_are_not_of_its_model_is_named(tmp_path: Path) -> None:
    ran = federated(tmp_path, {"attack": "linear-inversion"})
    view = ran.views[0]
    with pytest.raises(ScenarioError, match=r"round-1-client-0.*missing or unknown"):
        ran.parts.sent_model([replace(view, sent={})])


def written(folder: Path, name: str, changes: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.toml").write_text(
        scenario(folder.parent / "runs", {"threat-model": "B", **changes}).to_toml()
    )


def test_a_folder_is_run_in_order_and_compared(tmp_path: Path, fedsim: Fedsim) -> None:  # noqa: F811
    folder, runs = tmp_path / "series", tmp_path / "runs"
    written(folder, "1_train", {"output.dir": str(runs / "trained"), **FEDAVG})
    start = {"model.weights": str(runs / "trained" / "latest")}
    attack = {"attack": "linear-inversion", **start}
    written(folder, "2_attack", {**attack, "federation.local": "fedsgd(batch_size=1, lr=0.1)"})
    said = fedsim("run", folder, "federation.clients=2", "attack.layer='1'")
    assert said.status == 0, said.err
    rows = [line for line in said.out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| 1_train", "| 2_attack"]
    assert " 2 of 2 " in rows[3]
    assert (runs / "series.md").read_text().splitlines() == rows
    assert latest(runs).scenario.attack == "linear-inversion(layer='1')"
    # The link moves on, and what the run began with does not.
    assert latest(runs).scenario.model.weights == str((runs / "trained" / "latest").resolve())
    assert latest(runs / "trained").scenario.federation.clients == 2


def test_one_that_fails_leaves_the_others_standing(tmp_path: Path) -> None:
    folder = tmp_path / "series"
    for name in "abc":
        written(folder, name, {"title": name})
    ran = []

    def run_one(file: Path, _: list[str]) -> Path:
        ran.append(file.stem)
        if file.stem == "b":
            raise RunFailed("no round had a usable reply")
        place = tmp_path / "runs" / file.stem
        place.mkdir(parents=True)
        federation = '{"federation": {"accuracy": {"before": 0.1, "after": 0.2}}}'
        (place / "report.json").write_text(federation)
        return place / "report.html"

    with pytest.raises(RunFailed, match=r"b\.toml failed") as error:
        run_series(folder, run_one, [])
    assert ran == ["a", "b", "c"]
    assert "| c | 0.10 | 0.20 |" in str(error.value)
    page = (tmp_path / "runs" / "series.html").read_text()
    assert '<a href="c/report.html">c</a>' in page
    assert "failed: no round had a usable reply" in page
    assert not (tmp_path / "runs" / "series.png").exists()  # nobody was attacked
    with pytest.raises(ScenarioError, match="holds no scenario"):
        run_series(tmp_path / "runs", run_one, [])


def test_a_series_shows_accuracy_against_leak_rate(tmp_path: Path) -> None:
    head, page = ["scenario", "after"], tmp_path / "some.html"
    rows = [("a/report.html", ["a", "0.90"]), ("b/report.html", ["b <b>", "0.70"])]
    write_series(page, head, rows, {"a": (1.0, 0.9, ""), "b <b>": (0.25, 0.7, "")})
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in page.read_text()
    assert "b &lt;b&gt;" in page.read_text()


def test_one_argument_of_an_expression_is_changed_in_place(tmp_path: Path, fedsim: Fedsim) -> None:  # noqa: F811
    file = tmp_path / "one.toml"
    changes = {
        "attack": "linear-inversion(layer='1')",
        "defenses": "clip(norm=1.0) | prune(ratio=0.5)",
    }
    file.write_text(scenario(tmp_path, {"threat-model": "B", **changes}).to_toml())
    changed = Scenario.load(file, {"attack": {"layer": "2"}, "federation.local.lr": 0.5})
    assert changed.attack == "linear-inversion(layer='2')"
    assert changed.federation.local == "fedsgd(batch_size=2, lr=0.5)"
    nested = Scenario.load(file, {"attack": "shuffled(of='dlg')", "attack.of.lr": 2.0})
    assert nested.attack == "shuffled(of='dlg(lr=2.0)')"
    refused(fedsim("validate", file, "defenses.norm=2.0"), "defenses.norm", "not one expression")
    refused(fedsim("validate", file, "attack.layers='1'"), "no such parameter", "'layer'")
    refused(fedsim("validate", file, "title.first=3"), "not a table")
    other = Scenario.load(file, {"attack.lr": 2.0, "attack": "dlg"})
    assert other.attack == "dlg(lr=2.0)"


def test_what_is_wrong_is_refused_before_the_first_one_runs(tmp_path: Path) -> None:
    folder = tmp_path / "series"
    written(folder, "1_train", FEDAVG)
    written(folder, "2_attack", {"attack": "linear-inversion"})

    def nothing_runs(file: Path, _: list[str]) -> Path:
        raise AssertionError(file)

    for override, key in (
        ("attack.layers='1'", "attack.layers"),
        ("attack.layer=[1]", "attack"),
        ("sed=3", "sed"),
    ):
        with pytest.raises(ScenarioError) as error:
            run_series(folder, nothing_runs, [override])
        assert error.value.key.startswith(key)
