"""Label rules against batch size and number of classes, and the page that shows them.

    FEDSIM_TEST_DATA=... python tests/benchmarks/labels.py [--trials 30]
        [--page docs/methods/labels.md]

Accuracy is by instance, ``1 - 1/2 sum_c |n_found_c - n_c| / B``: the share of a batch's labels, as
a multiset, that was named.  Every trial has new images and, untrained, a new network.  The network
is that of the card's measured points: two convolutions (32 and 64 channels, stride 2), a hidden
layer of 256, ReLU, PyTorch's initialization.  Images are CIFAR-10's; a hundred classes are its ten,
each cut in ten by the brightness of the images, so that they can be learned.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim import registry
from fedsim.data import DataSpec, Split
from fedsim.models.building import Normalize
from fedsim.threat import Knowledge, TrainingDetails
from fedsim.view import ServerView

MEAN, STD = (0.4915, 0.4823, 0.4468), (0.2470, 0.2435, 0.2616)
# Name in the table, expression, threat model.
ONE_STEP = (
    ("`analytic`, noise", "analytic", "B"),
    ("`analytic`, surrogate images", "analytic", "D"),
    ("`fedavg-counts(read='weight')`, noise", "fedavg-counts(read='weight')", "B"),
    ("`ilrg`", "ilrg", "B"),
    ("`bias-negative`", "bias-negative", "B"),
    ("`llg` (LLG)", "llg", "B"),
    ("`llg(impact='model')`, noise (LLG\\*)", "llg(impact='model')", "B"),
    ("`llg(impact='model')`, surrogate images (LLG+)", "llg(impact='model')", "D"),
    ("`gradinversion`", "gradinversion", "B"),
    ("`e2egi`", "e2egi", "B"),
    ("`hf-gradinv`, surrogate images", "hf-gradinv", "D"),
    ("`rlg`", "rlg", "B"),
    ("`idlg`", "idlg", "B"),
)
LOCAL_STEPS = (
    ("`fedavg-counts`, noise", "fedavg-counts", "C"),
    ("`fedavg-counts`, surrogate images", "fedavg-counts", "D"),
    ("`fedavg-counts`, noise, steps unknown", "fedavg-counts", "B"),
    ("`fedavg-counts(read='weight')`, noise", "fedavg-counts(read='weight')", "C"),
    ("`fedavg-counts(read='weight')`, surrogate images", "fedavg-counts(read='weight')", "D"),
    ("`analytic`, noise", "analytic", "C"),
    ("`analytic`, surrogate images", "analytic", "D"),
    ("`analytic`, noise, steps unknown", "analytic", "B"),
    ("`ilrg`", "ilrg", "C"),
    ("`bias-negative`", "bias-negative", "B"),
    ("`llg` (LLG)", "llg", "B"),
    ("`llg(impact='model')`, surrogate images (LLG+)", "llg(impact='model')", "D"),
    ("`gradinversion`", "gradinversion", "B"),
    ("`e2egi`", "e2egi", "B"),
    ("`rlg`", "rlg", "B"),
)
HELD_OUT = 2000  # surrogate images, which are nobody's


@dataclass(frozen=True)
class Case:
    """One column: how many classes, how large a batch, how far trained, how many local steps.

    ``occurring`` classes occur, drawn anew for each trial; None for all; ``distinct`` takes one
    image of each class.  ``minibatch`` 0 is one gradient of the whole batch.
    """

    classes: int
    batch: int
    trained: int = 0
    occurring: int | None = None
    distinct: bool = False
    activation: Callable[[], nn.Module] = nn.ReLU
    epochs: int = 1
    minibatch: int = 0
    lr: float = 0.004


@cache
def pictures(classes: int) -> tuple[Split, Split]:
    """Return the clients' images and the surrogate ones, with labels of 10 or 100 classes."""
    folder = os.environ.get("FEDSIM_TEST_DATA")
    if folder is None:
        raise SystemExit("FEDSIM_TEST_DATA must name a folder that holds cifar10/train_1.npz")
    with np.load(Path(folder) / "cifar10" / "train_1.npz") as stored:
        images, labels = torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"]).long()
    if classes == 100:
        labels = 10 * labels + brightness_tenth(images, labels)
    everything = Split(images, labels)
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
    return everything.subset(order[HELD_OUT:]), everything.subset(order[:HELD_OUT])


def brightness_tenth(images: Tensor, labels: Tensor) -> Tensor:
    """Return, ``[N]`` in 0 .. 9, in which tenth of its class an image is by brightness."""
    brightness = images.double().flatten(1).mean(dim=1)
    tenth = torch.empty_like(labels)
    for label in labels.unique():
        own = (labels == label).nonzero().flatten()
        tenth[own[brightness[own].argsort()]] = torch.arange(len(own)) * 10 // len(own)
    return tenth


@lru_cache(maxsize=8)
def network(
    classes: int, trained: int, activation: Callable[[], nn.Module], seed: int
) -> nn.Module:
    """Build the network and train it for some steps of SGD on 32 images each."""
    spec = DataSpec((3, 32, 32), classes, MEAN, STD)
    torch.manual_seed(seed)
    act = activation
    model = nn.Sequential(
        Normalize(spec),
        *(nn.Conv2d(3, 32, 3, stride=2, padding=1), act()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), act()),
        *(nn.Flatten(), nn.Linear(4096, 256), act(), nn.Linear(256, classes)),
    )
    model.spec = spec  # type: ignore[assignment]
    clients, _ = pictures(classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(trained):
        images, labels = clients.batch(torch.randint(len(clients), (32,)))
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def upload(model: nn.Module, case: Case, images: Tensor, labels: Tensor) -> ServerView:
    """Return what a client sends: a gradient, or weights after its local steps."""
    sent = {name: p.detach().clone() for name, p in model.named_parameters()}
    if not case.minibatch:
        loss = cross_entropy(model(images), labels)
        found = torch.autograd.grad(loss, list(model.parameters()))
        return ServerView(1, (0,), "", sent, dict(zip(sent, found, strict=True)), "gradient")
    for _ in range(case.epochs):
        for chosen in torch.randperm(len(labels)).split(case.minibatch):
            loss = cross_entropy(model(images[chosen]), labels[chosen])
            steps = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, step in zip(model.parameters(), steps, strict=True):
                    parameter.sub_(case.lr * step)
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(sent[name])
    return ServerView(1, (0,), "", sent, after, "weights")


def knowledge(threat_model: str, case: Case, seed: int) -> Knowledge:
    """Return what a server of this threat model knows."""
    surrogate = pictures(case.classes)[1]
    kind = "weights" if case.minibatch else "gradient"
    size = case.minibatch or case.batch
    return Knowledge(
        threat_model,
        data=DataSpec((3, 32, 32), case.classes, MEAN, STD),
        training=TrainingDetails(kind, case.lr, size, case.epochs, 0.0, 0.0),
        seed=seed,
        device=torch.device("cpu"),
        surrogate=lambda: surrogate,
        num_examples={"round-1-client-0": case.batch},
    )


def trials(case: Case, count: int) -> Iterator[tuple[nn.Module, ServerView, Tensor, int]]:
    """Yield model, upload and true labels ``[B]`` of each trial, and its seed."""
    clients, _ = pictures(case.classes)
    for seed in range(count):
        # Untrained, each trial has a network of its own.
        start = 0 if case.trained else seed
        model = network(case.classes, case.trained, case.activation, start)
        torch.manual_seed(1000 + seed)
        occurring = torch.randperm(case.classes)[: case.occurring or case.classes]
        eligible = torch.isin(clients.labels, occurring).nonzero().flatten()
        chosen = eligible[torch.randperm(len(eligible))]
        if case.distinct:
            first = {int(clients.labels[at]): at for at in chosen}
            chosen = torch.stack(list(first.values()))
        images, labels = clients.batch(chosen[: case.batch])
        yield model, upload(model, case, images, labels), labels, seed


def accuracy(found: Tensor, truth: Tensor, classes: int) -> float:
    """Return the share of labels named, as a multiset."""
    one, other = (torch.bincount(labels, minlength=classes) for labels in (found, truth))
    return 1 - float((one - other).abs().sum()) / (2 * len(truth))


def set_accuracy(found: Tensor, truth: Tensor, classes: int) -> float:
    """Return for which share of all classes it is rightly said whether they occur."""
    one, other = (torch.bincount(labels, minlength=classes) > 0 for labels in (found, truth))
    return float((one == other).double().mean())


@dataclass(frozen=True)
class Scores:
    """One rule in one case: means over trials by instance and by class, in as many trials."""

    instances: float
    classes: float
    trials: int


@cache
def measure(case: Case, count: int) -> dict[str, Scores]:
    """Return the scores of each rule that did not refuse, by its name in the table."""
    got: dict[str, list[tuple[float, float]]] = {}
    for model, view, labels, seed in trials(case, count):
        for name, expression, letter in LOCAL_STEPS if case.minibatch else ONE_STEP:
            rule = registry.build("labels", expression, "labels")
            try:
                found = rule.labels(view, model, case.batch, knowledge(letter, case, seed))
            except ValueError:
                continue  # beyond the rule: the page says so
            scores = (each(found, labels, case.classes) for each in (accuracy, set_accuracy))
            got.setdefault(name, []).append(tuple(scores))
    print(case, flush=True)
    return {name: Scores(*np.mean(each, axis=0), len(each)) for name, each in got.items()}


# -- the page --------------------------------------------------------------------------------------
SIZES = {10: (1, 8, 32, 64, 256), 100: (1, 8, 24, 64, 256)}
TRAINED = (0, 60, 600)
# Measured before with a separate implementation of the same rules on the same layers; 30 trials.
POINTS: tuple[tuple[str, Case, dict[str, str]], ...] = (
    (
        "100 classes, 24 images",
        Case(100, 24),
        {"analytic": "1.00", "bias-negative": "1.00", "ilrg": "1.00", "llg": "0.99"},
    ),
    (
        "100 classes of which 10 occur, 24 images",
        Case(100, 24, occurring=10),
        {"analytic": "1.00", "bias-negative": "1.00", "ilrg": "1.00", "llg": "0.96"},
    ),
    (
        "10 classes, 64 images",
        Case(10, 64),
        {
            "analytic": "1.00",
            "bias-negative": "0.52 to 0.53",
            "ilrg": "0.96 to 1.00",
            "llg": "0.45 to 0.55",
        },
    ),
    (
        "10 classes, 32 images, 60 steps of training",
        Case(10, 32, 60),
        {"analytic": "0.85", "ilrg": "0.63", "llg": "0.59"},
    ),
    ("100 classes, 8 that differ", Case(100, 8, distinct=True), {"gradinversion": "1.00"}),
    ("100 classes, 48 that differ", Case(100, 48, distinct=True), {"gradinversion": "1.00"}),
    (
        "100 classes, 48 that differ, tanh",
        Case(100, 48, distinct=True, activation=nn.Tanh),
        {"gradinversion": "1.00"},
    ),
)
NETWORK = (
    "Network: two convolutions (32 and 64 channels, stride 2), a hidden\nlayer of 256, ReLU; "
    "untrained, each trial has a new one."
)
INTRO = """# Label rules

Any attack that takes labels takes any of these, as `labels="..."`. Letters are the least threat
model beside the number of examples.

| rule | reads | letter | source, and where it ends |
| --- | --- | --- | --- |
{rules}
The tables give how many of a batch's labels a rule names, as a multiset:
`1 - 1/2 sum_c |n_found_c - n_c| / B`, the mean of {trials} trials. "-": the rule refuses. CIFAR-10
images; 100 classes are its ten, each cut in ten by brightness. Surrogate images: {held_out} that
are nobody's. {network}

One command writes this page: `{command}`.
"""
# Rule, what it reads, threat models, and source and limits.
ABOUT = (
    (
        "`analytic`",
        "bias",
        "B, D",
        "exact with the true mean prediction; for a trained model noise stands for it badly, "
        "surrogate images better",
    ),
    (
        "`fedavg-counts`",
        "bias or weights",
        "C, D",
        "Geng et al. 2021, Dimitrov et al. 2022; for one step `analytic`, then it follows the "
        "predictions along the local steps; `read='weight'` needs no bias",
    ),
    (
        "`ilrg`",
        "both",
        "B",
        "Ma et al. 2023; reads a class's features as a ratio, which says little where its bias "
        "gradient is near 0",
    ),
    (
        "`bias-negative`",
        "bias",
        "A",
        "Geiping's `breaching`; takes few of the classes to occur",
    ),
    (
        "`llg`",
        "weights",
        "A, B, D",
        "Wainakh et al. 2022; takes few of the classes to occur (not with `impact='model'`), and "
        "features that are not negative",
    ),
    ("`gradinversion`", "weights", "A", "Yin et al. 2021; names no label twice"),
    (
        "`e2egi`",
        "weights",
        "A",
        "Li et al. 2023; an untrained network, and features that are not negative",
    ),
    (
        "`hf-gradinv`",
        "weights",
        "B, D",
        "Ye et al. 2024; takes few of the classes to occur, and features that are not negative; "
        "counts by a genetic search; here with surrogate images only, not from noise (B) nor after "
        "local training",
    ),
    (
        "`rlg`",
        "weights",
        "A",
        "Dang et al. 2021; which classes occur, for fewer images than classes; how often each, by "
        "LLG's loop",
    ),
    ("`idlg`", "bias or weights", "A", "Zhao et al. 2020; one image"),
)
# Rule, what is published and where it was read, and what stands beside it here.
PUBLISHED = (
    (
        "`gradinversion`",
        "99.56 % of labels (row sums: 95.89 %): ImageNet, ResNet-50, 8 images; Yin et al. 2021, "
        "Table 1, as quoted by a later text",
        "{gi}: 8 of 100 classes that differ, another network",
    ),
    (
        "`ilrg`",
        "by class 1.0, CIFAR-100, LeNet-5, 24 images, untrained (iDLG's, GradInversion's and RLG's "
        "rule too); MNIST, three layers: iLRG 1.0 (counts 0.994), GradInversion's 1.0, RLG 0.932, "
        "iDLG's 0.514; trained, CIFAR-100, counts 0.579; the authors' logs",
        "by class iLRG {ilrg}, GradInversion's {gi24}, RLG {rlg}: 24 of 100 classes, another "
        "network",
    ),
    (
        "`rlg`",
        "exact sets of words in speech: 98 / 95.5 / 93.3 % untrained / after 4,000 / 10,000 "
        "steps; the authors' README",
        "not the same task",
    ),
    ("`llg`, `bias-negative`, `fedavg-counts`", "no figure was at hand to check", "above"),
)


def published(count: int) -> str:
    """Return the published figures, ours beside them."""
    differing = measure(Case(100, 8, distinct=True), count)
    one = measure(Case(100, 24), count)
    ours = {
        "gi": cell(differing["`gradinversion`"]),
        "gi24": cell(one["`gradinversion`"], by_class=True),
        "ilrg": cell(one["`ilrg`"], by_class=True),
        "rlg": cell(one["`rlg`"], by_class=True),
    }
    text = "\n## Published\n\n| rule | published | here |\n| --- | --- | --- |\n"
    return text + "".join(f"| {r} | {there} | {h.format(**ours)} |\n" for r, there, h in PUBLISHED)


def cell(scores: Scores | None, *, by_class: bool = False) -> str:
    """Return a figure, and in how many trials where the rule refused some."""
    if scores is None:
        return "-"
    return f"{scores.classes if by_class else scores.instances:.3f}"


def grid(cases: Sequence[tuple[str, Case]], count: int, *, by_class: bool = False) -> str:
    """Return a table: a row for each rule, a column for each case."""
    rules = LOCAL_STEPS if cases[0][1].minibatch else ONE_STEP
    text = f"\n| rule | {' | '.join(name for name, _ in cases)} |\n"
    text += "| --- |" + " --- |" * len(cases) + "\n"
    for name, _, _ in rules:
        cells = [cell(measure(case, count).get(name), by_class=by_class) for _, case in cases]
        text += f"| {name} | {' | '.join(cells)} |\n"
    return text


def points(count: int) -> str:
    """Return the points that were measured before, beside this run's figures."""
    text = "\n## Points measured before\n\nBy a separate implementation of the same rules on the "
    text += "same layers, 30 trials, noise where a rule runs the model; how that one was trained "
    text += "is not known to match.\n\n"
    text += "| setting | rule | before | here |\n| --- | --- | --- | --- |\n"
    for name, case, before in POINTS:
        for rule, figure in before.items():
            row = next(shown for shown, expression, _ in ONE_STEP if expression == rule)
            here = cell(measure(case, count).get(row))
            text += f"| {name} | `{rule}` | {figure} | {here} |\n"
    return text


def local_steps(count: int) -> str:
    """Return the tables of 50 images trained on for more and more steps."""
    text = "\n## After local training\n\nFedAvg, 50 images, SGD; each epoch in a new order.\n"
    shapes = ((1, 50, 0.004), (1, 10, 0.004), (5, 10, 0.004), (10, 10, 0.004), (10, 5, 0.004))
    for classes in SIZES:
        for trained in (0, 60):
            cases = [
                (
                    f"{epochs} x {50 // size} steps, lr {lr:g}",
                    Case(classes, 50, trained, epochs=epochs, minibatch=size, lr=lr),
                )
                for epochs, size, lr in (*shapes, (10, 10, 0.05))
            ]
            state = f"{trained} steps of training before" if trained else "untrained"
            text += f"\n### {classes} classes, {state}\n" + grid(cases, count)
    return text


def write_page(page: Path, count: int) -> None:
    """Measure everything and write the page."""
    heads = {0: "Untrained", 60: "A little trained: 60 steps", 600: "Trained: 600 steps"}
    columns = [(classes, size) for classes, sizes in SIZES.items() for size in sizes]
    text = INTRO.format(
        trials=count,
        network=NETWORK,
        rules="".join(f"| {' | '.join(row)} |\n" for row in ABOUT),
        command=f"FEDSIM_TEST_DATA=... python tests/benchmarks/labels.py --trials {count}",
        held_out=f"{HELD_OUT:,}",
    )
    for trained in TRAINED:
        cases = [(f"{c} / {b}", Case(c, b, trained)) for c, b in columns]
        right = {c: model_accuracy(c, trained) for c in SIZES} if trained else {}
        told = ", ".join(f"{share:.0%} of {c} classes" for c, share in right.items())
        text += f"\n## {heads[trained]}\n\nColumns: classes / images.\n"
        text += f"The network is right on {told}, surrogate images.\n" if told else ""
        text += grid(cases, count)
    by_class = [(f"{b}", Case(100, b)) for b in (8, 24, 64)]
    by_class += [(f"{b}, tanh", Case(100, b, activation=nn.Tanh)) for b in (8, 24)]
    by_class += [(f"{b}, 600 steps", Case(100, b, 600)) for b in (8, 24)]
    text += "\n## Which classes occur\n\nShare of 100 classes of which it is rightly said whether "
    text += "they occur, by number of images.\n"
    text += grid(by_class, count, by_class=True)
    text += local_steps(count) + points(count) + published(count)
    page.write_text(text)


def model_accuracy(classes: int, trained: int) -> float:
    """Return on which share of the surrogate images the trained network is right."""
    surrogate = pictures(classes)[1]
    images, labels = surrogate.batch(torch.arange(len(surrogate)))
    model = network(classes, trained, nn.ReLU, 0)
    with torch.no_grad():
        return float((model(images).argmax(dim=1) == labels).double().mean())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--page", type=Path, default=Path("docs/methods/labels.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    write_page(arguments.page, arguments.trials)


if __name__ == "__main__":
    main()
