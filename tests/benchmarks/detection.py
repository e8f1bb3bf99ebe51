"""How well clients' checks tell a manipulated model from an honest one; fills docs/detection.md.

    python tests/benchmarks/detection.py [--out runs/detection] [--attacks NAME ...] [--resume]

*Attacked rounds.*  The toy case of every registered manipulation, and the variants below, run under
a few seeds through federations whose clients use every registered detector and refuse nothing.  The
reconstruction is left out: a check is done before it.

*Limits.*  Honest federations of several models train on two data sets, from an untrained model to a
trained one.  The limit of a check is the least one that at most 1 % (5 %) of their client rounds
exceed, of those on which the check has a figure.  Only rounds of *another* model, *another* seed
and *another* stage of training (number of the round) than what is judged take part; of the scenario
they share the batch size, which a client knows.  Fewer than 100 (20) of them give no limit.

*False alarms.*  Every honest round is judged by such limits of the others, and so is every attacked
federation without its attack (its *honest twin*).

Scores are kept in ``--out``, one file a federation; delete it when a detector or a model changes.
Attacked federations run anew all the same, unless ``--resume`` goes on with a run cut short.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import math
import re
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

ALARMS = (0.01, 0.05)
ATTACKED_SEEDS = (7, 8, 9, 10, 11)
HONEST_SEEDS = (101, 102, 103)
DATASETS = ("digits", "photo-tiles")
MODELS = (
    "mlp(hidden=[64])",
    "mlp(hidden=[128, 64])",
    "lenet",
    "lenet(activation='relu', init='default')",
    "convnet(width=16)",
    "convnet(width=8, stride=2, hidden=[64])",
    "cnn(hidden=[64, 32])",
    "convnet(width=8, norm='batch')",
)
BATCHES = (1, 4, 8, 16, 32, 64)
CLIENTS, ROUNDS, STEPS = 2, 6, 40
#: A client's examples: what the steps of two epochs need, and no more than there are.
MOST_EXAMPLES = 512
#: What attacked rounds are trained like, and therefore no limit is set on.
UNTRAINED = 1
#: A check that sees this share of the client rounds sees the attack; some send one client an
#: honest model.
SEEN = 0.5
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
#: What toy cases leave out: how it differs from an attack's toy case.
VARIANTS: dict[str, tuple[str, Flat]] = {
    "fishing, by feature": (
        "fishing",
        {
            "attack": "fishing(then='linear-inversion', by='feature')",
            "data.partition": "pathological(num_classes_per_partition=1)",
            "federation.rounds": 6,
        },
    ),
    "model-inconsistency, payload": (
        "model-inconsistency",
        {
            "threat-model": "G",
            "attack": "model-inconsistency(then='robbing-the-fed(units=64)')",
            "channel": "secagg",
            "data.dataset": "photo-tiles",
            "model.name": "convnet(width=8)",
            "federation.rounds": 1,
            "federation.local": "fedsgd(batch_size=8, lr=0.1)",
        },
    ),
    "robbing-the-fed, convnet": (
        "robbing-the-fed",
        {"attack": "robbing-the-fed(units=64)", "model.name": "convnet(width=8)"},
    ),
    "curious-abandon-honesty, convolutions": (
        "curious-abandon-honesty",
        {"model.name": "convnet(width=32, hidden=[128])"},
    ),
    "mkor, convolutions": ("mkor", {"model.name": "lenet5(maps=[12, 48])"}),
}


@dataclass(frozen=True)
class Round:
    """What one client measured in one round of a federation."""

    model: str
    seed: int
    stage: int
    scores: dict[str, float]


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
    """Return the cases: the toys of all attacks that change what clients receive, and variants."""
    toys = {
        name: dict(kind.toy.scenario)
        for name, kind in components("attack").items()
        if isinstance(kind, type) and issubclass(kind, Manipulation)
    }
    varied = {name: {**toys[of], **changes} for name, (of, changes) in VARIANTS.items()}
    return dict(sorted({**toys, **varied}.items()))


# -- federations ---------------------------------------------------------------------------------


def honest(model: str, dataset: str, seed: int, batch_size: int) -> Flat:
    """Return a federation that trains a model, ``STEPS`` steps a round and client."""
    examples = min(STEPS * batch_size // 2, MOST_EXAMPLES)
    epochs = STEPS * batch_size // examples
    return {
        "attack": "none",
        "seed": seed,
        "data.dataset": dataset,
        "data.partition": f"size(partition_sizes={[examples] * CLIENTS})",
        "model.name": model,
        "federation.clients": CLIENTS,
        "federation.rounds": ROUNDS,
        "federation.local": f"fedavg(epochs={epochs}, batch_size={batch_size}, lr=0.05)",
    }


def watched(case: Flat, seed: int) -> Flat:
    """Return a case whose clients look at what they receive."""
    own = str(case.get("defenses", "none"))
    chain = [*detectors(), *([] if own == "none" else [own])]
    return {**case, "seed": seed, "defenses": " | ".join(chain), "audit.baseline": False}


def twin(case: Flat) -> Flat:
    """Return the same federation with an honest server, who brings no devices of its own."""
    cohort = f"cohort={case.get('federation.clients', 1)}"
    alone = re.sub(r"\bcohort=\d+", cohort, str(case.get("defenses", "none")))
    unasked: Flat = {"data.known": "none"} if "data.known" in case else {}
    return {**case, "attack": "none", "oracles": "none", "defenses": alone, **unasked}


def measured(case: Flat, cache: Path, *, anew: bool = False) -> list[Round]:
    """Return what every client measured in every round; a federation that is kept runs no more."""
    text = json.dumps({"federation.threads": 1, "federation.device": "cpu", **case}, sort_keys=True)
    kept = cache / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    if anew or not kept.exists():
        print(f"  {case['attack']}, {case['model.name']}, seed {case['seed']}", flush=True)
        found = run(json.loads(text))
        kept.write_text(json.dumps({"scenario": json.loads(text), "rounds": found}))
    model, seed = str(case["model.name"]), int(case["seed"])
    rounds = json.loads(kept.read_text())["rounds"]
    return [Round(model, seed, stage, scores) for stage, scores in rounds]


def run(case: Flat) -> list[tuple[int, dict[str, float]]]:
    """Run a federation, without the reconstruction, and open its vault: rounds and scores."""
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
        return [(record.round, dict(record.checks)) for record in Vault(folder.path / "vault")]


def benign_rounds(batch_size: int, cache: Path) -> Iterator[Round]:
    """Yield honest client rounds of all models, data sets and seeds at a batch size."""
    for model in MODELS:
        for dataset in DATASETS:
            for seed in HONEST_SEEDS:
                case = honest(model, dataset, seed, batch_size)
                yield from measured(watched(case, seed), cache)


# -- limits and rates ----------------------------------------------------------------------------


def limit(scores: Iterable[float], alarms: float) -> float | None:
    """Return the least score that at most a share ``alarms`` of these exceed.

    None for fewer than ``1 / alarms`` scores, which cannot tell.
    """
    ordered = sorted(scores, reverse=True)
    # 100 * 0.01 is 1, but 300 * 0.01 need not be 3.
    above = math.floor(alarms * len(ordered) + 1e-9)
    return ordered[above] if above else None


def limit_of(
    benign: Iterable[Round], name: str, alarms: float, judged: tuple[str, int, int]
) -> float | None:
    """Return a check's limit of rounds that share no model, seed or stage with those judged."""
    model, seed, stage = judged
    return limit(
        (
            one.scores[name]
            for one in benign
            if name in one.scores and one.model != model and one.seed != seed and one.stage != stage
        ),
        alarms,
    )


def rate(rounds: Sequence[Round], name: str, above: float | None) -> float | None:
    """Return the share of client rounds above a limit; None where the check never has a figure."""
    decided = [one.scores[name] for one in rounds if name in one.scores]
    if not decided or above is None:
        return None
    return sum(score > above for score in decided) / len(rounds)


@dataclass(frozen=True)
class Case:
    """One attack's case: client rounds under attack and without, and limits by check and share."""

    batch_size: int
    attacked: list[Round]
    honest: list[Round]
    limits: dict[float, dict[str, float | None]]

    def rates(self, name: str, rounds: Sequence[Round]) -> list[float | None]:
        """Return the shares above the check's limits, by ``ALARMS``."""
        return [rate(rounds, name, self.limits[alarms].get(name)) for alarms in ALARMS]

    def any_of(self, rounds: Sequence[Round]) -> list[float | None]:
        """Return the shares of rounds in which at least one check is above its limit."""
        return [
            sum(
                any(
                    score > above
                    for name, score in one.scores.items()
                    if (above := self.limits[alarms].get(name)) is not None
                )
                for one in rounds
            )
            / len(rounds)
            for alarms in ALARMS
        ]


def evaluated(case: Flat, cache: Path, *, anew: bool) -> Case:
    """Run a case and its twin under all seeds, and the honest rounds that set its limits."""
    attacked = [
        one for seed in ATTACKED_SEEDS for one in measured(watched(case, seed), cache, anew=anew)
    ]
    alike = [s for seed in ATTACKED_SEEDS for s in measured(watched(twin(case), seed), cache)]
    wanted = Parts(Scenario.from_flat(case)).local.batch_size
    batch_size = max(size for size in BATCHES if size <= wanted)
    benign = list(benign_rounds(batch_size, cache))
    judged = (str(case["model.name"]), ATTACKED_SEEDS[0], UNTRAINED)
    limits = {
        alarms: {name: limit_of(benign, name, alarms, judged) for name in names(benign)}
        for alarms in ALARMS
    }
    return Case(batch_size, attacked, alike, limits)


def names(rounds: Iterable[Round]) -> list[str]:
    """Return the checks that have a figure in any round."""
    return sorted({name for one in rounds for name in one.scores})


def held_out(benign: Sequence[Round], checks: Sequence[str], alarms: float) -> list[float | None]:
    """Return the shares of honest rounds above limits of others, by check, and of any check's."""
    groups: dict[tuple[str, int, int], list[Round]] = {}
    for one in benign:
        groups.setdefault((one.model, one.seed, one.stage), []).append(one)
    judged: dict[str, list[bool]] = {name: [] for name in checks}
    together = []
    for group, rounds in groups.items():
        limits = {name: limit_of(benign, name, alarms, group) for name in checks}
        for one in rounds:
            known = {
                name: score > above
                for name, score in one.scores.items()
                if (above := limits.get(name)) is not None
            }
            together.append(any(known.values()))
            for name, alarmed in known.items():
                judged[name].append(alarmed)
    return [sum(found) / len(found) if found else None for found in (*judged.values(), together)]


# -- the page --------------------------------------------------------------------------------------


def tables(cases: dict[str, Case], benign: dict[int, list[Round]], failed: dict[str, str]) -> str:
    """Return the measured part of docs/detection.md."""
    checks = names(one for case in cases.values() for one in case.attacked)
    sizes = sorted({case.batch_size for case in cases.values()})
    fewest = min(sum(one.stage != UNTRAINED for one in benign[size]) for size in sizes)
    parts = [
        f"Attacked federations under {len(ATTACKED_SEEDS)} seeds; limits from {fewest} honest "
        f"client rounds or more, of {len(MODELS)} models, {len(DATASETS)} data sets and "
        f"{len(HONEST_SEEDS)} other seeds.\n",
        "### Which checks see which attack\n",
        f"In at least {SEEN:.0%} of the client rounds at the 1 % limit, with at most 5 % false "
        "alarms on the honest twin.\n",
        "\n".join(f"- {attack}: {seen_by(case, checks)}" for attack, case in cases.items()) + "\n",
        "### Detection rate\n",
        "Percent of attacked client rounds above the limit at 1 % / at 5 % false alarms; one "
        "figure where they are equal.\n",
        table(cases, checks, under_attack=True),
        "### False alarms on the honest twins\n",
        "The same federations without the attack, at the same limits.\n",
        table(cases, checks, under_attack=False),
        "### False alarms on held-out models\n",
        "Percent of the honest client rounds above limits that were set on other models, seeds and "
        "stages of training, at 1 % / at 5 %.\n",
        held_out_table(checks, benign),
        "### Limits\n",
        "At 1 % / at 5 %, over all models, seeds and stages but the untrained: what to write into "
        "`refuse_above` and its like.  A share cannot exceed 1: there nothing sets off an alarm.\n",
        limits_table(checks, benign),
    ]
    if failed:
        told = [f"- {attack}: {reason}" for attack, reason in failed.items()]
        parts += ["### Not measured\n", "\n".join(told) + "\n"]
    return "\n".join(parts)


def seen_by(case: Case, checks: Sequence[str]) -> str:
    """Return the checks that see an attack at 1 % and leave its honest twin alone."""
    found = []
    for name in checks:
        under, without = case.rates(name, case.attacked)[0], case.rates(name, case.honest)[0]
        if under is not None and under >= SEEN and (without or 0) <= ALARMS[1]:
            found.append(f"`{name}`")
    return ", ".join(found) or "none"


def table(cases: dict[str, Case], checks: Sequence[str], *, under_attack: bool) -> str:
    """Return a table of checks by attacks."""
    rounds = {a: case.attacked if under_attack else case.honest for a, case in cases.items()}
    rows = [
        [f"`{name}`", *(cell(case.rates(name, rounds[a])) for a, case in cases.items())]
        for name in checks
    ]
    together = ["any of them", *(cell(case.any_of(rounds[a])) for a, case in cases.items())]
    count = ["*client rounds*", *(str(len(some)) for some in rounds.values())]
    return markdown(["check", *cases], [*rows, together, count])


def held_out_table(checks: Sequence[str], benign: dict[int, list[Round]]) -> str:
    """Return the false alarms on models that took no part in setting a limit, by batch size."""
    columns = {
        size: [cell(pair) for pair in zip(*(held_out(b, checks, a) for a in ALARMS), strict=True)]
        for size, b in benign.items()
    }
    called = [*(f"`{name}`" for name in checks), "any of them"]
    rows = [[name, *cells] for name, *cells in zip(called, *columns.values(), strict=True)]
    return markdown(["check", *(f"batches of {size}" for size in benign)], rows)


def limits_table(checks: Sequence[str], benign: dict[int, list[Round]]) -> str:
    """Return the limits by batch size."""
    nothing = ("", 0, UNTRAINED)
    rows = [
        [
            f"`{n}`",
            *(
                figures([limit_of(b, n, a, nothing) for a in ALARMS], "{:.3g}")
                for b in benign.values()
            ),
        ]
        for n in checks
    ]
    return markdown(["check", *(f"batches of {size}" for size in benign)], rows)


def cell(shares: Sequence[float | None]) -> str:
    """Return percentages."""
    return figures([None if share is None else 100 * share for share in shares], "{:.0f}")


def figures(values: Sequence[float | None], form: str) -> str:
    """Return figures side by side, one where all read the same, and a dash for none."""
    told = ["–" if value is None else form.format(value) for value in values]
    return told[0] if len(set(told)) == 1 else " / ".join(told)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def fill(page: Path, text: str) -> None:
    """Put the tables between the page's marks; the prose around them stays."""
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def main() -> None:
    """Run every case that is asked for, and fill the page."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--out", type=Path, default=Path("runs/detection"))
    arguments.add_argument("--page", type=Path, default=Path("docs/detection.md"))
    arguments.add_argument("--attacks", nargs="*", help="only these; all that are registered")
    arguments.add_argument("--resume", action="store_true", help="take attacked ones from --out")
    chosen = arguments.parse_args()
    # Flower sets its own level when it is first used.
    logging.disable(logging.INFO)
    chosen.out.mkdir(parents=True, exist_ok=True)
    cases, failed = {}, {}
    for attack, case in manipulations().items():
        if chosen.attacks and attack not in chosen.attacks:
            continue
        print(attack, flush=True)
        try:
            cases[attack] = evaluated(case, chosen.out, anew=not chosen.resume)
        except (RunFailed, ScenarioError) as error:
            failed[attack] = str(error)
    sizes = sorted({case.batch_size for case in cases.values()})
    benign = {size: list(benign_rounds(size, chosen.out)) for size in sizes}
    fill(chosen.page, tables(cases, benign, failed))
    print(chosen.page)


if __name__ == "__main__":
    main()
