"""Phase retrieval: images from the sizes ``|A Z|`` of their mixtures, where no sign is known.

M mixtures of n originals; ``Z [n, D]`` are their D values around the channel's mean, ``A [M, n]``
the weights, and ``Y = |A Z|`` is what random signs leave.  Squares are linear in products:

    Y_md^2 = sum_{i <= j} (2 - [i = j]) A_mi A_mj  Z_id Z_jd

that is ``Y^2 = B W`` with the ``n (n + 1) / 2`` products of two weights, B, and of two originals, W
(the lifting of Balan, Casazza, Edidin, "On Signal Reconstruction without Phase", ACHA 2006; Candes,
Strohmer, Voroninski, "PhaseLift", CPAM 2013).  With more mixtures than that, all is linear algebra:

*The weights' span.*  The columns of B span S, which is read off ``Y^2``.  Rows of A sum to 1, so
that a column of A, the sum of its products with all columns, lies in S; so does its product with
the weight of a class, which the soft labels tell and which is a sum of columns.  What else in S
stays in S when it is multiplied so?  Nothing: S is the quadratic forms of A's rows, on the plane of
sum 1, and a quadratic form times a linear one is quadratic there only if it was linear itself.
(Mixtures of two say less: where no third image is, between two of one class no label changes, and
their product stays in S as well.)

*The originals*, A known: least squares for W, whose column d is the matrix ``Z_d Z_d^T``.  Its one
eigenvector is ``Z_d`` up to a sign, which turns all n originals at once.

*That sign*, one for each value d: that of the neighbors.  Originals are smooth, so that of two
neighboring values each original with both of them off the mean votes for the sign that makes them
alike.  Where one sign puts an original outside ``[0, 1]`` it is the other.
"""

import heapq
import math

import torch
from torch import Tensor

# A singular value that is so many times smaller than the one before is zero.
CLIFF = 100.0
# Solutions whose signs are fitted again so often end at the rounding errors of what was read.
REFITTED = 8
# What is out of [0, 1] by more than this decides a sign, and outweighs all that neighbors vote.
EVIDENT, DECISIVE = 2e-3, 1e6


def cliff(values: Tensor) -> int | None:
    """Return how many singular values stand before they fall off; None if they do not."""
    falls = values[:-1] / values[1:].clamp_min(values[0] * torch.finfo(values.dtype).eps)
    return None if len(falls) < 2 or falls.max() < CLIFF else int(falls.argmax()) + 1


def originals_behind(products: int) -> int | None:
    """Return the n whose ``n (n + 1) / 2`` this is; None if there is none."""
    count = (math.isqrt(8 * products + 1) - 1) // 2
    return count if count * (count + 1) // 2 == products else None


def span_of_weights(products: Tensor, labels: Tensor, count: int) -> Tensor | None:
    """Find a basis ``[M, n]`` of A's columns in one of their products' span.

    ``products [M, n (n + 1) / 2]`` is orthonormal, ``labels [M, K]`` the weights of classes.  None
    where more than n directions stay in the span: one class only, or too few mixtures.
    """
    images = labels.T[:, :, None] * products
    leaving = images - products @ (products.T @ images)
    _, sizes, directions = torch.linalg.svd(leaving.flatten(0, 1), full_matrices=False)
    if sizes[-count - 1] < CLIFF * sizes[-count]:
        return None
    basis: Tensor = products @ directions[-count:].T
    return basis


def retrieved(sizes: Tensor, weights: Tensor) -> Tensor:
    """Solve ``|A Z| = Y`` for ``Z [n, D]``, each column up to its sign; ``Y [M, D]``, ``A [M, n]``.

    Wants ``n (n + 1) / 2`` mixtures or more.
    """
    count = weights.shape[1]
    rows, columns = torch.triu_indices(count, count)
    products = weights[:, rows] * weights[:, columns] * torch.where(rows == columns, 1.0, 2.0)
    lifted = torch.linalg.lstsq(products, sizes.square()).solution
    squares = lifted.new_zeros(sizes.shape[1], count, count)
    squares[:, rows, columns] = squares[:, columns, rows] = lifted.T
    lengths, directions = torch.linalg.eigh(squares)
    found: Tensor = (directions[:, :, -1] * lengths[:, -1:].clamp_min(0).sqrt()).T
    for _ in range(REFITTED):
        signed = (weights @ found).sign() * sizes
        found = torch.linalg.lstsq(weights, signed).solution
    return found


def signs_by_neighbors(values: Tensor, mean: Tensor) -> Tensor:
    """Return the sign of each value, ``[C, H, W]``, that makes all originals smooth.

    Parameters
    ----------
    values : Tensor
        ``[n, C, H, W]`` around the mean, known up to a sign for each of ``[C, H, W]``.
    mean : Tensor
        ``[C, 1, 1]``.

    Notes
    -----
    Clearest votes first: the two groups of values with the most votes between them become one, one
    of them turned where the vote says so, and their votes on others add up (greedy additive edge
    contraction: Keuper et al., ICCV 2015).  Where nothing leaves ``[0, 1]`` one sign of all values
    stays open.
    """
    shape, flat = values.shape[1:], values.flatten(1)
    first, second = neighbors(shape)
    one, other = flat[:, first], flat[:, second]
    votes = (one.sign() * other.sign() * torch.minimum(one.abs(), other.abs())).sum(dim=0)
    possible = (outside(mean - values) - outside(mean + values)).flatten()
    sure = possible.nonzero().flatten()
    upright = torch.full_like(sure, flat.shape[1])  # one value more, whose sign is known
    graph: list[dict[int, float]] = [{} for _ in range(flat.shape[1] + 1)]
    tails, heads = torch.cat([first, sure]), torch.cat([second, upright])
    weights = torch.cat([votes, DECISIVE * possible[sure]])
    for tail, head, weight in zip(tails.tolist(), heads.tolist(), weights.tolist(), strict=True):
        graph[tail][head] = graph[head][tail] = weight
    signs = torch.tensor(_contracted(graph)).to(values)
    return (signs[:-1] * signs[-1]).view(shape)


def neighbors(shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return both ends of each pair of values beside each other, in a row, column, or pixel."""
    at = torch.arange(shape.numel()).view(shape)
    pairs = [(at.narrow(d, 0, n - 1), at.narrow(d, 1, n - 1)) for d, n in enumerate(shape)]
    first, second = zip(*((one.flatten(), other.flatten()) for one, other in pairs), strict=True)
    return torch.cat(first), torch.cat(second)


def outside(images: Tensor) -> Tensor:
    """Return by how much images ``[n, C, H, W]`` leave ``[0, 1]``, all together, ``[C, H, W]``."""
    beyond = (-images).clamp_min(images - 1) - EVIDENT
    return beyond.clamp_min(0).sum(dim=0)


def _contracted(graph: list[dict[int, float]]) -> list[float]:
    """Contract the edges of a signed graph, largest first; return each node's sign."""
    members, signs = [[node] for node in range(len(graph))], [1.0] * len(graph)
    edges = [(-abs(w), a, b) for a, near in enumerate(graph) for b, w in near.items() if a < b]
    heapq.heapify(edges)
    while edges:
        size, a, b = heapq.heappop(edges)
        if -size != abs(graph[a].get(b, math.inf)):
            continue  # one of both is gone, or other votes have been added
        kept, gone = (a, b) if len(graph[a]) >= len(graph[b]) else (b, a)
        turn = math.copysign(1.0, graph[kept].pop(gone))
        for node in members[gone]:
            signs[node] *= turn
        members[kept] += members[gone]
        del graph[gone][kept]
        for node, vote in graph[gone].items():
            del graph[node][gone]
            weight = graph[kept].get(node, 0.0) + turn * vote
            graph[kept][node] = graph[node][kept] = weight
            heapq.heappush(edges, (-abs(weight), kept, node))
        graph[gone] = {}
    return signs
