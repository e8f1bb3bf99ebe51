"""A criterion means what it says, or is refused with what would be right."""

import pytest
import torch

from fedsim.audit.criterion import parse_criterion
from fedsim.errors import ScenarioError

VALUES = {
    "psnr": torch.tensor([10.0, 20.0, 30.0, float("nan")]),
    "ssim": torch.tensor([0.9, 0.5, 0.9, float("nan")]),
    "mse": torch.tensor([0.1, 0.01, 0.001, float("nan")]),
}


@pytest.mark.parametrize(
    ("text", "leaked"),
    [
        ("psnr>=20", [False, True, True, False]),
        ("psnr > 20", [False, False, True, False]),
        ("mse<=0.01", [False, True, True, False]),
        ("mse < 1e-2", [False, False, True, False]),
        ("psnr>=10 and ssim>0.6", [True, False, True, False]),
        ("PSNR>=20 AND SSIM>=.5".replace("AND", "and"), [False, True, True, False]),
    ],
)
def test_an_image_leaks_when_all_conditions_hold_and_never_without_a_match(text, leaked):
    assert parse_criterion(text).holds(VALUES).tolist() == leaked


def test_it_is_spoken_for_people():
    assert parse_criterion("psnr>=18 and ssim>0.6").spoken() == "PSNR ≥ 18 dB and SSIM > 0.6"
    assert parse_criterion("psnr>=18 and ssim>0.6").limit("psnr") == 18
    assert parse_criterion("ssim>0.6").limit("psnr") is None


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("", "psnr>=20"),
        ("psnr", "metric>=value"),
        ("psnr=20", "metric>=value"),
        ("psnr>=20 or ssim>0.6", "metric>=value"),
        ("psnr>=20, ssim>0.6", "metric>=value"),
        ("psnr>=1.2.3", "is no number"),
        ("pnsr>=20", "did you mean 'psnr'"),
        ("psnr<=20", "write psnr>=20"),
        ("mse>0.1", "write mse<0.1"),
        ("lpips<0.2", "FEDSIM_WEIGHTS"),
        ("__import__('os')>=1", "metric>=value"),
    ],
)
def test_a_wrong_criterion_is_refused_with_a_remedy(text, remedy, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("FEDSIM_WEIGHTS", raising=False)
    with pytest.raises(ScenarioError) as refused:
        parse_criterion(text)
    assert refused.value.key == "audit.criterion"
    assert remedy in refused.value.remedy
