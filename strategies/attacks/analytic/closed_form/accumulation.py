"""Accumulation: what a compressor keeps back for later is read off the rounds that it is sent in.

Two kinds of compressors remember, and whoever sees a client's uploads s_1, s_2 ... remembers with
them.  Error feedback (Lin et al., ICLR 2018; Stich et al., NeurIPS 2018) sends of round t

    s_t = C(g_t + e_t),    e_{t+1} = g_t + e_t - s_t,    e_1 = 0,

so that a coordinate that comes after k rounds holds the sum of its gradients since it last came,
and 1/k of it is their mean.  SoteriaFL (Li et al., NeurIPS 2022, Algorithm 1) sends

    s_t = (d / k) mask * (u_t - h_t),    h_{t+1} = h_t + gamma s_t,    h_1 = 0,

the shift h from what was sent alone: a coordinate that comes is ``u_t = h_t + (k / d) s_t``, that
round's clipped and noised gradient to the last digit.

So each round's gradient is known where the upload speaks, and 0, as if pruned, elsewhere.  An
attack that joins rounds gets it in this form; any other gets one upload of each client, the mean
over rounds of what is known, as if it were an answer to the model of the middle one.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedsim.attack import Paper, Reconstruction, Setting, ToyCase
from fedsim.models import is_buffer
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.handing_on import HandsOn
from strategies.attacks.optimization.rounds import same_batch_every_round


@register("attack", "accumulation")
@dataclass(frozen=True, kw_only=True)
class Accumulation(HandsOn):
    """Threat model C: how clients compress, and that they remember, is known.

    Cost: that of ``then``.

    Parameters
    ----------
    then : str
        The passive attack that reads what was accumulated, as an expression.
    keep : float or None
        SoteriaFL's ``k / d``; None for error feedback.
    """

    paper: ClassVar[Paper] = Paper(
        title="SoteriaFL: A Unified Framework for Private Federated Learning with Communication "
        "Compression",
        authors="Li, Zhao, Li, Chi",
        venue="NeurIPS",
        year=2022,
        published="no attacker; that compression protects nothing is why it adds noise",
        measured="error feedback, fedsim run scenarios/accumulation.toml (four photo tiles, 20 "
        "rounds, first linear layer, prune(ratio=0.9, feedback=True)), seeds 0, 1, 2: 26.5, 37.2, "
        "47.2 dB, linear-inversion on the same uploads 18.9, 22.5, 23.3; other figures: "
        "docs/methods/accumulation.md",
    )
    needs: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.UPDATES, Capability.BASICS, Capability.DETAILS}
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={
            "threat-model": "C",
            "attack": "accumulation(then='linear-inversion')",
            "defenses": "prune(ratio=0.9, feedback=True)",
            "data.dataset": "photo-tiles",
            "model.name": "mlp(hidden=[32])",
            "federation.clients": 4,
            "federation.rounds": 20,
            "federation.local": "fedsgd(batch_size=1, lr=0.01)",
            "data.partition": "size(partition_sizes=[1, 1, 1, 1])",
        },
        figure="leak.psnr.mean",
        # Seeds 0, 1 and 2 gave 26.5 to 47.2; linear-inversion alone 18.9 to 23.3.
        low=24.0,
        high=80.0,
    )

    then: str = "bayes(iterations=200, tv=0.01, defense='prune', rounds=True)"
    keep: Annotated[float, Field(gt=0, le=1)] | None = None

    @property
    def joins_rounds(self) -> bool:
        """Always."""
        return True

    def check_setting(self, setting: Setting) -> None:
        """Refuse sums, clients that draw another batch every round, and what ``then`` refuses."""
        super().check_setting(setting)
        if setting.channel.aggregates:
            raise ValueError(
                f"it follows each client's memory, and behind {setting.channel.name} sums arrive; "
                "use channel = 'plain'"
            )
        same_batch_every_round(setting)

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Return what ``then`` makes of what was accumulated."""
        knowledge.require(Capability.DETAILS)
        of_senders = defaultdict[tuple[int, ...], list[int]](list)
        for place, view in enumerate(views):
            of_senders[view.senders].append(place)
        made: dict[int, ServerView] = {}
        receipts = []
        for places in of_senders.values():
            mine = [views[place] for place in places]
            heard = shifted(mine, self.keep) if self.keep else fed_back(mine)
            sums, rounds = (torch.stack(each) for each in zip(*heard, strict=True))
            came = float((rounds > 0).any(dim=0).double().mean())
            receipts.append(f"{mine[0].label}: {came:.1%} of it came in {len(mine)} rounds")
            if self.inner.joins_rounds:
                means = sums / rounds.clamp_min(1)
                made |= dict(zip(places, map(with_update, mine, means), strict=True))
            else:
                mean, middle = sums.sum(0) / rounds.sum(0).clamp_min(1), len(mine) // 2
                made[places[middle]] = with_update(mine[middle], mean)
        order = sorted(made)
        found = self.inner.reconstruct([made[place] for place in order], knowledge)
        return replace(
            found,
            views=torch.tensor(order, dtype=torch.int64)[found.views],
            receipts=(*receipts, *found.receipts),
        )


def fed_back(views: Sequence[ServerView]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each upload of a client, a sum of updates ``[P]``, and of how many rounds each is.

    Both are 0 where the upload says nothing.
    """
    waiting: Tensor | None = None
    for view in views:
        sent = flat_update(view)
        waiting = torch.ones_like(sent) if waiting is None else waiting + 1
        came = sent != 0
        yield sent, torch.where(came, waiting, 0)
        waiting[came] = 0


def shifted(views: Sequence[ServerView], keep: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each upload of a client, the update ``[P]`` before it was shifted, and 1 or 0.

    Both are 0 where the upload says nothing.
    """
    shift: Tensor | None = None
    for view in views:
        sent = flat_update(view)
        shift = torch.zeros_like(sent) if shift is None else shift
        came = sent != 0
        scale = len(sent) / max(1, round(len(sent) * keep))
        yield torch.where(came, shift + sent / scale, 0), came.to(sent)
        shift = shift + shift_rate(keep) * sent


def shift_rate(keep: float) -> float:
    """Return SoteriaFL's ``gamma`` (Theorem 1) of random-k, whose ``omega`` is ``1 / keep - 1``."""
    omega = 1 / keep - 1
    return math.sqrt((1 + 2 * omega) / (2 * (1 + omega) ** 3))


def flat_update(view: ServerView) -> Tensor:
    """Return ``[P]``, what moved, without buffers."""
    moved = [tensor.flatten() for name, tensor in view.update().items() if not is_buffer(name)]
    return torch.cat(moved)


def with_update(view: ServerView, update: Tensor) -> ServerView:
    """Return a view with another update ``[P]``."""
    names = [name for name in view.update() if not is_buffer(name)]
    received = dict(view.received)
    parts = torch.split(update, [received[name].numel() for name in names])
    for name, part in zip(names, parts, strict=True):
        moved = part.view_as(received[name]).to(received[name])
        received[name] = moved if view.kind == "gradient" else view.sent[name].to(moved) - moved
    return replace(view, received=received)
