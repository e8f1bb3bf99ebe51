"""What there is, and what is known of it: ``fedsim list`` and ``fedsim explain``."""

import inspect
import tomllib
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fedsim
from fedsim import federation, registry, wanted
from fedsim.attack import Paper
from fedsim.data.partition import OURS, partitioners
from fedsim.errors import ScenarioError
from fedsim.threat import NAMES, Capability, least_model

# Kinds whose components are called with something of the range's own first.
_GIVEN = {"model": 1}
# Flower's own: the key that names them, and the parameters that the range sets itself.
_FLOWERS = {
    "strategy": ("federation.strategy", federation.OURS),
    "partitioner": ("data.partition", OURS),
}


@dataclass(frozen=True)
class Entry:
    """One thing that is listed; ``letter``, ``family`` and ``paper`` where it has them."""

    name: str
    what: str
    letter: str = ""
    family: str = ""
    paper: str = ""

    def __str__(self) -> str:
        columns = [f"{self.name:34}", self.letter, f"{self.family:22}" if self.family else ""]
        return "  ".join([*filter(None, columns), self.what]) + (self.paper and f" {self.paper}")

    def matches(self, word: str) -> bool:
        """Say whether this is of the threat model that a word names, or else contains the word."""
        if word in NAMES and self.letter:
            return word == self.letter
        return word.lower() in str(self).lower()


def entries(what: str, words: Collection[str] = ()) -> list[Entry]:
    """Return what there is of a kind (plural, as on the command line), and fits all the words.

    Parameters
    ----------
    what : str
        For instance ``"attacks"``.
    words : collection of str
        Letters of threat models, families or parts of them (``analytic``), or other text.
    """
    found = list(_entries("strategy" if what == "strategies" else what.removesuffix("s")))
    for word in words:
        families = [one for one in found if word.lower() in one.family.split("/")]
        found = families or [one for one in found if one.matches(word)]
    return found


def _entries(kind: str) -> Iterator[Entry]:
    if kind == "scenario":
        for path in sorted(scenario_folder().rglob("*.toml")):
            content = tomllib.loads(path.read_text())
            name = str(path.relative_to(scenario_folder()))
            yield Entry(name, content["title"], content.get("threat-model", "B"))
    elif kind in _FLOWERS:
        for name, component in sorted(_flowers()[kind].items()):
            yield Entry(name, first_line(component))
    else:
        for name, component in registry.components(kind).items():
            paper, family = getattr(component, "paper", None), _family(kind, component)
            told, letter = first_line(component), ""
            if kind == "attack":  # the file's first line names the method and its idea
                told, letter = first_line(inspect.getmodule(component)), _letter(component)
            yield Entry(name, told, letter, family, f"[{_cited(paper)}]" if paper else "")


def _family(kind: str, component: Callable[..., Any]) -> str:
    """Return a method's family, from where its file lies: ``analytic/isolation``."""
    inside = component.__module__.partition(f".{kind}s.")[2]
    return inside.rpartition(".")[0].replace(".", "/")


def _cited(paper: Paper) -> str:
    """Return authors, venue and year, short: ``Fowl et al., ICLR 2022``."""
    names = [name.split()[-1] for name in paper.authors.split(", ")]
    authors = ", ".join(names) if len(names) <= 3 else f"{names[0]} et al."
    return f"{authors}, {paper.venue} {paper.year}"


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
    if family := _family(kind, component):
        yield f"family     {family}"
    if kind == "attack":
        letter = _letter(component)
        needs = ", ".join(sorted(need.value for need in _needs(component)))
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


def _needs(component: Any) -> frozenset[Capability]:
    """Return what an attack's defaults ask for; where one has none, what every value does."""
    incomplete = any(p.default is p.empty for p in registry.settable(component).values())
    return frozenset(component.needs if incomplete else component().required)


def _letter(component: Any) -> str:
    """Return the least threat model under which an attack's defaults run."""
    return least_model(_needs(component)) or "?"


def first_line(documented: object) -> str:
    """Return the first line of a docstring, as plain text."""
    return (inspect.getdoc(documented) or "").partition("\n")[0].replace("``", "")
