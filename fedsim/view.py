"""What the adversary holds of one reply, and nothing else; saved as plain tensors.

A folder of views is ``round-<r>-<senders>.safetensors`` (what came back) beside
``sent-<hash>.safetensors`` (what was sent, once however many clients got it).  safetensors holds
no code: a view from elsewhere is data.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from typing_extensions import TypedDict

from fedsim.errors import ScenarioError
from fedsim.files import write_atomically


@dataclass(frozen=True)
class ServerView:
    """One reply, as the adversary holds it.

    Attributes
    ----------
    round : int
        Server round, from 1.
    senders : tuple of int
        One client, or all those behind an aggregate.
    model : str
        The model expression that the server sent.
    sent : dict of str to Tensor
        Parameters and buffers the server sent.
    received : dict of str to Tensor
        What came back: gradients (``kind="gradient"``, the mean over the examples) or arrays after
        local training (``kind="weights"``).  Aggregates are weighted means.
    kind : {"gradient", "weights"}
    num_examples : int or None
        Only where the protocol reveals it.  The range blanks it in the views it hands to an attack,
        which asks :meth:`Knowledge.num_examples` instead: a grant, and recorded.
    metrics : mapping of str to float
        Whatever else rode along: leakage too.
    """

    round: int
    senders: tuple[int, ...]
    model: str
    sent: dict[str, Tensor]
    received: dict[str, Tensor]
    kind: Literal["gradient", "weights"]
    num_examples: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Say which view this is: ``round-1-client-3`` or ``round-1-aggregate-of-8``."""
        who = f"client-{self.senders[0]}"
        if len(self.senders) > 1:
            who = f"aggregate-of-{len(self.senders)}"
        return f"round-{self.round}-{who}"

    def update(self) -> dict[str, Tensor]:
        """Return what moved: the gradient itself, or ``sent - received`` (lr times a gradient)."""
        if self.kind == "gradient":
            return self.received
        return {
            name: self.sent[name].to(after.dtype) - after
            for name, after in self.received.items()
            if name in self.sent
        }


def save_view(folder: Path, view: ServerView) -> Path:
    """Save a view; what was sent is stored once under the hash of its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    sent = save(_plain(view.sent))
    digest = hashlib.sha256(sent).hexdigest()[:16]
    sent_path = folder / f"sent-{digest}.safetensors"
    if not sent_path.exists():
        write_atomically(sent_path, sent)
    facts = {
        "round": view.round,
        "senders": list(view.senders),
        "model": view.model,
        "kind": view.kind,
        "num_examples": view.num_examples,
        "metrics": dict(view.metrics),
        "sent": sent_path.name,
    }
    path = folder / f"{view.label}.safetensors"
    write_atomically(path, save(_plain(view.received), metadata={"view": json.dumps(facts)}))
    return path


def load_view(path: Path) -> ServerView:
    """Load a view; only safetensors in the same folder are read.

    Raises
    ------
    ScenarioError
        If the file is not a view, or names a file outside its folder.
    """
    facts = _facts(path)
    name = facts.pop("sent")
    try:
        if Path(name).name != name:
            raise ValueError("it points outside its own folder")
        sent = load_file(path.parent / name)
        received = load_file(path)
        return ServerView(
            **{**facts, "senders": tuple(facts["senders"])}, sent=sent, received=received
        )
    except Exception as error:
        raise ScenarioError("views", str(path), f"not a readable view: {error}") from error


class _Facts(TypedDict):
    """What a view's file says beside its tensors."""

    round: int
    senders: list[int]
    model: str
    kind: Literal["gradient", "weights"]
    num_examples: int | None
    metrics: dict[str, float]
    sent: str


def _facts(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as stored:
            told = (stored.metadata() or {})["view"]
        return dict(TypeAdapter(_Facts).validate_json(told, strict=True))
    except Exception as error:
        raise ScenarioError("views", str(path), f"not a readable view: {error}") from error


class SavedViews(Sequence[ServerView]):
    """The views of a folder, in order of round and sender, each loaded when asked for."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("round-*.safetensors"), key=_order)

    def __len__(self) -> int:
        return len(self.paths)

    def facts(self) -> list[dict[str, Any]]:
        """Return each view's ``label``, ``round``, ``senders``, ``num_examples``: no tensors.

        Raises
        ------
        ScenarioError
            If one of them is not a view.
        """
        return [{**_facts(path), "label": path.stem} for path in self.paths]

    @overload
    def __getitem__(self, index: int) -> ServerView: ...
    @overload
    def __getitem__(self, index: slice) -> list[ServerView]: ...
    def __getitem__(self, index: int | slice) -> ServerView | list[ServerView]:
        if isinstance(index, slice):
            return [load_view(path) for path in self.paths[index]]
        return load_view(self.paths[index])

    def __iter__(self) -> Iterator[ServerView]:
        return (load_view(path) for path in self.paths)


class Blanked(Sequence[ServerView]):
    """Views as an attack gets them: without the number of examples, which is a grant."""

    def __init__(self, views: Sequence[ServerView]) -> None:
        self._views = views

    def __len__(self) -> int:
        return len(self._views)

    @overload
    def __getitem__(self, index: int) -> ServerView: ...
    @overload
    def __getitem__(self, index: slice) -> list[ServerView]: ...
    def __getitem__(self, index: int | slice) -> ServerView | list[ServerView]:
        if isinstance(index, slice):
            return [self[at] for at in range(len(self))[index]]
        return replace(self._views[index], num_examples=None)


def _order(path: Path) -> tuple[int, int]:
    words = path.stem.split("-")
    return int(words[1]), int(words[-1])


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
