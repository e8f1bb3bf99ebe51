"""HF-GradInv: a window that opens towards early layers, dropped entries, steps of two sizes."""

import pytest
import torch

from fedsim.errors import ScenarioError
from fedsim.registry import build
from strategies.attacks.labels import hf_gradinv as label_rule
from strategies.attacks.optimization.basic.hf_gradinv import HFGradInv, LateFirst, TwoSizes
from strategies.attacks.optimization.objectives import Cosine
from strategies.attacks.optimization.optimizers import Adam
from tests.strategies.passive.honest import (
    Honest,
    batch,
    cifar10,
    floor_psnr,
    psnr,
    spec,
    tiles,
)
from tests.strategies.passive.test_label_rules import mean_agreement


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_without_window_and_drops_it_is_the_cosine():
    observed, at = rand(2, 50), rand(2, 50, seed=1)
    whole = LateFirst(observed, lambda _: 0, 0.0, torch.Generator())
    distance, derivative = whole(at.clone(), 0.3)
    wanted = Cosine(observed)(at.clone())
    assert torch.equal(distance, wanted[0])
    assert torch.equal(derivative, wanted[1])


def test_what_is_left_out_does_not_count_and_has_no_slope():
    observed, at = rand(2, 50), rand(2, 50, seed=1)
    late = LateFirst(observed, lambda _: 30, 0.3, torch.Generator().manual_seed(3))
    distance, derivative = late(at.clone())
    assert (derivative[:, :30] == 0).all()
    left = (derivative[:, 30:] != 0).all(dim=0)
    assert 0.4 < left.double().mean() < 1
    kept = torch.arange(30, 50)[left]
    assert torch.allclose(distance, Cosine(observed[:, kept])(at[:, kept].clone())[0])
    step, along = 1e-6, rand(2, 50, seed=2)

    def again(where):
        return LateFirst(observed, lambda _: 30, 0.3, torch.Generator().manual_seed(3))(where)[0]

    slope = (again(at + step * along) - again(at - step * along)) / (2 * step)
    assert torch.allclose((derivative * along).sum(dim=1), slope, atol=1e-7)


def test_entries_are_drawn_where_the_gradients_are_and_some_targets_draw_as_all_do(monkeypatch):
    observed, at = rand(2, 50), rand(2, 50, seed=1)
    whole = LateFirst(observed, lambda _: 0, 0.3, torch.Generator().manual_seed(3))
    whole(at.clone())
    some, draw, asked = whole.take(torch.tensor([0])), torch.rand, []
    monkeypatch.setattr(torch, "rand", lambda *n, **how: asked.append(how) or draw(*n, **how))
    derivative = whole(at.clone())[1]
    assert torch.equal(some(at[:1].clone())[1] != 0, derivative[:1] != 0)
    for how in asked:
        assert how["device"] == how["generator"].device == observed.device


def test_the_window_opens_until_a_quarter_is_left_out():
    begins = HFGradInv().kept([10] * 100)
    assert [begins(p) for p in (0.0, 0.5 * 7 / 30, 7 / 30, 0.5, 1.0)] == [750, 500, 250, 250, 250]
    assert HFGradInv(first=0.0, last=0.0).kept([10] * 8)(0.0) == 0
    with pytest.raises(ScenarioError, match="leaves out more"):
        build("attack", "hf-gradinv(first=0.2, last=0.5)", "attack")


def test_a_step_tells_sizes_in_halves_of_the_median():
    gradient = torch.tensor([[0.1, -1.0, 4.0, 0.0, 1.0]])
    ours, theirs = torch.zeros(1, 5), torch.zeros(1, 5)
    TwoSizes(0.1, signed=False).step(ours, gradient.clone(), 0.5)
    along = torch.tensor([[0.2, -1.0, 1.0, 0.0, 1.0]])
    Adam(0.1, signed=False).step(theirs, along, 0.5)
    assert torch.allclose(ours, theirs)


# -- the label rule --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("classes", "size", "occurring", "low", "high"),
    [(100, 24, 2, 0.9, 1), (100, 24, 10, 0.9, 1), (10, 64, None, 0.5, 0.7)],
)
def test_repeated_labels_of_untrained_networks_are_counted(classes, size, occurring, low, high):
    """Where every class occurs, hardly half of them have a negative row."""
    found = mean_agreement("hf-gradinv", classes, size, 4, occurring=occurring)
    print(f"\n{classes} classes ({occurring or 'all'} occur), {size} images: {found:.3f}")
    assert low <= found <= high


@pytest.mark.parametrize("counts", [[1, 1, 1], [5], [17, 1, 3, 3], [1, 30, 2, 2, 1, 1, 1, 9]])
def test_rows_that_are_counts_times_the_reference_are_counted_exactly(counts):
    true = torch.tensor(counts)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        found = label_rule.HFGradInv().bred(0.3 * true.double(), int(true.sum()), generator)
        assert torch.equal(found, true)


def test_what_is_bred_for_is_the_cosine_of_rows_and_counts_times_reference():
    rows, reference = rand(3, 20).abs(), rand(20, seed=1).abs()
    counts = torch.tensor([[1.0, 2.0, 5.0], [4.0, 1.0, 3.0]], dtype=torch.float64)
    found = label_rule.fitness(counts, rows @ reference)
    wanted = torch.nn.functional.cosine_similarity(
        rows.flatten()[None], (counts[:, :, None] * reference).flatten(1)
    )
    assert torch.allclose(found, wanted * rows.norm() * reference.norm())


def test_children_have_one_example_of_each_class_and_the_batchs_size():
    generator = torch.Generator().manual_seed(0)
    for total in (4, 5, 40):
        children = label_rule.mended(1 + total * rand(30, 4).abs(), total)
        for individuals in (children, label_rule.mutated(children, generator)):
            assert (individuals.sum(dim=1) == total).all()
            assert individuals.min() >= 1
            assert torch.equal(individuals, individuals.round())
    assert torch.equal(label_rule.mended(children, total), children)


def test_ranks_that_vary_least_are_asked_and_dead_ones_not():
    features = rand(50, 30).abs() * torch.linspace(1, 2, 50)[:, None].double()
    features[:, 3] = 0
    ranks, reference = label_rule.sorted_features(features)
    ascending = features.sort(dim=1).values
    assert len(ranks) == label_rule.RANKS
    assert 0 not in ranks
    variation = ascending.std(dim=0) / ascending.mean(dim=0)
    left = variation[[rank for rank in range(1, 30) if rank not in ranks]]
    assert variation[ranks].max() <= left.min()
    assert torch.equal(reference, ascending.mean(dim=0)[ranks])


@pytest.mark.slow
@pytest.mark.parametrize(("size", "count"), [(1, 8), (4, 2)])
@pytest.mark.timeout(3600)
def test_it_does_not_beat_inverting_gradients_on_cifar_and_drops_cost_batches(size, count):
    """Prints the page's figures; BatchNorm left out."""
    client = Honest("convnet(stride=2)", spec())
    pairs = [batch(cifar10(), size, seed) for seed in range(count)]
    views = [client.gradient(*pair, client=place) for place, pair in enumerate(pairs)]
    truth = torch.cat([images for images, _ in pairs])
    figures = {}
    for expression in (
        "hf-gradinv(iterations=600, batchnorm=0.0)",
        "hf-gradinv(iterations=600, batchnorm=0.0, drop=0.0)",
        "hf-gradinv(iterations=600, batchnorm=0.0, first=0.0, last=0.0)",
        "inverting-gradients(iterations=600, tv=5e-3)",
    ):
        labels = {view.label: pair[1] for view, pair in zip(views, pairs, strict=True)}
        counts = {view.label: size for view in views}
        knowledge = client.knowledge("E", counts, surrogate=tiles(), labels=labels)
        found = build("attack", expression, "attack").reconstruct(views, knowledge)
        figures[expression] = matched(truth, found.examples, size)
        print(f"batches of {size}: {expression}: {figures[expression]:.1f} dB")
    floor = floor_psnr(truth, cifar10()).mean().item()
    print(f"floor {floor:.1f} dB")
    whole, undropped, windowless, plain = figures.values()
    if size == 1:
        assert min(figures.values()) > floor + 18
        assert max(figures.values()) - min(figures.values()) < 1.5
    else:
        assert floor + 6 < whole < plain - 2
        assert undropped > whole + 2
        assert abs(undropped - plain) < 1
        assert windowless > whole + 0.5


def matched(truth, found, size):
    from tests.strategies.passive.honest import matched_psnr

    parts = zip(truth.split(size), found.split(size), strict=True)
    each = [matched_psnr(*part) if size > 1 else psnr(*part) for part in parts]
    return float(torch.cat(each).mean())
