"""No attack gets what its threat model does not give it, however it tries."""

# ruff: noqa: PTH108, PTH208
import gc
import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import sklearn.datasets
import torch
from torch import Tensor

from fedsim import client_app, reconstructions, registry, seeds
from fedsim.audit import sealing
from fedsim.audit.landlock import Rules
from fedsim.audit.vault import Vault
from fedsim.data import embedded, load_dataset, split_test
from fedsim.engines.inline import run_inline
from fedsim.errors import NotGranted, RunFailed
from fedsim.parts import Parts
from fedsim.progress import Progress
from fedsim.run_folder import RunFolder
from fedsim.scenario import Scenario
from fedsim.threat import THREAT_MODELS, Capability, Knowledge
from fedsim.view import ServerView
from tests.fedsim.small import (
    Watching,
    federated,
    latest,
    meddling,
    plug_in,
    scenario,
    told,
    watching,
)

Deed = Callable[[Path], object]


def typed(run: Path) -> Path:
    """Where the scenario that somebody typed lies: away from the runs."""
    return run.parent.with_name(f"{run.parent.name}-typed") / "mine.toml"


def vault_file(run: Path) -> Path:
    return run / "vault" / "client-0" / "round-1.sealed"


def clients_context(run: Path) -> Any:
    class Told:
        run_config = scenario(run.parent).flat()
        node_config = {"client": 0}  # noqa: RUF012

    return Told


CHEATS: dict[str, Deed] = {
    "open the vault": lambda run: vault_file(run).open("rb"),
    "list the vault": lambda run: os.listdir(run / "vault"),
    "walk the run": lambda run: list(run.rglob("*")),
    "ask the auditor": lambda run: Vault(run / "vault").record(0, 1),
    "read the scenario": lambda run: (run / "scenario.toml").read_text(),
    "load the scenario": lambda run: RunFolder.open(run).scenario,
    "read the environment": lambda run: (run / "environment.json").read_text(),
    "read what the federation told": lambda run: (run / "federation.json").read_text(),
    "read the events": lambda run: (run / "events.jsonl").read_text(),
    "read an earlier report": lambda run: (run / "report.html").read_text(),
    "read an earlier report's data": lambda run: (run / "report.json").read_text(),
    "list the views": lambda run: os.listdir(run / "views"),
    "follow latest": lambda run: (run.parent / "latest" / "scenario.toml").read_text(),
    "delete the vault": lambda run: os.unlink(vault_file(run)),
    "rename the folder above": lambda run: run.parent.rename(run.parent.with_name("mine")),
    "read the auditor's key": lambda run: (run.parent / "home" / "auditor.key").read_bytes(),
    "take the auditor's key": lambda run: sealing.private_key(),
    "read the secret key": lambda run: (run.parent / "home" / "secret.key").read_bytes(),
    "draw from the secret stream": lambda run: seeds.secret_generator(7, "client", 0),
    "walk memory": lambda run: gc.get_objects(),
    "walk referrers": lambda run: gc.get_referrers(run),
    "walk frames": lambda run: sys._current_frames(),
    "start a process": lambda run: subprocess.run(["true"], check=True),
    "load the data": lambda run: load_dataset("digits").train,
    "read the digits from disk": lambda run: sklearn.datasets.load_digits(),
    "read a picture from disk": lambda run: skimage.data.astronaut(),
    "read the typed scenario": lambda run: typed(run).read_text(),
    "build the data": lambda run: registry.build("dataset", "digits", "data.dataset"),
    "ask the registry for the data": lambda run: registry.components("dataset")["digits"](),
    "call the data set itself": lambda run: embedded.digits(),
    "build the parts": lambda run: Parts(Scenario.from_flat({"data.dataset": "digits"})).dataset,
    "ask for the clients' parts": lambda run: client_app._parts(clients_context(run)),
    "be a client": lambda run: client_app._own_data(
        Parts(scenario(run.parent)), clients_context(run)
    ),
}


def in_reconstruct(deed: Callable[[], object]) -> Any:
    return watching(lambda views, knowledge: deed())


def in_craft(deed: Callable[[], object]) -> Any:
    return meddling(lambda arrays, knowledge: deed())


def swallowed(deed: Callable[[], object]) -> None:
    try:
        deed()
    except Exception:  # what a sly attack would do
        return


# A manipulator may know what came back in earlier rounds.
ITS_OWN = [(in_craft, "list the views")]


@pytest.mark.parametrize(
    ("when", "cheat"),
    [
        pytest.param(when, cheat, id=f"{cheat}-{when.__name__}")
        for when in (in_reconstruct, in_craft)
        for cheat in CHEATS
        if (when, cheat) not in ITS_OWN
    ],
)
def test_a_cheat_fails_the_run(
    when: Callable[[Callable[[], object]], Any],
    cheat: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deed = CHEATS[cheat]
    plug_in(monkeypatch, "attack", "cheat", when(lambda: deed(latest(tmp_path).path)))
    written = typed(tmp_path / "run")
    written.parent.mkdir()
    written.write_text("seed = 7")
    monkeypatch.setattr(sys, "argv", ["fedsim", "run", str(written)])
    with pytest.raises(RunFailed, match=r"attack code tried to .*nothing it made may be believed"):
        federated(tmp_path, {"attack": "cheat"})
    assert not (latest(tmp_path).path / "reconstructions").exists()


def test_crafting_reads_code_alone_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it lies, and whatever library opens it; and it is not told how it was started."""
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-elsewhere")
    elsewhere.mkdir()
    note = elsewhere / "data.bin"
    note.write_bytes(b"0123456789abcdef")
    readers: dict[str, Callable[[], object]] = {
        "python": note.read_bytes,
        "torch": lambda: torch.from_file(str(note), size=16, dtype=torch.uint8).sum(),
        "write": lambda: (elsewhere / "mine").write_text("mine"),
    }
    if not landlocked():
        pytest.skip("this kernel has no Landlock")
    for name, reader in readers.items():
        plug_in(monkeypatch, "attack", "reader", in_craft(reader))
        with pytest.raises((RunFailed, RuntimeError), match=r"(?i)permission denied"):
            federated(tmp_path / name, {"attack": "reader"})
    assert os.listdir(elsewhere) == ["data.bin"]
    told: list[str] = []
    plug_in(monkeypatch, "attack", "asking", in_craft(lambda: told.extend(sys.argv)))
    federated(tmp_path / "asking", {"attack": "asking"})
    assert told == [""]


def landlocked() -> bool:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(Rules([]).enforce()))
    thread.start()
    thread.join()
    return found[0]


LOUD = {"open the vault", "read the scenario", "take the auditor's key", "load the data"}


@pytest.mark.parametrize("when", [in_reconstruct, in_craft])
@pytest.mark.parametrize("cheat", sorted(LOUD))
def test_hiding_the_refusal_does_not_help(
    cheat: str,
    when: Callable[[Callable[[], object]], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deed = CHEATS[cheat]
    sly = when(lambda: swallowed(lambda: deed(latest(tmp_path).path)))
    plug_in(monkeypatch, "attack", "cheat", sly)
    with pytest.raises(RunFailed, match="hid the refusal"):
        run_inline(scenario(tmp_path, {"attack": "cheat"}), "a test")
    assert not (latest(tmp_path).path / "report.html").exists()


def frames() -> list[str]:
    """Name every variable that frames lead to, and its type."""
    found: set[str] = set()
    frame = inspect.currentframe()
    while frame is not None:
        found.update(frame.f_locals)
        found.update(type(value).__name__ for value in frame.f_locals.values())
        frame = frame.f_back
    return sorted(found)


TRUTH = {"parts", "Parts", "folder", "RunFolder", "scenario", "Scenario", "ledger"}


def test_no_chain_of_frames_leads_to_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "climber", watching(lambda views, knowledge: frames()))
    found = set(told(federated(tmp_path / "apart", {"attack": "climber"})))
    assert "views" in found
    assert not found & TRUTH
    found.clear()
    plug_in(monkeypatch, "attack", "climber", in_craft(lambda: found.update(frames())))
    federated(tmp_path / "crafting", {"attack": "climber"})
    assert "arrays" in found
    assert not found & TRUTH


def test_an_interrupted_attack_is_no_cheat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(knowledge: Knowledge) -> None:
        knowledge.progress(1, 1, "about to wait")
        while True:
            time.sleep(0.01)

    slow = watching(lambda views, knowledge: wait(knowledge))
    slow_to_craft = meddling(lambda arrays, knowledge: wait(knowledge))
    monkeypatch.setattr("fedsim.adversary.Progress", Interrupting)
    monkeypatch.setattr("fedsim.run.Progress", Interrupting)
    for name, attack in (("slow", slow), ("slow-to-craft", slow_to_craft)):
        plug_in(monkeypatch, "attack", name, attack)
        with pytest.raises(KeyboardInterrupt):
            run_inline(scenario(tmp_path / name, {"attack": name}), "a test")
        folder = latest(tmp_path / name).path
        assert '"interrupted"' in (folder / "events.jsonl").read_text()
        assert not list(folder.glob(".spool-*"))
        assert not [thread for thread in threading.enumerate() if thread.name == "sealed"]


class Interrupting(Progress):
    """Somebody types Ctrl-C twice when an attack says what it is about to do.

    While a reconstruction runs the first asks for the best so far, which this one does not hear.
    """

    def __call__(self, done: int, total: int, text: str = "") -> None:
        if text:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)


# -- what a threat model does not give ----------------------------------------------------------

ASKED: dict[str, Callable[[Sequence[ServerView], Knowledge], object]] = {
    "updates": lambda views, knowledge: knowledge.model(views[0]),
    "basics": lambda views, knowledge: knowledge.num_examples(views[0]),
    "details": lambda views, knowledge: knowledge.training,
    "surrogate": lambda views, knowledge: knowledge.surrogate,
    "statistics": lambda views, knowledge: knowledge.statistics(0),
    "manipulation": lambda views, knowledge: knowledge.require(Capability.MANIPULATION),
    "selection": lambda views, knowledge: knowledge.require(Capability.SELECTION),
}


@pytest.mark.parametrize("letter", THREAT_MODELS)
def test_each_letter_gives_what_it_grants_and_the_report_says_what_was_used(
    letter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(views: Sequence[ServerView], knowledge: Knowledge) -> list[str]:
        refused = []
        for name, question in ASKED.items():
            try:
                question(views, knowledge)
            except NotGranted:
                refused.append(name)
        return refused

    plug_in(monkeypatch, "attack", "asking", watching(ask))
    ran = federated(tmp_path, {"attack": "asking", "threat-model": letter})
    granted = {capability.value for capability in THREAT_MODELS[letter]}
    assert set(told(ran)) == ASKED.keys() - granted
    _, facts = reconstructions.load(ran.folder.path / "reconstructions" / "asking.safetensors")
    assert set(facts.used) == granted


@pytest.mark.parametrize("capability", ["surrogate", "statistics", "selection"])
def test_asking_too_much_fails_the_run_with_the_least_model(
    capability: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "greedy", watching(ASKED[capability]))
    with pytest.raises(NotGranted, match=rf"does not grant '{capability}'; the least model"):
        run_inline(scenario(tmp_path, {"attack": "greedy", "threat-model": "C"}), "a test")


def test_what_was_used_to_craft_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def craft(arrays: dict[str, Tensor], knowledge: Knowledge) -> None:
        assert len(knowledge.surrogate)
        with pytest.raises(NotGranted):
            knowledge.statistics(0)

    plug_in(monkeypatch, "attack", "crafty", meddling(craft))
    ran = federated(tmp_path, {"attack": "crafty", "threat-model": "G"})
    _, facts = reconstructions.load(ran.folder.path / "reconstructions" / "crafty.safetensors")
    assert set(facts.used) == {"surrogate", "manipulation"}
    assert ran.federation["used"] == ["surrogate"]


def test_reading_a_view_is_using_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, deed in (("blind", lambda v, k: len(v)), ("seeing", lambda v, k: v[0])):
        plug_in(monkeypatch, "attack", name, watching(deed))
        ran = federated(tmp_path / name, {"attack": name})
        _, facts = reconstructions.load(ran.folder.path / f"reconstructions/{name}.safetensors")
        assert facts.used == (("updates",) if name == "seeing" else ())


@pytest.mark.parametrize("channel", ["plain", "secagg(max_weight=2)"])
def test_a_view_holds_what_rode_along_and_no_number_of_examples(
    channel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(views: Sequence[ServerView], knowledge: Knowledge) -> dict[str, Any]:
        seen = [*views, *views[:], views[-1]]
        with pytest.raises(IndexError):
            views[len(views)]
        return {
            "rode along": [(view.num_examples, dict(view.metrics)) for view in seen],
            "asked": [knowledge.num_examples(view) for view in views],
        }

    plug_in(monkeypatch, "attack", "looker", watching(look))
    ran = federated(tmp_path, {"attack": "looker", "threat-model": "B", "channel": channel})
    assert all(one == [None, {}] for one in told(ran)["rode along"])
    assert sum(told(ran)["asked"]) == 8
    assert [view.num_examples for view in ran.views] == told(ran)["asked"]


def reachable(value: object, depth: int) -> list[object]:
    """What attributes, keys and items lead to; not what is inside closures or modules."""
    if depth == 0 or isinstance(value, int | float | str | Tensor | type(None) | type):
        return [value]
    inside: list[Any] = list(getattr(value, "__dict__", {}).values())
    if isinstance(value, dict):
        inside += [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        inside += list(value)
    elif hasattr(value, "__self__"):
        inside.append(value.__self__)
    elif hasattr(value, "args") and hasattr(value, "keywords"):  # functools.partial
        inside += [*value.args, *value.keywords.values()]
    return [value, *(found for one in inside for found in reachable(one, depth - 1))]


def within(knowledge: Knowledge, views: Sequence[ServerView]) -> list[str]:
    """Describe what attributes lead to."""
    found = reachable(knowledge, 6) + reachable(views, 6)
    return [f"{type(one).__name__} {one if isinstance(one, int) else ''}" for one in found]


@pytest.mark.parametrize("letter", THREAT_MODELS)
def test_no_attribute_leads_to_the_run(
    letter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = watching(lambda views, knowledge: within(knowledge, views))
    plug_in(monkeypatch, "attack", "looker", look)
    ran = federated(tmp_path, {"attack": "looker", "threat-model": letter, "seed": 987_654_321})
    types = {one.split(" ")[0] for one in told(ran)}
    assert types >= {"AskedKnowledge", "Views", "DataSpec"}
    assert not types & {"Parts", "Scenario", "RunFolder", "PosixPath", "Tensor", "Split"}
    assert not [one for one in told(ran) if "987654321" in one]


def test_the_attacks_seed_leads_to_no_other_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(views: Sequence[ServerView], knowledge: Knowledge) -> list[int]:
        return [knowledge._seed, knowledge.generator("start").initial_seed()]

    plug_in(monkeypatch, "attack", "looker", watching(look))
    ran = federated(tmp_path, {"attack": "looker", "seed": 11})
    held = told(ran)
    names: list[tuple[object, ...]] = [("model",), ("partition",), ("surrogate",), ("cohort", 1)]
    names += [("client", client, "batches", 1) for client in range(4)]
    streams = {seeds.derive(11, *name) for name in names}
    assert not streams & {*held, *(seeds.derive(one, *name) for one in held for name in names)}
    assert ran.parts.scenario.seed not in held


def test_the_surrogate_is_public_and_none_of_the_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "a", watching(lambda v, k: k.surrogate.images.tolist()))
    ran = federated(tmp_path, {"attack": "a", "threat-model": "D"})
    public, held_out = split_test(ran.parts.dataset.test, ran.parts.scenario.seed)
    assert torch.equal(torch.tensor(told(ran)), public.images)
    assert len(public) + len(held_out) == len(ran.parts.dataset.test)


def test_statistics_are_each_clients_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(views: Sequence[ServerView], knowledge: Knowledge) -> list[list[float]]:
        return [knowledge.statistics(client).class_distribution.tolist() for client in range(4)]

    plug_in(monkeypatch, "attack", "asking", watching(ask))
    changes = {"attack": "asking", "threat-model": "E", "data.partition": "dirichlet(alpha=1.0)"}
    ran = federated(tmp_path, changes)
    labels = ran.parts.dataset.train.labels
    for client, own in enumerate(ran.parts.partitions):
        share = torch.bincount(labels[own], minlength=10) / len(own)
        assert torch.allclose(torch.tensor(told(ran)[client]), share)


# -- oracles ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Oracular(Watching):
    @property
    def oracles(self) -> frozenset[str]:
        return frozenset({"labels"})


def test_the_labels_oracle_is_not_there_unless_the_scenario_grants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = watching(lambda views, knowledge: knowledge.oracle("labels", views[0]))
    plug_in(monkeypatch, "attack", "asking", ask)
    with pytest.raises(NotGranted, match="its report wears a badge"):
        run_inline(scenario(tmp_path, {"attack": "asking"}), "a test")


def test_a_granted_oracle_tells_the_truth_and_wears_its_badge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(views: Sequence[ServerView], knowledge: Knowledge) -> list[list[int]]:
        return [knowledge.oracle("labels", view).tolist() for view in views]

    oracular = type("Oracular", (Oracular,), {"deed": staticmethod(ask)})
    plug_in(monkeypatch, "attack", "oracular", oracular)
    run_inline(scenario(tmp_path, {"attack": "oracular", "oracles": "labels"}), "a test")
    folder = latest(tmp_path).path
    assert told(latest(tmp_path)) == [r.labels.tolist() for r in Vault(folder / "vault")]
    report = json.loads((folder / "report.json").read_text())
    assert report["threat_model"]["oracles"] == ["labels"]
    assert "oracle" in report["verdict"]


def test_nobody_but_the_range_imports_the_auditor() -> None:
    for package in ("strategies", "clients"):
        module = importlib.import_module(package)
        root = Path(module.__path__[0])
        for file in root.rglob("*.py"):
            text = file.read_text()
            assert "fedsim.audit" not in text, file
            other = "clients" if package == "strategies" else "strategies"
            assert f"from {other}" not in text, file
            assert f"import {other}" not in text, file
