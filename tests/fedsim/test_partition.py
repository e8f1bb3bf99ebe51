"""Partitions are exact, seeded, and refuse with a way out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.data import Split, partition, split_test
from fedsim.data.partition import partitioners
from fedsim.errors import ScenarioError

COVERING = [
    "iid",
    "linear",
    "dirichlet(alpha=0.5, min_partition_size=1)",
    "dirichlet(alpha=[1.0, 2.0, 3.0, 4.0], min_partition_size=1)",
    "shard(num_shards_per_partition=2)",
    "pathological(num_classes_per_partition=3, class_assignment_mode='deterministic')",
    "size(partition_sizes=[60, 80, 100, 160])",
    "square",
]


def labels_of(count: int, classes: int = 5) -> Tensor:
    return torch.arange(count) * 7919 % classes


@pytest.mark.parametrize("expression", COVERING)
def test_every_example_has_exactly_one_owner(expression: str) -> None:
    parts = partition(expression, labels_of(400), clients=4, seed=1)
    assert len(parts) == 4
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(400))
    for part in parts:
        assert part.dtype == torch.int64
        assert torch.equal(part, part.sort().values)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 120),
    clients=st.integers(1, 120),
    seed=st.integers(0, 2**62),
    expression=st.sampled_from(
        ["iid", "dirichlet(alpha=1.0, min_partition_size=1)", "shard(num_shards_per_partition=1)"]
    ),
)
def test_a_partition_is_a_disjoint_cover_or_a_refusal(
    count: int, clients: int, seed: int, expression: str
) -> None:
    if expression == "iid" and clients > count:
        with pytest.raises(ScenarioError, match="use 1 to"):
            partition(expression, labels_of(count), clients, seed)
        return
    try:
        parts = partition(expression, labels_of(count), clients, seed)
    except ScenarioError:
        assert expression != "iid"  # which can always do it
        return
    assert len(parts) == clients
    assert all(len(part) for part in parts)
    covered = torch.cat(parts)
    assert len(covered.unique()) == len(covered)
    # Flower's shards are of one size; what does not fill one for each client is left out.
    left_out = count - len(covered)
    assert left_out < clients if expression.startswith("shard") else left_out == 0


@pytest.mark.parametrize("expression", COVERING[:5])
def test_the_seed_decides(expression: str) -> None:
    labels = labels_of(400)
    first = partition(expression, labels, 4, 1)
    # Another call in between drops no state into the next: only seed and arguments count.
    other = partition(expression, labels, 4, 2)
    from fedsim.data.partition import _partition

    _partition.cache_clear()
    again = partition(expression, labels, 4, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_iid_gives_everyone_every_class_though_the_data_is_sorted() -> None:
    labels = torch.arange(500) // 100
    for part in partition("iid", labels, 5, seed=1):
        assert len(part) == 100
        assert len(labels[part].unique()) == 5


def test_pathological_gives_one_class_a_client() -> None:
    labels = labels_of(200)
    for part in partition("pathological(num_classes_per_partition=1)", labels, 10, seed=1):
        assert len(labels[part].unique()) == 1


def test_a_small_alpha_is_less_even_than_a_large_one() -> None:
    labels = labels_of(2000)

    def largest_share(alpha: float) -> float:
        parts = partition(f"dirichlet(alpha={alpha}, min_partition_size=1)", labels, 4, seed=3)
        shares = [labels[part].bincount(minlength=5).max() / len(part) for part in parts]
        return float(torch.stack(shares).mean())

    assert largest_share(0.1) > largest_share(100.0) + 0.2


def test_the_same_partition_is_not_computed_twice() -> None:
    from fedsim.data.partition import _partition

    _partition.cache_clear()
    labels = labels_of(300)
    for _ in range(50):
        partition("iid", labels, 10, seed=1)
    assert _partition.cache_info().misses == 1


@pytest.mark.parametrize(
    ("expression", "clients", "says"),
    [
        ("dirichelt(alpha=0.5)", 4, "did you mean 'dirichlet'"),
        ("dirichlet(alfa=0.5)", 4, "did you mean 'alpha'"),
        (
            "dirichlet",
            4,
            "'dirichlet': dirichlet needs alpha, a finite number or a list, each item a finite "
            "number (Concentration parameter to the Dirichlet distribution); write for instance "
            "dirichlet(alpha=0.5)",
        ),
        ("dirichlet(alfa=0.5)", 4, "there is: alpha, min_partition_size, self_balancing, shuffle"),
        (
            "inner-dirichlet",
            4,
            "write for instance inner-dirichlet(partition_sizes=[2], alpha=0.5)",
        ),
        (
            "pathological(shuffle=False)",
            4,
            "write for instance pathological(shuffle=False, num_classes_per_partition=2)",
        ),
        ("dirichlet(alpha='high')", 4, "write a finite number or a list"),
        ("dirichlet(alpha=-1.0)", 4, "greater than zero"),
        ("dirichlet(alpha=0.01)", 40, "lower min_partition_size"),
        ("iid(num_partitions=3)", 4, "federation.clients"),
        ("iid(alpha=3)", 4, "iid(alpha) = 3: iid takes no parameters; leave it out"),
        (
            "pathological",
            4,
            "'pathological': pathological needs num_classes_per_partition, a whole number (The",
        ),
        ("dirichlet(alpha=0.5, seed=3)", 4, "leave it out"),
        ("natural-id", 4, "column of ids"),
        ("vertical-even", 4, "splits columns"),
        ("pathological(num_classes_per_partition=9)", 4, "fewer clients"),
        ("size(partition_sizes=[10, 20])", 4, "makes 2 partitions"),
        ("iid", 401, "use 1 to 400"),
        ("iid", 0, "use 1 to 400"),
        ("iid | linear", 4, "exactly one"),
        ("none", 4, "exactly one"),
        ("iid(", 4, "name(key=literal"),
    ],
)
def test_a_refusal_names_the_way_out(expression: str, clients: int, says: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        partition(expression, labels_of(400), clients, seed=1)
    assert caught.value.key.startswith("data.partition")
    assert says in str(caught.value)


@pytest.mark.parametrize("name", partitioners())
def test_what_the_range_supplies_is_never_offered(name: str) -> None:
    for written in (name, f"{name}(num=1)", f"{name}(partition=1)", f"{name}(sed=1)"):
        try:
            partition(written, labels_of(400), 4, seed=1)
        except ScenarioError as refused:
            said = str(refused).removeprefix(f"data.partition: {written}")
            for ours in ("num_partitions", "partition_by", "seed"):
                assert ours not in said


def test_nobody_starts_without_an_example() -> None:
    with pytest.raises(ScenarioError, match=r"without an example|Use fewer clients"):
        partition("dirichlet(alpha=0.01, min_partition_size=0)", labels_of(100), 50, seed=1)


@given(count=st.integers(0, 50), seed=st.integers(0, 2**62))
def test_surrogate_and_holdout_are_two_halves(count: int, seed: int) -> None:
    test = Split(torch.arange(count).view(-1, 1, 1, 1), torch.zeros(count, dtype=torch.int64))
    surrogate, holdout = split_test(test, seed)
    assert len(surrogate) == count // 2
    together = torch.cat([surrogate.images, holdout.images]).flatten()
    assert torch.equal(together.sort().values, torch.arange(count))
    again, _ = split_test(test, seed)
    assert torch.equal(surrogate.images, again.images)
