"""Rehearsals: surrogate clients' uploads, attacked beside the real ones, teach what that loses.

An adversary with data of its own makes the upload that a client with such data would send, attacks
it as it attacks real ones, and has a pair: what came out, and what should have.  A network that was
trained on pairs then corrects what came out of the real uploads.  A quarter is held out, to say
what that is worth.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from fedsim.attack import Cost, Reconstruction
from fedsim.seeds import seeded_globals
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from strategies.attacks.optimization.training import training_steps

# Pairs of images in a step of a network's training, and Adam's rate.
BATCH, RATE = 16, 1e-3
# One rehearsal in so many is held out.
HELD_OUT = 4
# How many images are corrected at once.
AT_ONCE = 256
# The round of rehearsals: real ones count from 1.
REHEARSED = 0

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rehearsal:
    """A surrogate batch and the view that a client with it would have made.

    ``job`` is the place of the views that it is like; ``images`` ``[B, C, H, W]``, ``labels``
    ``[B]``; ``evaluations`` is what its update took.
    """

    job: int
    view: ServerView
    images: Tensor
    labels: Tensor
    evaluations: int


def answer(view: ServerView, received: Mapping[str, Tensor], number: int) -> ServerView:
    """Return the view of a rehearsing client that was sent the same and sent this back."""
    back = {name: tensor.to(view.received[name]) for name, tensor in received.items()}
    return replace(
        view,
        round=REHEARSED,
        senders=(number,),
        received={**view.received, **back},
        metrics={},
    )


def paired(
    found: Reconstruction, made: Sequence[tuple[int, Rehearsal]]
) -> list[tuple[Tensor, Tensor]]:
    """Return what the attack made of each rehearsal, and its images in the order that fits.

    Both are ``[n, C, H, W]``; the order is the one-to-one matching of least squared error, of the
    attacker's own images.  Rehearsals that were lost, or not reached before a stop, are left out.
    """
    pairs = []
    for index, one in made:
        shown = found.examples[found.views == index].float()
        if not len(shown):
            continue
        errors = torch.cdist(shown.flatten(1), one.images.flatten(1)).square()
        rows, columns = (torch.from_numpy(side) for side in linear_sum_assignment(errors.numpy()))
        pairs.append((shown[rows], one.images[columns]))
    return pairs


@dataclass(frozen=True)
class Taught:
    """A network that learned from rehearsals.

    ``before`` and ``after`` are the mean PSNR in dB of those held out, as they came and corrected;
    ``told`` says so, and ``cut`` whether its training was ended by hand.
    """

    network: nn.Module
    before: float
    after: float
    told: str
    cut: bool


def taught(
    fresh: Callable[[], nn.Module],
    pairs: Sequence[tuple[Tensor, Tensor]],
    loss: Loss,
    steps: int,
    knowledge: Knowledge,
    *,
    what: str,
    draw: torch.Generator,
) -> Taught | None:
    """Train a fresh network on three quarters of the pairs, and measure it on the rest.

    ``what`` it is called in progress and receipts.  None where there are too few pairs.
    """
    count = len(pairs) // HELD_OUT
    if not count:
        return None
    given, wanted, shown, clean = (
        torch.cat(side).to(knowledge.device)
        for part in (pairs[:count], pairs[count:])
        for side in zip(*part, strict=True)
    )
    with seeded_globals(int(torch.randint(2**31, (), generator=draw))):
        network = fresh().to(knowledge.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    cut: list[str] = []
    for _ in training_steps(steps, what, knowledge, cut):
        rows = torch.randint(len(shown), (BATCH,), generator=draw).to(shown.device)
        optimizer.zero_grad()
        torch.autograd.backward(loss(network(shown[rows]), clean[rows]))
        optimizer.step()
    before, after = (psnr(images, wanted) for images in (given, corrected(network, given)))
    told = f"{what} of {len(pairs) - count} rehearsals takes the {count} held out from "
    told = "; ".join([f"{told}{before:.1f} to {after:.1f} dB", *cut])
    return Taught(network.eval(), before, after, told, bool(cut))


@torch.no_grad()
def corrected(network: nn.Module, images: Tensor) -> Tensor:
    """Return what a network makes of images ``[N, C, H, W]``, in ``[0, 1]``."""
    like = next(network.parameters())
    parts = torch.split(images, AT_ONCE)
    return torch.cat([network(part.to(like)).clamp(0, 1).to(images) for part in parts])


def psnr(images: Tensor, wanted: Tensor) -> float:
    """Return the mean PSNR in dB over images ``[N, C, H, W]``."""
    errors = (images - wanted).square().flatten(1).mean(dim=1)
    return float(-10 * errors.clamp_min(1e-10).log10().mean())


def handed_over(
    found: Reconstruction, views: int, made: Sequence[Rehearsal], told: Sequence[str]
) -> Reconstruction:
    """Return what was found of the first ``views`` views, and not of the rehearsals after them."""
    rows = found.views < views
    spent = found.cost.gradient_evaluations + sum(one.evaluations for one in made)
    rehearsed = tuple(f"{one.view.label}:" for one in made)
    receipts = [line for line in found.receipts if not line.startswith(rehearsed)]
    return replace(
        found,
        examples=found.examples[rows],
        views=found.views[rows],
        labels=None if found.labels is None else found.labels[rows],
        scores=None if found.scores is None else found.scores[rows],
        cost=Cost(gradient_evaluations=spent),
        receipts=(*told, *receipts),
    )
