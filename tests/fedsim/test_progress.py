"""Progress says how fast and how long still: a moving line in a terminal, plain lines elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedsim.progress import Progress
from tests.fedsim.small import federated, plug_in, watching


@dataclass
class Watch:
    """A clock that a test sets, in seconds."""

    seconds: float = 100.0


Start = Callable[..., Progress]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    monkeypatch.setattr("fedsim.progress.time.monotonic", lambda: watch.seconds)
    return watch


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    def start(unit: str = "views", *, terminal: bool = False) -> Progress:
        monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
        return Progress("reading", unit)

    return start


@pytest.mark.parametrize(
    ("seconds", "done", "said"),
    [
        (10, 20, "20/100 views, 2.0 views/s, 40.0 s left"),
        (10, 5, "5/100 views, 2.0 s a view, 3 min 10 s left"),
        (100, 1, "1/100 views, 100.0 s a view, 2 h 45 min left"),
        (10, 0, "0/100 views, 0.0 views/s"),
        (50, 100, "100/100 views, 2.0 views/s, took 50.0 s"),
        (3725, 100, "100/100 views, 37.2 s a view, took 1 h 02 min"),
    ],
)
def test_a_line_gives_rate_and_time_left(
    seconds: float,
    done: int,
    said: str,
    start: Start,
    watch: Watch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = start()
    watch.seconds += seconds
    progress(done, 100)
    assert capsys.readouterr().out == f"reading {said}\n"


def test_another_count_has_a_rate_of_its_own(
    start: Start, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = start("iterations")
    watch.seconds += 100
    progress(20, 20, "training the prior")
    progress(0, 400)
    watch.seconds += 10
    progress(100, 400)
    assert "100/400 iterations, 10.0 iterations/s, 30.0 s left" in capsys.readouterr().out


def test_elsewhere_plain_lines_come_seldom_and_the_last_one_always(
    start: Start, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = start()
    for second in range(1, 13):
        watch.seconds = 100.0 + second
        progress(second, 12, "objective 0.5")
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "reading 5/12 views, 1.0 views/s, 7.0 s left, objective 0.5",
        "reading 10/12 views, 1.0 views/s, 2.0 s left, objective 0.5",
        "reading 12/12 views, 1.0 views/s, took 12.0 s, objective 0.5",
    ]
    assert not err


def test_in_a_terminal_one_line_moves_and_ends_with_a_new_line(
    start: Start, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = start(terminal=True)
    for done in range(1, 5):
        watch.seconds += 0.15  # every other one comes too soon
        progress(done, 4)
    out, err = capsys.readouterr()
    assert not out
    first, last = err.split("\r\x1b[K")[1:]
    assert first == "reading 2/4 views, 6.7 views/s, 0.3 s left"
    assert last == "reading 4/4 views, 6.7 views/s, took 0.6 s\n"


def test_the_end_is_told_once_and_again_only_after_a_new_beginning(
    start: Start, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = start()
    for done in (2, 2, 2, 1, 2):
        watch.seconds += 1
        progress(done, 2)
    assert capsys.readouterr().out.count("took") == 2


def test_what_was_done_before_is_no_part_of_the_rate(
    start: Start, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = start()
    progress.resumed()
    watch.seconds += 10
    progress(60, 100)
    watch.seconds += 10
    progress(80, 100)
    watch.seconds += 10
    progress(100, 100)
    assert capsys.readouterr().out.splitlines() == [
        "reading 60/100 views, 0.0 views/s",
        "reading 80/100 views, 2.0 views/s, 10.0 s left",
        "reading 100/100 views, 2.0 views/s, took 30.0 s",
    ]


def test_what_an_attack_says_stands_in_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say = watching(lambda views, knowledge: knowledge.progress(3, 3, "objective 0.25"))
    plug_in(monkeypatch, "attack", "saying", say)
    federated(tmp_path, {"attack": "saying"})
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("saying")]
    assert line.startswith("saying 3/3 steps, ")
    assert line.endswith(" s, objective 0.25")
    assert ", took " in line


@pytest.mark.parametrize(
    ("attack", "changes", "said"),
    [
        ("linear-inversion", {}, "linear-inversion 4/4 views,"),
        ("watching", {}, "watching 1/1 steps,"),
        (
            "inverting-gradients(iterations=1)",
            {"threat-model": "B"},
            "inverting-gradients 4/4 iterations,",
        ),
    ],
)
def test_an_attack_counts_in_its_own_unit(
    attack: str,
    changes: dict[str, str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    look = watching(lambda views, knowledge: knowledge.progress(1, 1, ""))
    plug_in(monkeypatch, "attack", "watching", look)
    federated(tmp_path, {"attack": attack, **changes})
    assert [line.startswith(said) for line in capsys.readouterr().out.splitlines()].count(True) == 1
