"""What clip, prune and noise do to the ratio attack on a first linear layer, in dB.

The bars are those of the project's regression table for batch 1, ``x = dW_i / db_i``: PSNR of the
best row and of the least squares over rows, capped at 120, and the cosine to the clean gradient.
Under noise each is the mean over secret keys.  Of its 22 figures in dB 20 are met within 1 dB.  Two
hang on the draw of image and network, which it does not name, and are missed by 1.2 dB: the best
row after pruning 90 % (here 19.2), and the least squares under noise of 1e-2, which shrinks the
image by ``256 std^2 / |db|^2`` (here 21.7).
"""

import pytest

from clients.defenses.formal.gaussian import Gaussian
from clients.defenses.perturbation.clip import Clip, global_norm
from clients.defenses.perturbation.prune import Prune
from fedsim.defense import Defense, Tensors
from tests.clients.one_update import Eavesdropped, context, eavesdrop, gradient, smooth_image

IMAGE = smooth_image()
CLEAN = gradient(IMAGE)
KEYS = [f"{number:02x}" * 32 for number in range(1, 21)]


def read(*chain: Defense) -> Eavesdropped:
    """Average over secret keys of the noise, if there is any."""
    noisy = any(isinstance(defense, Gaussian) for defense in chain)
    seen = []
    for key in KEYS if noisy else KEYS[:1]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDSIM_SECRET_KEY", key)
            received: Tensors = CLEAN
            for defense in chain:
                received = defense.transform_update(received, context())
        seen.append(eavesdrop(received, CLEAN, IMAGE))
    return Eavesdropped(
        sum(s.best_row for s in seen) / len(seen),
        sum(s.least_squares for s in seen) / len(seen),
        sum(s.cosine for s in seen) / len(seen),
    )


def test_the_toy_is_the_tables_own() -> None:
    first = {name: CLEAN[name] for name in ("1.weight",)}
    assert global_norm(first) == pytest.approx(11.9, abs=0.1)


# chain, best row, least squares, cosine; None: missed, see below
TABLE: list[tuple[tuple[Defense, ...], float | None, float | None, float]] = [
    ((), 120.0, 120.0, 1.0),
    ((Prune(ratio=0.5),), 72.7, 66.4, 1.0),
    ((Prune(ratio=0.9),), None, 15.8, 0.853),
    ((Prune(ratio=0.99),), 9.1, 9.0, 0.439),
    ((Gaussian(std=1e-4),), 56.8, 70.6, 1.0),
    ((Gaussian(std=1e-3),), 36.2, 50.1, 0.998),
    ((Gaussian(std=1e-2),), 17.6, None, 0.813),
    ((Gaussian(std=1e-1),), 7.4, 5.9, 0.139),
    ((Clip(norm=1.0), Gaussian(std=0.01)), 7.1, 5.6, 0.113),
    ((Clip(norm=1.0), Gaussian(std=0.1)), 6.5, 5.6, 0.010),
    ((Clip(norm=1.0), Gaussian(std=1.0)), 6.5, 5.5, 0.000),
]


@pytest.mark.parametrize(("chain", "best_row", "least_squares", "cosine"), TABLE)
def test_twenty_of_the_tables_figures_are_met_within_one_decibel(
    chain: tuple[Defense, ...],
    best_row: float | None,
    least_squares: float | None,
    cosine: float,
) -> None:
    got = read(*chain)
    for found, bar in ((got.best_row, best_row), (got.least_squares, least_squares)):
        assert bar is None or found == pytest.approx(bar, abs=1.0)
    assert got.cosine == pytest.approx(cosine, abs=0.03)


def test_two_of_its_twenty_two_figures_are_missed_by_more() -> None:
    bars = [bar for _, *row, _ in TABLE for bar in row]
    assert (len(bars), bars.count(None)) == (22, 2)
    pruned = read(Prune(ratio=0.9)).best_row
    assert pruned == pytest.approx(19.2, abs=0.1)
    assert pruned - 18.0 > 1.0
    noised = read(Gaussian(std=1e-2)).least_squares
    assert noised == pytest.approx(21.7, abs=0.3)
    assert 22.9 - noised > 1.0


def test_clipping_costs_the_attacker_exactly_nothing() -> None:
    clipped = Clip(norm=0.1 * global_norm(CLEAN)).transform_update(CLEAN, context())
    assert clipped is not CLEAN
    got = eavesdrop(clipped, CLEAN, IMAGE)
    assert (got.best_row, got.least_squares) == (120.0, 120.0)
    assert got.cosine == pytest.approx(1.0, abs=1e-12)


def test_rescaling_by_a_negative_rate_costs_nothing_either() -> None:
    scaled = {name: -0.05 * tensor for name, tensor in CLEAN.items()}
    got = eavesdrop(scaled, CLEAN, IMAGE)
    assert (got.best_row, got.least_squares) == (120.0, 120.0)
    assert got.cosine == pytest.approx(-1.0)
