"""Un-mixing: what many mixtures of the same few images have in common is the images.

MixUp and its kin train on ``X~ = A X``: M mixtures ``[M, D]`` of n originals ``X [n, D]``, at most
k in each, rows of A on the simplex.  Another attack reads ``X~`` off the updates of several rounds;
the client's data stay, the mixing is new in every step.  Carlini et al., "Is Private Learning
Possible with Instance Encoding?", IEEE S&P 2021, un-mix as here: first who is in which mixture,
then least squares; and where InstaHide turns every value's sign at random, ``|A X| = |X~|`` around
the mean.  Their first step clusters with a network trained on public images, which their noisy
problem asks for; exact mixtures of few images need algebra only (decided here).

*How many.*  ``X~`` has rank n: its singular values fall off a cliff after the n-th.

*Labels.*  With cross-entropy the last bias gradient of one example is ``p - y~``, and p is known
from x~.  ``y~ = A onehot(y)``: if there are n classes in the mixtures, every original has one of
its own and ``y~`` *is* A.

*Sparsity.*  Else, with ``X~ = U S V^T``, every column of A is ``U q`` for some q, and it is zero on
all mixtures without its original, a share ``1 - k/n``: n - 1 of them that span n - 1 directions
give q as the only vector that they are orthogonal to.  Drawn at random they are such with
probability about ``e^-k``, for each original.  Any other n - 1 mixtures give a ``U q`` that no
further mixture is zero on, or that has both signs: a column of A is 0 or more.  (Spielman, Wang,
Wright, "Exact Recovery of Sparsely-Used Dictionaries", COLT 2012, prove such A and X unique.)
Rows of A sum to 1: that fixes the length of the columns.

*Signs* (``signs=True``).  Only ``|X~|`` is known; its squares have rank ``n (n + 1) / 2``, and the
labels of two classes or more lead from them to the span of A's columns, the ``U`` above.  With A
every value of all originals comes back up to one sign, which its neighbors tell
(:mod:`~strategies.attacks.analytic.closed_form.phase_retrieval`).

*Verified*: no weight below zero or above the cap, at most k in a mixture, originals within
``[0, 1]``, and ``A X = X~``.  The cap is what tells an original from a mixture: of an image that
was mixed once, or always with the same other, nothing else does, and the mixture with most of it
would pass for it, with weight 1.  What is not verified is not un-mixed.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedsim.attack import Attack, Paper, Reconstruction, Setting, ToyCase
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.analytic.closed_form.phase_retrieval import (
    cliff,
    originals_behind,
    retrieved,
    signs_by_neighbors,
    span_of_weights,
)
from strategies.attacks.handing_on import HandsOn
from strategies.attacks.labels.rule import biased_classifier, moved

# So many mixtures more than the n - 1 that a column was computed from must be zero in it.
SPARE = 2
# Originals may leave [0, 1] by so much.
BEYOND = 0.02
# Columns are the same one if what they span is so much narrower than long.
ALIKE = 1e-2
# How often a column is computed again, without what turned out to be no zero of it.
REWEIGHTED = 8
# Draws of n - 1 mixtures in an attempt, how many are solved at once, and attempts at most.
DRAWS, AT_ONCE, ATTEMPTS = 32_768, 2048, 8


@register("attack", "unmixing")
@dataclass(frozen=True, kw_only=True)
class Unmixing(HandsOn):
    """Read each client's mixtures with another attack, and solve for the images in them.

    Threat model C: it knows that clients mix, and how many.  Candidates are the originals, each for
    the view in which it weighs most; where nothing is verified they are the mixtures, with score 0.

    Parameters
    ----------
    then : str
        Expression of the passive attack that reads the mixtures.
    k : int
        At most so many images are in a mixture.
    cap : float
        The largest weight that one image may have.
    tolerance : float
        Weights, and errors relative to the whole, below this are zero.
    signs : bool
        Every value is mirrored at its channel's mean or not (InstaHide).

    Wants mixtures that are all but exact (linear inversion on one example: noise of 1e-4 in the
    gradient hides the cliff), more of them than originals, and each original left out of n + 1 of
    them, or classes of their own.  A client that holds no more than k images leaves none out, and
    only labels help.  With signs it wants more than ``n (n + 1) / 2`` mixtures, of three images or
    more and of two classes at least: ``m - n (n + 1) / 2`` times the classes but one must not be
    less than ``n (n - 1) / 2``; or classes of their own.  Soft labels of clipped updates are off by
    an unknown factor, which only mixtures without signs survive.  Which signs neighbors have is a
    vote, which nothing verifies: right for eight photographs, mostly for four, not for one or two.
    """

    paper: ClassVar[Paper] = Paper(
        title="Is Private Learning Possible with Instance Encoding?",
        authors="Nicholas Carlini, Samuel Deng, Sanjam Garg, Somesh Jha, Saeed Mahloujifar, "
        "Mohammad Mahmoody, Shuang Song, Abhradeep Thakurta, Florian Tramer",
        venue="IEEE Symposium on Security and Privacy",
        year=2021,
        published="InstaHide Challenge: 100 images of 32x32 from 5,000 encodings (50 of each; two "
        "private and four public images with known weights, signs random); SSIM with the nearer "
        "image 0.90 and 0.79 (two versions, the challenge's leaderboard), 4 hours and more",
        measured="another problem: MixUp, read exactly.  fedsim run "
        "scenarios/unmixing.toml (k = 4, two clients of 8 photo tiles, 48 rounds of one mixture), "
        "seeds 7, 8, 9: 16 of 16 images exactly, 153.6, 154.6, 152.5 dB on average; "
        "fedsim attack RUN linear-inversion, on the same uploads: none, 21.8, 21.4, 19.8 dB.  With "
        "signs, also read exactly: fedsim run scenarios/unmixing_instahide.toml (64 rounds), same "
        "seeds: 16 of 16 exactly, 149.0, 147.2, 146.2 dB",
    )
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.UPDATES, Capability.DETAILS})
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={
            "threat-model": "C",
            "attack": "unmixing(k=2)",
            "defenses": "mixup(k=2)",
            "data.dataset": "digits",
            "data.partition": "size(partition_sizes=[6, 6])",
            "model.name": "mlp",
            "federation.clients": 2,
            "federation.rounds": 30,
            "federation.local": "fedsgd(batch_size=1, lr=0.01)",
        },
        figure="leak.psnr.mean",
        # Seeds 0 to 4 gave 157.3 to 158.4: float32; 200 is the auditor's cap.
        low=120.0,
        high=199.0,
    )

    then: str = "linear-inversion(clip=False)"
    k: Annotated[int, Field(ge=2, le=8)] = 4
    cap: Annotated[float, Field(gt=0, lt=0.99)] = 0.65
    tolerance: Annotated[float, Field(gt=0, lt=0.1)] = 1e-3
    signs: bool = False

    def check_reader(self, inner: Attack) -> None:
        """Refuse an active reader, and one that clips what signs take out of [0, 1]."""
        super().check_reader(inner)
        if self.signs and getattr(inner, "clip", False):
            raise ValueError(
                f"then={self.then!r} clips mixtures with signs, which leave [0, 1]; write "
                f"{inner.name}(clip=False)"
            )

    @property
    def law(self) -> "Law":
        """What is known of the weights."""
        return Law(self.k, self.cap, self.tolerance)

    def check(self, model: nn.Module, kind: str) -> None:
        """Refuse local training, a last layer without a bias, and what ``then`` refuses."""
        if kind == "weights":
            raise ValueError(
                "unmixing reads the mixtures of single steps, and weights after local training are "
                "of many; use federation.local = 'fedsgd(...)'"
            )
        biased_classifier(model)
        super().check(model, kind)

    def check_setting(self, setting: Setting) -> None:
        """Refuse batches, of which no mixture is read alone, and what ``then`` refuses."""
        if setting.uploads[-1] > 1:
            raise ValueError(
                f"unmixing wants single mixtures, and clients upload gradients of "
                f"{setting.uploads[-1]}; use federation.local = 'fedsgd(batch_size=1, ...)'"
            )
        super().check_setting(setting)

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Return the originals of every client that could be un-mixed, and others' mixtures."""
        knowledge.require(Capability.DETAILS)
        read = self.inner.reconstruct(views, knowledge)
        clients: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for at, view in enumerate(read.views.tolist()):
            clients[views[view].senders].append(at)
        parts, receipts = [], []
        for senders, rows in clients.items():
            part, receipt = self._of_one_client(views, torch.tensor(rows), read, knowledge)
            parts.append(part)
            receipts.append(f"clients {', '.join(map(str, senders))}: {receipt}")
        if not parts:
            return read
        return Reconstruction(
            examples=torch.cat([part.examples for part in parts]),
            views=torch.cat([part.views for part in parts]),
            labels=torch.cat([part.labels for part in parts if part.labels is not None]),
            scores=torch.cat([part.scores for part in parts if part.scores is not None]),
            cost=read.cost,
            receipts=(*read.receipts, *receipts),
        )

    def _of_one_client(
        self, views: Sequence[ServerView], rows: Tensor, read: Reconstruction, knowledge: Knowledge
    ) -> tuple[Reconstruction, str]:
        """Un-mix some of the candidates ``read``, all of one client; say what came of it."""
        mixtures, sources = read.examples[rows].double(), read.views[rows]
        labels = soft_labels([views[at] for at in sources.tolist()], mixtures, knowledge)
        generator = knowledge.generator("unmixing", *views[int(sources[0])].senders)
        if self.signs:
            mean = mixtures.new_tensor(knowledge.basics.data.mean).view(-1, 1, 1)
            found = unmixed_sizes(mixtures - mean, mean, labels, self.law, generator)
        else:
            found = unmixed(mixtures.flatten(1), labels, self.law, generator)
        if found is None:
            unknown = torch.full((len(rows),), -1, dtype=torch.int64)
            kept = unknown if read.labels is None else read.labels[rows]
            shown, sure = mixtures.clamp(0, 1), torch.zeros(len(rows)).double()
            left = Reconstruction(shown, sources, kept, sure)
            return left, f"{len(rows)} mixtures that could not be un-mixed, handed on as they are"
        count = found.weights.shape[1]
        originals = found.originals.clamp(0, 1).view(count, *mixtures.shape[1:])
        own = torch.linalg.lstsq(found.weights, labels).solution.argmax(dim=1)
        score = torch.full((count,), 1 - found.residual, dtype=torch.float64)
        made = Reconstruction(originals, sources[found.weights.argmax(dim=0)], own, score)
        return made, f"{count} images in {len(rows)} mixtures, told apart by {found.by}"


@dataclass(frozen=True)
class Law:
    """At most ``k`` weights in a mixture, none above ``cap``; below ``tolerance`` it is zero."""

    k: int
    cap: float
    tolerance: float


@dataclass(frozen=True)
class Unmixed:
    """``weights`` ``A [M, n]``, ``originals`` ``X [n, D]``, and ``||A X - X~|| / ||X~||``."""

    weights: Tensor
    originals: Tensor
    residual: float
    by: str


def soft_labels(views: Sequence[ServerView], mixtures: Tensor, knowledge: Knowledge) -> Tensor:
    """Return ``y~ = p - dL/db`` ``[M, K]`` of mixtures ``[M, C, H, W]``, one for each view."""
    read = []
    for view, mixture in zip(views, mixtures, strict=True):
        model = knowledge.model(view).double().cpu().eval()
        with torch.no_grad():
            predicted = model(mixture.unsqueeze(0)).softmax(dim=1)[0]
        read.append(predicted - moved(view, model, "bias"))
    return torch.stack(read)


def unmixed(
    mixtures: Tensor, labels: Tensor, law: Law, generator: torch.Generator
) -> Unmixed | None:
    """Solve ``X~ = A X`` for mixtures ``[M, D]`` with soft labels ``[M, K]``; None if it cannot."""
    left, values, _ = torch.linalg.svd(mixtures, full_matrices=False)
    if (count := cliff(values)) is None:
        return None
    present = labels[:, labels.max(dim=0).values > law.tolerance]
    for weights, by in weights_in(left[:, :count], present, law, generator):
        if found := verified(mixtures, weights, law, by):
            return found
    return None


def unmixed_sizes(
    encodings: Tensor, mean: Tensor, labels: Tensor, law: Law, generator: torch.Generator
) -> Unmixed | None:
    """Solve ``|A (X - mean)| = |encodings|`` for encodings around the mean ``[M, C, H, W]``."""
    sizes = encodings.abs().flatten(1)
    left, values, _ = torch.linalg.svd(sizes.square(), full_matrices=False)
    products = cliff(values)
    if products is None or (count := originals_behind(products)) is None:
        return None
    present = labels[:, labels.max(dim=0).values > law.tolerance]
    own = present.shape[1] == count
    basis = present if own else span_of_weights(left[:, :products], present, count)
    if basis is None:
        return None
    for weights, by in weights_in(basis, present, law, generator):
        centered = retrieved(sizes, weights)
        values = centered.view(count, *encodings.shape[1:])
        originals = (mean + signs_by_neighbors(values, mean) * values).flatten(1)
        residual = float(((weights @ centered).abs() - sizes).norm() / sizes.norm())
        if found := lawful(weights, originals, residual, law, f"{by}, signs by their neighbors"):
            return found
    return None


def weights_in(
    basis: Tensor, present: Tensor, law: Law, generator: torch.Generator
) -> Iterator[tuple[Tensor, str]]:
    """Yield what A may be, in the span of ``basis [M, n]``, and what told.

    ``present [M, K]`` are the soft labels' columns of the classes that there are.
    """
    if present.shape[1] == basis.shape[1]:
        yield present, "their classes"
    columns = sparse_columns(basis, law.tolerance, generator)
    if columns is not None:
        lengths = torch.linalg.lstsq(columns, torch.ones(len(columns), 1).to(columns)).solution
        yield columns * lengths.T, "which mixtures they are not in"


def verified(mixtures: Tensor, weights: Tensor, law: Law, by: str) -> Unmixed | None:
    """Return the least squares originals under these weights, if all is as it must be."""
    originals = torch.linalg.lstsq(weights, mixtures).solution
    residual = float((weights @ originals - mixtures).norm() / mixtures.norm())
    return lawful(weights, originals, residual, law, by)


def lawful(
    weights: Tensor, originals: Tensor, residual: float, law: Law, by: str
) -> Unmixed | None:
    """Return what was found, if weights, originals and residual are as they must be."""
    capped = weights.min() > -law.tolerance and weights.max() < law.cap + law.tolerance
    sparse = (weights > law.tolerance).sum(dim=1).max() <= law.k
    within = originals.min() > -BEYOND and originals.max() < 1 + BEYOND
    if not (capped and sparse and within and residual < law.tolerance):
        return None
    return Unmixed(weights, originals, residual, by)


def sparse_columns(basis: Tensor, tolerance: float, generator: torch.Generator) -> Tensor | None:
    """Find n columns ``U q >= 0`` of the most zeros for a basis ``U [M, n]``, up to their lengths.

    None where fewer than n are zero on ``n - 1 + SPARE`` mixtures.
    """
    count = basis.shape[1]
    if len(basis) < count + SPARE:
        return None
    patterns = torch.empty(0, len(basis), dtype=torch.bool)
    for _ in range(ATTEMPTS):
        drawn = [_zeros(basis, tolerance, generator) for _ in range(DRAWS // AT_ONCE)]
        patterns = torch.unique(torch.cat([patterns, *drawn]), dim=0)
        found = _independent(basis, patterns, tolerance)
        if len(found) == count:
            return torch.stack(found, dim=1)
    return None


def _independent(basis: Tensor, patterns: Tensor, tolerance: float) -> list[Tensor]:
    """Return the columns ``[M]`` that are zero on these mixtures, sparsest first, each once."""
    found: list[Tensor] = []
    for zero in patterns[patterns.sum(dim=1).argsort(descending=True)]:
        if len(found) == basis.shape[1]:
            break
        if (column := _zero_on(basis, zero, tolerance)) is None:
            continue
        if torch.linalg.matrix_rank(torch.stack([*found, column]), rtol=ALIKE) > len(found):
            found.append(column)
    return found


def _zero_on(basis: Tensor, zero: Tensor, tolerance: float) -> Tensor | None:
    """Return ``U q`` ``[M]``, smallest on the mixtures ``zero [M]``; None where q is not unique.

    Each counts the less the larger it is: a small weight among them is none of the zeros.
    """
    rows, column = basis[zero], torch.zeros(len(basis)).to(basis)
    for _ in range(REWEIGHTED):
        size = column[zero].abs()
        trust = 1 / (size + size.median() + torch.finfo(size.dtype).eps)
        _, values, directions = torch.linalg.svd(rows * (trust / trust.max())[:, None])
        if values[basis.shape[1] - 2] < tolerance * values[0]:
            return None
        column = basis @ directions[-1]
    return column / column[column.abs().argmax()]


def _zeros(basis: Tensor, tolerance: float, generator: torch.Generator) -> Tensor:
    """Draw n - 1 mixtures often; return on which ``U q`` is zero, ``[T, M]``, where it may be."""
    mixtures, count = basis.shape
    drawn = torch.rand(AT_ONCE, mixtures, generator=generator).topk(count - 1).indices
    anywhere = torch.randn(AT_ONCE, 1, count, generator=generator, dtype=basis.dtype)
    systems = torch.cat([basis[drawn], anywhere], dim=1)
    wanted = torch.eye(count, dtype=basis.dtype)[-1].expand(AT_ONCE, -1)
    solutions: Tensor = torch.linalg.solve_ex(systems, wanted).result
    columns = solutions @ basis.T
    peaks = columns.gather(1, columns.abs().argmax(dim=1, keepdim=True))
    columns = (columns / peaks).nan_to_num(-1.0)
    zero = columns.abs() < tolerance
    allowed = (columns > -tolerance).all(dim=1) & (zero.sum(dim=1) >= count - 1 + SPARE)
    return zero[allowed]
