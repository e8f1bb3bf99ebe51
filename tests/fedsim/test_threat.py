"""Threat models are enforced: what is not granted is refused, and is not even there."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.attack import Manipulation
from fedsim.data import DataSpec, Split
from fedsim.errors import NotGranted
from fedsim.models import build_model, travelling
from fedsim.registry import components
from fedsim.threat import (
    NAMES,
    THREAT_MODELS,
    Capability,
    Knowledge,
    Statistics,
    TrainingDetails,
    least_model,
)
from fedsim.view import ServerView

# Carletti et al. 2025, as the design has it: each letter and what it holds.
TABLE = {
    "A": "updates",
    "B": "updates basics",
    "C": "updates basics details",
    "D": "updates basics details surrogate",
    "E": "updates basics details surrogate statistics",
    "F": "updates basics details manipulation",
    "G": "updates basics details surrogate manipulation",
    "H": "updates basics details surrogate manipulation selection",
}
SPEC = DataSpec((1, 8, 8), 10, (0.3,), (0.4,))
ASKED: dict[str, Callable[[Knowledge, ServerView], object]] = {
    "updates": lambda knowledge, view: knowledge.model(view),
    "basics": lambda knowledge, view: (knowledge.basics, knowledge.num_examples(view)),
    "details": lambda knowledge, view: knowledge.training,
    "surrogate": lambda knowledge, view: knowledge.surrogate,
    "statistics": lambda knowledge, view: knowledge.statistics(0),
    "manipulation": lambda knowledge, view: knowledge.require(Capability.MANIPULATION),
    "selection": lambda knowledge, view: knowledge.require(Capability.SELECTION),
}


@pytest.fixture
def view() -> ServerView:
    arrays = travelling(build_model("mlp(hidden=[8])", SPEC))
    return ServerView(1, (0,), "mlp(hidden=[8])", arrays, arrays, "gradient")


def knowledge(
    letter: str, oracles: Mapping[str, Callable[[ServerView], Tensor]] | None = None
) -> Knowledge:
    return Knowledge(
        letter,
        data=SPEC,
        training=TrainingDetails("gradient", 0.125, 2, 1, 0.0, 0.0),
        seed=3,
        device=torch.device("cpu"),
        surrogate=lambda: Split(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)),
        statistics=lambda client: Statistics(torch.full((10,), 0.1)),
        oracles=oracles,
        num_examples={"round-1-client-0": 16},
    )


def test_every_letter_grants_what_the_taxonomy_says() -> None:
    said = {letter: {c.value for c in has} for letter, has in THREAT_MODELS.items()}
    assert said == {letter: set(words.split()) for letter, words in TABLE.items()}
    assert NAMES.keys() == THREAT_MODELS.keys()


@pytest.mark.parametrize("letter", TABLE)
@pytest.mark.parametrize("capability", ASKED)
def test_what_is_granted_is_given_and_noted_and_nothing_else(
    letter: str, capability: str, view: ServerView
) -> None:
    known = knowledge(letter)
    if capability in TABLE[letter].split():
        ASKED[capability](known, view)
        assert known.used == {Capability(capability)}
        return
    with pytest.raises(NotGranted, match=f"does not grant '{capability}'") as refused:
        ASKED[capability](known, view)
    least = next(model for model, words in TABLE.items() if capability in words.split())
    assert str(refused.value).endswith(f"the least model that does is {least}")
    assert f"threat model {letter} ({NAMES[letter]})" in str(refused.value)
    assert not known.used


@pytest.mark.parametrize(
    ("needs", "least"),
    [
        ("updates", "A"),
        ("basics", "B"),
        ("details surrogate", "D"),
        ("statistics", "E"),
        ("manipulation", "F"),
        ("manipulation surrogate", "G"),
        ("selection", "H"),
        ("selection statistics", None),
    ],
)
def test_the_least_model_is_the_smallest_that_has_it_all(needs: str, least: str | None) -> None:
    assert least_model(frozenset(Capability(word) for word in needs.split())) == least


def test_no_attack_asks_for_what_no_threat_model_has() -> None:
    for name, attack in components("attack").items():
        needs: frozenset[Capability] = attack.needs  # type: ignore[attr-defined]
        assert least_model(needs), name
        if isinstance(attack, type) and issubclass(attack, Manipulation):
            assert Capability.MANIPULATION in needs, name


def test_an_oracle_answers_only_where_the_scenario_grants_it(view: ServerView) -> None:
    for letter in TABLE:
        with pytest.raises(NotGranted, match=r"oracles = 'labels'.*badge"):
            knowledge(letter).oracle("labels", view)
    granted = knowledge("A", {"labels": lambda view: torch.tensor([1, 2])})
    assert granted.oracles_used == frozenset()
    assert granted.oracle("labels", view).tolist() == [1, 2]
    assert granted.oracles_used == {"labels"}


def reachable(value: object, depth: int = 6) -> list[object]:
    """Everything that ordinary attribute access, keys, items and closures lead to."""
    if depth == 0 or isinstance(value, int | float | str | torch.device | type(None)):
        return [value]
    inside: list[Any] = []
    if isinstance(value, Mapping):
        inside = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        inside = list(value)
    elif callable(value) and getattr(value, "__closure__", None):
        inside = [cell.cell_contents for cell in value.__closure__]
    elif hasattr(value, "__dict__") and not isinstance(value, type | torch.Tensor):
        inside = list(vars(value).values())
    return [value, *(found for one in inside for found in reachable(one, depth - 1))]


@pytest.mark.parametrize("letter", TABLE)
def test_what_is_not_granted_is_not_in_there(letter: str) -> None:
    has = TABLE[letter].split()
    found = reachable(knowledge(letter))
    assert (16 in found) == ("basics" in has)
    assert any(isinstance(one, TrainingDetails) for one in found) == ("details" in has)
    wells = [one for one in found if getattr(one, "__name__", "") == "<lambda>"]
    assert len(wells) == len({"surrogate", "statistics"} & set(has))


@pytest.mark.parametrize("attribute", ["threat_model", "granted", "used", "oracles_used"])
def test_an_attack_does_not_promote_itself(attribute: str) -> None:
    known = knowledge("A")
    with pytest.raises(AttributeError):
        setattr(known, attribute, "H")
    known._threat_model = "H"
    with pytest.raises(AssertionError):
        _ = known.surrogate


def test_a_number_that_the_protocol_hides_is_not_given(view: ServerView) -> None:
    known = Knowledge(
        "B",
        data=SPEC,
        training=TrainingDetails("gradient", 0.1, 2, 1, 0.0, 0.0),
        seed=3,
        device=torch.device("cpu"),
    )
    with pytest.raises(NotGranted, match="does not reveal how many examples round-1-client-0"):
        known.num_examples(view)


@pytest.mark.parametrize(("batchnorm", "training"), [("frozen", False), ("shared", True)])
def test_the_model_is_the_one_that_was_sent_in_the_clients_mode(
    batchnorm: str, training: bool, view: ServerView
) -> None:
    known = Knowledge(
        "A",
        data=SPEC,
        training=TrainingDetails("gradient", 0.1, 2, 1, 0.0, 0.0),
        seed=3,
        device=torch.device("cpu"),
        batchnorm=batchnorm,
    )
    model = known.model(view)
    assert model.training == training
    assert model.spec == SPEC
    for name, tensor in travelling(model).items():
        assert torch.equal(tensor, view.sent[name])
        assert tensor.data_ptr() != view.sent[name].data_ptr()


def test_the_attacks_randomness_is_named_and_its_own() -> None:
    one, other = knowledge("A"), knowledge("A")
    assert one.generator("start", 1).initial_seed() == other.generator("start", 1).initial_seed()
    assert one.generator("start", 1).initial_seed() != one.generator("start", 2).initial_seed()
