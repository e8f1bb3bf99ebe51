"""Linear inversion: exact for one example, whatever is done to the whole update."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import registry
from fedsim.data import DataSpec
from fedsim.models import build_model
from fedsim.view import ServerView
from strategies.attacks.analytic.closed_form.linear_inversion import LinearInversion
from tests.strategies.passive.honest import Honest, batch, psnr, spec, tiles

ATTACK = LinearInversion()


def rescaled(view: ServerView, factor: float) -> ServerView:
    upload = {name: tensor * factor for name, tensor in view.received.items()}
    return ServerView(1, view.senders, view.model, view.sent, upload, "gradient")


@pytest.mark.ladder(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("expression", ["mlp", "mlp(hidden=[])", "mlp(hidden=[64, 32])"])
def test_one_example_comes_back_exactly_with_its_label(expression, dtype):
    client = Honest(expression, spec(), dtype=dtype)
    for seed in range(10):
        images, labels = batch(tiles(), 1, seed, dtype)
        view = client.gradient(images, labels)
        found = ATTACK.reconstruct([view], client.knowledge("A"))
        assert (found.examples - images).abs().max() < 1e-6
        assert psnr(images, found.examples).min() >= (120 if dtype == torch.float32 else 190)
        assert found.labels.tolist() == labels.tolist()


@settings(deadline=None, max_examples=30)
@given(factor=st.floats(min_value=1e-4, max_value=1e4), seed=st.integers(0, 50))
def test_rescaling_never_hides_the_image(factor, seed):
    client = Honest("mlp", spec())
    images, labels = batch(tiles(), 1, seed)
    view = rescaled(client.gradient(images, labels), factor)
    found = ATTACK.reconstruct([view], client.knowledge("A"))
    assert psnr(images, found.examples) >= 100
    assert found.labels.tolist() == labels.tolist()


def test_all_rows_together_make_up_for_entries_that_were_dropped():
    """The largest tenth of the layer set to zero: whole rows are gone, and pixels of others."""
    client = Honest("mlp", spec(), dtype=torch.float64)
    images, labels = batch(tiles(), 1, 0, torch.float64)
    view = client.gradient(images, labels)
    dropped = dict(view.received)
    for name in ("1.weight", "1.bias"):
        size = dropped[name].abs()
        dropped[name] = torch.where(size < size.quantile(0.9), dropped[name], 0.0)
    pruned = ServerView(1, view.senders, view.model, view.sent, dropped, "gradient")
    every = LinearInversion(rows="all")
    for attack, seen, low, high in (
        (ATTACK, pruned, 0, 30),
        (every, pruned, 190, 200),
        (every, view, 190, 200),
    ):
        found = attack.reconstruct([seen], client.knowledge("A"))
        assert low <= psnr(images, found.examples).item() <= high


def test_a_batch_gives_the_mean_weighted_by_the_row_s_gradients():
    client = Honest("mlp", spec(), dtype=torch.float64)
    images, labels = batch(tiles(), 4, 3, torch.float64)
    view = client.gradient(images, labels)
    each = [client.gradient(images[i : i + 1], labels[i : i + 1]) for i in range(4)]
    g = torch.stack([one.received["1.bias"] for one in each])  # [B, rows]
    row = view.received["1.bias"].abs().argmax()
    mean = (g[:, row, None] * images.flatten(1)).sum(0) / g[:, row].sum()
    found = ATTACK.reconstruct([view], client.knowledge("A"))
    assert torch.allclose(found.examples.flatten(), mean.clamp(0, 1), atol=1e-9)


def test_the_score_tells_one_example_from_a_mixture():
    client = Honest("mlp", spec())
    one, many = (client.gradient(*batch(tiles(), size, 5), client=size) for size in (1, 8))
    found = ATTACK.reconstruct([one, many], client.knowledge("A"))
    assert found.scores[0] > 0.999 > found.scores[1]
    assert found.views.tolist() == [0, 1]


def test_a_normalization_before_the_layer_is_undone():
    class Normalized(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.spec = spec()
            self.fc = torch.nn.Linear(3072, 10)

        def forward(self, images):
            return self.fc(((images - 0.4) / 0.2).flatten(1))

    model = Normalized()
    images, labels = batch(tiles(), 1, 0)
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    upload = dict(
        zip(("fc.weight", "fc.bias"), torch.autograd.grad(loss, list(model.parameters())), strict=1)
    )

    class Known:
        def model(self, view):
            return model

        def progress(self, *_):
            pass

    view = ServerView(1, (0,), "anything", {}, upload, "gradient")
    assert psnr(images, ATTACK.reconstruct([view], Known()).examples) > 100


def test_each_factor_of_ten_in_the_step_costs_weights_20_db():
    client = Honest("mlp", spec())
    images, labels = batch(tiles(), 1, 1)
    reached = []
    for lr in (1e-1, 1e-2, 1e-3):
        view = client.weights(images, labels, lr)
        reached.append(psnr(images, ATTACK.reconstruct([view], client.knowledge("A")).examples))
    losses = torch.stack(reached).diff(dim=0)
    assert losses.max() < -10
    assert -25 < losses.mean() < -15


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_figures_of_the_docstring(dtype):
    client = Honest("mlp", spec(), dtype=dtype)
    figures: dict[str, list[float]] = {}
    for seed in range(50):
        images, labels = batch(tiles(), 1, seed, dtype)
        views = {
            f"lr {lr}": client.weights(images, labels, lr) for lr in (1, 0.1, 0.01, 1e-3, 1e-4)
        }
        views["gradient"] = client.gradient(images, labels)
        for name, view in views.items():
            found = ATTACK.reconstruct([view], client.knowledge("A"))
            figures.setdefault(name, []).append(psnr(images, found.examples).item())
    for name, values in figures.items():
        print(f"{dtype} {name}: least {min(values):.0f} median {sorted(values)[25]:.0f} dB")
    assert min(figures["gradient"]) > (150 if dtype == torch.float32 else 199)


@pytest.mark.parametrize("rows", ["largest", "all"])
def test_a_vanished_layer_gives_no_candidate_and_says_so(rows):
    client = Honest("mlp", spec())
    view = rescaled(client.gradient(*batch(tiles(), 1, 0)), 0.0)
    found = LinearInversion(rows=rows).reconstruct([view], client.knowledge("A"))
    assert len(found.examples) == 0
    assert any("round-1-client-0" in line for line in found.receipts)


@pytest.mark.parametrize("expression", ["lenet", "convnet", "resnet20"])
def test_a_model_that_starts_with_a_convolution_is_refused(expression):
    with pytest.raises(ValueError, match="use a model that starts with one"):
        ATTACK.check(build_model(expression, spec()), "gradient")


def test_without_a_bias_only_the_direction_is_there_and_it_is_refused():
    model = build_model("mlp", spec())
    model[1] = torch.nn.Linear(3072, 64, bias=False)
    model[3] = torch.nn.Linear(64, 10)
    images, labels = batch(tiles(), 1, 0)
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    row = model[1].weight.grad[model[1].weight.grad.norm(dim=1).argmax()]
    assert torch.nn.functional.cosine_similarity(row, images.flatten(), dim=0).abs() > 1 - 1e-6
    with pytest.raises(ValueError, match="with a bias"):
        ATTACK.check(model, "gradient")


def test_the_named_layer_must_read_the_pixels():
    model = build_model("mlp", DataSpec((1, 8, 8), 10, (0.5,), (0.5,)))
    LinearInversion(layer="1").check(model, "gradient")
    with pytest.raises(ValueError, match="'3' is no fully connected layer"):
        LinearInversion(layer="3").check(model, "gradient")


def test_it_needs_nothing_but_updates():
    assert registry.components("attack")["linear-inversion"] is LinearInversion
    client = Honest("mlp", spec())
    knowledge = client.knowledge("A")
    ATTACK.reconstruct([client.gradient(*batch(tiles(), 1, 0))], knowledge)
    assert {capability.value for capability in knowledge.used} == {"updates"}
