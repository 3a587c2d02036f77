"""Several methods on one problem: every one searches it with every seed, in a process of its own, beside the baselines.

A comparison is a folder with one ordinary run for each method and seed (`fbnet-0`), and `shared`, the run whose prices
and reference all others take over, so that all plan with one price list and one absolute budget. What makes it fair:

- `best_of` gets the processor seconds that the dearest compared search with the same seed took;
- every network keeps the budget as measured on its file, aimed at within 2 % of each other, and in the end all files
  are timed in turn in one process: a machine's speed wanders by more than that from hour to hour;
- the test split is touched once for each network, by the gate.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import fields
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netsmith.cost.budget import Budget, parse_budgets
from netsmith.cost.device import parse_device
from netsmith.errors import UserError, unknown
from netsmith.methods import METHODS, check_searchable
from netsmith.options import RECORDED, CompareOptions, ProblemOptions, SearchOptions, checked
from netsmith.prepare import check, default_space, method_options, next_folder, offered_widths, problem_of
from netsmith.report.comparison import summary
from netsmith.run import Run, load_yaml, read_events
from netsmith.spaces import open_space

if TYPE_CHECKING:
    from torch import nn

    from netsmith.job import Say

BASELINES = ("random", "capacity", "best_of")
"""In the order in which they run, after the searches: what `best_of` gets depends on those."""

SHAPE = ("classes", "channels", "resolution")
"""What the task decides of a space."""

MATCHED = 0.965
"""Share of a limit from which a network is close enough; together with promise.TIGHT a window of 2 %."""

TIMING_SECONDS = 2.0
"""For each network, when all are timed in turn."""


def compared(options: CompareOptions) -> list[str]:
    """The methods in the order in which they run. Raises: UserError for a name unknown or given twice."""
    given = [name.strip() for name in options.methods.split(",") if name.strip()]
    for name in given:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
        if given.count(name) > 1:
            raise UserError(f"{name} is given twice in --methods {options.methods}")
    for field_name in ("method_options", "spaces"):
        for name in getattr(options, field_name):
            if name not in (*given, *BASELINES):
                raise unknown(f"method in {field_name},", name, dict.fromkeys((*given, *BASELINES)))
    for name in options.method_options:
        if not isinstance(options.method_options[name], dict):
            raise UserError(f"method_options.{name} is no mapping of options, such as {name}: {{epochs: 2}}")
    return [name for name in given if name not in BASELINES] + list(BASELINES)


def check_comparison(options: CompareOptions) -> None:
    """What can be checked before anything is loaded. Raises: UserError."""
    for name in ("seeds", "jobs"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise UserError(f"{name} is {given}; allowed: 1 or more")
    for name in compared(options):
        check(part(options, name))


def part(options: CompareOptions, method: str) -> SearchOptions:
    """What one method is asked."""
    own = {field.name: getattr(options, field.name) for field in fields(ProblemOptions)}
    own["method_options"] = options.method_options.get(method, {})
    if method in BASELINES:  # which train no supernet
        own["search_epochs"] = None
    return SearchOptions(**own, method=method, baselines=())


def prepare_comparison(options: CompareOptions, *, command: Sequence[str] = ()) -> Run:
    """A new comparison in `options.out`, or the next free runs/compare-TASK-NUMBER.

    All methods search one space; where none is named, the one that suits the first method. One that cannot search it
    searches its own under the same budget in numbers, unless the space was named.
    Raises: UserError, as `prepare`, and for a method given twice or no seed.
    """
    check_comparison(options)
    names = compared(options)
    problem = problem_of(part(options, names[0]), command)
    given = {name: method_options(part(options, name)) for name in names}
    from netsmith.job import ONE_THREAD

    small = problem["space_options"]["resolution"] <= ONE_THREAD
    jobs = options.jobs or (len(os.sched_getaffinity(0)) if small else 1)
    own = {"methods": ",".join(names), "seeds": options.seeds, "jobs": jobs, "method_options": given}
    unplaced = {name: its for name, its in given.items() if name not in options.spaces}
    own["spaces"] = {**_elsewhere(unplaced, problem, named=options.space is not None), **options.spaces}
    for name, space in own["spaces"].items():
        check_searchable(name, _opened(problem, space), space, given[name])
    problem = {key: value for key, value in problem.items() if key not in ("method", "seed", "baselines")} | own
    return Run.create(options.out or next_folder(options.task), problem)


def _elsewhere(given: Mapping[str, dict[str, Any]], problem: dict[str, Any], *, named: bool) -> dict[str, str]:
    """The methods, of those ``given`` with their options, that cannot search the space of the others, and the one that
    they search."""
    found = {}
    for name, options in given.items():
        try:
            check_searchable(name, _opened(problem, problem["space"]), problem["space"], options)
        except UserError:
            if named or name in BASELINES:
                raise
            found[name] = default_space(name, problem["space_options"]["resolution"])
    return found


def _opened(problem: dict[str, Any], space: str) -> nn.Module:
    """Without numbers."""
    import torch

    options = problem["space_options"]
    if space != problem["space"]:
        options = {key: options[key] for key in SHAPE}
    with torch.device("meta"):
        return open_space(space, **options)


def open_comparison(folder: Path) -> Run:
    """The comparison in a folder, to go on with. Raises: UserError where it is none."""
    run = Run.open(folder)
    try:
        if "methods" not in run.problem:
            raise UserError(f"{folder} is no comparison: go on with netsmith search --resume {folder}")
        checked(CompareOptions, {key: value for key, value in run.problem.items() if key not in RECORDED})
    except UserError:
        run.close()
        raise
    return run


def compare(run: Run, say: Say) -> dict[str, Any]:
    """The whole comparison; returns the content of its `result.json`. Continues what a killed process left.

    A run that fails is told of in the result, and tried again when the comparison is continued.
    Raises: UserError where no run came to an end, Infeasible for a budget that no network keeps.
    """
    from netsmith.job import Job

    asked, names = run.problem, run.problem["methods"].split(",")
    failed = _search_all(run, say, _ground(run, say))
    total = len(names) * asked["seeds"]
    ended = _parts(run)
    if not ended:
        raise UserError(f"all {total} runs failed: {failed[0]['error']}")
    with Run.open(run.path / "shared") as shared:
        job = Job(shared, say)
        in_turn = run.once(f"in-turn-{len(ended)}", lambda: _in_turn(run, job, ended))
        limits = [[{"metric": b.metric, "limit": b.limit, "unit": b.unit} for b in p] for p in job.problem.budgets]
        texts = [", ".join(map(str, budgets)) for budgets in job.budgets]
    result = summary(
        [_told(run, folder, in_turn) for folder in ended],
        failed=failed,
        budgets=[{"asked": text, "limits": limit} for text, limit in zip(texts, limits, strict=True)],
        methods=names,
        spaces=asked["spaces"],
        baselines=BASELINES,
        seeds=asked["seeds"],
    )
    run.write_json("result.json", result)
    return result


def _ground(run: Run, say: Say) -> dict[str, Any]:
    """The results of the stages that all runs share, computed in the run `shared`."""
    from netsmith.pipeline import GROUND, lay_ground
    from netsmith.search.allocate import Infeasible

    names = run.problem["methods"].split(",")
    with Run.create(run.path / "shared", _problem(run, names[-1], 0)) as shared:
        if not shared.path.joinpath("stages", "reference.json").exists():
            say.stage("what all runs share: prices, and the reference")
        try:
            lay_ground(shared, say)
        except Infeasible:
            run.discard()
            raise
        stages = [name for name in GROUND if (shared.path / "stages" / f"{name}.json").exists()]
        return {name: shared.once(name, dict) for name in stages}


def _problem(run: Run, method: str, seed: int, **options: Any) -> dict[str, Any]:
    """The problem of one run of the comparison."""
    left_out = ("methods", "seeds", "jobs", "spaces", "command")
    own = {key: value for key, value in run.problem.items() if key not in left_out}
    given = {**run.problem["method_options"][method], **options}
    return own | {"method": method, "method_options": given, "seed": seed, "baselines": []}


def _begin(run: Run, ground: dict[str, Any], method: str, seed: int, folder: Path) -> None:
    """Make the run of a method and seed, unless it is there, and give it what all share."""
    options = {}
    if method == "best_of" and _waits(run):
        # once: a run that is continued must not ask for something else
        options = run.once(f"compute-{seed}", lambda: _equal_compute(run, seed))
    problem = _problem(run, method, seed, **options)
    if space := run.problem["spaces"].get(method):
        problem |= _moved(problem, space, ground["reference"]["cost"])
        ground = {}
    command = ["netsmith", "search", "--config", str(folder.absolute() / "problem.yaml")]
    with Run.create(folder, problem | {"command": command}) as own:
        for name, value in ground.items():
            own.once(name, lambda value=value: value)
        teacher = Path("others", "reference")
        if run.problem["recipe"]["distillation"] and not (folder / teacher).exists():
            shutil.copytree(run.path / "shared" / teacher, folder / teacher, dirs_exist_ok=True)


def _moved(problem: dict[str, Any], space: str, reference: dict[str, float]) -> dict[str, Any]:
    """What becomes of a problem in another space: its budgets stay the same numbers."""
    device = None if problem["table"] else parse_device(problem["device"])
    shape = {key: problem["space_options"][key] for key in SHAPE}
    fronts: dict[str, list[str]] = {}
    for budgets in parse_budgets(problem["budget"]):
        for b in budgets:
            limit = Budget(b.metric, b.absolute(reference.get(b.metric, 0.0)), b.unit)
            fronts.setdefault(b.metric, []).append(str(limit).partition("<=")[2])
    texts = [f"{metric}<={','.join(dict.fromkeys(limits))}" for metric, limits in fronts.items()]
    return {"space": space, "space_options": {**offered_widths(space, device), **shape}, "budget": texts}


def _equal_compute(run: Run, seed: int) -> dict[str, float]:
    """What `best_of` gets: the dearest search's processor seconds; its default where no search came to an end."""
    searches = [part for part in _parts(run) if part.name.rsplit("-", 1)[0] not in BASELINES]
    spent = [_result(part)["effort"]["processor_seconds"] for part in searches if part.name.endswith(f"-{seed}")]
    return {"processor_seconds": round(max(spent), 1)} if spent and max(spent) >= 0.1 else {}


def _waits(run: Run) -> bool:
    """Whether what `best_of` gets depends on the searches."""
    return not {"candidates", "processor_seconds"} & set(run.problem["method_options"]["best_of"])


def _forget_best_of(run: Run, seed: int) -> bool:
    """Make `best_of` run again where a search with its seed, which had failed before, has ended after it; returns
    whether it has to."""
    best_of = _folder(run, "best_of", seed)
    if not _waits(run) or not best_of.exists():
        return False
    shutil.rmtree(best_of)
    (run.path / "stages" / f"compute-{seed}.json").unlink(missing_ok=True)
    return True


def _folder(run: Run, method: str, seed: int) -> Path:
    return run.path / f"{method}-{seed}"


def _parts(run: Run) -> list[Path]:
    """The folders of the runs that have a result."""
    names, seeds = run.problem["methods"].split(","), range(run.problem["seeds"])
    folders = [_folder(run, name, seed) for name in names for seed in seeds]
    return [folder for folder in folders if (folder / "result.json").exists()]


def _result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def _told(run: Run, folder: Path, in_turn: dict[str, float]) -> dict[str, Any]:
    """A run's result with what the comparison knows of it."""
    raced = sum(event["kind"] == "raced" for event in read_events(folder))
    times = {place: ms for place, ms in in_turn.items() if Path(place).parts[0] == folder.name}
    return {"run": folder.name, "trainings": raced, "in_turn_ms": list(times.values()), **_result(folder)}


def _in_turn(run: Run, job: Any, ended: list[Path]) -> dict[str, float]:
    """Milliseconds of every network, all timed in turn in this process, by its place in the comparison's folder, the
    networks of a front in the order of the budgets. Empty where nothing runs."""
    from netsmith.cost.device import load_shipped
    from netsmith.cost.meter import measure
    from netsmith.ship.weights import load

    if job.time is None:
        return {}
    places = [place for folder in ended for place in _places(folder)]
    job.say.stage(f"all {len(places)} networks timed in turn")
    calls = {
        str(place.relative_to(run.path)): load_shipped(
            job.device, load(place), place / "model.onnx", job.task.input_shape
        )
        for place in places
    }
    timed = measure(calls, seconds=TIMING_SECONDS * len(calls))
    return {place: measured.median_ms for place, measured in timed.items()}


def _places(folder: Path) -> list[Path]:
    """Where the networks of a run lie, in the order of its budgets: in another space these have other words."""
    from netsmith.pipeline import point_name

    front = parse_budgets(load_yaml((folder / "problem.yaml").read_text("utf-8"))["budget"])
    return [folder / point_name(budgets) for budgets in front] if len(front) > 1 else [folder]


# A process for each run: its peak memory is its own, and nothing of one search is left in the next --------------------


class _Told:
    """Progress, told to the process that started this one."""

    def __init__(self, tell: Connection) -> None:
        self.tell = tell

    def stage(self, name: str) -> None:
        self.tell.send(("stage", (name,)))

    def progress(self, name: str, done: int, total: int, note: str = "") -> None:
        self.tell.send(("progress", (name, done, total, note)))

    def line(self, text: str) -> None:
        self.tell.send(("line", (text,)))


def _search_all(run: Run, say: Say, ground: dict[str, Any]) -> list[dict[str, Any]]:
    """Search every run that has no result, several at a time; returns those that failed, each with its sentence."""
    names, seeds = run.problem["methods"].split(","), range(run.problem["seeds"])
    total, jobs = len(names) * len(seeds), run.problem["jobs"]
    pairs = [(name, seed) for seed in seeds for name in names]
    waiting = [pair for pair in pairs if not (_folder(run, *pair) / "result.json").exists()]
    running: dict[Connection, tuple[Any, str, int]] = {}
    failed: list[dict[str, Any]] = []

    def ready(name: str, seed: int) -> bool:
        """`best_of` waits for the searches whose seconds it gets."""
        unfinished = [*waiting, *((other, s) for _, other, s in running.values())]
        return name != "best_of" or not any(s == seed and other not in BASELINES for other, s in unfinished)

    try:
        while waiting or running:
            while len(running) < jobs and (pair := next((pair for pair in waiting if ready(*pair)), None)):
                waiting.remove(pair)
                say.stage(f"{total - len(waiting)} of {total}: {pair[0]}, seed {pair[1]}")
                _begin(run, ground, *pair, _folder(run, *pair))
                process, told = _start(_folder(run, *pair), jobs)
                running[told] = (process, *pair)
            for told in wait(list(running)):
                assert isinstance(told, Connection)
                process, name, seed = running[told]
                try:
                    what, words = told.recv()
                except EOFError:
                    process.join()
                    sentence = f"its process ended with {process.exitcode} (-9: killed, perhaps for want of memory)"
                    what, words = "ended", sentence
                if what == "ended":
                    del running[told]
                    told.close()
                    process.join()
                    if words:
                        failed.append({"method": name, "seed": seed, "error": words})
                        say.line(f"{name}, seed {seed}, failed: {words}")
                    elif name not in BASELINES and _forget_best_of(run, seed) and ("best_of", seed) not in waiting:
                        waiting.append(("best_of", seed))
                else:
                    getattr(say, what)(f"{name}-{seed}: {words[0]}", *words[1:])
    finally:
        for process, _, _ in running.values():
            process.kill()  # where this process is interrupted
            process.join()
    return failed


def _start(folder: Path, jobs: int) -> tuple[Any, Connection]:
    """Begin to search the run in ``folder``: the process, and what it tells."""
    context = multiprocessing.get_context("spawn")
    told, tell = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(folder, tell, jobs), name=folder.name)
    process.start()
    tell.close()
    return process, told


def _child(folder: Path, tell: Connection, jobs: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    threading.Thread(target=_die_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    sentence = ""
    try:
        import torch

        from netsmith.pipeline import search

        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
        with Run.open(folder) as run:
            search(run, _Told(tell), enough=MATCHED)
    except UserError as error:
        sentence = str(error)
    except Exception as error:  # a bug in one method should not cost the results of the others
        (folder / "error.txt").write_text(traceback.format_exc())
        sentence = f"unexpected {type(error).__name__}: {error} (this is a bug; the traceback is in {folder}/error.txt)"
    tell.send(("ended", sentence))


def _die_with(parent: Any) -> None:
    """A parent that was killed can be started again, and then wants this run for itself."""
    parent.join()
    os._exit(1)
