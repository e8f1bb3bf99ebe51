"""How well clients' checks tell a manipulated model from an honest one; writes docs/detection.md.

    python tests/benchmarks/detection.py [--out runs/detection] [--attacks NAME ...]

Every registered manipulation runs its own toy case, under a few seeds, through a federation whose
clients use every registered detector and refuse nothing.  Limits come from honest federations of
other models and other seeds, on two data sets, from the first round on an untrained model to the
last on a trained one; of the scenario they share only the batch size, which a client knows (the
largest of a few that is not above it, or the smallest).  A limit is the least one that at most 1 %
(5 %) of those honest client rounds exceed, among those on which the check has a figure.  The toy
case without its attack (the *honest twin*) then shows what false alarms that limit really gives.

Scores of honest federations are kept in ``--out``, one file each; delete it when a detector or a
model changes.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import math
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from fedsim.attack import Manipulation
from fedsim.audit.vault import Vault
from fedsim.client_app import app
from fedsim.defense import Defense
from fedsim.engines.inline import HOST, InlineGrid
from fedsim.errors import RunFailed, ScenarioError
from fedsim.parts import Parts, check
from fedsim.registry import components
from fedsim.run import federate
from fedsim.run_folder import RunFolder, plainly
from fedsim.scenario import Scenario

Flat = dict[str, str | int | float | bool]
Scores = dict[str, float]

ALARMS = (0.01, 0.05)
ATTACKED_SEEDS = (7, 8, 9)
HONEST_SEEDS = (101, 102)
DATASETS = ("digits", "photo-tiles")
MODELS = (
    "mlp(hidden=[64])",
    "mlp(hidden=[128, 64])",
    "lenet",
    "lenet(activation='relu', init='default')",
    "convnet(width=16)",
    "cnn(hidden=[64, 32])",
    "resnet20(width=8, norm='group')",
    "resnet20(width=8)",
)
BATCHES = (4, 8, 16, 32, 64)
EXAMPLES, CLIENTS, ROUNDS, STEPS = 256, 2, 6, 48
#: A check that sees this share of the client rounds sees the attack; some send one client an
#: honest model.
SEEN = 0.5


def detectors() -> list[str]:
    """Return the names of all registered detectors."""
    return [
        name
        for name, kind in components("defense").items()
        if isinstance(kind, type)
        and issubclass(kind, Defense)
        and kind.inspect is not Defense.inspect
    ]


def manipulations() -> dict[str, Flat]:
    """Return the toy case of every registered attack that changes what clients receive."""
    return {
        name: dict(kind.toy.scenario)
        for name, kind in components("attack").items()
        if isinstance(kind, type) and issubclass(kind, Manipulation)
    }


# -- federations ---------------------------------------------------------------------------------


def honest(model: str, dataset: str, seed: int, batch_size: int) -> Flat:
    """Return a federation that trains a model, from its first round to a trained one."""
    epochs = max(1, STEPS * batch_size // EXAMPLES)
    return {
        "attack": "none",
        "seed": seed,
        "data.dataset": dataset,
        "data.partition": f"size(partition_sizes={[EXAMPLES] * CLIENTS})",
        "model.name": model,
        "federation.clients": CLIENTS,
        "federation.rounds": ROUNDS,
        "federation.local": f"fedavg(epochs={epochs}, batch_size={batch_size}, lr=0.05)",
    }


def watched(case: Flat, seed: int) -> Flat:
    """Return a toy case whose clients look at what they receive."""
    own = str(case.get("defenses", "none"))
    chain = [*detectors(), *([] if own == "none" else [own])]
    return {**case, "seed": seed, "defenses": " | ".join(chain), "audit.baseline": False}


def twin(case: Flat) -> Flat:
    """Return the same federation with an honest server."""
    return {**case, "attack": "none", "oracles": "none"}


def measured(case: Flat, cache: Path) -> list[Scores]:
    """Return what every client measured in every round; honest federations run only once."""
    text = json.dumps({"federation.threads": 1, "federation.device": "cpu", **case}, sort_keys=True)
    kept = cache / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    if case["attack"] != "none" or not kept.exists():
        print(f"  {case['attack']}, {case.get('model.name')}, seed {case['seed']}", flush=True)
        found = run(json.loads(text))
        kept.write_text(json.dumps({"scenario": json.loads(text), "scores": found}))
    scores: list[Scores] = json.loads(kept.read_text())["scores"]
    return scores


def run(case: Flat) -> list[Scores]:
    """Run a federation, without the reconstruction, and open its vault."""
    with tempfile.TemporaryDirectory() as out:
        scenario = Scenario.from_flat({**case, "output.dir": out})
        parts = Parts(scenario)
        check(parts)
        run_id = secrets.randbits(62)
        folder = RunFolder.create(scenario, run_id=run_id, engine="inline", command="detection")
        node: dict[str, Any] = {"vault": str(folder.path / "vault")}
        context = Context(run_id, HOST, node, RecordDict(), scenario.flat())
        grid = InlineGrid(app, context, scenario.federation.timeout)
        with contextlib.closing(grid), plainly(folder):
            federate(parts, grid, context, folder)
        return [dict(record.checks) for record in Vault(folder.path / "vault")]


# -- limits and rates ----------------------------------------------------------------------------


def limit(scores: Iterable[float], alarms: float) -> float | None:
    """Return the least score that at most a share ``alarms`` of these exceed; None for none."""
    ordered = sorted(scores, reverse=True)
    return ordered[math.floor(alarms * len(ordered))] if ordered else None


def rate(scores: Sequence[Scores], name: str, above: float | None) -> float | None:
    """Return the share of client rounds above a limit; None where the check never has a figure."""
    decided = [one[name] for one in scores if name in one]
    if not decided or above is None:
        return None
    return sum(score > above for score in decided) / len(scores)


@dataclass(frozen=True)
class Case:
    """One attack's toy case: scores under attack and without, and limits by check and share."""

    attacked: list[Scores]
    honest: list[Scores]
    limits: dict[float, dict[str, float | None]]

    def rates(self, name: str, scores: Sequence[Scores]) -> list[float | None]:
        return [rate(scores, name, self.limits[alarms].get(name)) for alarms in ALARMS]


def evaluated(case: Flat, cache: Path) -> Case:
    """Run a toy case and its twin under all seeds, and the honest rounds that set its limits."""
    attacked = [s for seed in ATTACKED_SEEDS for s in measured(watched(case, seed), cache)]
    alike = [s for seed in ATTACKED_SEEDS for s in measured(watched(twin(case), seed), cache)]
    wanted = Parts(Scenario.from_flat(case)).local.batch_size
    batch_size = max((size for size in BATCHES if size <= wanted), default=BATCHES[0])
    benign = list(benign_rounds(str(case["model.name"]), batch_size, cache))
    names = {name for one in benign for name in one}
    limits = {
        alarms: {n: limit((one[n] for one in benign if n in one), alarms) for n in names}
        for alarms in ALARMS
    }
    return Case(attacked, alike, limits)


def benign_rounds(without: str, batch_size: int, cache: Path) -> Iterator[Scores]:
    """Yield honest client rounds of all models but one."""
    for model in MODELS:
        for dataset in DATASETS:
            for seed in HONEST_SEEDS:
                if model != without:
                    case = honest(model, dataset, seed, batch_size)
                    yield from measured(watched(case, seed), cache)


# -- the page --------------------------------------------------------------------------------------


def page(cases: dict[str, Case], failed: dict[str, str]) -> str:
    """Return docs/detection.md."""
    checks = sorted({n for case in cases.values() for one in case.attacked for n in one})
    rounds = sum(len(case.attacked) for case in cases.values())
    seen = {attack: seen_by(case, checks) for attack, case in cases.items()}
    parts = [
        HEAD.format(
            rounds=rounds,
            seeds=len(ATTACKED_SEEDS),
            models=", ".join(f"`{model}`" for model in MODELS),
            datasets=" and ".join(DATASETS),
            honest_seeds=len(HONEST_SEEDS),
            local_rounds=ROUNDS,
            batches=", ".join(map(str, BATCHES)),
        ),
        "## Which checks see which attack\n",
        f"In at least {SEEN:.0%} of the client rounds at the 1 % limit, with at most 5 % false "
        "alarms on the honest twin.\n",
        "\n".join(f"- `{attack}`: {', '.join(by) or 'none'}" for attack, by in seen.items()) + "\n",
        "## Detection rate\n",
        table(cases, checks, lambda case: case.attacked),
        "## False alarms on the honest twins\n",
        "The same federations without the attack, at the same limits. Limits of other models do "
        "not fit every model: where this is far above the column's share, so is a part of the "
        "detection rate.\n",
        table(cases, checks, lambda case: case.honest),
        "## Limits\n",
        "The limits at 1 % over all toy cases: what to write into `refuse_above` and its like, by "
        "batch size.\n",
        limits_table(cases, checks),
    ]
    if failed:
        told = [f"- `{attack}`: {reason}" for attack, reason in failed.items()]
        parts += ["## Not measured\n", "\n".join(told) + "\n"]
    return "\n".join(parts)


HEAD = """# Detecting a manipulated model

Made by `python tests/benchmarks/detection.py`; do not edit.

A client inspects the model it receives before it trains (`fedsim list defenses detection`,
`fedsim explain structure`). Each check gives a score, higher is more suspicious, and refuses where
a limit is given. Here every registered manipulation runs its toy case with {seeds} seeds and no
refusals, {rounds} client rounds in all.

Limits are the least ones that at most 1 % (5 %) of honest client rounds exceed: of {models}, never
the attacked model itself, on {datasets}, with {honest_seeds} other seeds, over {local_rounds}
rounds from an untrained to a trained model, with the attacked scenario's batch size (the largest of
{batches} that is not above it, or the smallest). A cell is the share of client rounds above the
limit at 1 % / at 5 %; a dash is a check that has no figure there (no convolution, no hidden linear
layer, a batch of one, no honest round to set a limit).

What the table is not: toy cases are small models in their first rounds, and none of these
attackers knows the checks. One who does draws a functional for each row, orders nothing, and
trains a malicious model until it looks trained; SEER (Garov et al., ICLR 2024) was built to pass
D-SNR.
"""


def seen_by(case: Case, checks: Sequence[str]) -> list[str]:
    """Return the checks that see an attack at 1 % and leave its honest twin alone."""
    found = []
    for name in checks:
        under, without = case.rates(name, case.attacked)[0], case.rates(name, case.honest)[0]
        if under is not None and under >= SEEN and (without or 0) <= ALARMS[1]:
            found.append(f"`{name}`")
    return found


def table(cases: dict[str, Case], checks: Sequence[str], which: Any) -> str:
    """Return a table of checks by attacks."""
    lines = [f"| check | {' | '.join(cases)} |", f"| --- |{' --- |' * len(cases)}"]
    for name in checks:
        cells = [" / ".join(map(percent, case.rates(name, which(case)))) for case in cases.values()]
        cells = ["–" if cell == "– / –" else cell for cell in cells]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def limits_table(cases: dict[str, Case], checks: Sequence[str]) -> str:
    """Return the span of each check's limits."""
    lines = ["| check | at 1 % | at 5 % |", "| --- | --- | --- |"]
    for name in checks:
        spans = []
        for alarms in ALARMS:
            found = [
                x for case in cases.values() if (x := case.limits[alarms].get(name)) is not None
            ]
            spans.append(f"{min(found):.3g} to {max(found):.3g}" if found else "–")
        lines.append(f"| `{name}` | {' | '.join(spans)} |")
    return "\n".join(lines) + "\n"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--out", type=Path, default=Path("runs/detection"))
    arguments.add_argument("--page", type=Path, default=Path("docs/detection.md"))
    arguments.add_argument("--attacks", nargs="*", help="only these; all that are registered")
    chosen = arguments.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    chosen.out.mkdir(parents=True, exist_ok=True)
    cases, failed = {}, {}
    for attack, case in manipulations().items():
        if chosen.attacks and attack not in chosen.attacks:
            continue
        print(attack, flush=True)
        try:
            cases[attack] = evaluated(case, chosen.out)
        except (RunFailed, ScenarioError) as error:
            failed[attack] = str(error)
    chosen.page.write_text(page(cases, failed))
    print(chosen.page)


if __name__ == "__main__":
    main()
