"""Consistency: did all clients receive the same model?

An attack that isolates a client behind secure aggregation sends others another model (Pasquini,
Francati, Ateniese, CCS 2022; Zhao et al., CVPR 2023; LOKI).  Clients therefore compare what they
received, over a channel that the server cannot alter: here a *board*, a folder in which each client
writes ``<run>/round-<r>/client-<k>``, holding

    SHA-256(round, model expression, places, and for each array its name, type, shape and bytes)

with the bytes little-endian and the arrays sorted by name.  The board lies in
``$FEDSIM_HOME/boards`` unless named, and attack code is walled off from it; clients on several
machines need a shared folder that is not the server's.

A client posts first and looks afterwards, and does not wait: waiting for everybody would let one
absent client halt a round.  *Hence the first client of a round cannot know*: there is nothing on
the board to differ from.  Two things make up for it.  ``consistency/before`` shows the last round's
disagreement to everybody, so that a server gets one round.  ``witnesses=k`` refuses until k others
have posted the same: then nobody is first, and k clients a round sit out.

A model that is malicious in the same way for all (Robbing the Fed, SEER) is consistent.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from clients.defenses.detection.judged import judged
from clients.defenses.toy import IMPRINTED
from fedsim import seeds
from fedsim.attack import Paper, Setting, ToyCase
from fedsim.defense import Batch, ClientContext, Defense, Tensors, Verdict
from fedsim.files import unwritable, write_atomically
from fedsim.registry import register


@register("defense", "consistency")
@dataclass(frozen=True, kw_only=True)
class Consistency(Defense):
    """Compare the hash of what was received with the other clients', on a board.

    Parameters
    ----------
    board : str
        A folder that all clients reach and the server does not; ``""`` is
        ``$FEDSIM_HOME/boards``, for clients on one machine.
    refuse_above : float or None
        Refuse where more than this share of the others' postings of this round, or of the round
        before, differ; 0 tolerates none.  None only reports.
    witnesses : int
        Refuse until so many others have posted the same in this round.
    """

    paper: ClassVar[Paper] = Paper(
        title="Eluding Secure Aggregation in Federated Learning via Model Inconsistency",
        authors="Pasquini, Francati, Ateniese",
        venue="CCS",
        year=2022,
        published="no figure: a mismatch is certain",
        measured="docs/detection.md (python tests/benchmarks/detection.py)",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**IMPRINTED, "defenses": "consistency"},
        # Malicious, and the same for all; the first client measured nothing.
        figure="detection.2.checks.consistency",
        low=0.0,
        high=0.0,
    )
    changes_upload: ClassVar[bool] = False

    board: str = ""
    refuse_above: Annotated[float, Field(ge=0, lt=1)] | None = None
    witnesses: Annotated[int, Field(ge=0)] = 0

    def shared(self) -> list[Path]:
        """Return where the board lies."""
        return [self.root]

    def inspect(
        self,
        model: nn.Module,  # noqa: ARG002
        received: Tensors,
        probe: Batch,  # noqa: ARG002
        ctx: ClientContext,
    ) -> Verdict:
        """Post the hash, and return the scores ``consistency`` and ``consistency/before``."""
        run = self.root / str(ctx.run_id)
        own = digest(ctx.round, ctx.model, received, ctx.places)
        try:
            post(run, ctx.round, ctx.client, own)
        except OSError as error:
            raise RuntimeError(f"board {self.root} cannot be written to: {error}") from error
        others = posted(run, ctx.round)
        del others[ctx.client]
        same = sum(one == own for one in others.values())
        scores = {
            self.name: 1 - same / len(others) if others else float("nan"),
            f"{self.name}/before": disagreement(posted(run, ctx.round - 1)),
        }
        verdict = judged(scores, dict.fromkeys(scores, self.refuse_above))
        if verdict.accept and same < self.witnesses:
            few = "too few others are known to have received the same"
            return Verdict(accept=False, checks=verdict.checks, reason=few)
        return verdict

    def check_setting(self, setting: Setting) -> None:
        """Refuse more witnesses than a round can have, and a board that cannot be written to."""
        if self.witnesses >= setting.cohort:
            raise ValueError(
                f"witnesses={self.witnesses} others are wanted, and {setting.cohort} clients train "
                f"in a round: all would refuse; let it be at most {setting.cohort - 1}"
            )
        if setting.here and (reason := unwritable(self.root)):
            raise ValueError(f"board {self.root} cannot be written to: {reason}; name another")

    @property
    def root(self) -> Path:
        """The folder in which every run has its own."""
        return Path(self.board) if self.board else seeds.home() / "boards"


def digest(
    server_round: int, model: str, received: Tensors, places: Mapping[str, tuple[int, int]]
) -> str:
    """Return the hash of a model as it was received, the same on every machine."""
    hashed = hashlib.sha256(f"{server_round}\n{model}\n{sorted(places.items())}\n".encode())
    for name, tensor in sorted(received.items()):
        array = tensor.detach().cpu().contiguous().numpy()
        if sys.byteorder == "big":
            array = array.byteswap()
        hashed.update(f"{name}\n{array.dtype.str[1:]}\n{list(array.shape)}\n".encode())
        hashed.update(array.tobytes())
    return hashed.hexdigest()


def post(run: Path, server_round: int, client: int, what: str) -> None:
    """Write a client's hash on the board, whole or not at all."""
    place = run / f"round-{server_round}"
    place.mkdir(parents=True, exist_ok=True)
    write_atomically(place / f"client-{client}", what)


def posted(run: Path, server_round: int) -> dict[int, str]:
    """Return what stands on the board for a round, by client."""
    found = (run / f"round-{server_round}").glob("client-*")
    return {
        int(number): path.read_text()
        for path in found
        if (number := path.name.removeprefix("client-")).isdecimal()
    }


def disagreement(hashes: dict[int, str]) -> float:
    """Return the share of postings that are not the most common one; NaN for fewer than two."""
    if len(hashes) < 2:
        return float("nan")
    return 1 - Counter(hashes.values()).most_common(1)[0][1] / len(hashes)
