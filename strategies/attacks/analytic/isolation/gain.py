"""How far to turn up the gradients of an imprint: its gain, worked out before anything is sent.

Rows and biases carry the factor ``gain``, the way back ``1 / gain``: the forward pass does not
change, the rows' gradients are multiplied by ``1 / gain``.  Let ``s_j`` be the derivative of
example j's loss by the signal of one unit at gain 1, ``q = <x, x'> + 1``, ``lr`` the local rate
and ``m`` the local batch size.

*FedSGD.*  A cumulative row sees the whole batch, so that no bias gradient is far above
``mean |s| / gain``.  Flower's SecAgg+ multiplies by ``num_examples / 1000``, clips to 8 and rounds
stochastically to steps of 16 / 2^22 = 3.8e-6.  ``gain = mean |s| / CEILING`` with CEILING = 2
leaves a factor of 4 to the clipping; a typical example then moves its rows by ``2 / 1000`` after
the weighting, however large the batch: 520 steps, hence near 58 dB, less 10 log10 of the number
of clients in the sum.  Without quantization the gain of FedSGD cancels.

*FedAvg.*  One example moves the pre-activations of its own unit by ``lr s q / (m gain)``, that is
by ``P = lr s q / (m gain^2 w)`` bins of width w.  The rounding of uploaded weights is relative to
their size, so that precision grows with P, as ``1 / gain^2``.
Sparse (Hardtanh): with P << 1 the difference of two float32 biases near ``gain c / w`` has no
digits left; with P near the number of bins a unit lands on other images; with P far above it the
unit leaves the range of every image and keeps what it holds.  ``P = PUSH_OUT * n``: float32 is
then ample, and later images of the same bin no longer mix in (the push-out of Zhao et al., LOKI,
S&P 2024), so that the share of single images exceeds ``(1 - 1/n)^(M-1)``.
Dense (ReLU): every example moves every unit below it; P = DRIFT median bins is the best
compromise of drift and rounding, and not a good one: use sparse.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedsim.threat import TrainingDetails
from strategies.attacks.analytic.isolation.imprint import Imprint

CEILING = 2.0
PUSH_OUT = 16.0
DRIFT = 0.5


def signal_gradient(model: Imprint, images: Tensor, labels: Tensor) -> float:
    """Return ``mean_j |s_j|``: by how much one unit's signal moves an example's loss.

    Parameters
    ----------
    model : Imprint
        At gain 1.
    images, labels : Tensor
        ``[B, C, H, W]`` in ``[0, 1]``, ``[B]``; not the clients'.
    """
    shown = model.shown(images).detach().requires_grad_()
    loss = cross_entropy(model.body(shown), labels, reduction="sum")
    (pixels,) = torch.autograd.grad(loss, shown)
    if model.back is None:
        per_unit = pixels.flatten(1).sum(dim=1) / model.imprint.out_features
    else:
        per_unit = pixels.flatten(1) @ model.back.weight[:, 0].detach()
    return max(float(per_unit.abs().mean()), 1e-12)


def for_gradients(signal: float) -> float:
    """Return the gain at which bias gradients, means over a batch, stay below ``CEILING``."""
    return signal / CEILING


def for_weights(
    signal: float, images: Tensor, widths: Tensor, training: TrainingDetails, *, sparse: bool
) -> float:
    """Return the gain at which one example moves its unit by ``PUSH_OUT * n`` or ``DRIFT`` bins.

    ``widths`` (``[n]``) are those of the bins; a sparse unit measures in its own.
    """
    overlap = float(images.flatten(1).square().sum(dim=1).mean()) + 1
    moved = training.lr * signal * overlap / training.batch_size
    if sparse:
        return float((moved / (PUSH_OUT * len(widths))) ** 0.5)
    return float((moved / (DRIFT * float(widths.median()))) ** 0.5)
