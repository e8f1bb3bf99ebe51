"""A control: another attack, whose candidates are handed in for the wrong updates.

What it makes of one client's update is judged against the images of the next.  An attack whose
figures survive that owes them to its priors, its labels or its statistics, and not to the update:
leakage is the margin over this control, and over the report's own floor, which sees no update.

The control is ours; Huang et al., NeurIPS 2021, whose evaluation it belongs to here
(``scenarios/huang2021``), compare attacks with what each is told.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fedsim import registry
from fedsim.attack import Active, Attack, Paper, Reconstruction, Setting, ToyCase
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView


@register("attack", "shuffled")
@dataclass(frozen=True, kw_only=True)
class Shuffled(Attack):
    """Whatever the attack under test needs; its cost, too.

    Parameters
    ----------
    of : str
        Expression of the attack under test, a passive one.
    """

    paper = Paper(
        title="Evaluating Gradient Inversion Attacks and Defenses in Federated Learning",
        authors="Yangsibo Huang, Samyak Gupta, Zhao Song, Kai Li, Sanjeev Arora",
        venue="NeurIPS",
        year=2021,
        published="no such control there",
        measured="linear-inversion of single photo-tiles, above 90 dB as it is, stays below 25 dB "
        "shuffled (python -m pytest tests/strategies/passive/test_shuffled.py)",
    )
    needs = frozenset({Capability.UPDATES})
    toy = ToyCase(
        scenario={
            "threat-model": "B",
            "attack": 'shuffled(of="linear-inversion")',
            "data.dataset": "digits",
            "model.name": "mlp(hidden=[32])",
            "federation.clients": 4,
            "federation.local": "fedsgd(batch_size=1, lr=0.1)",
        },
        figure="leak.psnr.max",
        low=3.0,
        high=25.0,
    )

    of: str

    def __post_init__(self) -> None:
        """Refuse an attack that does not exist, or is an active one."""
        if isinstance(self.inner, Active):
            raise ValueError(f"{self.of} changes what clients get; name a passive attack")

    @property
    def inner(self) -> Attack:
        """The attack under test."""
        inner: Attack = registry.build("attack", self.of, "attack: of")
        return inner

    @property
    def required(self) -> frozenset[Capability]:
        """What the attack under test asks for."""
        return self.inner.required

    @property
    def oracles(self) -> frozenset[str]:
        """What the attack under test asks for."""
        return self.inner.oracles

    def check(self, model: nn.Module, kind: str) -> None:
        """Refuse what the attack under test refuses."""
        self.inner.check(model, kind)

    def check_setting(self, setting: Setting) -> None:
        """Refuse what the attack under test refuses, and a single update."""
        if setting.cohort < 2 or setting.channel.aggregates:
            raise ValueError(
                "the control swaps updates, and one a round arrives; have more clients"
            )
        self.inner.check_setting(setting)

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Return the candidates of each view as if they were the next one's."""
        found = self.inner.reconstruct(views, knowledge)
        receipt = "control: each candidate is handed in for the update after the one it is from"
        return dataclasses.replace(
            found, views=(found.views + 1) % len(views), receipts=(receipt, *found.receipts)
        )
