"""Names to components, and the expressions that scenarios write.

A component is a class or a function registered under a *kind* and a hyphenated *name*::

    @register("attack", "linear-inversion")
    @dataclass(frozen=True, kw_only=True)
    class LinearInversion(Attack): ...

A scenario writes ``name`` or ``name(key=literal, ...)``, several joined by `` | ``.  Expressions
are parsed with :mod:`ast` and never evaluated.  Modules of the packages in ``PACKAGES`` and the
entry points in the group ``fedsim.plugins`` are imported once, on the first look-up: a new method
is a new file, and no other file names it.
"""

import ast
import difflib
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedsim import wanted
from fedsim.errors import ScenarioError

PACKAGES = ("fedsim.data", "fedsim.models", "strategies", "clients")
KINDS = (
    "attack", "channel", "dataset", "defense", "labels", "local", "model", "role", "statistics"
)  # fmt: skip
#: What is easily taken for another kind, and the scenario key of that.
_TAKEN_FOR = {"defense": ("channel", "channel"), "channel": ("defense", "defenses")}

Component = TypeVar("Component", bound=Callable[..., Any])
_components: dict[str, dict[str, Callable[..., Any]]] = {kind: {} for kind in KINDS}


def register(kind: str, name: str) -> Callable[[Component], Component]:
    """Register a component; classes get their name as the attribute ``name``.

    Raises
    ------
    ValueError
        If the kind is unknown or the name is taken by another component.
    """

    def decorate(component: Component) -> Component:
        if kind not in _components:
            raise ValueError(f"there is no kind {kind!r}; there is: {', '.join(KINDS)}")
        if kind == "dataset":
            component = announced("the clients' data")(component)
        taken = _components[kind].get(name)
        if taken is not None and _origin(taken) != _origin(component):
            raise ValueError(f"{kind} {name!r} is already {_origin(taken)}")
        _components[kind][name] = component
        if inspect.isclass(component):
            component.name = name  # type: ignore[attr-defined]
        return component

    return decorate


def announced(what: str) -> Callable[[Component], Component]:
    """Make a function say, each time it is called, that it touches what attack code may not."""

    def decorate(function: Component) -> Component:
        @functools.wraps(function)
        def announcing(*args: Any, **kwargs: Any) -> Any:
            sys.audit("fedsim.private", what)
            return function(*args, **kwargs)

        announcing.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        del announcing.__wrapped__  # nobody calls it without a word
        return announcing  # type: ignore[return-value]

    return decorate


def _origin(component: Callable[..., Any]) -> str:
    return f"{component.__module__}.{component.__qualname__}"


@cache
def _discover() -> None:
    for package in PACKAGES:
        module = importlib.import_module(package)
        for found in pkgutil.walk_packages(module.__path__, package + "."):
            importlib.import_module(found.name)
    for entry in importlib.metadata.entry_points(group="fedsim.plugins"):
        entry.load()


def components(kind: str) -> dict[str, Callable[..., Any]]:
    """Return all components of a kind by name, sorted."""
    _discover()
    return dict(sorted(_components[kind].items()))


@dataclass(frozen=True)
class Expression:
    """One parsed ``name(key=literal, ...)``."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        inside = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        return f"{self.name}({inside})" if inside else self.name


def parse(text: str, key: str) -> list[Expression]:
    """Parse ``a(x=1) | b``; ``"none"`` and the empty string give an empty list.

    Raises
    ------
    ScenarioError
        If the text is not of that form; ``key`` names the scenario key in the message.
    """
    if text.strip() in ("", "none"):
        return []
    return [_parse_one(part.strip(), text, key) for part in _split(text)]


def _split(text: str) -> Iterator[str]:
    """Split at `` | `` outside quotes and brackets (an argument may hold an expression)."""
    depth, quote, start = 0, "", 0
    for at, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "|" and depth == 0:
            yield text[start:at]
            start = at + 1
    yield text[start:]


def _parse_one(part: str, text: str, key: str) -> Expression:
    form = "write name or name(key=literal, ...), several joined by ' | '"
    name, bracket, rest = part.partition("(")
    name = name.strip()
    if not name or not all(c.isalnum() or c in "-_." for c in name):
        raise ScenarioError(key, text, form)
    if not bracket:
        return Expression(name)
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
    except SyntaxError as error:
        raise ScenarioError(key, text, f"{form} ({error.msg} in {part!r})") from None
    except (ValueError, MemoryError, RecursionError) as error:  # a null byte, endless brackets
        raise ScenarioError(key, text, f"{form} ({error})") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ScenarioError(key, text, f"{form}; arguments need their names ({part!r})")
    arguments: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ScenarioError(key, text, form)
        if keyword.arg in arguments:
            raise ScenarioError(key, text, f"argument {keyword.arg!r} stands there twice")
        try:
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, MemoryError, RecursionError):
            remedy = "must be a literal (number, text, True, False, None, list)"
            spelled = {"true": "True", "false": "False", "null": "None", "none": "None"}
            if isinstance(keyword.value, ast.Name) and keyword.value.id in spelled:
                remedy += f"; did you mean {spelled[keyword.value.id]}?"
            remedy = f"argument {keyword.arg!r} {remedy}"
            raise ScenarioError(key, text, remedy) from None
    return Expression(name, arguments)


def nearest(name: str, known: list[str]) -> str:
    """Return the sentence that helps somebody who wrote a name that does not exist."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}there is: {', '.join(known) or 'nothing'}"


def build(kind: str, expression: Expression | str, key: str, *given: Any) -> Any:
    """Build one component from its expression.

    Parameters
    ----------
    kind : str
        One of ``KINDS``.
    expression : Expression or str
        What the scenario says.
    key : str
        The scenario key, for messages.
    *given : Any
        Positional arguments that the range itself supplies (a model gets its ``DataSpec``).

    Raises
    ------
    ScenarioError
        If the name, a parameter, or a parameter's type or range is wrong.
    """
    if isinstance(expression, str):
        found = parse(expression, key)
        if len(found) != 1:
            raise ScenarioError(key, expression, f"exactly one {kind} is wanted here")
        expression = found[0]
    known = components(kind)
    if expression.name not in known:
        remedy = f"no {kind} has this name; {nearest(expression.name, list(known))}"
        other, under = _TAKEN_FOR.get(kind, (kind, key))
        if expression.name in components(other):
            remedy = f"it is a {other}, not a {kind}: write it under the key {under!r}"
        raise ScenarioError(key, expression.name, remedy)
    component = known[expression.name]
    arguments = check_arguments(component, expression, key, skip=len(given))
    try:
        return component(*given, **arguments)
    except ScenarioError:
        raise
    except (ValueError, TypeError, OSError) as error:
        raise ScenarioError(key, str(expression), str(error)) from error


def check_arguments(
    component: Callable[..., Any],
    expression: Expression,
    key: str,
    *,
    skip: int = 0,
    ours: Collection[str] = (),
    limits: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Check an expression's arguments against a callable's signature and annotations.

    The first ``skip`` parameters, and those in ``ours``, are the range's own: not for scenarios.
    ``limits`` are annotations that say more than the callable's own.
    """
    parameters = {n: p for n, p in settable(component, skip).items() if n not in ours}
    hints = typing.get_type_hints(
        component.__init__ if inspect.isclass(component) else component, include_extras=True
    )
    hints.update(limits or {})
    checked: dict[str, Any] = {}
    for name, value in expression.arguments.items():
        where = f"{key}: {expression.name}({name})"
        if name not in parameters:
            remedy = f"{expression.name} takes no parameters; leave it out"
            if parameters:
                known = nearest(name, list(parameters))
                remedy = f"{expression.name} has no such parameter; {known}"
            raise ScenarioError(where, value, remedy)
        adapter = TypeAdapter(hints.get(name, Any), config=wanted.STRICT)
        try:
            checked[name] = adapter.validate_python(value)
        except ValidationError as error:
            default = parameters[name].default
            default = None if default is inspect.Parameter.empty else default
            schema, first = wanted.schema_of(hints[name]), error.errors()[0]
            remedy = wanted.remedy(schema, first, default, toml=False)
            raise ScenarioError(where, value, remedy) from None
    required = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty]
    if missing := {n: wanted.schema_of(hints.get(n, Any)) for n in required if n not in checked}:
        raise ScenarioError(key, str(expression), _missing(component, expression, missing))
    return checked


def _missing(
    component: Callable[..., Any], expression: Expression, missing: dict[str, dict[str, Any]]
) -> str:
    """Say which arguments are wanted, of what type, what they mean, and how to write them."""
    meanings = wanted.meanings(component)
    each = []
    for name, schema in missing.items():
        words = ", ".join(part for part in (name, wanted.in_words(schema)) if part)
        each.append(f"{words} ({meanings[name]})" if name in meanings else words)
    shown = {name: wanted.example(schema) for name, schema in missing.items()}
    written = Expression(expression.name, {**expression.arguments, **shown})
    return f"{expression.name} needs {'; and '.join(each)}; write for instance {written}"


def settable(component: Callable[..., Any], skip: int = 0) -> dict[str, inspect.Parameter]:
    """Return the parameters that a scenario may set, in order."""
    return dict(list(inspect.signature(component).parameters.items())[skip:])
