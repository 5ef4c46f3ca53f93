"""Time left is told from work that was done, and not before there is any. The clock is the test's own."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from service.cluster import progress
from service.cluster.progress import Active, Display, Pace, in_words


def after(*moments: tuple[float, int], total: int = 30) -> Pace:
    """The pace of a stage that was looked at at these times, with so many units done."""
    pace = Pace()
    for now, done in moments:
        pace.update(done, total, now)
    return pace


@pytest.mark.parametrize(
    "moments",
    [
        [(0, 0)],
        [(0, 0), (117, 1)],
        [(0, 0), (117, 1), (124, 2)],
        [(0, 0), (0.5, 1), (1.0, 9), (1.5, 12)],
    ],
    ids=["nothing done", "one slow step", "one step besides", "no time to speak of"],
)
def test_nothing_is_predicted_before_there_is_something_to_predict_from(moments: list[tuple[float, int]]) -> None:
    assert after(*moments).left(moments[-1][0] + 0.5) is None


def test_a_slow_first_step_says_nothing_of_the_others() -> None:
    """117 s for the first of 30, then 7 s each: 3,393 s would be left if the first one counted."""
    pace = after((0, 0), (117, 1), (124, 2), (131, 3))
    assert pace.left(131) == 27 * 7
    assert pace.left(134) == 27 * 7 - 3


def test_the_rate_is_a_recent_one() -> None:
    moments = [(0.0, 0), *((10.0 * n, n) for n in range(1, 11)), *((100.0 + n, 10 + n) for n in range(1, 71))]
    assert after(*moments, total=100).left(170) == pytest.approx(20, rel=0.05)


def test_slow_units_are_still_measured_by_two_of_them() -> None:
    pace = after(*((300.0 * n, n) for n in range(6)))
    assert pace.left(1500) == 25 * 300


def test_a_unit_that_takes_longer_than_the_others_counts_as_it_goes() -> None:
    pace = after((0, 0), (5, 1), (10, 2), (15, 3))
    expected = [pace.left(15 + waited) for waited in (0.0, 2.0, 5.0, 50.0, 500.0)]
    assert all(left is not None for left in expected)
    assert expected[:3] == [135, 133, 130]
    assert expected[3] > 27 * 15  # type: ignore[operator]
    assert expected[4] > expected[3]  # type: ignore[operator]


def test_other_work_begins_anew() -> None:
    """A stage's second phase has units of its own."""
    pace = after((0, 0), (5, 1), (10, 2), (15, 3))
    pace.update(0, 4, 20)
    assert pace.left(21) is None
    again = after((0, 0), (5, 1), (10, 2), (15, 3))
    again.update(1, 30, 20)
    assert again.left(21) is None


def test_what_goes_on_in_the_middle_counts_from_there() -> None:
    """A run that was killed at step 20 goes on: its 20 steps took no time now."""
    pace = after((0, 20), (60, 21), (67, 22), (74, 23))
    assert pace.left(74) == 7 * 7


def test_of_what_follows_the_last_unit_nothing_is_known() -> None:
    """An influence goes on after its last layer is solved: it would say for minutes that no second is left."""
    assert after((0, 0), (5, 28), (10, 29), (15, 30)).left(19) is None


def test_a_last_unit_that_is_overdue_is_not_said_to_be_done() -> None:
    pace = after((0, 0), (5, 27), (10, 28), (15, 29))
    assert pace.left(19) == 1
    assert pace.left(40) is None


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, ""), (0.4, "1 s left"), (119, "119 s left"), (240, "4 min left")]
)
def test_in_words(seconds: float | None, words: str) -> None:
    assert in_words(seconds) == words


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_and_a_terminal_say_the_same(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setattr(progress, "Board", SimpleNamespace(remote=lambda: None))
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=terminal, width=150))
    task = display._bars.add_task("starting", total=1, stage="D0 SFT", left="") if terminal else None
    stage, shown = Active(task, 0.0, 0.0, Pace()), []
    for now, done in ((0.0, 0), (117.0, 1), (124.0, 2), (134.0, 3)):
        display._show("D0 SFT", stage, f"loss {done}", done, 30, now)
        if terminal:
            shown.append(display._bars.tasks[0].fields["left"])
    if terminal:
        assert shown == ["", "", "", "4 min left"]
    else:
        assert out.getvalue().splitlines() == [
            "  D0 SFT 1/30 loss 1 (117 s)",
            "  D0 SFT 3/30 loss 3 (134 s, 4 min left)",
        ]
