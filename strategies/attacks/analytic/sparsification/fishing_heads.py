"""The questions that Fishing asks by a head, the answers, and what lies between two of them.

Wen et al., ICML 2022; the mathematics stands in :mod:`.fishing`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fedsim.threat import Knowledge
from fedsim.view import ServerView

# One image answers alone where the weights of those who answer add up to 1, but for this.
ALONE = 0.01
# So many times 1 / beta from a threshold an image answers, or not, to one part in 20,000.
CLEAR = 10.0


@dataclass(frozen=True)
class Head:
    """A last layer: weight ``[K, D]`` and bias ``[K]`` (zeros where left out)."""

    name: str
    weight: Tensor
    bias: Tensor | None = None

    def arrays(self) -> dict[str, Tensor]:
        """Return it as it travels."""
        bias = torch.zeros_like(self.weight[:, 0]) if self.bias is None else self.bias
        return {f"{self.name}.weight": self.weight, f"{self.name}.bias": bias}

    @property
    def label(self) -> int | None:
        """The class that it asks for; None for the roll call."""
        rows = self.weight.abs().sum(dim=1)
        return int(rows.argmax()) if rows.any() else None

    @property
    def feature(self) -> int | None:
        """The feature that it asks for; None where it asks for a class."""
        asked = self.weight.nonzero()
        return int(asked[0, 1]) if len(asked) == 1 else None

    @property
    def threshold(self) -> float:
        """``theta``, below which images of the class answer to the feature."""
        label, feature = self.label, self.feature
        assert label is not None
        assert feature is not None
        assert self.bias is not None
        beta = float(self.weight[label, feature])
        theta = (math.log(len(self.bias) - 1) - float(self.bias[label])) / beta
        return theta if theta < 1e20 else math.inf


@dataclass(frozen=True)
class Answer:
    """One query and what came back, as sums over the batch.

    Attributes
    ----------
    head : Head
        What was asked.
    view : ServerView
    index : int
        The view's place among all.
    examples : int
        ``B``.
    answered : Tensor
        ``[K]`` float64: ``-B db``; at the class asked for, the weights of those who answered.
    features : Tensor
        ``[K, D]`` float64: ``-B dW``; at the class asked for, their features' sum.
    """

    head: Head
    view: ServerView
    index: int
    examples: int
    answered: Tensor
    features: Tensor

    @classmethod
    def read(cls, view: ServerView, name: str, knowledge: Knowledge, index: int = 0) -> "Answer":
        """Read the head's own gradient."""
        weight, bias = f"{name}.weight", f"{name}.bias"
        examples = knowledge.num_examples(view)
        answered, features = (-examples * view.received[part].double() for part in (bias, weight))
        head = Head(name, view.sent[weight], view.sent[bias])
        return cls(head, view, index, examples, answered, features)

    # -- of a roll call --------------------------------------------------------------------------
    @property
    def counts(self) -> Tensor:
        """How many images of each class: ``n_k = B (1/K - db_k)``, ``[K]`` int64."""
        return (self.examples / len(self.answered) + self.answered).round().long()

    def rarest(self, most: int) -> list[int]:
        """Return the classes of at most so many images, fewest first."""
        counts = self.counts.tolist()
        here = [label for label, count in enumerate(counts) if 1 <= count <= most]
        return sorted(here, key=lambda label: counts[label])

    def only_class(self) -> int | None:
        """Return the class of all images, or None where there are several."""
        label = int(self.counts.argmax())
        return label if int(self.counts[label]) == self.examples else None

    def mean_features(self, label: int) -> Tensor:
        """Return the mean features of a batch of one class: ``dW_c / db_c``, ``[D]``."""
        return self.features[label] / self.answered[label]

    def loudest_feature(self, label: int) -> int:
        """Return the feature of the largest mean: the one that is least likely dead for some."""
        return int(self.mean_features(label).argmax())


@dataclass(frozen=True)
class Mark:
    """A threshold and what lies below it: images, and their sum in the feature.

    ``answer`` is None for the two ends that need no query.
    """

    threshold: float
    count: float
    total: float
    answer: Answer | None = None


def marks(answers: Sequence[Answer], label: int, feature: int) -> list[Mark]:
    """Return what is known of a batch of one class along one feature, from minus to plus infinity.

    The roll call says how many images there are and how they add up, so that the top end is there
    before anybody asked for it.
    """
    ladder, roll = [Mark(-math.inf, 0.0, 0.0)], answers[0]
    for answer in answers:
        if answer.head.label is None:
            roll = answer
        elif (answer.head.label, answer.head.feature) == (label, feature):
            count = float(answer.answered[label])
            total = float(answer.features[label, feature])
            ladder.append(Mark(answer.head.threshold, count, total, answer))
    ladder.sort(key=lambda mark: mark.threshold)
    if ladder[-1].threshold < math.inf:
        total = roll.examples * float(roll.mean_features(label)[feature])
        ladder.append(Mark(math.inf, float(roll.examples), total))
    return ladder


def next_threshold(ladder: Sequence[Mark]) -> float | None:
    """Return the threshold that isolates an image soonest; None where nothing is left to split.

    The mean of the images of an interval always splits them, unless they are all alike.  The
    emptiest interval of several images comes first: the paper's one-shot search, and, when that
    is done, its full search.  The last image needs a query in which all answer.
    """
    crowded = [
        (high.count - low.count, (high.total - low.total) / (high.count - low.count), low, high)
        for low, high in pairwise(ladder)
        if high.count - low.count > 1.5
    ]
    for _, mean, low, high in sorted(crowded, key=lambda gap: gap[:2]):
        if low.threshold < mean < high.threshold:
            return mean
    return math.inf if ladder[-1].answer is None else None


def holds_together(low: Mark, high: Mark) -> bool:
    """Say whether an interval holds no negative number of images, and their mean."""
    count = high.count - low.count
    if count < 0.5:
        return count > -0.5
    slack = 1e-3 * abs(high.total) / max(high.count, 1.0)
    return low.threshold - slack <= (high.total - low.total) / count <= high.threshold + slack


def holds_one(low: Mark, high: Mark, beta: float) -> bool:
    """Say whether an interval holds one image, far enough from both thresholds.

    The rule ``beta gap >> 5``: two images around a threshold so near that each answers in part
    add up to one as well, and their mean lies on the threshold.
    """
    if abs(high.count - low.count - 1) > ALONE:
        return False
    feature = high.total - low.total
    return beta * min(feature - low.threshold, high.threshold - feature) > CLEAR


@dataclass(frozen=True)
class Catch:
    """An isolated gradient as a view of its own, of so many images."""

    view: ServerView
    index: int
    examples: int


def isolated(low: Answer | None, high: Answer, examples: int, bias: float) -> Catch:
    """Return the mean gradient of the images that answer to ``high`` and not to ``low``.

    The view is of a model under which these images alone would have that gradient.  The head's
    own row is their mean feature; its other rows follow, since ``p_c = 0`` and the other classes
    share the rest evenly.  The backbone's part is divided by the weight that was sent, and
    multiplied by the weight that the view's model has: the one that makes it as long as the
    head's part, so that an attack by matching hears both.  (The authors restore 1, under which
    thousands of features drown the head.)  Everything in float64.
    """
    label, head = high.head.label, high.head
    assert label is not None
    answers = [(1.0, high)] if low is None else [(1.0, high), (-1.0, low)]
    count = sum(float(sign * answer.answered[label]) for sign, answer in answers)
    mean = torch.stack([sign * answer.features[label] for sign, answer in answers]).sum(dim=0)
    shares = torch.full_like(high.answered, 1 / (len(high.answered) - 1))
    shares[label] = -1.0
    own = Head(head.name, torch.outer(shares, mean / count), shares).arrays()
    scale = count * float(head.weight[label].max())
    backbone = {}
    for name in high.view.received.keys() - own.keys():
        parts = [sign * a.examples * a.view.received[name].double() for sign, a in answers]
        backbone[name] = torch.stack(parts).sum(dim=0) / scale
    weight = _length(own) / (_length(backbone) or 1.0)
    restored = torch.full_like(head.weight[:, 0], bias)
    restored[label] = 0
    model = Head(head.name, weight * (head.weight != 0).to(head.weight), restored)
    received = {
        name: own[name] if name in own else weight * backbone[name] for name in high.view.received
    }
    sent = {**high.view.sent, **model.arrays()}
    view = replace(high.view, sent=sent, received=received, num_examples=None)
    return Catch(view, high.index, examples)


def _length(arrays: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in arrays.values()))
