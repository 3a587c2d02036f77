"""A run that is killed, torn, shared or out of disk."""

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from netsmith.errors import UserError
from netsmith.run import Run, atomically, dump_yaml, load_yaml, read_events

PROBLEM = {"space": "toy", "seed": 3, "budgets": ["latency<=5ms"], "rate": 1e-5, "text": "1e-3", "no": "no"}

# Nested stages, events at all levels, and a training stage that rewinds to its checkpoint.
CHILD = """
import json, sys, time
from netsmith.run import Run, atomically

def train(run):
    file = run.checkpoint("train.json")
    state = json.loads(file.read_text()) if file.exists() else {"epoch": 0, "mark": run.mark()}
    run.rewind(state["mark"])
    for epoch in range(state["epoch"], 12):
        time.sleep(0.02)
        run.event("epoch", epoch=epoch, loss=1 / (epoch + 1))
        if epoch % 3 == 2:
            with atomically(file) as temporary:
                temporary.write_text(json.dumps({"epoch": epoch + 1, "mark": run.mark()}))
    return {"epochs": 12}

def trial(run, i):
    for step in range(3):
        run.event("step", trial=i, step=step)
        time.sleep(0.01)
    return run.seed(f"trial{i}")

def search(run):
    run.event("search begins")
    total = 0
    for i in range(8):
        total += run.once(f"trial{i}", lambda i=i: trial(run, i))
        run.event("trial", i=i, total=total)
    return total

with Run.create(sys.argv[1], {"seed": 7}) as run:
    run.event("start")
    total = run.once("search", lambda: search(run))
    run.event("searched", total=total)
    run.once("train", lambda: train(run))
    run.write_json("result.json", {"total": total})
    run.event("end")
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_killed_at_any_moment_it_ends_like_the_undisturbed_run(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    subprocess.run([sys.executable, str(script), str(calm)], check=True)
    begin = time.monotonic()
    subprocess.run([sys.executable, str(script), str(calm)], check=True)  # a finished run is left as it is
    nothing_to_do = time.monotonic() - begin
    generator, kills = random.Random(0), 0
    for _ in range(10):
        child = subprocess.Popen([sys.executable, str(script), str(stormy)])
        try:
            child.wait(timeout=nothing_to_do + generator.uniform(-0.02, 0.12))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            kills += 1
    subprocess.run([sys.executable, str(script), str(stormy)], check=True)
    assert kills > 0
    assert contents(stormy) == contents(calm)


@pytest.mark.parametrize("seed", range(30))
def test_stopped_at_any_event_it_ends_like_the_undisturbed_run(tmp_path, monkeypatch, seed):
    """The same in one process, where the stop can be put between any two steps of the folder."""
    program = CHILD.replace("time.sleep", "(lambda _: None)")

    def play(folder):
        monkeypatch.setattr(sys, "argv", ["child", str(folder)])
        exec(compile(program, "child", "exec"), {})

    play(tmp_path / "calm")

    class Stop(BaseException): ...

    generator, replace, fsync, cut = random.Random(seed), Path.replace, os.fsync, Run._cut

    def maybe(step):
        def inner(*arguments, **data):
            if generator.random() < 0.02:
                raise Stop
            return step(*arguments, **data)

        return inner

    for _ in range(20):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", maybe(replace))
            patch.setattr(os, "fsync", maybe(fsync))
            patch.setattr(Run, "_cut", maybe(cut))
            patch.setattr(Run, "event", maybe(Run.event))
            try:
                play(tmp_path / "stormy")
            except Stop:
                continue
            break
    play(tmp_path / "stormy")
    assert contents(tmp_path / "stormy") == contents(tmp_path / "calm")


def test_once_computes_once_and_returns_what_the_disk_returns(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"pair": (1, 2.5), 3: "three", "nan": math.nan, "array": np.arange(3), "scalar": np.float32(0.5)}

    with Run.create(tmp_path / "run", PROBLEM) as run:
        first = run.once("stage", compute)
    with Run.open(tmp_path / "run") as run:
        second = run.once("stage", compute)
    assert first == second == {"pair": [1, 2.5], "3": "three", "nan": None, "array": [0, 1, 2], "scalar": 0.5}
    assert len(calls) == 1


def test_a_stage_that_fails_is_repeated_without_its_events(tmp_path):
    with Run.create(tmp_path / "run", PROBLEM) as run:
        run.event("before", i=1)

        def fail():
            run.event("lost", when=1)
            raise RuntimeError

        with pytest.raises(RuntimeError):
            run.once("stage", fail)
        run.once("stage", lambda: run.event("kept", when=2))
        run.event("after")
    assert [event["kind"] for event in read_events(tmp_path / "run")] == ["before", "kept", "after"]


def test_events_that_differ_are_appended_and_cut_nothing(tmp_path):
    with Run.create(tmp_path / "run", PROBLEM) as run:
        run.once("a", lambda: run.event("a"))
        run.once("b", lambda: run.event("b"))
    with Run.open(tmp_path / "run") as run:
        run.once("a", lambda: pytest.fail("computed again"))
        mark = run.mark()
        run.event("shipped", seconds=1.5)
        run.once("c", lambda: run.event("c"))
        run.rewind(mark)  # never below what a finished stage has written
        run.event("d", loss=math.inf, pair=(1, math.nan))
    events = read_events(tmp_path / "run")
    assert [event["kind"] for event in events] == ["a", "b", "shipped", "c", "d"]
    assert events[-1] == {"kind": "d", "loss": None, "pair": [1, None]}


def test_a_stage_that_fails_takes_no_events_along_but_its_own(tmp_path):
    with Run.create(tmp_path / "run", PROBLEM) as run:
        run.once("a", lambda: run.event("a"))
        run.event("measured", seconds=1.5)
    with Run.open(tmp_path / "run") as run:
        run.once("a", lambda: pytest.fail("computed again"))

        def fail():
            run.event("lost")
            raise RuntimeError

        with pytest.raises(RuntimeError):  # begun where this process has not come past "measured"
            run.once("b", fail)
        run.once("b", lambda: run.event("b"))
    assert [event["kind"] for event in read_events(tmp_path / "run")] == ["a", "measured", "b"]


def test_the_events_of_a_stage_are_on_the_disk_before_its_result(tmp_path, monkeypatch):
    """Else a power cut could leave a result that points behind the end of the events."""
    fsync, synced = os.fsync, []
    with Run.create(tmp_path / "run", PROBLEM) as run:

        def noted(descriptor):
            if descriptor == run._events.fileno():
                stage = tmp_path / "run/stages/stage.json"
                synced.append((os.fstat(descriptor).st_size, stage.exists() and "end" in json.loads(stage.read_text())))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", noted)
        run.once("stage", lambda: run.event("event"))
        assert synced[-1] == (run.mark(), False)
        run.event("more")
        assert run.mark() == synced[-1][0]  # and what a checkpoint gets to store is there too


def test_a_write_that_was_killed_leaves_nothing_in_the_run(tmp_path):
    Run.create(tmp_path / "run", PROBLEM).close()
    before = contents(tmp_path / "run")
    for name in (".result.json.tmp", "stages/.search.json.tmp", "checkpoints/.train.pt.tmp"):
        (tmp_path / "run" / name).write_text("half")
    Run.open(tmp_path / "run").close()
    assert contents(tmp_path / "run") == before


def test_rewind_forgets_what_came_after_the_mark(tmp_path):
    with Run.create(tmp_path / "run", PROBLEM) as run:
        run.event("one")
        mark = run.mark()
        run.event("two")
        run.rewind(mark)
        assert [event["kind"] for event in read_events(run.path)] == ["one"]
        run.event("three")
        assert [event["kind"] for event in read_events(run.path)] == ["one", "three"]
        with pytest.raises(UserError, match="the checkpoint expects 9999"):
            run.rewind(9999)


def test_a_torn_last_line_is_cut_off(tmp_path):
    with Run.create(tmp_path / "run", PROBLEM) as run:
        run.event("whole")
    with open(tmp_path / "run/events.jsonl", "a") as file:
        file.write('{"kind": "to')
    assert [event["kind"] for event in read_events(tmp_path / "run")] == ["whole"]
    with Run.open(tmp_path / "run") as run:
        run.event("next")
    assert [json.loads(line)["kind"] for line in (tmp_path / "run/events.jsonl").read_text().splitlines()] == [
        "whole",
        "next",
    ]


def test_the_problem_comes_back_as_it_was(tmp_path):
    with Run.create(tmp_path / "run", PROBLEM) as run:
        assert run.problem == PROBLEM
    assert (tmp_path / "run/problem.yaml").read_text().startswith("format: 1\n")
    with Run.create(tmp_path / "run", PROBLEM) as run:  # the same problem: continued
        assert run.problem == PROBLEM
    with pytest.raises(UserError, match="another problem"):
        Run.create(tmp_path / "run", {**PROBLEM, "seed": 4})
    Run.open(tmp_path / "run").close()  # the refusal has let go of the lock


def test_yaml_reads_exponents_as_numbers():
    assert load_yaml("a: 1e-3\nb: -2E+5\nc: 1.e3\nd: .5e1\ne: 12\nf: e3\n") == {
        "a": 1e-3,
        "b": -2e5,
        "c": 1e3,
        "d": 5.0,
        "e": 12,
        "f": "e3",
    }
    for value in ("1e-3", 1e-3, 1e22, "no", True, None, "µs", [1, {"x": "2"}]):
        assert load_yaml(dump_yaml({"x": value})) == {"x": value}


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("")
    with pytest.raises(UserError, match="is not empty and is no run"):
        Run.create(tmp_path / "photos", PROBLEM)
    assert [file.name for file in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    for folder in ("photos", "nowhere"):
        with pytest.raises(UserError, match=r"is no run of netsmith: it has no problem\.yaml"):
            Run.open(tmp_path / folder)
    with pytest.raises(UserError, match="is not empty"):
        Run.create(tmp_path / "photos/cat.jpg", PROBLEM)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format: 2\n", "written in format 2; this netsmith reads format 1"),
        ("seed: 1\n", "has no format"),
        ("- a\n", "has no format"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_run_of_another_version_is_refused(tmp_path, text, message):
    (tmp_path / "problem.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        Run.open(tmp_path)
    with pytest.raises(UserError, match=message):
        Run.create(tmp_path, PROBLEM)


def test_one_process_at_a_time(tmp_path):
    program = "import sys, time; from netsmith.run import Run; run = Run.open(sys.argv[1]); print('open', flush=True)"
    program += "; time.sleep(60)"
    Run.create(tmp_path / "run", PROBLEM).close()
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    with pytest.raises(UserError, match="in use by another process"):
        Run.open(tmp_path / "run")
    child.kill()
    child.wait()
    child.stdout.close()
    Run.open(tmp_path / "run").close()


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    run = Run.create(tmp_path / "run", PROBLEM)
    (reader, writer), (waiting, started) = os.pipe(), os.pipe()
    worker = os.fork()
    if worker == 0:
        os.write(started, b"1")
        os.close(writer)
        os.read(reader, 1)  # lives until the parent closes its end
        os._exit(0)
    os.read(waiting, 1)
    run.close()
    Run.open(tmp_path / "run").close()
    os.close(writer)
    os.waitpid(worker, 0)
    for descriptor in (reader, waiting, started):
        os.close(descriptor)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Run.create(tmp_path / "run", PROBLEM) as run:
        run.event("before")
        run.write_json("result.json", {"a": 1})
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full)
            with pytest.raises(UserError, match=r"no space left to write .*result\.json"):
                run.write_json("result.json", {"a": 2})
            with pytest.raises(UserError, match=r"no space left to write .*stage\.json"):
                run.once("stage", lambda: 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(UserError, match=r"weights\.bin"), atomically(run.checkpoint("weights.bin")) as file:
                file.write_bytes(b"1")
        events = run._events

        class Small:
            """Writes five bytes, as a disk does that has room for five."""

            def __getattr__(self, name):
                return getattr(events, name)

            def write(self, data):
                return events.write(data[:5])

        run._events = Small()
        with pytest.raises(UserError, match=r"no space left to write .*events\.jsonl"):
            run.event("lost")
        run._events = events
        assert run.read_json("result.json") == {"a": 1}
        run.event("after")
        assert run.once("stage", lambda: 1) == 1
    assert [event["kind"] for event in read_events(tmp_path / "run")] == ["before", "after"]
    assert not run.checkpoint("weights.bin").exists()
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run cannot be written: Not a directory"):
        Run.create(tmp_path / "file" / "run", PROBLEM)
    with Run.create(tmp_path / "run", PROBLEM) as run:
        run.checkpoint("a.pt").mkdir()
        with (
            pytest.raises(UserError, match=r"a\.pt cannot be written: Is a directory"),
            atomically(run.checkpoint("a.pt")) as file,
        ):
            file.touch()


def test_a_damaged_stage_is_named(tmp_path):
    with Run.create(tmp_path / "run", PROBLEM) as run:
        run.once("stage", lambda: 1)
        (tmp_path / "run" / "stages" / "stage.json").write_text('{"begin": 0, "en')
        with pytest.raises(UserError, match=r"stage\.json is damaged: it is no JSON; delete it"):
            run.once("stage", lambda: 1)


def test_a_run_is_discarded_unless_something_was_searched_or_trained(tmp_path):
    with Run.create(tmp_path / "run", PROBLEM) as run:
        run.once("profile", lambda: 1)
        run.once("search", lambda: 1)
        run.discard()
    assert (tmp_path / "run" / "problem.yaml").exists()
    (tmp_path / "run" / "stages" / "search.json").unlink()
    with Run.open(tmp_path / "run") as run:
        run.discard()
    assert not (tmp_path / "run").exists()


def test_seeds_are_stable_and_differ_by_purpose(tmp_path):
    with Run.create(tmp_path / "a", {"seed": 1}) as a, Run.create(tmp_path / "b", {"seed": 2}) as b:
        assert a.seed("weights") == 2143059559
        assert len({a.seed("weights"), a.seed("data"), b.seed("weights")}) == 3


def test_names_stay_inside_the_run(tmp_path):
    with Run.create(tmp_path / "run", PROBLEM) as run:
        for name in ("../x", "a/b", ".hidden", ""):
            with pytest.raises(ValueError, match="no name for a file"):
                run.checkpoint(name)
        with pytest.raises(UserError, match=r"has no result\.json"):
            run.read_json("result.json")
