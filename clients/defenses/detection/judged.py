"""From scores to a verdict: what is above its limit is refused, what is undecidable is not."""

from collections.abc import Iterable, Mapping
from math import isfinite

from fedsim.attack import Setting
from fedsim.defense import Verdict

#: A ratio whose denominator is nothing: larger than any threshold, and still a number.
LARGEST = 1e12


def judged(
    scores: Mapping[str, float], limits: Mapping[str, float | None], unread: Iterable[str] = ()
) -> Verdict:
    """Return a verdict.

    Parameters
    ----------
    scores : mapping of str to float
        By the name of the check; the higher, the more suspicious.  What is no finite number is
        undecidable and left out.
    limits : mapping of str to float or None
        What is refused *above* this; None only reports.
    unread : iterable of str
        Arrays that the checks could not read.

    The reason names the checks and no score: it goes to the server, and scores are computed on
    private images.  What is undecidable is named where there is a limit, or no score at all.
    """
    checks = {name: score for name, score in scores.items() if isfinite(score)}
    above = [
        name
        for name, limit in limits.items()
        if limit is not None and name in checks and checks[name] > limit
    ]
    if above:
        return Verdict(accept=False, checks=checks, reason=f"{', '.join(above)} above the limit")
    wanted = {name for name, limit in limits.items() if limit is not None} if checks else {*limits}
    undecided = [*sorted(wanted - checks.keys()), *unread]
    reason = f"undecidable: {', '.join(undecided)}" if undecided else ""
    return Verdict(accept=True, checks=checks, reason=reason)


def over_the_rest(largest: float, total: float) -> float:
    """Return ``largest / (total - largest)``, at most ``LARGEST``; NaN where there is nothing."""
    if not total > 0:
        return float("nan")
    return largest / max(total - largest, largest / LARGEST)


def largest(scores: Iterable[float]) -> float:
    """Return the largest that is a finite number; NaN where none is."""
    return max((score for score in scores if isfinite(score)), default=float("nan"))


def refuse_single(name: str, setting: Setting) -> None:
    """Refuse a limit that could never decide (``ValueError``): all first batches are of one."""
    if setting.training.batch_size == 1 or max(setting.examples) == 1:
        raise ValueError(
            f"{name} compares the examples of a batch, and every batch is of one: it would refuse "
            "nothing; leave the limit out, or use a larger batch_size in federation.local"
        )
