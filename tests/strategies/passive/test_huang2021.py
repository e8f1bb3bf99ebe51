"""The orderings of Huang et al. 2021 on their scenarios, small: photo tiles and 200 iterations.

``scenarios/huang2021`` is the evaluation at its own size, docs/methods/gradattack.md has its
figures.  PSNR stands for the paper's LPIPS here as there: what can be compared is the order.
"""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from fedsim.engines.inline import run_inline
from fedsim.scenario import Scenario

FOLDER = Path(__file__).parents[3] / "scenarios" / "huang2021"
#: Mean PSNR of a scenario's candidates, and of the mean surrogate image that takes no update.
Reached = Callable[[str], tuple[float, float]]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def reached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reached]:
    """Train the network under attack; yield what runs a scenario against it, once.

    Under one secret key, so that clients mix the same images each time.
    """
    out = tmp_path_factory.mktemp("huang2021")

    def ran(name: str, changes: dict[str, str]) -> Path:
        there = {"data.dataset": "photo-tiles", "output.dir": str(out / name)}
        return run_inline(Scenario.load(FOLDER / f"{name}.toml", {**there, **changes}), "").parent

    trained = ran("00_train", {})

    @cache
    def figures(name: str) -> tuple[float, float]:
        attack = Scenario.load(FOLDER / f"{name}.toml").attack
        short = attack.replace("iterations=500", "iterations=200")
        folder = ran(name, {"attack": short, "model.weights": str(trained)})
        leak = json.loads((folder / "report.json").read_text())["leak"]
        found = leak["psnr"]["mean"], leak["floor"]["psnr"]["mean"]
        print(f"{name}: {found[0]:.1f} dB, floor {found[1]:.1f}")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSIM_SECRET_KEY", "21" * 32)
        yield figures


def test_pruning_hides_more_the_more_it_prunes_and_half_hides_nothing(reached: Reached):
    control, floor = reached("b1_8_control_shuffled")
    most, much, half, none = (
        reached(f"b1_{name}")[0]
        for name in ("7_prune_0_99", "7_prune_0_9", "7_prune_0_5", "1_strong")
    )
    assert control < floor < most - 1
    assert most < much - 3
    assert much < none - 2
    assert abs(half - none) < 1.5


def test_each_assumption_taken_away_costs(reached: Reached):
    strong, floor = reached("b1_1_strong")
    no_labels, no_statistics, neither = (
        reached(f"b1_{name}")[0] for name in ("2_labels_unknown", "5_bn_none", "6_realistic")
    )
    assert strong > no_statistics > neither
    assert strong > no_labels + 2
    assert no_labels > neither - 0.5
    assert strong - no_labels > strong - no_statistics  # labels are worth more than statistics
    assert neither > floor + 5


def test_of_a_batch_of_sixteen_any_assumption_taken_away_costs(reached: Reached):
    strong, floor = reached("b16_1_strong")
    less = [reached(f"b16_{name}")[0] for name in ("3_bn_proxy", "5_bn_none", "6_realistic")]
    assert strong > max(less)
    assert strong > floor + 0.5


def test_mixtures_hide_most_and_with_flipped_signs_all(reached: Reached):
    mixed, floor = reached("b1_9_mixup_4")
    flipped, its_floor = reached("b1_9_instahide_4")
    assert flipped < its_floor + 1
    assert flipped < mixed < reached("b1_7_prune_0_99")[0]
    assert mixed < floor + 3
