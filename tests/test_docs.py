"""What README and the methods say of themselves is there, and nothing was left to fill in."""

import re
from pathlib import Path

import pytest

from fedsim import registry

ROOT = Path(__file__).resolve().parents[1]
ATTACKS = registry.components("attack")
LEFT_OPEN = re.compile(r"@[A-Z]\w*@|\bTODO\b|\bFIXME\b")


@pytest.mark.parametrize("kind", ["attack", "defense", "channel"])
def test_readme_names_every_method(kind: str) -> None:
    readme = (ROOT / "README.md").read_text()
    assert [name for name in registry.components(kind) if f"`{name}`" not in readme] == []


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_has_published_and_own_figures(name: str) -> None:
    paper = ATTACKS[name].paper
    assert paper.published
    assert paper.measured
    assert (ROOT / "docs" / "methods" / f"{name}.md").exists()


@pytest.mark.parametrize("name", ATTACKS)
def test_figures_name_tests_and_scenarios_that_are_there(name: str) -> None:
    text = ATTACKS[name].paper.measured + (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    named = re.findall(r"\b(?:tests|scenarios)/[\w/]+\.(?:py|toml)", text)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_nothing_is_left_to_fill_in() -> None:
    files = [path for top in ("docs", "scenarios") for path in (ROOT / top).rglob("*.*")]
    texts = {path.name: path.read_text() for path in files if path.suffix in (".md", ".toml")}
    for kind in ("attack", "defense"):
        texts |= {name: str(made.paper) for name, made in registry.components(kind).items()}
    assert [name for name, text in texts.items() if LEFT_OPEN.search(text)] == []
