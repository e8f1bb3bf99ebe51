"""Each client's images stand in its own block of the sum: LOKI and the sparse linear layer.

The whole federation around them: the server crafts and tailors, clients train, the channel sums,
the attack reads.  Photograph tiles, no two equally bright; cut-offs from the tiles' own quantiles.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedsim import adversary, registry
from fedsim.attack import Manipulation, ModelToSend
from fedsim.data import DataSet, DataSpec, Split, partition
from fedsim.errors import ScenarioError
from fedsim.models import build_model, load_arrays
from fedsim.threat import Knowledge, TrainingDetails
from strategies.attacks.analytic.isolation.blocks import BlockImprint
from strategies.attacks.analytic.isolation.loki import Loki, expected_share
from strategies.attacks.analytic.isolation.sparse_linear_layer import (
    SparseLinearLayer,
    added_bytes,
)
from tests.fedsim.small import Ran, federated, plug_in
from tests.strategies.isolation.one_client import PHOTOGRAPHS, best_psnr, tiles

LOKI = "loki(units=48, bins='empirical')"
SPARSE = "sparse-linear-layer(units=48, bins='empirical')"
LOCAL = {LOKI: "fedavg(epochs=1, batch_size=3, lr=0.001)", SPARSE: "fedsgd(batch_size=12, lr=0.1)"}
CHANNELS = ["plain", "trusted-sum", "secagg"]
READ_OUT = 30.0
SEED = 7


@pytest.fixture(autouse=True)
def _pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each client holds 12 tiles that nobody else has, client 0 always the same ones; the attacker
    knows how bright tiles are.
    """

    def some(clients: int) -> DataSet:
        order = torch.randperm(len(tiles()), generator=torch.Generator().manual_seed(5))
        rows = torch.empty(12 * clients, dtype=torch.int64)
        parts = partition(twelve_each(clients), torch.zeros(len(rows)), clients, SEED)
        rows[torch.cat(parts)] = order[: 12 * clients]
        names = tuple(load.__name__ for load in PHOTOGRAPHS)
        return DataSet(tiles().subset(rows), tiles(), names)

    some.__annotations__["clients"] = int
    plug_in(monkeypatch, "dataset", "some-tiles", some)
    monkeypatch.setattr(adversary, "split_test", lambda *_: (tiles(), tiles()))


def twelve_each(clients: int) -> str:
    return f"size(partition_sizes={[12] * clients})"


def ran(folder: Path, attack: str, channel: str, clients: int = 3) -> Ran:
    return federated(
        folder,
        {
            "threat-model": "G",
            "attack": attack,
            "channel": channel,
            "data.dataset": f"some-tiles(clients={clients})",
            "data.partition": twelve_each(clients),
            "seed": SEED,
            "federation.clients": clients,
            "federation.local": LOCAL[attack],
        },
    )


def own_images(run: Ran, client: int) -> Tensor:
    record = run.vault.record(client, 1)
    assert record is not None
    return record.examples.double()


def read_by_block(run: Ran) -> dict[int, Tensor]:
    """Return what was read out of each client's block, ``[k, C, H, W]``."""
    attack, found = run.parts.attack, {}
    assert isinstance(attack, Loki | SparseLinearLayer)
    for view in run.views:
        images, _, clients, _ = attack.read(view, run.parts.spec)
        for client in view.senders:
            found[client] = images[clients == client].view(-1, *run.parts.spec.shape)
    return found


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("attack", [LOKI, SPARSE])
def test_the_block_says_whose_image_it_is(attack: str, channel: str, tmp_path: Path) -> None:
    run = ran(tmp_path, attack, channel)
    assert run.failures == []
    assert len(run.views) == (3 if channel == "plain" else 1)
    found = read_by_block(run)
    for client in range(3):
        own = best_psnr(own_images(run, client), found[client]) >= READ_OUT
        assert own.sum() >= 6  # of 12; the middle of so wide a bin is off by some percent
        others = torch.cat([found[other] for other in range(3) if other != client])
        assert (best_psnr(own_images(run, client), others) >= READ_OUT).sum() == 0


@pytest.mark.parametrize("attack", [LOKI, SPARSE])
def test_secure_aggregation_takes_nothing_away(attack: str, tmp_path: Path) -> None:
    read = {}
    for channel in CHANNELS:
        run = ran(tmp_path / channel, attack, channel)
        found = read_by_block(run)
        read[channel] = torch.cat(
            [best_psnr(own_images(run, client), found[client]) >= READ_OUT for client in range(3)]
        )
    assert torch.equal(read["plain"], read["trusted-sum"])
    assert int((read["secagg"] ^ read["plain"]).sum()) <= 1


@pytest.mark.parametrize("attack", [LOKI, SPARSE])
def test_leakage_does_not_depend_on_the_number_of_clients(attack: str, tmp_path: Path) -> None:
    """Clients 0 and 1 hold the same images alone as among 6, and lose the same ones."""
    held, lost = [], []
    for clients in (2, 6):
        run = ran(tmp_path / str(clients), attack, "trusted-sum", clients)
        found = read_by_block(run)
        own = [own_images(run, client) for client in range(2)]
        read = [best_psnr(images, found[at]) >= READ_OUT for at, images in enumerate(own)]
        # A batch is drawn in an order of the run's own.
        order = [images.flatten(1).sum(dim=1).argsort() for images in own]
        held.append(torch.cat([images[at] for images, at in zip(own, order, strict=True)]))
        lost.append(torch.cat([~seen[at] for seen, at in zip(read, order, strict=True)]))
    assert torch.equal(*held)
    assert int((lost[0] ^ lost[1]).sum()) <= 1
    assert float(lost[0].double().mean()) == pytest.approx(1 - (1 - 1 / 48) ** 11, abs=0.17)


# -- the models that clients get -------------------------------------------------------------------
def knowledge(spec: DataSpec, clients: int, kind: str = "gradient") -> Knowledge:
    gray = torch.rand(200, *spec.shape, generator=torch.Generator().manual_seed(0)) * 0.4
    gray += torch.linspace(0, 0.6, 200).view(-1, 1, 1, 1)
    surrogate = Split(gray.float(), torch.arange(200) % spec.num_classes)
    return Knowledge(
        "G",
        data=spec,
        training=TrainingDetails(kind, 0.1, 8, 1, 0.0, 0.0),
        seed=1,
        device=torch.device("cpu"),
        surrogate=lambda: surrogate,
        clients=clients,
    )


def sent_to(
    attack: Manipulation, client: int, clients: int, spec: DataSpec, body: str = "mlp(hidden=[])"
) -> ModelToSend:
    arrays = {n: t.detach() for n, t in build_model(body, spec).state_dict().items()}
    return attack.tailor(attack.craft(body, arrays, knowledge(spec, clients)), client, 1)


CIFAR = DataSpec((3, 32, 32), 10, (0.5,) * 3, (0.25,) * 3)
SMALL = DataSpec((3, 8, 8), 10, (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(
    ("shape", "clients", "sparse", "dense", "robbing"),
    [
        ((3, 32, 32), 1000, 18.33, 3003.3, 6001.0),
        ((3, 32, 32), 100, 18.0, 303.0, 600.1),
        ((1, 28, 28), 100, 4.6, 77.3, 153.2),
        ((3, 64, 64), 100, 72.1, 1212.1, 2400.1),
        ((3, 256, 256), 100, 1152.8, 19392.8, 38400.9),
    ],
)
def test_the_sizes_of_the_papers_second_table(
    shape: tuple[int, int, int], clients: int, sparse: float, dense: float, robbing: float
) -> None:
    for layout, published in (("sparse", sparse), ("dense", dense), ("robbing-the-fed", robbing)):
        grown = added_bytes(shape, clients, 256, layout) / 2**20  # type: ignore[arg-type]
        assert grown == pytest.approx(published, abs=0.1)


@pytest.mark.parametrize(
    ("shape", "clients", "published"),
    [((3, 32, 32), 1000, 18.33), ((3, 32, 32), 100, 18.0), ((1, 28, 28), 100, 4.6)],
)
def test_what_is_sent_is_as_small_as_the_paper_says(
    shape: tuple[int, int, int], clients: int, published: float
) -> None:
    spec = DataSpec(shape, 10, (0.5,) * shape[0], (0.25,) * shape[0])
    sent = sent_to(SparseLinearLayer(units=256, scale=1.0), clients - 1, clients, spec)
    own = [tensor for name, tensor in sent.arrays.items() if not name.startswith("body.")]
    stored = sum(len(tensor.numpy().tobytes()) for tensor in own)
    assert stored == added_bytes(shape, clients, 256, "sparse")
    assert stored / 2**20 == pytest.approx(published, abs=0.1)


def test_bytes_on_the_wire_are_those_of_the_block(tmp_path: Path) -> None:
    run = ran(tmp_path, SPARSE, "plain")
    body = sum(t.nbytes for n, t in run.views[0].sent.items() if n.startswith("body."))
    down = run.federation["bytes_down"] / 3 - body
    up = run.federation["bytes_up"] / 3 - body
    assert down == pytest.approx(added_bytes((3, 32, 32), 3, 48, "sparse"), rel=0.01)
    assert up == pytest.approx(down - 16 * 48 * 3072, rel=0.01)  # the indices are known


def dense_twin(sent: ModelToSend, client: int, clients: int) -> BlockImprint:
    """Return the same network with every zero written out, as plain PyTorch layers."""
    pixels, units = SMALL.shape[0] * 64, len(sent.arrays["imprint.bias"])
    wide = torch.nn.Linear(clients * pixels, units)
    model = BlockImprint(
        build_model("mlp(hidden=[])", SMALL), SMALL,
        clients=clients, units=units, imprint=wide, activation=torch.nn.ReLU(),
    )  # fmt: skip
    weight = torch.zeros(units, clients * pixels)
    weight[:, client * pixels : (client + 1) * pixels] = sent.arrays["imprint.values"]
    dropped = ("imprint.values", "imprint.indices")
    arrays = {name: value for name, value in sent.arrays.items() if name not in dropped}
    load_arrays(model, {**arrays, "imprint.weight": weight})
    return model


def test_what_is_not_stored_would_not_have_mattered() -> None:
    client, clients = 2, 4
    sent = sent_to(SparseLinearLayer(units=8), client, clients, SMALL)
    sparse = build_model(sent.expression, SMALL)
    load_arrays(sparse, sent.arrays)
    dense = dense_twin(sent, client, clients)
    images, labels = torch.rand(5, *SMALL.shape), torch.arange(5)
    gradients = []
    for model in (sparse, dense):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    block = gradients[1].pop("imprint.weight").unflatten(1, (clients, -1))
    assert torch.allclose(gradients[0].pop("imprint.values"), block[:, client], rtol=1e-4)
    assert not block[:, [0, 1, 3]].any()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-7), name


def test_closed_blocks_of_loki_stay_closed_while_clients_train() -> None:
    sent = sent_to(Loki(units=8, scale=50.0), 1, 3, SMALL)
    model = build_model(sent.expression, SMALL)
    load_arrays(model, sent.arrays)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        images = torch.rand(6, *SMALL.shape)
        torch.nn.functional.cross_entropy(model(images), torch.arange(6)).backward()
        optimizer.step()
    trained = dict(model.named_parameters())
    still = (trained["conv.weight"].unflatten(0, (3, 3))[[0, 2]]).abs().max()
    assert float(still.detach()) == 0
    kept = trained["imprint.weight"].detach() == sent.arrays["imprint.weight"]
    per_block = kept.unflatten(1, (3, -1)).all(dim=2).all(dim=0)
    assert per_block.tolist() == [True, False, True]


def test_a_client_gets_one_open_block_and_the_rest_is_everybodys() -> None:
    attack = Loki(units=8, scale=50.0)
    sent = [sent_to(attack, client, 3, SMALL) for client in range(3)]
    for client, model in enumerate(sent):
        kernels = model.arrays["conv.weight"].unflatten(0, (3, 3))
        assert [bool(block.any()) for block in kernels] == [k == client for k in range(3)]
    assert torch.equal(sent[0].arrays["imprint.weight"], sent[2].arrays["imprint.weight"])


# -- closed forms and refusals ---------------------------------------------------------------------
@pytest.mark.parametrize(
    ("steps", "share"), [(1, 0.777), (2, 0.828), (4, 0.855), (8, 0.868), (16, 0.875), (64, 0.880)]
)
def test_the_push_out_law(steps: int, share: float) -> None:
    """The card's figures have ``n + 2`` quantiles, of which two have no unit."""
    assert expected_share(258, 64, steps, push_out=True) * 256 / 258 == pytest.approx(
        share, abs=0.002
    )


@pytest.mark.parametrize("steps", [2, 8])
def test_the_push_out_law_is_what_a_draw_of_bins_gives(steps: int) -> None:
    units, images = 64, 16
    generator = torch.Generator().manual_seed(3)
    bins = torch.randint(units, (20_000, steps, images // steps), generator=generator)
    read = 0
    for step in range(steps):
        now = torch.nn.functional.one_hot(bins[:, step], units).sum(dim=1)
        before = torch.nn.functional.one_hot(bins[:, :step].flatten(1), units).sum(dim=1)
        read += int(((now == 1) & (before == 0)).sum())
    share = read / (20_000 * images)
    assert share == pytest.approx(expected_share(units, images, steps, push_out=True), abs=0.005)


def test_one_step_is_the_same_with_and_without_push_out() -> None:
    alone = expected_share(256, 64, 1, push_out=False)
    assert expected_share(256, 64, 1, push_out=True) == pytest.approx(alone)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attack": SPARSE, "federation.local": LOCAL[LOKI]}, "loki"),
        ({"attack": LOKI, "threat-model": "F"}, "surrogate"),
        ({"attack": "loki(units=2)"}, "3"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, str], words: str, tmp_path: Path) -> None:
    settings = {"threat-model": "G", "data.dataset": "some-tiles(clients=4)", **changes}
    with pytest.raises(ScenarioError, match=words):
        federated(tmp_path, settings)


def test_the_attacks_are_found_by_name() -> None:
    assert {"loki", "sparse-linear-layer"} <= registry.components("attack").keys()
