"""Structure: does the received model look made rather than trained?

Every construction that reads images off a gradient leaves something in the arrays that training
does not.  Each check reads the arrays alone, by shape, and is the largest over layers:

``duplicate-rows``  share of rows parallel to another (|cos| > 0.999): one functional for all units
                    (Robbing the Fed, LOKI, Scale-MIA), a mean for all (MKOR)
``equal-columns``   the same of a linear layer's columns: the constant way back of an imprint
``low-rank``        ``1 - ((sum s)^2 / sum s^2) / min(rows, fan-in)``, s the singular values: near 1
                    for one functional
``bias-ladder``     how evenly the sorted biases climb: ``exp(-median |log(d_i / d_{i+1})|)`` of the
                    steps d between them.  Independent draws of whatever distribution give 1/3
                    (the ratio of two exponentials), cut-offs at quantiles near 1
``row-sums``        ``|mean| / std`` of the rows' sums: alike in trap weights, whose negative half
                    outweighs the positive by the same factor in each row (Boenisch et al.)
``one-weight``      share of a linear layer's rows in which one weight outweighs the rest: the
                    identity of a pass-through, the one feature of feature fishing
``zero-rows``       share of rows that are zero: all classes but the target's (Wen et al., Fishing),
                    kernels that are silent in a model for one client (CVPR 2023, LOKI), a layer
                    made dead (Pasquini et al., CCS 2022)
``huge-bias``       the largest bias over the largest sum of a row's absolute weights, that is over
                    what inputs in [0, 1] can add to it at most
``not-finite``      share of an array's values that are NaN or infinite: a bias of minus infinity
                    kills a unit for good

Nobody's paper measures its attack by all of these; the sources are the constructions themselves.
An attacker who knows them draws a measurement of its own for each unit (duplicates, rank),
or trains its malicious model (SEER); hence the checks on gradients beside these.  A fresh head
that starts at zero, and a layer cut narrow, are false alarms.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from clients.defenses.detection.judged import LARGEST, judged, largest
from clients.defenses.detection.layers import bias_of, linear, matrices, unread
from clients.defenses.toy import IMPRINTED
from fedsim.attack import Paper, ToyCase
from fedsim.defense import Batch, ClientContext, Defense, Tensors, Verdict
from fedsim.registry import register

Share = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(gt=0)]
PARALLEL = 0.999
# Vectors of fewer numbers are parallel by chance.
SHORT = 8
# Fewer biases than this say nothing about how evenly they climb.
LADDER = 16
# Rows (columns) that are compared with all: a product of so many is quick.  They are drawn in
# secret, or a server could put its copies where nobody looks.
COMPARED = 1024
# Cosines held at once.
AT_ONCE = 2**22


@register("defense", "structure")
@dataclass(frozen=True, kw_only=True)
class Structure(Defense):
    """Measure what construction, and not training, leaves in a model's arrays.

    Each parameter is the limit above which a model is refused; None only reports.

    Parameters
    ----------
    duplicate_rows : float or None
        Share of rows parallel to another; an honest model has none.
    equal_columns : float or None
        Share of columns parallel to another.
    low_rank : float or None
        1 minus the participation rank as a share of the possible one.
    bias_ladder : float or None
        Evenness of the sorted biases' steps; 1/3 by chance.
    row_sums : float or None
        Mean over spread of the rows' sums.
    one_weight : float or None
        Share of rows in which one weight outweighs the rest.
    zero_rows : float or None
        Share of rows that are zero.
    huge_bias : float or None
        Largest bias over the largest sum of a row's absolute weights.
    not_finite : float or None
        Share of an array's values that are NaN or infinite; an honest model has none.
    """

    paper: ClassVar[Paper] = Paper(
        title="Robbing the Fed: Directly Obtaining Private Data in Federated Learning with "
        "Modified Models",
        authors="Fowl, Geiping, Czaja, Goldblum, Goldstein",
        venue="ICLR",
        year=2022,
        published="none: what is looked for are the constructions of this paper, Boenisch et al. "
        "(EuroS&P 2023), Wen et al. (ICML 2022), Pasquini et al. (CCS 2022) and Zhao et al. (CVPR "
        "2023); the checks are ours",
        measured="docs/detection.md (python tests/benchmarks/detection.py)",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**IMPRINTED, "defenses": "structure"},
        # All sixteen rows of the imprint are one functional.
        figure="detection.0.checks.structure/duplicate-rows",
        low=0.99,
        high=1.0,
    )
    changes_upload: ClassVar[bool] = False

    duplicate_rows: Share | None = None
    equal_columns: Share | None = None
    low_rank: Share | None = None
    bias_ladder: Share | None = None
    row_sums: Ratio | None = None
    one_weight: Share | None = None
    zero_rows: Share | None = None
    huge_bias: Ratio | None = None
    not_finite: Share | None = None

    def inspect(
        self,
        model: nn.Module,  # noqa: ARG002
        received: Tensors,
        probe: Batch,  # noqa: ARG002
        ctx: ClientContext,
    ) -> Verdict:
        """Return one score for each check, ``structure/<check>``."""
        found = structure(received, ctx.secret(self.name, ctx.round))
        scores = {f"{self.name}/{check}": score for check, score in found.items()}
        limits = {
            f"{self.name}/duplicate-rows": self.duplicate_rows,
            f"{self.name}/equal-columns": self.equal_columns,
            f"{self.name}/low-rank": self.low_rank,
            f"{self.name}/bias-ladder": self.bias_ladder,
            f"{self.name}/row-sums": self.row_sums,
            f"{self.name}/one-weight": self.one_weight,
            f"{self.name}/zero-rows": self.zero_rows,
            f"{self.name}/huge-bias": self.huge_bias,
            f"{self.name}/not-finite": self.not_finite,
        }
        return judged(scores, limits, unread(received))


def structure(received: Tensors, drawn: torch.Generator) -> dict[str, float]:
    """Return every check's largest score over layers; NaN where no layer has one.

    ``drawn`` says which rows of a large layer are looked at.
    """
    every = {name: weight.double() for name, weight in matrices(received).items()}
    dense = {name: every[name] for name in linear(received)}
    biases = {name: bias for name in every if (bias := bias_of(received, name)) is not None}
    found = {
        "duplicate-rows": [parallel(w, drawn) for w in every.values()],
        "equal-columns": [parallel(w.T, drawn) for w in dense.values()],
        "low-rank": [low_rank(w, drawn) for w in every.values()],
        "bias-ladder": [ladder(bias) for bias in biases.values()],
        "row-sums": [alike(w.sum(dim=1)) for w in dense.values()],
        "one-weight": [one_weight(w) for w in dense.values()],
        "zero-rows": [float((w == 0).all(dim=1).double().mean()) for w in every.values()],
        "huge-bias": [over_weights(bias, every[name]) for name, bias in biases.items()],
        "not-finite": [not_finite(tensor) for tensor in received.values() if tensor.numel()],
    }
    return {check: largest(scores) for check, scores in found.items()}


def whole(weight: Tensor) -> Tensor:
    """Return the rows that are numbers and not all zero."""
    return weight[(weight != 0).any(dim=1) & weight.isfinite().all(dim=1)]


def taken(count: int, drawn: torch.Generator) -> Tensor:
    """Return the places of at most ``COMPARED`` of so many rows: all, or some that are drawn."""
    if count <= COMPARED:
        return torch.arange(count)
    return torch.randperm(count, generator=drawn)[:COMPARED]


def parallel(weight: Tensor, drawn: torch.Generator) -> float:
    """Return the share of nonzero rows that are parallel to another; NaN for short or few rows.

    Of a large layer some are looked at, and compared with all.
    """
    rows = whole(weight)
    if len(rows) < 2 or rows.shape[1] < SHORT:
        return float("nan")
    unit = rows / rows.norm(dim=1, keepdim=True)
    some = taken(len(rows), drawn).to(rows.device)
    found = 0
    for part in torch.split(some, max(1, AT_ONCE // len(rows))):
        cosines = (unit[part] @ unit.T).abs()
        cosines[torch.arange(len(part), device=part.device), part] = 0
        found += int((cosines.amax(dim=1) > PARALLEL).sum())
    return found / len(some)


def low_rank(weight: Tensor, drawn: torch.Generator) -> float:
    """Return 1 minus the participation rank over the possible rank; NaN for narrow layers."""
    rows = whole(weight)
    rows = rows[taken(len(rows), drawn).to(rows.device)]
    possible = min(weight.shape[0], weight.shape[1], COMPARED)
    if possible < SHORT or not len(rows):
        return float("nan")
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    singular = torch.linalg.eigvalsh(gram / gram.diagonal().max()).clamp_min(0).sqrt()
    return 1 - float(singular.sum().square() / singular.square().sum()) / possible


def ladder(bias: Tensor) -> float:
    """Return ``exp(-median |log(d_i / d_{i+1})|)`` of the steps between sorted biases.

    NaN for few biases, and where hardly two differ (all zero at the start).
    """
    bias = bias[bias.isfinite()]
    steps = bias.double().sort().values.diff()
    steps = steps[steps > 0]
    if len(bias) < LADDER or len(steps) < LADDER / 2:
        return float("nan")
    return float(steps.log().diff().abs().median().neg().exp())


def alike(sums: Tensor) -> float:
    """Return ``|mean| / std``, at most ``LARGEST``; NaN for few, or where all are zero."""
    sums = sums[sums.isfinite()]
    mean, spread = float(sums.mean().abs()), float(sums.std())
    if len(sums) < SHORT or not mean > 0:
        return float("nan")
    return mean / max(spread, mean / LARGEST)


def one_weight(weight: Tensor) -> float:
    """Return the share of nonzero rows in which one weight outweighs the rest; NaN if narrow."""
    size = weight.abs()
    total, first = size.sum(dim=1), size.amax(dim=1)
    if weight.shape[1] < SHORT or not bool((total > 0).any()):
        return float("nan")
    return float((first > total - first)[total > 0].double().mean())


def over_weights(bias: Tensor, weight: Tensor) -> float:
    """Return ``max |b| / max_r sum |W_r|``, at most ``LARGEST``; NaN where both are zero.

    A bias that is no number is as large as any; weights that are none bound nothing.
    """
    if not bool(bias.isfinite().all()):
        return LARGEST
    sums = weight.abs().sum(dim=1)
    bound = float(sums[sums.isfinite()].max()) if bool(sums.isfinite().any()) else 0.0
    most = float(bias.abs().max())
    if not most > 0:
        return 0.0 if bound > 0 else float("nan")
    return most / max(bound, most / LARGEST)


def not_finite(values: Tensor) -> float:
    """Return the share of values that are NaN or infinite."""
    return 1 - float(values.isfinite().double().mean())
