"""Progress on a terminal: one bar for what is under way, one for each where several runs are."""

import io

from netsmith.say import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(*names: str) -> list[str]:
    with Console(Terminal()) as console:
        for name in names:
            console.progress(name, 1, 3)
        return [task.description for task in console.bar.tasks]


def test_what_comes_next_takes_the_bar():
    assert shown("profile", "supernet (fbnet)", "supernet (fbnet)") == ["supernet (fbnet)"]


def test_runs_side_by_side_have_a_bar_each():
    assert shown("fbnet-0: supernet", "darts-0: supernet", "fbnet-0: short trainings") == [
        "darts-0: supernet",
        "fbnet-0: short trainings",
    ]


def test_on_no_terminal_progress_is_a_line_now_and_then(monkeypatch):
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr("netsmith.say.time.monotonic", lambda: now[0])
    console = Console(stream)
    console.progress("train", 1, 9)
    now[0] = 11.0
    console.progress("train", 5, 9, "loss 0.5")
    assert stream.getvalue() == "  0:11  train: 5 of 9, loss 0.5\n"
