"""What there is, and what is known of it: ``fedsim list`` and ``fedsim explain``."""

import inspect
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fedsim
from fedsim import federation, registry, wanted
from fedsim.attack import Attack
from fedsim.data.partition import OURS, partitioners
from fedsim.errors import ScenarioError
from fedsim.threat import NAMES, least_model

# Kinds whose components are called with something of the range's own first.
_GIVEN = {"model": 1}
# Flower's own: the key that names them, and the parameters that the range sets itself.
_FLOWERS = {
    "strategy": ("federation.strategy", federation.OURS),
    "partitioner": ("data.partition", OURS),
}


def lines(what: str) -> Iterator[str]:
    """Yield one line for each thing of a kind (plural, as on the command line)."""
    kind = "strategy" if what == "strategies" else what.removesuffix("s")
    if kind == "scenario":
        for path in sorted(scenario_folder().rglob("*.toml")):
            content = tomllib.loads(path.read_text())
            letter = content.get("threat-model", "B")
            yield f"{path.relative_to(scenario_folder())!s:40} {letter}  {content['title']}"
    elif kind in _FLOWERS:
        for name, component in sorted(_flowers()[kind].items()):
            yield f"{name:28} {first_line(component)}"
    else:
        for name, component in registry.components(kind).items():
            if kind == "attack":  # the file's first line names the method and its idea
                yield f"{name:28} {_letter(component)}  {first_line(inspect.getmodule(component))}"
            else:
                yield f"{name:28} {first_line(component)}"


def scenario_folder() -> Path:
    """Return where the scenarios that come with FedSim lie."""
    package = Path(fedsim.__file__).resolve().parent
    checkout = package.parent / "scenarios"
    return checkout if checkout.is_dir() else package / "scenarios"


def explain(name: str) -> str:
    """Return everything known of a component, to print; of several, where kinds share the name.

    ``name`` may be an expression, as in a scenario, or in Flower's own spelling (``FedAdam``).

    Raises
    ------
    ScenarioError
        If nothing has this name.
    """
    sought = name.partition("(")[0].strip().lower()
    pages = [
        _explanation(kind, sought, registry.components(kind)[sought])
        for kind in registry.KINDS
        if sought in registry.components(kind)
    ]
    pages += [
        _flowers_own(kind, sought, known[sought])
        for kind, known in _flowers().items()
        if sought in known
    ]
    if not pages:
        ours = [one for kind in registry.KINDS for one in registry.components(kind)]
        every = [*ours, *(one for known in _flowers().values() for one in known)]
        remedy = f"nothing has this name; {registry.nearest(sought, list(dict.fromkeys(every)))}"
        raise ScenarioError("name", name, remedy)
    return "\n\n".join("\n".join(page) for page in pages)


def _flowers() -> dict[str, dict[str, Any]]:
    """Return what scenarios name and Flower has, by kind and name."""
    return {"strategy": federation.inner_strategies(), "partitioner": partitioners()}


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
    yield from _parameters(registry.settable(component, _GIVEN.get(kind, 0)))
    if paper and paper.published:
        yield f"published  {paper.published}"
    if paper and paper.measured:
        yield f"measured   {paper.measured}"


def _flowers_own(kind: str, name: str, component: Callable[..., Any]) -> Iterator[str]:
    """Explain without the parameters that the range sets itself."""
    key, ours = _FLOWERS[kind]
    package = component.__module__.partition(".")[0]
    yield f"{name}  ({kind}; Flower's {component.__name__}, {package} {version(package)})"
    yield ""
    yield (inspect.getdoc(component) or "").partition("\nParameters\n---")[0].strip()
    yield ""
    own = {one: p for one, p in registry.settable(component).items() if one not in ours}
    types = typing.get_type_hints(component.__init__)
    required = [one for one, parameter in own.items() if parameter.default is parameter.empty]
    shown = {one: wanted.example(wanted.schema_of(types[one])) for one in required}
    yield f'scenario   {key} = "{registry.Expression(name, shown)}"'
    yield from _parameters(own, wanted.meanings(component))


def _parameters(
    parameters: Mapping[str, inspect.Parameter], meanings: Mapping[str, str] | None = None
) -> Iterator[str]:
    for index, (name, parameter) in enumerate(parameters.items()):
        default = "required" if parameter.default is parameter.empty else repr(parameter.default)
        set_to, meaning = f"{name} = {default}", (meanings or {}).get(name, "")
        yield f"{'' if index else 'parameters':10} {set_to:36} {meaning}".rstrip()


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
