"""What docs/detection.md promises: its limits, what they are set on, and that prose stays."""

from pathlib import Path

import pytest

from tests.benchmarks.detection import (
    BEGIN,
    END,
    Round,
    fill,
    held_out,
    honest,
    limit,
    limit_of,
    rate,
)


@pytest.mark.parametrize("alarms", [0.01, 0.05])
@pytest.mark.parametrize("rounds", [100, 101, 250, 300, 480])
def test_no_more_than_the_promised_share_is_above_the_limit(rounds: int, alarms: float) -> None:
    scores = [float((7919 * k) % rounds) for k in range(rounds)]
    above = limit(scores, alarms)
    assert above is not None
    assert sum(score > above for score in scores) == int(alarms * rounds + 1e-9)


def test_ties_are_not_alarms() -> None:
    assert limit([1.0] * 100, 0.05) == 1


def test_too_few_rounds_set_no_limit() -> None:
    assert limit([1.0] * 99, 0.01) is None
    assert limit([1.0] * 20, 0.05) == 1
    assert limit([], 0.05) is None


def test_a_limit_is_set_on_other_models_seeds_and_stages() -> None:
    benign = [Round("other", 2, 2, {"a": 1.0})] * 100
    benign += [Round("same", 2, 2, {"a": 9.0})] * 50
    benign += [Round("other", 1, 2, {"a": 9.0})] * 50
    benign += [Round("other", 2, 1, {"a": 9.0})] * 50
    assert limit_of(benign, "a", 0.01, ("same", 1, 1)) == 1
    assert limit_of(benign, "b", 0.01, ("same", 1, 1)) is None


def test_a_round_without_a_figure_is_no_alarm() -> None:
    rounds = [Round("m", 1, 1, {"a": 2.0}), Round("m", 1, 1, {})]
    assert rate(rounds, "a", 1.0) == 0.5
    assert rate(rounds, "b", 1.0) is None


def test_a_model_unlike_the_others_is_a_false_alarm() -> None:
    benign = [
        Round(model, seed, stage, {"a": 5.0 if model == "odd" else 1.0})
        for model in ("one", "two", "odd")
        for seed in (1, 2)
        for stage in (1, 2, 3)
        for _ in range(20)
    ]
    # Of the others' rounds, those of the odd one are more than a twentieth where they take part.
    assert held_out(benign, ["a"], 0.05) == [pytest.approx(1 / 3), pytest.approx(1 / 3)]


def test_honest_clients_hold_no_more_than_there_are() -> None:
    partition = str(honest("mlp", "digits", 1, 64)["data.partition"])
    assert partition == "size(partition_sizes=[512, 512])"


def test_the_prose_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    fill(page, "new\n")
    assert page.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
