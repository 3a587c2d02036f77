"""What each verb does: a class a verb, its fields are the options, `run` does the work and returns an `Answer`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

from tyro.conf import Positional, Suppress, arg

from netsmith.errors import PromiseBroken, UserError
from netsmith.options import CompareOptions, Later, ProblemOptions, SearchOptions, read_options
from netsmith.say import Console

if TYPE_CHECKING:
    from netsmith.run import Run


@dataclass(frozen=True)
class Answer:
    """What a verb has to say on stdout: plain data for --json, or lines (and tables of rich) for a person."""

    data: dict[str, Any]
    lines: list[Any]
    broken: str = ""
    """The sentence of a promise that was not kept."""
    exit_code: int = PromiseBroken.exit_code
    """Where there is such a sentence."""

    def show(self) -> None:
        from rich.console import Console as Terminal

        # In a file or a pipe nothing needs to be squeezed into a terminal's width.
        terminal = Terminal(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
        for line in self.lines:
            if isinstance(line, str):
                print(line)
            else:
                terminal.print(line)


class Verb(Protocol):
    @property
    def json(self) -> bool: ...
    def run(self) -> Answer: ...


FAR_OFF = 10.0
"""Percent; a table filled on a quiet machine is off by 1 to 5."""


RunFolder = Annotated[Positional[Path], arg(metavar="RUN")]


@dataclass(frozen=True, kw_only=True)
class Search(SearchOptions):
    """Search a network that keeps a budget, train it, export it, and measure the exported file.

    With no options: PruNet on handwritten digits for this CPU, at half the latency of the largest network.
    """

    config: Annotated[Path | None, Later] = None
    """A YAML file with these options (and more, see the README); options given here override it."""
    resume: Annotated[Path | None, Later] = None
    """Continue the run in this folder, which was stopped or killed; takes no other options."""
    json: bool = False
    """Print one JSON object on stdout, the content of result.json."""
    unless_given: Annotated[tuple[str, ...], Suppress] = SearchOptions.budget
    """The file's budgets; no default of `budget`, to which given ones would be added."""

    @classmethod
    def before(cls, arguments: Sequence[str]) -> Search:
        """The defaults: what the file says that --config names. Repeated budgets are gathered, not added to these."""
        return cls(**before(SearchOptions, arguments))

    def options(self) -> SearchOptions:
        return given(SearchOptions, self, self.unless_given)

    def run(self) -> Answer:
        if self.resume is not None:
            if replace(self, resume=None, json=False) != Search.before([]):
                raise UserError(f"--resume takes no other options: {self.resume / 'problem.yaml'} says what was asked")
            from netsmith.prepare import open_run

            return self._search(open_run(self.resume))
        options = self.options()
        from netsmith.prepare import check

        check(options)  # before torch is loaded, which takes seconds
        from netsmith.prepare import prepare

        return self._search(prepare(options, command=["netsmith", *sys.argv[1:]]))

    def _search(self, run: Run) -> Answer:
        with run, resumable(run), Console() as say:
            from netsmith.pipeline import search

            say.line(
                f"{run.path}: {run.problem['method']} for {run.problem['task']}, {', '.join(run.problem['budget'])}"
            )
            return finished(run.path, search(run, say))


@dataclass(frozen=True, kw_only=True)
class Compare(CompareOptions):
    """Run several methods on one problem with several seeds, beside the baselines, at equal compute.

    best_of gets the processor seconds that the dearest search with its seed took. In the end all networks are timed in
    turn; the answer is a table of means with intervals, and a page. One space for all: --space, or the first method's.
    """

    config: Annotated[Path | None, Later] = None
    """A YAML file with these options; options of a method: `method_options: {prunet: {starts: 8}}`."""
    resume: Annotated[Path | None, Later] = None
    """Continue the comparison in this folder, which was stopped or killed; takes no other options."""
    json: bool = False
    """Print one JSON object on stdout, the content of result.json."""
    unless_given: Annotated[tuple[str, ...], Suppress] = CompareOptions.budget
    """As in `Search`."""

    @classmethod
    def before(cls, arguments: Sequence[str]) -> Compare:
        return cls(**before(CompareOptions, arguments))

    def run(self) -> Answer:
        from netsmith.compare import check_comparison, open_comparison, prepare_comparison

        if self.resume is not None:
            if replace(self, resume=None, json=False) != Compare.before([]):
                raise UserError(f"--resume takes no other options: {self.resume / 'problem.yaml'} says what was asked")
            return self._compare(open_comparison(self.resume))
        options = given(CompareOptions, self, self.unless_given)
        check_comparison(options)
        return self._compare(prepare_comparison(options, command=["netsmith", *sys.argv[1:]]))

    def _compare(self, run: Run) -> Answer:
        from netsmith.compare import compare
        from netsmith.report.comparison import tables, write_comparison

        with run, resumable(run, "compare"):
            with Console() as say:
                say.line(f"{run.path}: {run.problem['methods']} for {run.problem['task']}")
                result = compare(run, say)
            page = str(write_comparison(run.path, run.path / "report.html"))
        broken = [f"{row['method']} at {table['asked']}" for table in result["budgets"] for row in table["rows"]
                  if row["kept"] < len(row["points"])]  # fmt: skip
        lines, data = [*tables(result), f"report: {page}"], {**result, "run": str(run.path), "report": page}
        if failed := [f"{one['method']}-{one['seed']}" for one in result["failed"]]:
            again = shlex.join(["netsmith", "compare", "--resume", str(run.path)])
            return Answer(data, lines, f"failed: {', '.join(failed)} ({again} tries again)", UserError.exit_code)
        return Answer(data, lines, f"broken: {', '.join(broken)}" if broken else "")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Repeat the training of a finished search, and what follows: export, gate, report."""

    folder: RunFolder
    """The folder of the run."""
    epochs: Annotated[int | None, Later] = None
    """Passes of the training from now on (default: as it was)."""
    json: bool = False
    """Print one JSON object on stdout, the content of result.json."""

    def run(self) -> Answer:
        from netsmith.pipeline import retrain
        from netsmith.prepare import open_run

        with open_run(self.folder) as run, resumable(run), Console() as say:
            return finished(self.folder, retrain(run, say, self.epochs))


@dataclass(frozen=True, kw_only=True)
class Ship:
    """Export the trained network of a run again and judge the file: agreement, accuracy, latency, size, budgets."""

    folder: RunFolder
    """The folder of the run, or of one network of its front."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> Answer:
        from netsmith.pipeline import ship

        with Console() as say:
            data = ship(self.folder, say)
        data = {"file": str(self.folder / "model.onnx"), **data}
        lines = [] if not data["kept"] else [data["verdict"], data["file"]]
        return Answer(data, lines, "" if data["kept"] else data["verdict"])


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Time an ONNX file, or the networks of a run, on this machine."""

    target: Annotated[Positional[Path], arg(metavar="FILE_OR_RUN")]
    """An .onnx file, or the folder of a run."""
    device: str = "ort-cpu"
    """Runtime and its options, such as ort-cpu:threads=2; the torch devices take runs, not files."""
    seconds: float = 10.0
    """Bounds the timing."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> Answer:
        from netsmith.profiling import measure_files

        data = measure_files(self.target, self.device, self.seconds)
        lines = []
        for network in data["networks"]:
            low, high = network["ci95"]
            lines.append(
                f"{network['file']}: {network['latency_ms']:.4g} ms (95 % interval {low:.4g}-{high:.4g}, "
                f"{network['iterations']} calls)"
            )
            if not network["settled"]:
                lines.append("  the machine was too busy for a narrow interval")
        return Answer(data, [*lines, f"on {data['fingerprint']}"])


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Measure the layers of a space on a device, and say how well they predict whole networks.

    The layers go into the device's table in the cache folder, which every later search uses. Then networks that the
    table has never seen are measured whole and compared with the table's prediction. With --table nothing is measured:
    the file is read, and checked for all layers of the space.
    """

    device: str = "ort-cpu"
    """What to measure on: `netsmith list devices`; options as in ort-cpu:threads=2."""
    space: str = "prunet_small"
    """Whose layers: `netsmith list spaces`."""
    task: Annotated[str | None, Later] = None
    """The task whose images and classes the networks take; or name these:"""
    data: Annotated[Path | None, Later] = None
    """Folder with the files of the task."""
    resolution: Annotated[int | None, Later] = None
    """Pixels a side (default: the space's)."""
    channels: Annotated[int | None, Later] = None
    """Channels of an image (default: the space's)."""
    classes: Annotated[int | None, Later] = None
    """Classes (default: the space's)."""
    networks: int = 20
    """Random networks to test the table on; 0: none."""
    seed: int = 0
    """Which random networks."""
    again: bool = False
    """Measure all layers, also those that the table has: it was filled on a busy machine, say."""
    table: Annotated[Path | None, Later] = None
    """A table measured by others, to check instead of measuring."""
    table_part: Annotated[str | None, Later] = None
    """Which table of a file that holds several, such as gpu."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> Answer:
        from netsmith.cost.device import parse_device
        from netsmith.cost.imported import import_table
        from netsmith.profiling import profile
        from netsmith.tasks import open_task

        device = import_table(self.table, self.table_part) if self.table else parse_device(self.device)
        options = {name: getattr(self, name) for name in ("classes", "channels", "resolution")}
        if self.task:
            if given := [f"--{name}" for name, value in options.items() if value is not None and name != "resolution"]:
                raise UserError(f"{given[0]} and --task were given; the task says how many {given[0][2:]} there are")
            task = open_task(self.task, self.data, resolution=self.resolution)
            options = {name: getattr(task, name) for name in options}
        with Console() as say:
            data = profile(self.space, device, say, networks=self.networks, seed=self.seed, again=self.again, **options)
        lines = [f"{self.space} on {data['fingerprint']}: {data['entries']} layers"]
        if data["new_entries"]:
            lines[0] += f", {data['new_entries']} of them measured now in {data['ms_per_entry']:.1f} ms each"
        low, high = data["range_ms"]
        lines.append(f"networks of the space take {low:.3g} to {high:.3g} ms as predicted")
        if error := data["error"]:
            lines.append(
                f"on {error['networks']} random networks it has never seen: mean error {error['mean_percent']:.1f} %, "
                f"largest {error['largest_percent']:.1f} %"
                + ("" if error["kendall_tau"] is None else f", Kendall tau {error['kendall_tau']:.2f}")
            )
            if error["mean_percent"] > FAR_OFF:
                lines.append("that is far off: the machine was busy, now or before; --again measures every layer anew")
        return Answer(data, lines)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one self-contained HTML page about one or several runs."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN..."), Later]
    """Folders of runs; those that are not finished are left out, by name, where others are."""
    out: Annotated[Path | None, Later] = None
    """The file to write (default: RUN/report.html, for several runs report.html here)."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> Answer:
        from netsmith.report.comparison import is_comparison, write_comparison
        from netsmith.report.page import write_report

        def left(run: Path) -> str:
            """Why a run is left out of the page about several."""
            if is_comparison(run):
                return f"a comparison, which has a page of its own: {run} (netsmith report {shlex.quote(str(run))})"
            if (run / "problem.yaml").is_file() and not (run / "result.json").exists():
                verb = "compare" if (run / "shared").is_dir() else "search"
                return f"not finished: {run} (netsmith {verb} --resume {shlex.quote(str(run))})"
            return ""

        if len(self.runs) == 1 and is_comparison(self.runs[0]):
            page = str(write_comparison(self.runs[0], self.out or self.runs[0] / "report.html"))
            return Answer({"report": page, "runs": [str(self.runs[0])], "left_out": []}, [page])
        runs = [run for run in self.runs if not left(run)] or self.runs
        left_out = [run for run in self.runs if run not in runs]
        alone = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
        page = str(write_report(runs, self.out or alone))
        lines = [f"left out, {left(run)}" for run in left_out]
        data = {"report": page, "runs": list(map(str, runs)), "left_out": list(map(str, left_out))}
        return Answer(data, [*lines, page])


@dataclass(frozen=True, kw_only=True)
class List:
    """List what there is, one line each."""

    what: Positional[Literal["spaces", "methods", "devices", "tasks", "costs"]]
    """Which list."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> Answer:
        from netsmith.listing import listing

        found = listing(self.what)
        wide = max(map(len, found))
        return Answer({self.what: found}, [f"{name:{wide}}  {text}" for name, text in found.items()])


Asked = TypeVar("Asked", bound=ProblemOptions)


def before(kind: type[ProblemOptions], arguments: Sequence[str]) -> dict[str, Any]:
    """The defaults of a verb's fields: what the file says that --config names. Repeated budgets are gathered, not
    added to these."""
    config = None
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            config = Path(arguments[i + 1])
        elif argument.startswith("--config="):
            config = Path(argument.removeprefix("--config="))
    known = vars(read_options(config, kind) if config else kind())
    return {**known, "budget": (), "config": config, "unless_given": known["budget"]}


def given(kind: type[Asked], verb: Any, budget: tuple[str, ...]) -> Asked:
    """The options among a verb's fields; ``budget``: where none was given."""
    own: dict[str, Any] = {field.name: getattr(verb, field.name) for field in fields(kind)}
    return kind(**{**own, "budget": own["budget"] or budget})


@contextmanager
def resumable(run: Run, verb: str = "search") -> Iterator[None]:
    """Whatever stops the work carries a note with the command that continues it."""
    try:
        yield
    except BaseException as error:
        error.add_note(shlex.join(["netsmith", verb, "--resume", str(run.path)]))
        raise


def finished(folder: Path, result: dict[str, Any]) -> Answer:
    """Writes the report; the answer is the table, the verdict and where the report is."""
    from netsmith.report.networks import found, networks, rivals
    from netsmith.report.page import write_report
    from netsmith.report.table import table

    report = write_report([folder], folder / "report.html")
    verdicts = {str(member["verdict"]): bool(member["kept"]) for member in found(result)}
    listed = networks(result)
    compared = rivals([n for n in listed if n.kind == "found"], [n for n in listed if n.kind == "baseline"])
    broken = [verdict for verdict, kept in verdicts.items() if not kept]
    lines = [table(result), *(verdict for verdict, kept in verdicts.items() if kept), *compared, f"report: {report}"]
    return Answer({**result, "run": str(folder), "report": str(report)}, lines, "; ".join(broken))
