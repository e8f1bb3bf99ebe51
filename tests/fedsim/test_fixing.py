"""A model that a defense refuses has a neighbor that it takes, and `fedsim fix` names it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from fedsim.cli import app
from fedsim.data import DataSpec
from fedsim.errors import ScenarioError
from fedsim.fixing import fixes
from fedsim.models import build_model, group_normalized, mixing_layers, travelling
from fedsim.parts import Parts, check
from fedsim.scenario import Scenario
from tests.fedsim.small import scenario

SPEC = DataSpec((3, 32, 32), 10, (0.5,) * 3, (0.25,) * 3)
WITH, WITHOUT = (
    ["resnet20(width=4)", "convnet(width=8, norm='batch')"],
    ["mlp(hidden=[8])", "lenet"],
)


@pytest.mark.parametrize("expression", WITH + WITHOUT)
def test_opacus_has_the_same_opinion_of_a_model(expression: str) -> None:
    opacus = pytest.importorskip("opacus.validators")
    model = build_model(expression, SPEC)
    assert (not mixing_layers(model)) == opacus.ModuleValidator.is_valid(model)
    assert bool(mixing_layers(model)) == (expression in WITH)


@pytest.mark.parametrize(
    ("expression", "fixed"),
    [
        ("resnet20(width=4)", "resnet20(width=4, norm='group')"),
        (
            "convnet(width=8, norm='batch')",
            "group-normalized(of=\"convnet(width=8, norm='batch')\")",
        ),
    ],
)
def test_a_model_has_a_neighbor_without_batchnorm(expression: str, fixed: str) -> None:
    assert group_normalized(expression) == fixed
    before, after = build_model(expression, SPEC), build_model(fixed, SPEC)
    assert mixing_layers(after) == []
    assert sum(isinstance(layer, nn.GroupNorm) for layer in after.modules()) == len(
        mixing_layers(before)
    )
    weights = [p.shape for p in before.parameters()]
    assert [p.shape for p in after.parameters()] == weights
    images = torch.rand(3, *SPEC.shape)
    alone = torch.cat([after(image.unsqueeze(0)) for image in images])
    assert torch.allclose(after(images), alone, atol=1e-5)


@pytest.mark.parametrize("model", WITH)
@pytest.mark.parametrize("policy", ["frozen", "private"])
def test_what_fix_says_is_accepted(model: str, policy: str, tmp_path: Path) -> None:
    changes = {"defenses": "dp-sgd", "model.name": model, "model.batchnorm": policy}
    refused = scenario(tmp_path, changes)
    with pytest.raises(ScenarioError, match="normalizes over the batch"):
        check(Parts(refused))
    check(Parts(refused.with_changes(**fixes(refused))))


@pytest.mark.parametrize(
    ("defenses", "policy", "fixed"),
    [
        ("dropout | dp-sgd", "private", "private"),  # without it dropout would be off
        ("dropout | dp-sgd", "shared", "shared"),
        ("dropout | dp-sgd | local-dp", "shared", "private"),  # shared would void the guarantee
        ("dp-sgd", "private", "frozen"),  # there is none left to have a policy for
        ("dp-sgd", "frozen", "frozen"),
    ],
)
def test_the_policy_changes_only_where_the_users_does_not_pass(
    defenses: str, policy: str, fixed: str, tmp_path: Path
) -> None:
    changes = {"defenses": defenses, "model.name": WITH[1], "model.batchnorm": policy}
    refused = scenario(tmp_path, changes)
    found = fixes(refused)
    assert found.get("model.batchnorm") == (None if fixed == policy else fixed)
    check(Parts(refused.with_changes(**found)))


def test_weights_of_a_network_with_batchnorm_are_named_with_the_remedy(tmp_path: Path) -> None:
    changes = {"defenses": "dp-sgd", "model.name": WITH[0]}
    unweighted = scenario(tmp_path, changes)
    saved = tmp_path / "saved.safetensors"
    save_file(travelling(Parts(unweighted).model()), saved)
    refused = unweighted.with_changes(**{"model.weights": str(saved)})
    with pytest.raises(ScenarioError, match=r"network with BatchNorm, .* leave model.weights out"):
        fixes(refused)
    name = fixes(unweighted)["model.name"]
    save_file(travelling(Parts(unweighted).model(name)), saved)
    assert fixes(refused) == {"model.name": name}
    saved.unlink()
    with pytest.raises(ScenarioError, match="cannot be read"):
        fixes(refused)


def test_a_scenario_that_is_right_has_nothing_to_fix(tmp_path: Path) -> None:
    assert fixes(scenario(tmp_path, {"defenses": "dp-sgd"})) == {}
    assert fixes(scenario(tmp_path, {"model.name": WITH[0]})) == {}


def test_a_defense_that_brings_batchnorm_itself_is_named(tmp_path: Path) -> None:
    changes = {"defenses": "fedkl | dp-sgd", "model.name": "convnet(width=8)"}
    for model in ("convnet(width=8)", WITH[1]):
        both = scenario(tmp_path, {**changes, "model.name": model})
        with pytest.raises(ScenarioError, match=r"fedkl puts a layer into .* dp-sgd cannot carry"):
            fixes(both)
    assert fixes(scenario(tmp_path, {**changes, "defenses": "fedkl"})) == {}
    assert fixes(scenario(tmp_path, {**changes, "defenses": "pefl | dp-sgd"})) == {}


def test_the_command_prints_the_override_and_writes_the_file(tmp_path: Path) -> None:
    refused = scenario(tmp_path, {"defenses": "dp-sgd", "model.name": WITH[0]})
    file, out = tmp_path / "refused.toml", tmp_path / "fixed.toml"
    file.write_text(refused.to_toml())
    result = CliRunner().invoke(app, ["fix", str(file), "--out", str(out)])
    assert result.exit_code == 0
    assert "resnet20(width=4, norm=" in result.output
    fixed = Scenario.load(out)
    assert fixed.model.name == "resnet20(width=4, norm='group')"
    check(Parts(fixed))
    again = CliRunner().invoke(app, ["fix", str(out)])
    assert "nothing to fix" in again.output
