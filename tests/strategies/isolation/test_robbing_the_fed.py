"""What Robbing the Fed promises, in closed form."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.trainer import FedAvg, FedSGD
from fedsim import registry
from fedsim.data import Split
from fedsim.errors import NotGranted, ScenarioError
from fedsim.models import build_model, initial_model, load_arrays, travelling
from fedsim.threat import Capability, least_model
from fedsim.view import ServerView
from strategies.attacks.analytic.isolation.bins import (
    empirical_cutoffs,
    normal_cutoffs,
    random_functional,
    scalar_of,
)
from strategies.attacks.analytic.isolation.robbing_the_fed import RobbingTheFed, imprint_rows
from tests.strategies.isolation.one_client import (
    SPEC,
    Range,
    alone_in_bin,
    best_psnr,
    dense_cutoffs,
    pixels,
    tiles,
)


def one_image_in_each_bin(cutoffs: Tensor) -> Split:
    """Choose from the pool an image of every bin, the brightest bin last."""
    bins = torch.bucketize(pixels(tiles()).flatten(1).mean(dim=1), cutoffs) - 1
    chosen = torch.stack([(bins == b).nonzero().flatten()[0] for b in range(len(cutoffs))])
    return tiles().subset(chosen)


def share_alone(values: Tensor, cutoffs: Tensor, batch: int) -> float:
    """Expected share of images alone in their bin, for independent draws from ``values``."""
    mass = torch.bucketize(values, cutoffs).bincount().double() / len(values)
    return float((mass * (1 - mass) ** (batch - 1)).sum())


def changed(view: ServerView, **received: Tensor) -> ServerView:
    return dataclasses.replace(view, received={**view.received, **received})


# -- the dense read-out --------------------------------------------------------------------------
def test_all_bins_are_read_the_brightest_too() -> None:
    range_ = Range(RobbingTheFed(units=16), FedSGD(batch_size=16))
    sent = range_.craft()
    view = range_.answer(sent, Split(torch.empty(0, 3, 32, 32), torch.empty(0).long()))
    private = one_image_in_each_bin(dense_cutoffs(view))
    view = range_.answer(sent, private)
    found = range_.attack.reconstruct([view], range_.knowledge(16))
    assert len(found.examples) == 16
    assert float(best_psnr(pixels(private), found.examples).min()) > 80
    assert found.receipts == ("read 16 occupied bins of 16 in view round-1-client-0",)


@pytest.mark.parametrize("factor", [-1.0, 1e-6, 0.37, 1e5])
def test_rescaling_the_whole_update_never_hides_the_image(factor: float) -> None:
    range_ = Range(RobbingTheFed(units=64), FedSGD(batch_size=16))
    truth, found, view = range_.run(16)
    scaled = {name: factor * tensor for name, tensor in view.received.items()}
    again = range_.attack.reconstruct([changed(view, **scaled)], range_.knowledge(16))
    before, after = (best_psnr(truth, r.examples) for r in (found, again))
    assert torch.equal(before >= 60, after >= 60)


def test_the_read_out_needs_names_and_arrays_only() -> None:
    range_ = Range(RobbingTheFed(units=64), FedSGD(batch_size=8))
    _, found, view = range_.run(8)
    stranger = RobbingTheFed(units=999, variant="sparse")
    again = stranger.reconstruct([view], range_.knowledge(8))
    assert torch.equal(again.examples, found.examples)


def test_a_sum_over_clients_is_read_like_one_batch() -> None:
    range_ = Range(RobbingTheFed(units=256), FedSGD(batch_size=8))
    sent = range_.craft()
    private = range_.batch(32, seed=3)
    views = [range_.answer(sent, private.subset(part)) for part in torch.split(torch.arange(32), 8)]
    mean = {
        name: torch.stack([view.received[name] for view in views]).mean(dim=0)
        for name in views[0].received
    }
    aggregate = dataclasses.replace(views[0], senders=(0, 1, 2, 3), received=mean)
    found = range_.attack.reconstruct([aggregate], range_.knowledge())
    truth = pixels(private)
    alone = alone_in_bin(truth, dense_cutoffs(aggregate))
    assert torch.equal(best_psnr(truth, found.examples) >= 60, alone)


def test_several_views_keep_their_candidates_apart() -> None:
    range_ = Range(RobbingTheFed(units=256), FedSGD(batch_size=4))
    sent = range_.craft()
    batches = [range_.batch(4, seed) for seed in (0, 1)]
    views = [range_.answer(sent, batch) for batch in batches]
    found = range_.attack.reconstruct(views, range_.knowledge(4))
    for index, batch in enumerate(batches):
        mine = found.examples[found.views == index]
        assert float(best_psnr(pixels(batch), mine).median()) > 60


# -- broken and empty uploads --------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["dense", "sparse", "one-shot"])
def test_an_update_of_zeros_gives_no_candidate(variant: str) -> None:
    range_ = Range(RobbingTheFed(units=16, variant=variant), FedSGD(batch_size=4))
    _, _, view = range_.run(4)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in view.received.items()}
    found = range_.attack.reconstruct([changed(view, **zeros)], range_.knowledge(4))
    assert found.examples.shape == (0, 3, 32, 32)


def test_rows_that_are_not_finite_are_dropped_and_poison_no_other() -> None:
    range_ = Range(RobbingTheFed(units=256), FedSGD(batch_size=16))
    _, found, view = range_.run(16)
    weight, bias = (view.received[f"imprint.{part}"].clone() for part in ("weight", "bias"))
    occupied = (bias[:-1] - bias[1:]).abs().argmax()
    weight[occupied, 7], bias[3] = torch.nan, torch.inf
    broken = changed(view, **{"imprint.weight": weight, "imprint.bias": bias})
    again = range_.attack.reconstruct([broken], range_.knowledge(16))
    assert again.examples.isfinite().all()
    assert again.scores is not None
    assert again.scores.isfinite().all()
    assert len(found.examples) - 3 <= len(again.examples) < len(found.examples)


def test_an_honest_model_has_no_imprint_to_read() -> None:
    range_ = Range(RobbingTheFed(units=16), FedSGD(batch_size=4))
    _, _, view = range_.run(4)
    with pytest.raises(ValueError, match="no imprint"):
        range_.attack.reconstruct([dataclasses.replace(view, model="convnet")], range_.knowledge())


# -- bins ----------------------------------------------------------------------------------------
def test_a_sparse_unit_hears_its_own_bin_and_no_other() -> None:
    cutoffs = torch.tensor([-1.0, 0.1, 0.15, 0.4, 0.9, 2.0], dtype=torch.float64)
    weight, bias = imprint_rows(torch.ones(1, dtype=torch.float64), cutoffs, sparse=True)
    inside = (cutoffs[:-1] + cutoffs[1:]) / 2
    z = inside.unsqueeze(1) * weight.T + bias
    assert torch.equal((z > 0) & (z < 1), torch.eye(5, dtype=torch.bool))
    edges = cutoffs.unsqueeze(1) * weight.T + bias
    torch.testing.assert_close(edges[:-1].diagonal(), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(edges[1:].diagonal(), torch.ones(5, dtype=torch.float64))


def test_empirical_bins_hold_equal_shares_and_leave_nobody_out() -> None:
    row = torch.full((3072,), 1 / 3072, dtype=torch.float64)
    values = scalar_of(tiles(), row)
    cutoffs = empirical_cutoffs(values, torch.linspace(0, 1, 65, dtype=torch.float64))
    counts = torch.histogram(values, cutoffs).hist
    assert int(counts.sum()) == len(values)
    assert float((counts - len(values) / 64).abs().max()) <= 1


def test_ties_and_a_tiny_surrogate_still_give_increasing_cutoffs() -> None:
    for values in (torch.zeros(50), torch.tensor([0.2]), torch.tensor([0.1, 0.1, 0.1, 0.9])):
        cutoffs = empirical_cutoffs(values, torch.linspace(0, 1, 33, dtype=torch.float64))
        assert bool((cutoffs.diff() > 0).all())


def test_few_surrogate_images_are_smoothed_and_cut_nearly_as_well_as_many() -> None:
    row = torch.full((3072,), 1 / 3072, dtype=torch.float64)
    generator, quantiles = torch.Generator().manual_seed(0), torch.linspace(0, 1, 257).double()
    values = scalar_of(tiles(), row)
    few = values[torch.randperm(len(values), generator=generator)[:300]]
    edges = {
        "few": empirical_cutoffs(few, quantiles),
        "few, not smoothed": torch.from_numpy(np.quantile(few, quantiles, method="hazen")),
        "all": empirical_cutoffs(values, quantiles),
    }
    alone = {name: share_alone(values, cutoffs, 64) for name, cutoffs in edges.items()}
    assert alone["all"] == pytest.approx((1 - 1 / 256) ** 63, abs=0.01)
    assert alone["few"] > alone["all"] - 0.06
    assert alone["few, not smoothed"] < alone["all"] - 0.1


def test_normal_bins_are_the_quantiles() -> None:
    cutoffs = normal_cutoffs(torch.tensor([0.0, 0.5, 0.975, 1.0], dtype=torch.float64))
    assert cutoffs.tolist() == pytest.approx([-10, 0, 1.959964, 10], abs=1e-5)


def test_the_random_functional_reads_the_standardized_image() -> None:
    row, offset = random_functional(SPEC, torch.Generator().manual_seed(0))
    mean, std = (
        torch.tensor(value, dtype=torch.float64).view(3, 1, 1).expand(SPEC.shape).flatten()
        for value in (SPEC.mean, SPEC.std)
    )
    assert float(mean @ row) + offset == pytest.approx(0.0, abs=1e-12)
    assert float((row * std).norm()) == pytest.approx(1.0)
    assert float((row * std).sum()) == pytest.approx(0.0, abs=1e-12)


# -- the model that is sent ----------------------------------------------------------------------
@pytest.mark.parametrize("read_out", ["addition", "linear"])
@pytest.mark.parametrize("variant", ["dense", "sparse"])
def test_the_gain_changes_no_output(variant: str, read_out: str) -> None:
    images = pixels(tiles().subset(torch.arange(8)))
    logits = []
    for gain in (1.0, 1e-3):
        attack = RobbingTheFed(units=32, variant=variant, read_out=read_out, gain=gain)
        sent = Range(attack, FedSGD(), dtype=torch.float64).craft()
        model = build_model(sent.expression, SPEC).double()
        load_arrays(model, sent.arrays)
        logits.append(model(images))
    torch.testing.assert_close(*logits)


def test_the_honest_arrays_travel_unchanged_under_the_prefix() -> None:
    range_ = Range(RobbingTheFed(units=16), FedSGD(), body="convnet(width=4)")
    honest = travelling(initial_model("convnet(width=4)", SPEC, 0))
    sent = range_.attack.craft("convnet(width=4)", honest, range_.knowledge())
    assert sent.prefix == "body."
    for name, tensor in honest.items():
        assert torch.equal(sent.arrays["body." + name], tensor)


@pytest.mark.parametrize(("read_out", "extra"), [("addition", 0), ("linear", 3072 * 33)])
def test_what_the_block_adds(read_out: str, extra: int) -> None:
    range_ = Range(RobbingTheFed(units=32, read_out=read_out), FedSGD(batch_size=2))
    block = [t for name, t in range_.craft().arrays.items() if not name.startswith("body.")]
    assert sum(tensor.numel() for tensor in block) == 32 * 3073 + extra


@pytest.mark.parametrize("body", ["mlp(hidden=[])", "convnet(width=8)"])
@pytest.mark.parametrize("batch", [8, 64])
def test_calibrated_gradients_fit_the_range_of_secure_aggregation(body: str, batch: int) -> None:
    range_ = Range(RobbingTheFed(units=128), FedSGD(batch_size=batch), body=body)
    _, _, view = range_.run(batch)
    weight, bias = view.received["imprint.weight"], view.received["imprint.bias"]
    weighted = batch / 1000  # Flower's SecAgg+: num_examples / max_weight, clipped to 8
    assert max(float(weight.abs().max()), float(bias.abs().max())) * weighted < 8
    jumps = (bias[:-1] - bias[1:]).abs()
    typical = jumps[jumps > 1e-6 * bias.abs().max()].median()
    assert float(typical) * weighted > 100 * 16 / 2**22


# -- local training ------------------------------------------------------------------------------
def push_out_law(units: int, batch: int, size: int) -> float:
    """Share of images kept when the first in a bin shuts it: alone in its step, bin still open."""
    p = 1 / units
    still_open = (1 - (1 - p) ** batch) / (1 - (1 - p) ** size)
    return units / batch * size * p * (1 - p) ** (size - 1) * still_open


@pytest.mark.parametrize(
    ("lr", "dtype"), [(0.1, torch.float32), (1e-3, torch.float32), (1e-3, torch.float64)]
)
def test_sparse_survives_local_training_in_single_precision_too(
    lr: float, dtype: torch.dtype
) -> None:
    local = FedAvg(epochs=1, batch_size=8, lr=lr)
    range_ = Range(RobbingTheFed(variant="sparse"), local, body="convnet(width=4)", dtype=dtype)
    sent, psnr = range_.craft(), []
    for seed in range(20):
        private = range_.batch(64, seed)
        view = range_.answer(sent, private, seed)
        found = range_.attack.reconstruct([view], range_.knowledge(64))
        psnr.append(best_psnr(pixels(private), found.examples))
    shares = {limit: float((torch.cat(psnr) >= limit).double().mean()) for limit in (30, 60)}
    assert push_out_law(256, 64, 8) == pytest.approx(0.874, abs=1e-3)
    assert shares[30] == pytest.approx(push_out_law(256, 64, 8), abs=0.03)
    # An image whose loss hardly moves does not push its unit all the way: a later one stains it.
    assert shares[60] > (1 - 1 / 256) ** 63


def test_a_second_epoch_adds_nothing_and_takes_little() -> None:
    local = FedAvg(epochs=3, batch_size=8, lr=0.01)
    range_ = Range(RobbingTheFed(variant="sparse"), local)
    truth, found, _ = range_.run(64)
    assert float((best_psnr(truth, found.examples) >= 60).double().mean()) > 0.75


# -- one shot ------------------------------------------------------------------------------------
def test_one_shot_catches_one_image_as_often_as_the_law_says() -> None:
    units = batch = 32
    range_ = Range(RobbingTheFed(units=units, variant="one-shot"), FedSGD(batch_size=batch))
    sent, caught, rounds = range_.craft(), 0, 120
    for seed in range(rounds):
        private = range_.batch(batch, seed)
        found = range_.attack.reconstruct([range_.answer(sent, private)], range_.knowledge(batch))
        assert len(found.examples) <= 1
        caught += int((best_psnr(pixels(private), found.examples) >= 60).sum())
    law = batch / units * (1 - 1 / units) ** (batch - 1)
    assert caught / rounds == pytest.approx(law, abs=3 * math.sqrt(law * (1 - law) / rounds))


def test_one_shot_catches_where_it_aims() -> None:
    row = torch.full((3072,), 1 / 3072, dtype=torch.float64)
    values = scalar_of(tiles(), row)
    for target in (0.1, 0.9):
        attack = RobbingTheFed(units=64, variant="one-shot", target=target)
        range_ = Range(attack, FedSGD(batch_size=3))
        low, middle, high = (values.quantile(target + d) for d in (-0.05, 0.0, 0.05))
        between = ((values - middle).abs().argmin(), (values - high).abs().argmin())
        private = tiles().subset(torch.stack([*between, (values - low).abs().argmin()]))
        view = range_.answer(range_.craft(), private)
        found = range_.attack.reconstruct([view], range_.knowledge(3))
        assert float(best_psnr(pixels(private)[:1], found.examples)[0]) > 60


# -- threat models and refusals ------------------------------------------------------------------
def test_without_surrogate_data_it_is_an_attack_of_threat_model_f() -> None:
    attack = RobbingTheFed(units=1000, functional="random", bins="normal")
    assert least_model(attack.needs) == "F"
    assert least_model(RobbingTheFed().needs) == "G"
    range_ = Range(attack, FedSGD(batch_size=16), threat_model="F")
    truth, found, _ = range_.run(16)
    assert float((best_psnr(truth, found.examples) >= 60).double().mean()) > 0.7
    with pytest.raises(NotGranted, match="surrogate"):
        Range(RobbingTheFed(units=16), FedSGD(), threat_model="F").craft()


def test_only_what_is_needed_is_used() -> None:
    range_ = Range(RobbingTheFed(units=16), FedSGD(batch_size=2))
    knowledge = range_.knowledge(2)
    arrays = travelling(initial_model(range_.body, SPEC, 0))
    sent = range_.attack.craft(range_.body, arrays, knowledge)
    range_.attack.reconstruct([range_.answer(sent, range_.batch(2, 0))], knowledge)
    assert knowledge.used <= range_.attack.needs
    assert Capability.SELECTION not in range_.attack.needs


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("robbing-the-fed(bins='normal')", "surrogate"),
        ("robbing-the-fed(target=0.3)", "one-shot"),
        ("robbing-the-fed(units=4, variant='one-shot', target=0.01)", "virtual bins"),
        ("robbing-the-fed(units=1)", "at least 2"),
        ("robbing-the-fed(gain=0.0)", "above 0"),
        ("robbing-the-fed(functional='mean')", "brightness"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_would_be_right(
    expression: str, message: str
) -> None:
    with pytest.raises(ScenarioError, match=message):
        registry.build("attack", expression, "attack")


def test_one_shot_refuses_uploaded_weights() -> None:
    model = build_model("mlp", SPEC)
    attack = RobbingTheFed(variant="one-shot")
    attack.check(model, "gradient")
    with pytest.raises(ValueError, match="sparse"):
        attack.check(model, "weights")
