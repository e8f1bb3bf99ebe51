"""Factor a sum of outer products whose left factors have many zeros.

For ``G = D X`` (``[m, n] = [m, B] [B, n]``) of rank B and any other factorization ``G = L R``
there is one Q with ``D = L Q``, ``X = Q^-1 R``.  A column q of Q is the null vector of any B - 1
independent rows of L where its column of D is zero.  Dimitrov et al., SPEAR, NeurIPS 2024, Sec. 4.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Draws that go through the linear algebra at once, at most (the paper's number).
DRAWS_AT_ONCE = 10_000
# A search starts with rounds of so many, and makes each a quarter of what it has drawn.
FIRST_DRAWS = 32
# A null vector is looked at if it has so many zeros beyond the rows that it was made from.
SPARE_ZEROS = 6
# Above how many times the numerical noise an entry of D is not zero.
CLEAR = 30.0
# A full set of columns that stayed the same for so many times the draws it took is the best there
# is: noise, or several local steps, keep it from being exact.
SETTLED = 10
# A search that is not done at so many times the draws that it should take never will be: raw
# pixels take up to a hundred times as many, noise forever.
HOPELESS = 1000


@dataclass(frozen=True)
class Factors:
    """``G = left @ right`` up to ``noise``, which is relative to the entries of ``left``.

    Attributes
    ----------
    left : Tensor
        ``[m, r]`` float64, of orthogonal columns whose mean square is 1.
    right : Tensor
        ``[r, n]`` float64.
    noise : float
        First singular value beyond the rank, over the last within.
    """

    left: Tensor
    right: Tensor
    noise: float

    @property
    def zero(self) -> float:
        """Below this a product with ``left`` is taken for zero: between the noise and 1."""
        return math.sqrt(self.noise)

    @property
    def clear(self) -> float:
        """Above this a product of ``left`` with a fitted vector is not zero."""
        return min(self.zero, CLEAR * self.noise)

    @property
    def rank(self) -> int:
        """How many columns there are to find."""
        return self.left.shape[1]


def factorize(matrix: Tensor, most: int) -> Factors:
    """Factor ``[m, n]`` at its rank, at most ``most`` (less than m and n).

    Fewer where singular values vanish: examples that are the same image, or have no gradient.
    """
    left, sizes, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    beyond = torch.maximum(sizes[most], torch.finfo(torch.float64).eps * sizes[0])
    rank = int((sizes[:most] > 10 * beyond).sum())
    if rank == 0:
        return Factors(left[:, :0], right[:0], 1.0)
    beyond = torch.maximum(sizes[rank], beyond)
    scale = left.shape[0] ** 0.5
    right = right[:rank] * sizes[:rank, None] / scale
    return Factors(left[:, :rank] * scale, right, float(beyond / sizes[rank - 1]))


@dataclass
class Columns:
    """The best columns of Q so far, and what it took.

    Attributes
    ----------
    found : Tensor
        ``[k, r]``: independent unit vectors, those with the most zeros first.
    zeros : Tensor
        ``[k]``: how many rows of ``left`` each is zero on.
    draws, dependent : int
        Draws so far, and those thrown away because their rows depend on each other.
    """

    found: Tensor
    zeros: Tensor
    draws: int = 0
    dependent: int = 0


def expected_draws(examples: int) -> float:
    """Return ``2^(B-1) H_B``: draws until each of B directions came up, at full rank and half off.

    The coupon collector's problem: each of B comes up once in ``2^(B-1)`` draws.
    """
    return 2.0 ** (examples - 1) * sum(1 / i for i in range(1, examples + 1))


def find_columns(
    factors: Factors,
    draws: int,
    generator: torch.Generator,
    verified: Callable[[Columns], bool],
    tell: Callable[[int], None] = lambda _: None,
) -> Columns:
    """Sample until ``verified`` says of a full set of columns that it is Q, or draws are spent.

    ``verified`` is asked whenever the full set changed; ``tell`` hears the draws after each round.
    """
    rank, left = factors.rank, factors.left
    columns = Columns(left.new_empty(0, rank), left.new_empty(0))
    if rank == 1:
        columns.found, columns.zeros = left.new_ones(1, 1), left.new_zeros(1)
        verified(columns)
        return columns
    live = left[torch.linalg.norm(left, dim=1) > factors.zero]
    if len(live) < rank - 1 + SPARE_ZEROS:
        return columns
    draws = min(draws, int(HOPELESS * expected_draws(rank)))
    changed = draws
    while columns.draws < min(draws, SETTLED * changed):
        at_once = min(DRAWS_AT_ONCE, max(FIRST_DRAWS, columns.draws // 4))
        count = min(at_once, draws - columns.draws)
        rows = torch.rand(count, len(live), generator=generator).topk(rank - 1, dim=1).indices
        vectors, independent = null_vectors(live[rows.to(live.device)], factors.zero)
        columns.draws += count
        columns.dependent += count - int(independent.sum())
        tell(columns.draws)
        vectors = vectors[independent]
        zeros = ((vectors @ live.T).abs() <= factors.zero).sum(dim=1)
        promising = zeros >= rank - 1 + SPARE_ZEROS
        if _add(columns, factors, live, vectors[promising], zeros[promising]):
            changed = columns.draws
            if verified(columns):
                break
    return columns


def null_vectors(rows: Tensor, zero: float) -> tuple[Tensor, Tensor]:
    """Return the unit null vectors ``[N, B]`` of ``[N, B-1, B]``, and whose rows are independent.

    ``A^T = Q R`` has the null vector of A as Q's last column; dependent rows leave R with a
    diagonal entry that is zero.
    """
    basis, triangle = torch.linalg.qr(rows.mT, mode="complete")
    diagonal = triangle.diagonal(dim1=-2, dim2=-1).abs()
    return basis[..., -1], diagonal.amin(dim=-1) > zero


def _add(columns: Columns, factors: Factors, live: Tensor, vectors: Tensor, zeros: Tensor) -> bool:
    """Let new vectors compete with those found; say whether a full set changed."""
    tried = [_fit(live, vectors[i], factors) for i in sparsest(vectors, zeros, factors)]
    fitted = [one for one in tried if one is not None]
    if not fitted:
        return False
    both = torch.cat([columns.found, torch.stack([one[0] for one in fitted])])
    counts = torch.cat([columns.zeros, columns.zeros.new_tensor([one[1] for one in fitted])])
    chosen = sparsest(both, counts, factors)
    changed = any(i >= len(columns.found) for i in chosen)
    columns.found, columns.zeros = both[chosen], counts[chosen]
    return changed and len(chosen) == factors.rank


def _fit(live: Tensor, vector: Tensor, factors: Factors) -> tuple[Tensor, int] | None:
    """Fit a null vector to all rows that it is zero on, twice; None if they are not of rank B - 1.

    The second time, what is clearly not zero for the better vector is left out.
    """
    for zero in (factors.zero, factors.clear):
        on = live[(live @ vector).abs() <= zero]
        if len(on) < factors.rank - 1:
            return None
        _, sizes, basis = torch.linalg.svd(on, full_matrices=True)
        if sizes[factors.rank - 2] <= factors.zero:
            return None
        vector = basis[-1]
    return vector, int(((live @ vector).abs() <= zero).sum())


def sparsest(vectors: Tensor, zeros: Tensor, factors: Factors) -> list[int]:
    """Return which of ``[k, r]`` unit vectors to keep: independent, those with most zeros first.

    A mixture of columns is zero where all of them are, hence never on more rows than one of them,
    and the greedy choice is the best one: independent sets are a matroid.
    """
    basis: list[Tensor] = []
    chosen = []
    for i in zeros.argsort(descending=True, stable=True).tolist():
        rest = vectors[i]
        for one in basis:
            rest = rest - (rest @ one) * one
        size = torch.linalg.norm(rest)
        if size > min(10 * factors.zero, 0.1):
            basis.append(rest / size)
            chosen.append(i)
        if len(chosen) == factors.rank:
            break
    return chosen
