"""The verdict in plain words: what a reader takes away who reads one paragraph."""

from collections.abc import Sequence

from fedsim.audit.criterion import Criterion
from fedsim.audit.schema import Failure, Leak, Membership, Refusals

_ROUNDS_SPOKEN = 3
# What an oracle tells, where its name does not say it.
_GIVEN = {"batchnorm": "BatchNorm statistics"}


def verdict(
    criterion: Criterion,
    leak: Leak | None,
    *,
    membership: Membership | None = None,
    reason: str | None = None,
    oracles: Sequence[str] = (),
    failed: str | None = None,
    stopped: str | None = None,
    refusals: Sequence[Refusals] = (),
) -> str:
    """Say how much came back, against what a guess gets, what flatters the figure, who refused."""
    sentences = []
    if failed:
        sentences.append(f"This run failed and its figures must not be believed: {failed}.")
    if stopped:
        sentences.append(f"This run is not whole: {stopped}.")
    if membership is not None:
        sentences.append(_who_has_it(membership))
    elif leak is None:
        sentences.append(f"There is no leak to judge: {reason}.")
    else:
        sentences.append(_came_back(leak, criterion))
        if leak.floor is not None:
            sentences.append(_against_floor(leak))
        if oracles:
            given = " and ".join(_GIVEN.get(name, name) for name in oracles)
            sentences.append(
                f"The attack was given the true {given} by an oracle, which no real server has."
            )
    if any(one.refused for one in refusals):
        sentences.append(f"{capitalized(refused(refusals))}.")
    return " ".join(sentences)


def nothing_came(refusals: Sequence[Refusals], failures: Sequence[Failure]) -> str:
    """Say why nothing reached the server where clients refused."""
    if all(one.refused == one.asked for one in refusals):
        return "every client refused what it was sent or asked, and the server could read nothing"
    # What happened to no client in particular happened to the channel.
    ended = dict.fromkeys(one.reason.partition(":")[0] for one in failures if one.client is None)
    return f"{' and '.join([refused(refusals), *ended])}; nothing reached the server"


def refused(refusals: Sequence[Refusals]) -> str:
    """Say how many clients refused, round by round where those are few."""
    found = [one for one in refusals if one.refused]
    if len(found) > _ROUNDS_SPOKEN:
        most = max(found, key=lambda one: one.refused / one.asked)
        return (
            f"clients refused in {len(found)} of {len(refusals)} rounds, {most.refused} of "
            f"{most.asked} at most"
        )
    told = [f"{one.refused} of {one.asked} clients refused in round {one.round}" for one in found]
    return ", ".join(told)


def capitalized(text: str) -> str:
    """Return a text whose first letter is large, and the rest as it is."""
    return text[:1].upper() + text[1:]


def _who_has_it(found: Membership) -> str:
    low, high = (round(100 * bound) for bound in found.interval)
    right = round(found.accuracy * found.asked)
    return (
        f"The attacker holds an image and asks whether it is among the data: right in {right} of "
        f"{found.asked} cases ({percent(found.accuracy)}, 95 % interval {low}–{high} %). "
        f"It was there in {found.present}, which the attack found in {found.found}; of the other "
        f"{found.asked - found.present} it took {found.alarms} for one. "
        f"Who always gives the commoner answer gets {percent(found.guess)}."
    )


def _came_back(leak: Leak, criterion: Criterion) -> str:
    low, high = (round(100 * bound) for bound in leak.interval)
    who = "None" if leak.leaked == 0 else f"{leak.leaked}"
    if leak.leaked == leak.private_examples:
        who = "All"
    return (
        f"{who} of {leak.private_examples} private images ({percent(leak.leak_rate)}, "
        f"95 % interval {low}–{high} %) came back recognizably: {criterion.spoken()}."
    )


def _against_floor(leak: Leak) -> str:
    assert leak.floor is not None
    guess = percent(leak.floor.leak_rate)
    if leak.leaked and leak.leak_rate <= leak.floor.leak_rate:
        return (
            f"A guess that never looks at the updates gets {guess}: "
            "the attack shows no more than that."
        )
    return f"A guess that never looks at the updates gets {guess}."


def percent(share: float) -> str:
    """Say a share in percent; what is not quite none or not quite all never reads as such."""
    if 0 < share < 0.005:
        return "under 1 %"
    if 0.995 <= share < 1:
        return "over 99 %"
    return f"{100 * share:.0f} %"
