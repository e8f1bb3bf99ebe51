"""The range's end: starts an attack's process, answers its questions, and takes what it made."""

import contextlib
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from fedsim import reconstructions
from fedsim.attack import Attack, Reconstruction
from fedsim.audit.guard import hidden
from fedsim.checkpoints import named
from fedsim.errors import NotGranted, RunFailed, ScenarioError
from fedsim.isolation import server, start, wire
from fedsim.isolation.child import Task
from fedsim.stopping import first_interrupt
from fedsim.threat import Capability, Knowledge
from fedsim.view import Blanked, SavedViews, ServerView


def prepare(attack: Attack) -> None:
    """Start what attacks are forked from, so that it is ready when this one is.

    Raises
    ------
    ScenarioError
        If the attack is one that another process cannot import.
    """
    try:
        pickle.dumps(attack)
        importable = type(attack).__module__ != "__main__"
    except (pickle.PicklingError, AttributeError, TypeError):
        importable = False
    if not importable:
        remedy = f"{type(attack).__qualname__} of {type(attack).__module__} cannot be imported by "
        remedy += "the process that attacks; define it at the top level of a module"
        raise ScenarioError("attack", attack.name, remedy)
    start.SERVER.start()


def reconstruct(
    attack: Attack, views: SavedViews, knowledge: Knowledge, walls: list[Path]
) -> Reconstruction:
    """Let an attack work in a process of its own; return what it made.

    Raises
    ------
    PermissionError
        If it reached for what it must not see.
    NotGranted
        If it asked for what its threat model does not grant.
    RunFailed
        If it failed in any other way.
    """
    task = Task(
        walls=tuple(map(str, walls)),
        threads=_threads(),
        views=len(views),
        threat_model=knowledge.threat_model,
        device=knowledge.device,
        batchnorm=knowledge.batchnorm,
        **knowledge.told(),
    )
    with _child(server.way(knowledge.device.type)) as (line, ending):
        conversation = _Conversation(attack, views, knowledge, line, ending)
        wire.send(line, {"sys_path": sys.path}, pickle.dumps((task, attack)))
        with first_interrupt(conversation.finish):
            return conversation.hold()


def _threads() -> int:
    """Return how many threads PyTorch gives a new thread of this process."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@contextlib.contextmanager
def _child(how: bytes) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Start a child; yield its line, and the one that tells how it ended.  Leaving, end it."""
    line, theirs = socket.socketpair()
    ending, told = socket.socketpair()
    with line, ending:
        with theirs, told, open(os.devnull, "w") as nowhere:  # noqa: PTH123
            outputs = [file if _is_open(file) else nowhere.fileno() for file in (1, 2)]
            start.SERVER.request(how, [theirs.fileno(), told.fileno(), *outputs])
        yield line, ending


def _is_open(file: int) -> bool:
    with contextlib.suppress(OSError):
        os.fstat(file)
        return True
    return False


class _Conversation:
    """Everything that is said over one line."""

    def __init__(
        self,
        attack: Attack,
        views: SavedViews,
        knowledge: Knowledge,
        line: socket.socket,
        ending: socket.socket,
    ) -> None:
        self.attack, self.knowledge, self.line, self.ending = attack, knowledge, line, ending
        self.views = Blanked(views)
        self.attempts: list[str] = []
        self.sending = self.stop_told = False

    def hold(self) -> Reconstruction:
        """Answer until the child is done."""
        while True:
            try:
                told, content = wire.receive(self.line)
            except EOFError:
                raise RunFailed(f"{self.attack.name}'s process {self._end()}") from None
            say = told.get("say")
            if say == "ask":
                self._answer(told)
            elif say == "progress":
                self.knowledge.progress(told["done"], told["total"], told["text"])
            elif say == "keep":
                self._keep(told, content)
            elif say == "refused":
                self.attempts.append(told["deed"])
                self.knowledge.forget()  # what a cheat kept is no more to be believed
            else:
                return self._outcome(told, content)

    def finish(self) -> None:
        """Ask the child for the best so far; in the middle of an answer, after it.

        A signal's handler calls this, at any step of the thread that talks.
        """
        self.knowledge.stop()
        if not self.sending:
            self._tell_stop()

    def _tell_stop(self) -> None:
        if not self.stop_told:
            self.stop_told = True
            with contextlib.suppress(OSError):  # it is gone, as the next word tells
                wire.send(self.line, {"stop": True})

    def _keep(self, told: Mapping[str, Any], content: bytes) -> None:
        """Write down what the child wants kept; nothing of a child that reached for the truth."""
        if self.attempts:
            return
        try:
            name, tensors = named(told["name"]), load(content)
        except Exception as error:
            raise RunFailed(f"{self.attack.name} kept what cannot be read: {error}") from error
        self.knowledge.keep(name, tensors)

    def _outcome(self, told: dict[str, Any], content: bytes) -> Reconstruction:
        """Take what the child made, or say what went wrong."""
        name, say = self.attack.name, told.get("say")
        if say == "error" and told["kind"] == "refusal":
            raise PermissionError(told["message"])
        if self.attempts:
            raise hidden(self.attempts)
        if say == "error" and told["kind"] == NotGranted.__name__:
            raise NotGranted(told["message"])
        if say == "error" and told["value"]:
            raise RunFailed(f"{name} cannot work on these views: {told['message']}")
        if say == "error":
            print(told["traceback"], end="", file=sys.stderr, flush=True)
            raise RunFailed(f"{name} failed with {told['kind']}: {told['message']}")
        if say == "nothing":
            raise RunFailed(f"{name} returned {told['returned']}, not a Reconstruction")
        try:
            return reconstructions.unpack(told["facts"], content)
        except Exception as error:
            raise RunFailed(f"what {name} returned cannot be judged: {error}") from error

    def _answer(self, told: Mapping[str, Any]) -> None:
        answer: object
        try:
            answer = _ANSWERS[told["question"]](self, *told["about"])
        except NotGranted as refusal:
            answer = NotGranted(str(refusal))
        except Exception as error:
            answer = _plain(error)
        self.sending = True
        wire.send(self.line, {}, pickle.dumps(answer))
        self.sending = False
        if self.knowledge.stopping:
            self._tell_stop()

    def view(self, index: int) -> ServerView:
        """Return one view, blanked of what an attack asks its knowledge for."""
        self.knowledge.require(Capability.UPDATES)
        return self.views[index]

    def _end(self) -> str:
        """Say how the child ended."""
        try:
            status = int(wire.receive(self.ending)[0]["ended"])
        except EOFError:
            return "could not be started"
        if status >= 0:
            return f"ended with status {status}, and handed nothing back"
        told = signal.Signals(-status).name
        reason = ", as the system does when memory runs out" if told == "SIGKILL" else ""
        return f"was ended by {told}{reason}"


def _plain(error: Exception) -> Exception:
    """Return a builtin exception that says the same: it travels."""
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
    plain: Exception = kind(str(error))
    return plain


def _asked_about(server_round: int, senders: list[int]) -> ServerView:
    """Return a view that is but a label, for what is known of views by their label."""
    return ServerView(server_round, tuple(senders), "", {}, {}, "gradient")


_ANSWERS: dict[str, Callable[..., Any]] = {
    "view": _Conversation.view,
    "used": lambda held: held.knowledge.used,
    "oracles_used": lambda held: held.knowledge.oracles_used,
    "require": lambda held, name: held.knowledge.require(Capability(name)),
    "basics": lambda held: held.knowledge.basics,
    "training": lambda held: held.knowledge.training,
    "surrogate": lambda held: held.knowledge.surrogate,
    "statistics": lambda held, client: held.knowledge.statistics(client),
    "num_examples": lambda held, *view: held.knowledge.num_examples(_asked_about(*view)),
    "kept": lambda held, name: held.knowledge.kept(name),
    "oracle": lambda held, name, *view: held.knowledge.oracle(name, _asked_about(*view)),
}
