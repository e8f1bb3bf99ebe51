"""Expressions and the registry: what is written is what is built, or refused with the way out."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, Field

from fedsim import registry
from fedsim.errors import ScenarioError
from fedsim.registry import (
    Expression,
    build,
    check_arguments,
    components,
    nearest,
    parse,
    register,
)

literals = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
names = st.from_regex(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", fullmatch=True)
keys = st.sampled_from(["lr", "units", "name", "path", "x", "norm"])
expressions = st.builds(
    Expression, names.filter(lambda n: n != "none"), st.dictionaries(keys, literals)
)


@settings(max_examples=50)
@given(st.lists(expressions, min_size=1, max_size=3))
def test_what_is_printed_parses_to_the_same(chain: list[Expression]) -> None:
    assert parse(" | ".join(map(str, chain)), "key") == chain


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with contextlib.suppress(ScenarioError):
        parse(text, "defenses")


@pytest.mark.parametrize(
    "text",
    [
        "clip(1.0)",
        "clip(norm=1.0, norm=2.0)",
        "clip(norm=float('inf'))",
        "clip(norm=__import__('os'))",
        "clip(norm=x)",
        "clip(**{'norm': 1})",
        "clip(*[1])",
        "clip(norm=1.0",
        "clip(norm=1.0))",
        "clip(norm=1.0)(2)",
        "clip(norm=1.0).real",
        "clip(norm={[]: 1})",
        "clip(norm=" + "(" * 500 + ")" * 500 + ")",
        "clip(norm='\0')\0",
        "clip norm",
        "clip |",
        "| clip",
        "clip || noise",
        "(norm=1)",
        "cl!p",
    ],
)
def test_what_is_not_an_expression_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(ScenarioError, match="defenses = ") as refused:
        parse(text, "defenses")
    assert refused.value.remedy


@pytest.mark.parametrize("text", ["", "none", "  none "])
def test_nothing_is_an_empty_chain(text: str) -> None:
    assert parse(text, "key") == []


def test_a_bar_inside_an_argument_does_not_split() -> None:
    chain = parse("a(inner='b | c(x=1)') | d", "key")
    assert [one.name for one in chain] == ["a", "d"]
    assert chain[0].arguments == {"inner": "b | c(x=1)"}


def test_the_nearest_name_comes_first() -> None:
    assert nearest("gausian", ["clip", "gaussian"]).startswith("did you mean 'gaussian'?")
    assert nearest("zzz", ["clip"]) == "there is: clip"
    assert nearest("zzz", []) == "there is: nothing"


@dataclass(frozen=True, kw_only=True)
class Part:
    count: Annotated[int, Field(ge=1)]
    rate: Annotated[float, Field(gt=0)] = 0.5
    mode: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.mode == "b" and self.rate > 1:
            raise ValueError("mode 'b' takes a rate of at most 1")


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> type[Part]:
    components("defense")
    monkeypatch.setitem(registry._components["defense"], "part", Part)
    return Part


def test_a_component_is_built_from_its_expression(part: type[Part]) -> None:
    assert build("defense", "part(count=3, rate=1)", "defenses") == part(count=3, rate=1.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prat(count=1)", "did you mean 'part'?"),
        (
            "part",
            "part needs count, a whole number of at least 1; write for instance part(count=1)",
        ),
        ("part(cuont=1)", "did you mean 'count'?"),
        ("part(count=0)", "write a whole number of at least 1"),
        ("part(count='3')", "write a whole number of at least 1"),
        ("part(count=True)", "write a whole number"),
        ("part(count=1.0)", "write a whole number"),
        ("part(count=1, rate=0)", "write a finite number above 0, for instance 0.5"),
        ("part(count=1, rate=1e999)", "finite"),
        ("part(count=1, mode='c')", "write 'a' or 'b'"),
        ("part(count=1, mode='b', rate=2.0)", "a rate of at most 1"),
        ("part(count=1) | part(count=2)", "exactly one defense"),
        ("none", "exactly one defense"),
    ],
)
@pytest.mark.usefixtures("part")
def test_what_does_not_fit_is_refused_with_what_would(text: str, said: str) -> None:
    with pytest.raises(ScenarioError, match="defenses") as refused:
        build("defense", text, "defenses")
    assert said in str(refused.value)


SETTABLE = [
    pytest.param(component, name, parameter, id=f"{name}({parameter})")
    for kind in registry.KINDS
    if kind != "role"
    for name, component in components(kind).items()
    for parameter in registry.settable(component, skip=kind == "model")
]


@pytest.mark.parametrize(("component", "name", "parameter"), SETTABLE)
def test_every_parameter_says_what_would_be_right(
    component: Callable[..., object], name: str, parameter: str
) -> None:
    with pytest.raises(ScenarioError) as refused:
        check_arguments(component, Expression(name, {parameter: {}}), "key")
    assert refused.value.key == f"key: {name}({parameter})"
    assert refused.value.remedy.startswith("write ")


def even(number: int) -> int:
    if number % 2:
        raise ValueError("only pairs train together")
    return number


@pytest.mark.parametrize(
    ("annotation", "value", "said"),
    [
        (bool, 1, "write True or False"),
        (str | None, 1, "write text in quotes or None"),
        (list[Annotated[int, Field(gt=0)]], [0], "write a list, each item a whole number above 0"),
        (int | float | list[float] | np.ndarray, "a", "write a finite number or a list, each"),
        (Literal["a"], "b", "write 'a'"),
        (Annotated[int, AfterValidator(even)], 3, "only pairs train together; write a whole num"),
        (np.ndarray, 1, "Input should be an instance of ndarray"),
    ],
)
def test_a_type_is_told_in_words(annotation: object, value: object, said: str) -> None:
    def component(given): ...  # type: ignore[no-untyped-def]

    component.__annotations__ = {"given": annotation}
    with pytest.raises(ScenarioError) as refused:
        check_arguments(component, Expression("component", {"given": value}), "key")
    assert refused.value.remedy.startswith(said)


def test_a_name_belongs_to_one_component() -> None:
    with pytest.raises(ValueError, match="already"):
        register("channel", "plain")(Part)
    with pytest.raises(ValueError, match="no kind 'chanel'"):
        register("chanel", "plain")(Part)


def test_a_plugin_is_found_through_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        @staticmethod
        def load() -> None:
            register("defense", "from-elsewhere")(Part)

    asked = []
    monkeypatch.setitem(registry._components, "defense", dict(components("defense")))
    monkeypatch.setattr(
        registry.importlib.metadata, "entry_points", lambda group: asked.append(group) or [Entry]
    )
    registry._discover.__wrapped__()
    assert asked == ["fedsim.plugins"]
    assert components("defense")["from-elsewhere"] is Part
