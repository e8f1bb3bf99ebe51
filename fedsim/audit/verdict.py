"""Judge a run: from a run folder to a :class:`~fedsim.audit.schema.Report`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.attack import Attack, Reconstruction
from fedsim.audit import perceptual, receipts
from fedsim.audit.aggregate import aggregation_cost
from fedsim.audit.criterion import Criterion, parse_criterion
from fedsim.audit.floor import GuessScores, floor
from fedsim.audit.leak import EXACT, THRESHOLDS, Scores, label_accuracy, score, wilson
from fedsim.audit.matching import PrivateSet, private_set
from fedsim.audit.membership import membership
from fedsim.audit.run import Run, open_run
from fedsim.audit.schema import (
    Accuracy,
    AttackPart,
    CurvePoint,
    DefensePart,
    Example,
    Failure,
    FederationPart,
    Floor,
    Guess,
    Leak,
    Membership,
    Report,
    Sent,
    Summary,
    ThreatModel,
)
from fedsim.audit.sentence import nothing_came, verdict
from fedsim.audit.vault import VaultRecord
from fedsim.data import DataSet, load_dataset, split_test
from fedsim.errors import ScenarioError
from fedsim.reconstructions import Facts
from fedsim.registry import components
from fedsim.threat import NAMES, THREAT_MODELS, Capability
from fedsim.view import SavedViews

Saved = tuple[Reconstruction, Facts, Path]
Records = dict[tuple[int, int], VaultRecord]

_NO_VAULT = "the vault is missing: bring the clients' deposits with fedsim report RUN --vault DIR"
_ASKED = "the attack asks who has an image that it holds, and reconstructs none"


class _NothingToJudge(Exception):  # noqa: N818 - a reason for the report, not an error
    """Why there is no leak to measure."""


@dataclass(frozen=True)
class _Finding:
    """What leaked, or the reason why nothing could be measured; and notes for the reader."""

    leak: Leak | None
    examples: list[Example]
    reason: str | None
    notes: list[str]
    membership: Membership | None = None


def judge(folder: Path, reconstruction: Path | None = None) -> Report:
    """Judge a run folder.

    Parameters
    ----------
    folder : Path
        The run folder; what is missing from it becomes a null with a reason.
    reconstruction : Path or None
        Another saved reconstruction to judge than that of the scenario's own attack.

    Raises
    ------
    RunFailed
        If the folder is no run folder, or a deposit does not open.
    ScenarioError
        If the criterion cannot be read, or asks for LPIPS where its weights are not at hand.
    """
    run = open_run(folder)
    criterion = parse_criterion(str(run.scenario.get("audit", {}).get("criterion", "psnr>=20")))
    saved = run.reconstruction(reconstruction)
    # Uploads are the bulk of a vault and are not needed here.
    records = {(r.client, r.round): dataclasses.replace(r, upload=None) for r in run.vault}
    finding = _finding(run, saved, records, criterion)
    return _report(run, saved, records, criterion, finding)


def _finding(run: Run, saved: Saved | None, records: Records, criterion: Criterion) -> _Finding:
    notes: list[str] = []
    if saved is not None and saved[0].present is not None:
        judged = membership(saved[0], saved[1], records) if records else _NO_VAULT
        if isinstance(judged, str):
            return _Finding(None, [], judged, notes)
        return _Finding(None, [], _ASKED, notes, judged)
    try:
        leak, examples = _leak(run, saved, records, criterion, notes)
    except _NothingToJudge as nothing:
        return _Finding(None, [], str(nothing), notes)
    return _Finding(leak, examples, None, notes)


def _report(
    run: Run, saved: Saved | None, records: Records, criterion: Criterion, finding: _Finding
) -> Report:
    seen = SavedViews(run.folder / "views").facts()
    single = [str(facts["label"]) for facts in seen if len(facts["senders"]) == 1]
    defenses = receipts.defense_parts(records.values(), run.federation, single)
    stopped = run.stopped()
    failed = None if stopped else _failed(run, saved, bool(records), defenses)
    threat_model, federation = _threat_model(run, saved), _federation(run)
    sentence = verdict(
        criterion,
        finding.leak,
        membership=finding.membership,
        reason=finding.reason,
        oracles=threat_model.oracles,
        failed=failed,
        stopped=stopped,
        refusals=() if run.refused else federation.refusals,  # or they are the reason
    )
    data = _data(run)
    return Report(
        title=str(run.scenario.get("title", "untitled")),
        run=run.folder.resolve().name,
        verdict=sentence,
        failed=failed,
        stopped=stopped,
        notes=finding.notes,
        scenario=run.scenario,
        threat_model=threat_model,
        federation=federation,
        attack=_attack(run, saved),
        defenses=defenses,
        detection=receipts.detections(records.values(), run.federation),
        leak=finding.leak,
        leak_reason=finding.reason,
        membership=finding.membership,
        examples=finding.examples,
        classes=list(data.classes) if isinstance(data, DataSet) else [],
        environment=run.environment,
    )


def _failed(run: Run, saved: Saved | None, opened: bool, parts: list[DefensePart]) -> str | None:
    """Say why a run that came to its end must not be believed."""
    if run.refused:
        return None  # nothing was uploaded: nobody could change or read anything
    idle = None
    if saved is not None:
        idle = receipts.idle_attack(saved[1].name, saved[:2], run.federation)
    elif run.attack is not None:
        idle = receipts.idle_attack(run.attack.name, None, run.federation)
    return idle or (receipts.idle_defense(parts, run.federation) if opened else None)


def _leak(
    run: Run,
    saved: Saved | None,
    records: Records,
    criterion: Criterion,
    notes: list[str],
) -> tuple[Leak, list[Example]]:
    """Measure the leak, adding to ``notes`` what a reader should know; or say why not."""
    if saved is None and run.refused:
        told = _federation(run)
        raise _NothingToJudge(nothing_came(told.refusals, told.failures))
    if saved is None:
        honest = "the server was honest and made no attack"
        raise _NothingToJudge(honest if run.attack is None else "there is no reconstruction")
    reconstruction, facts, _ = saved
    private = _private(facts, records, notes)
    candidates = reconstruction.examples
    if len(candidates) == 0:
        raise _NothingToJudge("the attack returned no candidate")
    if candidates.shape[1:] != private.images.shape[1:]:
        shapes = f"{list(candidates.shape[1:])}, private images {list(private.images.shape[1:])}"
        raise _NothingToJudge(f"candidates are {shapes}: they cannot be compared")
    if broken := int((~candidates.isfinite()).flatten(1).any(dim=1).sum()):
        notes.append(f"{broken} candidates hold values that are no numbers; they count as black")
    scores = score(candidates, reconstruction.views, private, criterion)
    if not bool(scores.matched.any()):
        raise _NothingToJudge("no candidate is of a view with private images behind it")
    guesses = _guesses(run, reconstruction.views, private, criterion)
    leak = _leak_part(reconstruction, private, scores, criterion, guesses)
    return leak, _examples(reconstruction, facts, private, scores)


def _private(facts: Facts, records: Records, notes: list[str]) -> PrivateSet:
    """Gather the private images behind the views that the attack was given."""
    if not records:
        raise _NothingToJudge(_NO_VAULT)
    behind, missing = [], []
    for senders, server_round in zip(facts.senders, facts.rounds, strict=True):
        keys = [(client, server_round) for client in senders]
        behind.append([records[key] for key in keys if key in records])
        missing += [f"client {c} in round {r}" for c, r in keys if (c, r) not in records]
    if missing:
        notes.append(
            f"the vault lacks {', '.join(missing)}: their images are not counted; bring them with "
            "fedsim report RUN --vault DIR"
        )
    try:
        return private_set(behind)
    except ValueError as error:
        raise _NothingToJudge(str(error)) from None


def _data(run: Run) -> DataSet | str:
    """Return the data set, for its classes and the floor, or why it is not here."""
    try:
        return load_dataset(str(run.scenario["data"]["dataset"]))
    except (ScenarioError, KeyError) as error:
        return f"the data set is not here: {error}"


def _guesses(
    run: Run, views: Tensor, private: PrivateSet, criterion: Criterion
) -> list[GuessScores] | str:
    data = _data(run)
    if isinstance(data, str):
        return data
    seed = int(run.scenario.get("seed", 7))
    surrogate, _ = split_test(data.test, seed)
    if len(surrogate) == 0:
        return "the data set has no test split to guess from"
    images, _ = surrogate.batch(torch.arange(len(surrogate)))
    return floor(images, views, private, criterion, seed)


def _leak_part(
    reconstruction: Reconstruction,
    private: PrivateSet,
    scores: Scores,
    criterion: Criterion,
    guesses: list[GuessScores] | str,
) -> Leak:
    accuracy, accuracy_reason = label_accuracy(reconstruction, private)
    best = guesses[0].scores if isinstance(guesses, list) else None
    return Leak(
        private_examples=len(private),
        reconstructed=len(reconstruction.examples),
        matched=int(scores.matched.sum()),
        leaked=scores.leaked_count,
        exact=int((scores.values["mse"] < EXACT).sum()),
        leak_rate=scores.leaked_count / len(private),
        interval=wilson(scores.leaked_count, len(private)),
        criterion=criterion.spoken(),
        psnr_limit=criterion.limit("psnr"),
        **_summaries(scores),
        lpips_reason=perceptual.unavailable(),
        label_accuracy=accuracy,
        label_accuracy_reason=accuracy_reason,
        floor=_floor_part(guesses, len(private)) if isinstance(guesses, list) else None,
        floor_reason=guesses if isinstance(guesses, str) else None,
        curve=[
            CurvePoint(psnr=t, leak_rate=scores.rate_at(t), floor=best.rate_at(t) if best else None)
            for t in THRESHOLDS
        ],
    )


def _floor_part(guesses: list[GuessScores], private: int) -> Floor:
    best = guesses[0]
    return Floor(
        guess=best.name,
        leaked=best.scores.leaked_count,
        leak_rate=best.scores.leaked_count / private,
        **_summaries(best.scores),
        guesses=[
            Guess(
                name=guess.name,
                psnr=guess.scores.mean_psnr,
                leak_rate=guess.scores.leaked_count / private,
            )
            for guess in guesses
        ],
    )


def _summaries(scores: Scores) -> dict[str, Any]:
    return {name: _summary(values[scores.matched]) for name, values in scores.values.items()}


def _summary(values: Tensor) -> Summary:
    return Summary(
        mean=float(values.mean()),
        median=float(values.quantile(0.5)),
        min=float(values.min()),
        max=float(values.max()),
    )


def _examples(
    reconstruction: Reconstruction, facts: Facts, private: PrivateSet, scores: Scores
) -> list[Example]:
    examples = []
    for row in range(len(private)):
        at = int(scores.chosen[row])
        measured: dict[str, Any] = {}
        if at >= 0:
            measured = {name: float(values[row]) for name, values in scores.values.items()}
            measured["match"] = at
            if reconstruction.labels is not None:
                measured["label_recovered"] = int(reconstruction.labels[at])
        view = int(scores.source[row])
        examples.append(
            Example(
                client=int(private.clients[row]),
                round=facts.rounds[view] if view >= 0 else int(private.rounds[row]),
                index=int(private.indices[row]),
                label=int(private.labels[row]),
                leaked=bool(scores.leaked[row]),
                **measured,
            )
        )
    return examples


def _threat_model(run: Run, saved: Saved | None) -> ThreatModel:
    letter = str(run.scenario.get("threat-model", "A"))
    used = {*(saved[1].used if saved else ()), *(run.federation.get("used") or ())}
    if receipts.was_active(run.federation):
        used.add(Capability.MANIPULATION.value)
    return ThreatModel(
        letter=letter,
        name=NAMES.get(letter, "unknown"),
        granted=[c.value for c in Capability if c in THREAT_MODELS.get(letter, ())],
        used=[c.value for c in Capability if c.value in used],
        oracles=sorted(saved[1].oracles) if saved else [],
    )


def _federation(run: Run) -> FederationPart:
    found = run.federation
    kept: dict[str, Any] = {"engine": run.environment.get("engine")}
    kept |= {
        key: found[key]
        for key in FederationPart.model_fields
        if found.get(key) is not None and key not in ("accuracy", "failures")
    }
    accuracy = {
        key: receipts.finite_or_none(value)
        for key, value in (found.get("accuracy") or {}).items()
        if key in Accuracy.model_fields
    }
    failures = [
        Failure(
            round=f.get("round"),
            client=f.get("client"),
            reason=str(f.get("reason")),
            refused=bool(f.get("refused")),
        )
        for f in found.get("failures") or []
    ]
    channel = kept.get("channel", {})
    if "max_weight" in channel:
        kept["channel"] = {**channel, **aggregation_cost(run.folder, channel)}
    return FederationPart(**kept, accuracy=Accuracy(**accuracy), failures=failures)


def _attack(run: Run, saved: Saved | None) -> AttackPart | None:
    told = run.federation.get("manipulation")
    sent = Sent(**told) if told else None
    added: dict[str, Any] = {
        "parameters_added": sent.parameters - sent.honest_parameters if sent else 0,
        "bytes_added": sent.bytes - sent.honest_bytes if sent else 0,
        "sent": sent,
    }
    if saved is None:
        return _unfinished(run, added) if run.refused else None
    reconstruction, facts, path = saved
    return AttackPart(
        expression=facts.expression,
        name=facts.name,
        paper=facts.paper,
        seconds=reconstruction.cost.seconds,
        gradient_evaluations=reconstruction.cost.gradient_evaluations,
        receipts=list(reconstruction.receipts),
        reconstruction=path.name,
        aggregated=bool(facts.senders) and all(len(who) > 1 for who in facts.senders),
        **added,
    )


def _unfinished(run: Run, added: dict[str, Any]) -> AttackPart | None:
    """Return what there is to say of an attack that clients left nothing to reconstruct from."""
    if run.attack is None:
        return None
    known = components("attack").get(run.attack.name)
    return AttackPart(
        expression=str(run.scenario["attack"]),
        name=run.attack.name,
        paper=known.paper.cited() if isinstance(known, type) and issubclass(known, Attack) else "",
        seconds=None,
        gradient_evaluations=None,
        receipts=[],
        reconstruction=None,
        aggregated=False,
        **added,
    )
