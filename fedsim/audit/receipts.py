"""What really happened, and which runs must therefore not be believed."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedsim.accounting import Release, Releases, epsilon, reconstruction_bound
from fedsim.attack import Active, Manipulation, Reconstruction
from fedsim.audit.schema import DefensePart, DefenseReceipts, Detection, Epsilon, Spent
from fedsim.audit.vault import VaultRecord
from fedsim.reconstructions import Facts
from fedsim.registry import components

GUESS = 0.1  # of who has not seen the releases: what the bound on reconstruction is told for
_FIXED = {"name", "parameters", "changed", "cosine", "norm_ratio", "seconds"}
_ACTED = re.compile(r"(?:sent a modified model(?:, to each its own,)?|lied) to [1-9]\d*/")


def defense_parts(
    records: Iterable[VaultRecord], federation: Mapping[str, Any], read_singly: Iterable[str] = ()
) -> list[DefensePart]:
    """Sum up the clients' receipts, one part for each defense in the order of the chain.

    ``read_singly`` names what the server read of one client alone: no promise of sums covers that.
    """
    receipts: dict[str, list[Mapping[str, Any]]] = {}
    ledgers: dict[str, dict[int, tuple[int, Releases]]] = {}
    for expected in federation.get("defenses_expected") or []:
        receipts[expected["name"]] = []
    records = sorted(records, key=lambda record: record.round)
    for record in records:
        for receipt in record.receipts:
            receipts.setdefault(receipt["name"], []).append(receipt)
            if rows := receipt.get("releases"):
                found = tuple(Release(*row) for row in rows)
                ledgers.setdefault(receipt["name"], {})[record.client] = record.round, found
    promises = {p["name"]: p for p in federation.get("privacy") or []}
    for name, promise in promises.items():
        if promise.get("of_sums") and not promise.get("withheld"):
            promises[name] = {**promise, "withheld": _no_sum(records, read_singly)}
    acts = federation.get("server") or {}
    return [
        DefensePart(
            name=name,
            parameters=dict(found[0].get("parameters") or {}) if found else {},
            receipts=_sum_up(found) if found else None,
            epsilon=_epsilon(promises[name]) if name in promises else None,
            spent=_spent(ledgers.get(name, {}), promises.get(name)),
            server=acts.get(name),
        )
        for name, found in receipts.items()
    ]


def _no_sum(records: Iterable[VaultRecord], read_singly: Iterable[str]) -> str:
    """Say what happened that a promise about the sum of whole uploads does not cover."""
    for view in read_singly:
        return f"the server read {view}, and single uploads hold a share of the noise only"
    for record in records:
        if record.cut_off:
            return (
                f"the channel cut off {record.cut_off:.2g} of what client {record.client} noised "
                f"in round {record.round}, noise and all; use a larger clipping_range"
            )
    return ""


def _spent(
    ledgers: Mapping[int, tuple[int, Releases]], promise: Mapping[str, Any] | None
) -> list[Spent]:
    """Return what each client's ledger comes to, those who spent most first.

    Nothing without a promise that held: a ledger's sum would be a figure about nothing.
    """
    if promise is None or promise.get("withheld"):
        return []
    spent = [
        Spent(
            client=client,
            round=server_round,
            releases=sum(release.count for release in found),
            epsilon=finite_or_none(epsilon(found, promise["delta"])),
            reconstruction=reconstruction_bound(found, GUESS),
        )
        for client, (server_round, found) in ledgers.items()
    ]
    infinite = float("inf")
    return sorted(spent, key=lambda s: (-(infinite if s.epsilon is None else s.epsilon), s.client))


def _sum_up(receipts: Sequence[Mapping[str, Any]]) -> DefenseReceipts:
    changed = sum(bool(r.get("changed")) for r in receipts)
    others = dict.fromkeys(
        key
        for r in receipts
        for key, value in r.items()
        if key not in _FIXED and isinstance(value, int | float)
    )
    figures = {key: _mean(receipts, key) for key in others}
    return DefenseReceipts(
        uploads_changed=f"{changed}/{len(receipts)}",
        cosine=_mean(receipts, "cosine"),
        norm_ratio=_mean(receipts, "norm_ratio"),
        seconds=_mean(receipts, "seconds"),
        figures={key: mean for key, mean in figures.items() if mean is not None},
    )


def _mean(receipts: Sequence[Mapping[str, Any]], key: str) -> float | None:
    found = [finite for r in receipts if (finite := finite_or_none(r.get(key))) is not None]
    return sum(found) / len(found) if found else None


def _epsilon(promise: Mapping[str, Any]) -> Epsilon:
    return Epsilon(
        epsilon=None if promise.get("withheld") else finite_or_none(promise.get("epsilon")),
        delta=finite_or_none(promise.get("delta")),
        unit=promise.get("unit") or "",
        relation=promise.get("relation") or "",
        mechanism=promise.get("mechanism") or "",
        withheld=promise.get("withheld") or "",
    )


def finite_or_none(value: Any) -> float | None:
    """Return a finite float, or None for anything else (JSON has no infinity)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) < float("inf") else None


def detections(records: Iterable[VaultRecord], federation: Mapping[str, Any]) -> list[Detection]:
    """Return what clients thought of what they were sent or asked, in order of client and round.

    Deposits tell what was measured; a refusal stands among the failures too, and there alone where
    the channel made it, or where a deposit is not here.
    """
    verdicts: dict[tuple[int, int], tuple[dict[str, float], str]] = {}
    for record in records:
        if record.checks or record.refused or record.remarks:
            told = "; ".join(["accepted", *record.remarks])
            said = f"refused: {record.refused}" if record.refused else told
            checks = {
                n: f for n, v in record.checks.items() if (f := finite_or_none(v)) is not None
            }
            verdicts[record.client, record.round] = checks, said
    for failure in federation.get("failures") or []:
        if failure.get("refused"):
            key = failure["client"], failure["round"]
            checks, said = verdicts.get(key, ({}, ""))
            if not said.startswith("refused"):
                verdicts[key] = checks, f"refused: {failure['reason']}"
    return [
        Detection(client=client, round=server_round, checks=checks, verdict=said)
        for (client, server_round), (checks, said) in sorted(verdicts.items())
    ]


def idle_defense(parts: Sequence[DefensePart], federation: Mapping[str, Any]) -> str | None:
    """Say which defense was switched on, should have changed uploads, and changed none."""
    by_name = {part.name: part for part in parts}
    for expected in federation.get("defenses_expected") or []:
        part = by_name[expected["name"]]
        at_server_only = expected.get("at_server") and not expected.get("must_change")
        if at_server_only and not part.server:
            return f"defense {part.name!r} is switched on and the server did nothing of it"
        if not expected.get("must_change"):
            continue
        if part.receipts is None:
            return f"defense {part.name!r} is switched on and left no receipt: it never ran"
        if part.receipts.uploads_changed.startswith("0/"):
            changed = part.receipts.uploads_changed
            return f"defense {part.name!r} is switched on and changed {changed} uploads"
    return None


def was_active(federation: Mapping[str, Any]) -> bool:
    """Say whether any client was really sent a manipulated model, or lied to by the protocol."""
    return any(_ACTED.search(receipt) for receipt in federation.get("receipts") or [])


def idle_attack(
    name: str, saved: tuple[Reconstruction, Facts] | None, federation: Mapping[str, Any]
) -> str | None:
    """Say in what way an attack that was switched on did nothing."""
    kind = components("attack").get(name)
    if isinstance(kind, type) and issubclass(kind, Active) and not was_active(federation):
        if issubclass(kind, Manipulation):
            return f"attack {name!r} manipulates the model, yet no client was sent a modified one"
        return f"attack {name!r} breaks the channel's protocol, yet no client was lied to"
    if saved is None:
        return f"attack {name!r} left no reconstruction"
    reconstruction, facts = saved
    if not facts.used:
        return f"attack {name!r} used nothing: it read no view"
    if len(reconstruction.examples) == 0:
        return f"attack {name!r} returned no candidate"
    return None
