"""Soteria: exactly the columns of the most telling units, and nothing else."""

import pytest
import torch
from torch import nn

from clients.defenses.perturbation.soteria import Soteria, scores
from tests.clients.a_step import a_step, few_images, small_model
from tests.clients.model_side import images_of, inverted, sent
from tests.strategies.passive.honest import psnr


@pytest.mark.parametrize("share", [0.1, 0.2, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("count", [1, 4])
def test_exactly_that_share_of_the_live_columns_is_zeroed(share: float, count: int) -> None:
    """With ReLU, where the references prune nothing, or dead units first."""
    model, batch = small_model(), few_images(count)
    before, ctx = a_step(model, batch)
    after = Soteria(share=share).transform_gradient(before, ctx)
    live = (before["fc.weight"] != 0).any(dim=0)
    zeroed = live & (after["fc.weight"] == 0).all(dim=0)
    assert int(zeroed.sum()) == round(share * int(live.sum()))
    kept = live & ~zeroed
    assert torch.equal(after["fc.weight"][:, kept], before["fc.weight"][:, kept])
    assert all(after[name] is before[name] for name in before if name != "fc.weight")
    figures = ctx.effects["soteria"].figures
    assert figures["live"] == live.sum() <= figures["columns"] == len(live)
    assert count > 1 or figures["live"] < figures["columns"]
    assert figures["columns changed"] == zeroed.sum()


def test_the_score_is_the_value_over_the_length_of_its_slope() -> None:
    """Two units by hand: r = relu(A x), |dr_i/dx| = |A_i|, one always off."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[3.0, 4, 0, 0], [0, 0, 1, 0], [-1, 0, 0, 0]]))
    images = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 2, 2)
    score, live = scores(model, model[3], images)
    assert live.tolist() == [True, True, False]
    assert score[:2].tolist() == pytest.approx([11 / 5, 3 / 1])


def test_over_a_batch_the_inverse_ratios_are_summed() -> None:
    model, (images, _) = small_model(), few_images(3)
    layer = model.fc
    assert isinstance(layer, nn.Linear)
    whole = 1 / scores(model, layer, images)[0]
    alone = [1 / scores(model, layer, image[None])[0] for image in images]
    assert torch.allclose(whole, torch.stack(alone).sum(dim=0), rtol=1e-4)


def test_a_named_layer_and_one_that_is_not_there() -> None:
    model = small_model("convnet(width=8, hidden=[20])")
    assert Soteria().defended(model) == "fc"
    assert Soteria(layer="hidden.0").defended(model) == "hidden.0"
    with pytest.raises(
        ValueError, match=r"no fully connected layer 'fc9'; there is: hidden\.0, fc"
    ):
        Soteria(layer="fc9").check(model, "gradient")
    with pytest.raises(ValueError, match="none: use convnet"):
        Soteria().check(nn.Conv2d(3, 3, 1), "gradient")


def test_running_statistics_do_not_move() -> None:
    model, batch = small_model("convnet(width=8, stride=2, norm='batch')"), few_images()
    gradient, ctx = a_step(model, batch)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    Soteria().transform_gradient(gradient, ctx)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_who_leaves_the_layer_out_finds_the_image() -> None:
    """Balunovic et al.: the defended layer gets no weight, and the others are the true gradient."""
    images, labels = images_of(1)
    seen = sent(Soteria(share=0.9), "convnet(width=8)", images, labels)
    whole = inverted(seen, labels, iterations=150)
    part = inverted(seen, labels, "fc.", iterations=150)
    found = {"whole": psnr(images, whole).item(), "without": psnr(images, part).item()}
    print(found)
    assert found["without"] > found["whole"] + 5
