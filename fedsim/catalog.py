"""What there is, and what is known of it: ``fedsim list`` and ``fedsim explain``."""

import inspect
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fedsim
from fedsim import registry
from fedsim.attack import Attack
from fedsim.errors import ScenarioError
from fedsim.federation import inner_strategies
from fedsim.threat import NAMES, least_model

# Kinds whose components are called with something of the range's own first.
_GIVEN = {"model": 1}


def lines(what: str) -> Iterator[str]:
    """Yield one line for each thing of a kind (plural, as on the command line)."""
    if what == "scenarios":
        for path in sorted(scenario_folder().rglob("*.toml")):
            content = tomllib.loads(path.read_text())
            letter = content.get("threat-model", "B")
            yield f"{path.relative_to(scenario_folder())!s:40} {letter}  {content['title']}"
    elif what == "strategies":
        for name, strategy in sorted(inner_strategies().items()):
            yield f"{name:28} {first_line(strategy)}"
    else:
        for name, component in registry.components(what.removesuffix("s")).items():
            if what == "attacks":  # the file's first line names the method and its idea
                yield f"{name:28} {_letter(component)}  {first_line(inspect.getmodule(component))}"
            else:
                yield f"{name:28} {first_line(component)}"


def scenario_folder() -> Path:
    """Return where the scenarios that come with FedSim lie."""
    package = Path(fedsim.__file__).resolve().parent
    checkout = package.parent / "scenarios"
    return checkout if checkout.is_dir() else package / "scenarios"


def explain(name: str) -> str:
    """Return everything known of one component, to print.

    Raises
    ------
    ScenarioError
        If nothing has this name.
    """
    for kind in registry.KINDS:
        known = registry.components(kind)
        if name in known:
            return "\n".join(_explanation(kind, name, known[name]))
    every = [name for kind in registry.KINDS for name in registry.components(kind)]
    raise ScenarioError("name", name, f"nothing has this name; {registry.nearest(name, every)}")


def _explanation(kind: str, name: str, component: Callable[..., Any]) -> Iterator[str]:
    yield f"{name}  ({kind}; {component.__module__})"
    yield ""
    yield inspect.getdoc(component) or ""
    yield ""
    if paper := getattr(component, "paper", None):
        yield f"paper      {paper.authors}: {paper.title}. {paper.venue} {paper.year}"
    if kind == "attack":
        letter = _letter(component)
        needs = ", ".join(sorted(need.value for need in component.needs))  # type: ignore[attr-defined]
        yield f"threat     {letter} ({NAMES[letter]}); needs {needs}"
    parameters = registry.settable(component, _GIVEN.get(kind, 0))
    for index, parameter in enumerate(parameters.values()):
        default = "required" if parameter.default is parameter.empty else repr(parameter.default)
        yield f"{'parameters' if not index else '':10} {parameter.name} = {default}"
    if paper and paper.published:
        yield f"published  {paper.published}"
    if paper and paper.measured:
        yield f"measured   {paper.measured}"


def _letter(component: Any) -> str:
    """Return the least threat model under which an attack's defaults run."""
    needs = component.needs
    if isinstance(needs, property):
        attack: Attack = component()
        needs = attack.needs
    return least_model(frozenset(needs)) or "?"


def first_line(documented: object) -> str:
    """Return the first line of a docstring, as plain text."""
    return (inspect.getdoc(documented) or "").partition("\n")[0].replace("``", "")
