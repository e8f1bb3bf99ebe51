"""The scenario reference, generated from the schema: ``python -m fedsim.reference``."""

import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from fedsim.scenario import Scenario

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scenario.md"


def render() -> str:
    """Return the page, Markdown."""
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    yield "# Scenario reference"
    yield ""
    yield "Generated from `fedsim/scenario.py` by `python -m fedsim.reference`; do not edit."
    yield ""
    yield "A scenario is a TOML file. Every key has a default, and any key is changed in place:"
    yield '`fedsim run FILE seed=3 federation.clients=16`, or `flwr run . --run-config "seed=3"`.'
    yield "Components are expressions, `name` or `name(key=literal, ...)`; `fedsim list` says which"
    yield "there are and `fedsim explain NAME` what they take.  One argument is changed by"
    yield "`fedsim run FILE attack.iterations=50 federation.local.lr=0.05`."
    yield from _table("", Scenario)
    for name, field in Scenario.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _table(name, field.annotation)


def _table(table: str, model: type[BaseModel]) -> Iterator[str]:
    yield ""
    yield f"## `[{table}]`" if table else "## Top level"
    yield ""
    yield "| key | default | meaning |"
    yield "| --- | --- | --- |"
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            continue
        choices = getattr(field.annotation, "__args__", ())
        one_of = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
        meaning = (field.description or "").replace("|", "\\|")
        yield f"| `{field.alias or name}` | `{field.default!r}` | {meaning}{one_of} |"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text() != render() and "docs/scenario.md is stale")
    PAGE.write_text(render())
