"""Metrics are per image, and say what their papers say."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.audit import perceptual
from fedsim.audit.metrics import METRICS, mse, psnr, ssim

GENERATOR = torch.Generator().manual_seed(1)
IMAGES = torch.rand(4, 3, 16, 16, generator=GENERATOR)


def test_equal_images_have_no_error_and_the_highest_psnr():
    assert mse(IMAGES, IMAGES).tolist() == [0.0] * 4
    assert psnr(IMAGES, IMAGES).tolist() == [200.0] * 4
    assert torch.allclose(ssim(IMAGES, IMAGES), torch.ones(4, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(st.floats(min_value=1e-6, max_value=0.5))
def test_psnr_of_a_constant_offset_is_minus_twenty_log_of_it(offset):
    dark = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    assert psnr(dark + offset, dark).item() == pytest.approx(-20 * math.log10(offset), abs=1e-6)


def test_one_bad_image_does_not_touch_the_others_figures():
    other = IMAGES.clone()
    other[0] = 1 - other[0].round()
    assert psnr(other, IMAGES)[1:].tolist() == [200.0] * 3
    assert mse(other, IMAGES)[1:].tolist() == [0.0] * 3


def test_candidates_are_clamped_and_what_is_no_number_counts_as_black():
    truth = torch.zeros(1, 1, 8, 8)
    assert mse(truth - 7, truth).item() == 0
    assert mse(torch.full_like(truth, float("nan")), truth).item() == 0
    assert mse(torch.full_like(truth, 9.0), truth).item() == 1
    assert mse(torch.full_like(truth, float("inf")), truth).item() == 1


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, Sec. III.B, pixel by pixel on one channel with reflected borders."""
    place = np.arange(11) - 5
    window = np.exp(-(place**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    left, right = (np.pad(x, 5, mode="reflect") for x in (a, b))
    values = []
    for row in range(a.shape[0]):
        for column in range(a.shape[1]):
            x = left[row : row + 11, column : column + 11]
            y = right[row : row + 11, column : column + 11]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * x * x).sum() - mx**2, (window * y * y).sum() - my**2
            cov = (window * x * y).sum() - mx * my
            top = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
            values.append(top / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return float(np.mean(values))


@pytest.mark.parametrize("side", [8, 11, 25])
def test_ssim_is_the_papers_formula_done_slowly(side):
    a = torch.rand(2, 1, side, side, generator=GENERATOR, dtype=torch.float64)
    b = (a + 0.2 * torch.randn(a.shape, generator=GENERATOR, dtype=torch.float64)).clamp(0, 1)
    slow = [slow_ssim(x[0].numpy(), y[0].numpy()) for x, y in zip(a, b, strict=True)]
    assert ssim(a, b).tolist() == pytest.approx(slow, abs=1e-9)


def test_ssim_is_that_of_torchmetrics():
    from torchmetrics.functional.image import structural_similarity_index_measure

    a = torch.rand(3, 3, 20, 33, generator=GENERATOR, dtype=torch.float64)
    b = (a + 0.1 * torch.randn(a.shape, generator=GENERATOR, dtype=torch.float64)).clamp(0, 1)
    theirs = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    assert torch.allclose(ssim(a, b), theirs, atol=1e-9)


def test_every_metric_gets_worse_with_noise():
    noise = torch.randn(IMAGES.shape, generator=GENERATOR)
    for name in ("psnr", "ssim", "mse"):
        metric = METRICS[name]
        near, far = (metric.function(IMAGES + s * noise, IMAGES).mean() for s in (0.02, 0.3))
        assert bool(near > far) == metric.higher_is_better


@pytest.mark.parametrize("name", ["psnr", "ssim", "mse"])
def test_no_images_give_no_figures(name):
    assert METRICS[name].function(IMAGES[:0], IMAGES[:0]).shape == (0,)


# -- LPIPS -----------------------------------------------------------------------------------------


def weights_file(folder):
    """Write AlexNet's convolutions, with random values; the digest is not that of the real file."""
    from torchvision.models import AlexNet

    torch.manual_seed(0)
    layers = AlexNet().features.state_dict()
    path = folder / perceptual.WEIGHTS
    torch.save({f"features.{name}": tensor for name, tensor in layers.items()}, path)
    return path


@pytest.fixture
def weights(tmp_path, monkeypatch):
    perceptual._outcome.cache_clear()
    monkeypatch.setenv("FEDSIM_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    yield tmp_path
    perceptual._outcome.cache_clear()


def test_without_weights_lpips_says_which_file_goes_where(weights):
    reason = perceptual.unavailable()
    assert perceptual.WEIGHTS in reason
    assert "FEDSIM_WEIGHTS" in reason
    assert str(weights / "hub") in reason
    with pytest.raises(perceptual.LpipsUnavailableError):
        perceptual.lpips(IMAGES, IMAGES)


def test_random_weights_under_the_real_name_are_refused(weights):
    weights_file(weights)
    assert "is damaged" in perceptual.unavailable()


def test_a_download_that_fails_is_tried_once(weights, monkeypatch):
    monkeypatch.delenv("FEDSIM_OFFLINE")
    tried = []

    def no_network(*args, **kwargs):
        tried.append(args)
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    assert "no route to host" in perceptual.unavailable()
    assert "no route to host" in perceptual.unavailable()
    assert len(tried) == 1


def test_the_backbone_in_the_file_is_the_one_that_measures(weights, monkeypatch):
    """With the digest of our own file expected, every layer must come from that file."""
    path = weights_file(weights)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(perceptual, "_DIGEST", digest)
    assert perceptual.unavailable() is None
    saved = torch.load(path, weights_only=True)
    own = perceptual._network().get_submodule("net").state_dict()
    assert len(own) == 10
    for name, tensor in own.items():
        assert torch.equal(tensor, saved["features." + name.split(".", 1)[1]])
    for images in (IMAGES, IMAGES[:, :1], torch.rand(2, 3, 80, 64)):
        far = (1 - images).clamp(0, 1)
        assert perceptual.lpips(images, images).abs().max() < 1e-6
        assert perceptual.lpips(images, far).min() > 1e-4
        assert perceptual.lpips(images, far).shape == (len(images),)


def test_real_weights_reproduce_the_packages_own_figures():
    """Needs the real file; the package's own way of loading it gives the reference."""
    if reason := perceptual.unavailable():
        pytest.skip(reason)
    import lpips as package

    reference = package.LPIPS(net="alex", verbose=False)
    a, b = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference(a * 2 - 1, b * 2 - 1).flatten()
    assert torch.allclose(perceptual.lpips(a, b).float(), expected, atol=1e-5)
