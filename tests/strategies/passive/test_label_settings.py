"""Label rules refuse, before any client trains, views of more examples than they can read."""

from pathlib import Path

import pytest

from fedsim import registry
from fedsim.attack import Setting
from fedsim.models import initial_model
from fedsim.parts import Parts
from fedsim.threat import TrainingDetails
from strategies.attacks.labels.rule import LabelRule
from tests.fedsim.small import scenario
from tests.strategies.passive.honest import spec

REFUSED = {
    "idlg": (1, "up to 2 examples and the idlg rule is for one; use labels='analytic'"),
    "gradinversion": (10, "up to 11 examples of 10 classes, and the gradinversion rule names no"),
    "rlg": (9, r"up to 10 examples and the rlg rule needs fewer .*\(10, 64\)"),
}


def setting(
    examples: tuple[int, ...], kind: str = "weights", batch_size: int = 4, channel: str = "plain"
) -> Setting:
    model = initial_model("mlp(hidden=[64])", spec(), 0)
    training = TrainingDetails(kind, 0.1, batch_size, 1, 0.0, 0.0)
    parts = Parts(scenario(Path("unused"), {"channel": channel}))
    cohort = len(examples) - (channel != "plain")
    return Setting(model, len(examples), cohort, examples, training, "frozen", parts.channel)


def built(rule: str) -> LabelRule:
    found: LabelRule = registry.build("labels", rule, "labels")
    return found


@pytest.mark.parametrize("rule", REFUSED)
def test_the_largest_view_decides(rule: str) -> None:
    most, said = REFUSED[rule]
    assert spec().num_classes == 10
    built(rule).check_setting(setting((1, most)))
    with pytest.raises(ValueError, match=said):
        built(rule).check_setting(setting((most + 1, 1)))
    built(rule).check_setting(setting((100, 50), "gradient", batch_size=most))
    with pytest.raises(ValueError, match=said):
        built(rule).check_setting(setting((100, 50), "gradient", batch_size=most + 1))


@pytest.mark.parametrize("rule", ["gradinversion", "rlg"])
def test_an_aggregate_is_of_all_its_senders_examples(rule: str) -> None:
    most, said = REFUSED[rule]
    built(rule).check_setting(setting((1, 2, most - 2), channel="trusted-sum"))
    with pytest.raises(ValueError, match=said):
        built(rule).check_setting(setting((1, 2, most - 1), channel="trusted-sum"))


@pytest.mark.parametrize("rule", ["analytic", "llg", "oracle"])
def test_other_rules_take_any(rule: str) -> None:
    built(rule).check_setting(setting((1000,)))
