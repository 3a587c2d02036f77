"""What each verb does: a class a verb, its fields are the options, `run` does the work and returns an `Answer`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

from tyro.conf import Positional, Suppress, arg

from netsmith.errors import PromiseBroken, UserError, unknown
from netsmith.options import (
    BudgetOptions,
    CompareOptions,
    CompressOptions,
    Later,
    SearchOptions,
    TrainingOptions,
    read_options,
)
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
UTILISATION = 0.08
"""Of a device's peak; what EfficientNet-B5 reaches on TPU v3 (benchmarks/plan.py)."""


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
        with run, resumable(run.path), Console() as say:
            from netsmith.pipeline import search

            say.line(
                f"{run.path}: {run.problem['method']} for {run.problem['task']}, {', '.join(run.problem['budget'])}"
            )
            return finished(run.path, search(run, say))


@dataclass(frozen=True, kw_only=True)
class Compress(CompressOptions):
    """Make a trained network keep a budget, fine-tune it, export it, and measure the exported file.

    MODEL is the folder of a run, or names a network whose weights are given. It is not changed.
    """

    model: Annotated[Positional[str | None], arg(metavar="MODEL"), Later] = None
    """What to compress: the folder of a run, timm:NAME, module:path.to:factory, or of `netsmith list networks`."""
    config: Annotated[Path | None, Later] = None
    """A YAML file with these options (and more); options given here override it."""
    resume: Annotated[Path | None, Later] = None
    """Continue the run in this folder, which was stopped or killed; takes no other options."""
    json: bool = False
    """Print one JSON object on stdout, the content of result.json."""
    unless_given: Annotated[tuple[str, ...], Suppress] = CompressOptions.budget
    """As in `Search`."""

    @classmethod
    def before(cls, arguments: Sequence[str]) -> Compress:
        return cls(**before(CompressOptions, arguments))

    def run(self) -> Answer:
        if self.resume is not None:
            if replace(self, resume=None, json=False) != Compress.before([]):
                raise UserError(f"--resume takes no other options: {self.resume / 'problem.yaml'} says what was asked")
            from netsmith.chain import CHAIN
            from netsmith.prepare import open_run

            if (self.resume / CHAIN).exists():
                return self._in_turn(self.resume)
            return self._compress(open_run(self.resume))
        from netsmith.chain import SEPARATOR, begin_chain
        from netsmith.compression import prepare_compression

        options = given(CompressOptions, self, self.unless_given)
        if SEPARATOR in options.method:
            return self._in_turn(begin_chain(options))
        return self._compress(prepare_compression(options, command=["netsmith", *sys.argv[1:]]))

    def _in_turn(self, folder: Path) -> Answer:
        from netsmith.chain import asked_of, compress_in_turn, in_words
        from netsmith.compression import gained

        with resumable(folder, "compress"), Console() as say:
            place, result = compress_in_turn(folder, say)
            answer = finished(place, result)
            if answer.broken:
                return answer
            lines = [answer.lines[0], *in_words(result), *answer.lines[1:]]
            return replace(answer, lines=lines, broken=gained(result, asked_of(folder).budget))

    def _compress(self, run: Run) -> Answer:
        from netsmith.compression import gained
        from netsmith.pipeline import search

        with run, resumable(run.path, "compress"), Console() as say:
            of = run.problem["space_options"]["of"]["space"]
            say.line(f"{run.path}: {run.problem['method']} for {of}, {', '.join(run.problem['budget'])}")
            result = search(run, say)
            answer = finished(run.path, result)
            return answer if answer.broken else replace(answer, broken=gained(result, run.problem["budget"]))


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

        with run, resumable(run.path, "compare"):
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
class Train(TrainingOptions):
    """Train a network by a named recipe, export it, and judge the file; or once more what a search found (RUN).

    On several processors or machines: torchrun --nproc-per-node 2 --max-restarts 3 -m netsmith train --model NAME ...
    The same command goes on with a training that was stopped.
    """

    folder: Annotated[Positional[Path | None], arg(metavar="RUN"), Later] = None
    """The folder of a finished search, whose training is repeated with all that follows; takes --epochs alone."""
    config: Annotated[Path | None, Later] = None
    """A YAML file with these options."""
    json: bool = False
    """Print one JSON object on stdout, the content of result.json."""

    @classmethod
    def before(cls, arguments: Sequence[str]) -> Train:
        """The defaults: what the file says that --config names."""
        config = config_among(arguments)
        return cls(**vars(read_options(config, TrainingOptions)), config=config) if config else cls()

    def run(self) -> Answer:
        if self.folder is not None:
            if replace(self, folder=None, epochs=None, json=False) != Train():
                raise UserError(f"of these options a RUN takes --epochs alone: {self.folder} says the rest")
            return self._again(self.folder)
        from netsmith.training import answer, train_network

        options = TrainingOptions(**{field.name: getattr(self, field.name) for field in fields(TrainingOptions)})
        rank = int(os.environ.get("RANK", "0"))
        try:
            with Console() as say:
                done = train_network(options, say, command=["netsmith", *sys.argv[1:]])
        except UserError as error:
            if rank == 0:
                raise
            sys.exit(error.exit_code)  # the first replica says it for all
        if done is None:
            sys.exit(0)
        return Answer(done, answer(done))

    def _again(self, folder: Path) -> Answer:
        from netsmith.pipeline import retrain
        from netsmith.prepare import open_run

        with open_run(folder) as run, resumable(run.path), Console() as say:
            return finished(folder, retrain(run, say, self.epochs))


@dataclass(frozen=True, kw_only=True)
class Ship:
    """Export the trained network of a run again and judge the file: agreement, accuracy, latency, size, budgets."""

    folder: RunFolder
    """The folder of the run, or of one network of its front."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> Answer:
        from netsmith.pipeline import ship
        from netsmith.report.training import is_training
        from netsmith.training import ship_trained

        with Console() as say:
            data = (ship_trained if is_training(self.folder) else ship)(self.folder, say)
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
class Plan:
    """Predict step time, hours and the share of all-reduce of a training on hardware one does not have.

    From images/s measured on one device (--images-per-second) or, less well, its peak (--device-tflops), and the
    links' bandwidth and latency. docs/plan.md has the formulae, and the published table they were checked against.
    """

    model: Annotated[str | None, Later] = None
    """A network of the literature, such as efficientnet_b5 (default: the recipe's)."""
    recipe: Annotated[str | None, Later] = None
    """A published recipe, such as efficientnet_lars_65536: its model, resolution, batch and epochs."""
    devices: int
    """How many train, each on its part of the batch."""
    images_per_second: Annotated[float | None, Later] = None
    """Of the training on one device alone, measured with as many images as it will get."""
    device_tflops: Annotated[float | None, Later] = None
    """Or the peak of one device, 1e12 FLOP/s; training takes 3 x 2 FLOP for each MAC of the forward pass."""
    utilisation: Annotated[float | None, Later] = None
    """The share of the peak that training reaches (default: 0.08, that of EfficientNet-B5 on TPU v3; B2 has 0.04)."""
    bandwidth: float
    """GB/s of one link in one direction."""
    link_latency: float = 5.0
    """Microseconds from a device to its neighbour (ours: 1 is usual within a machine, 10 between machines)."""
    topology: Literal["ring", "torus"] = "ring"
    """Of the all-reduce; the torus is as square as the number of devices allows."""
    batch: Annotated[int | None, Later] = None
    """Images of a step on all devices (default: the recipe's, or 32 a device)."""
    epochs: Annotated[int | None, Later] = None
    """Passes over the training images (default: the recipe's, or 350, as EfficientNets are trained)."""
    images: Annotated[int | None, Later] = None
    """Training images (default: the recipe's, or ImageNet's 1281167)."""
    resolution: Annotated[int | None, Later] = None
    """Pixels a side of training images (default: the recipe's, the largest where they grow, or the network's own)."""
    norm_images: int = 128
    """Images that a batch norm takes its statistics over; 0: every device its own."""
    gradient_bytes: Literal[4, 2] = 4
    """Sent for each parameter."""
    overlap: float = 0.0
    """Share of the gradients' all-reduce that passes during the backward pass; 0 bounds the cost from above."""
    price: Annotated[float | None, Later] = None
    """Of one device for an hour, in any money."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> Answer:
        peak, measured = self.device_tflops, self.images_per_second
        if peak is None and measured is None:
            raise UserError("neither --images-per-second nor --device-tflops was given: how fast is one device?")
        if peak is not None and measured is not None:
            raise UserError("both --images-per-second and --device-tflops were given; one says how fast a device is")
        if peak is None and self.utilisation is not None:
            raise UserError("--utilisation was given with --images-per-second; it is a share of --device-tflops")
        if self.price is not None and not 0 <= self.price < float("inf"):
            raise UserError(f"price is {self.price}; allowed: 0 or more")
        import torch

        from netsmith.spaces.networks import NETWORKS, RESOLUTIONS
        from netsmith.train.recipes import IMAGENET, published
        from netsmith.train.scaling import Cluster, Load, predict

        links: dict[str, Any] = {name: getattr(self, name) for name in ("bandwidth", "link_latency", "topology")}
        cluster = Cluster(devices=self.devices, **links)
        recipe = None if self.recipe is None else published(self.recipe)
        model = recipe.model if recipe and self.model is None else self.model
        if model is None:
            raise UserError("neither --model nor --recipe was given; --model efficientnet_b5, for one")
        if model not in NETWORKS:
            raise unknown("model", model, NETWORKS)
        asked = {
            "batch": recipe.recipe.batch_size if recipe else 32 * self.devices,
            "epochs": recipe.recipe.epochs if recipe else 350,
            "images": recipe.images if recipe else IMAGENET,
            "resolution": RESOLUTIONS[model],
        }
        if recipe and recipe.model == model:  # of stages the largest: a bound from above
            asked["resolution"] = max(recipe.recipe.resolutions, default=recipe.resolution)
        asked |= {name: getattr(self, name) for name in asked if getattr(self, name) is not None}
        if not 32 <= (resolution := asked.pop("resolution")) <= 4096:
            raise UserError(f"resolution is {resolution}; allowed: 32 to 4096")
        with torch.device("meta"):
            load = Load.of(NETWORKS[model](), resolution)
        share = UTILISATION if self.utilisation is None else self.utilisation
        speed = load.images_per_second(peak, share) if peak is not None else measured
        assert speed is not None
        sent: dict[str, Any] = {name: getattr(self, name) for name in ("gradient_bytes", "norm_images", "overlap")}
        found = predict(cluster, load, images_per_second=speed, **asked, **sent)
        data = {"model": model, "resolution": resolution, "recipe": self.recipe, "parameters": load.parameters}
        data |= {"macs": load.macs, "norm_layers": len(load.norms), "device_images_per_second": speed}
        data |= {"device_tflops": peak, "utilisation": None if peak is None else share, **links, **sent}
        cost = None if self.price is None else self.price * found.device_hours
        data |= {"sides": cluster.sides, **found.data(), "price": self.price, "cost": cost}
        return Answer(data, planned(data))


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one self-contained HTML page about one or several runs."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN..."), Later]
    """Folders of runs; those that are not finished are left out, by name, where others are; trainings share a page,
    but not with searches."""
    out: Annotated[Path | None, Later] = None
    """The file to write (default: RUN/report.html, for several runs report.html here)."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> Answer:
        from netsmith.report.comparison import is_comparison, write_comparison
        from netsmith.report.page import write_report
        from netsmith.report.training import is_training, write_trainings

        def kind(run: Path) -> str:
            return "comparison" if is_comparison(run) else "training" if is_training(run) else "search"

        def unfinished(run: Path) -> bool:
            return (run / "problem.yaml").is_file() and not (run / "result.json").exists()

        def left(run: Path) -> str:
            """Why a run is left out of the page about several."""
            if not unfinished(run):
                return f"a {kind(run)}, which has a page of its own: {run} (netsmith report {shlex.quote(str(run))})"
            if is_training(run):
                return f"not finished: {run} (the command that began it goes on with it)"
            compressed = (run / "original.safetensors").exists()
            verb = "compare" if (run / "shared").is_dir() else "compress" if compressed else "search"
            return f"not finished: {run} (netsmith {verb} --resume {shlex.quote(str(run))})"

        done = [run for run in self.runs if not unfinished(run)] or self.runs
        kinds = list(map(kind, done))
        shown = next((one for one in ("search", "training", "comparison") if one in kinds), "search")
        runs = [run for run, one in zip(done, kinds, strict=True) if one == shown]
        if shown == "comparison":
            runs = runs[:1]  # each has a page of its own
        out = self.out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
        if shown == "comparison":
            page = str(write_comparison(runs[0], out))
        else:
            page = str((write_trainings if shown == "training" else write_report)(runs, out))
        left_out = [run for run in self.runs if run not in runs]
        data = {"report": page, "runs": list(map(str, runs)), "left_out": list(map(str, left_out))}
        return Answer(data, [*(f"left out, {left(run)}" for run in left_out), page])


@dataclass(frozen=True, kw_only=True)
class List:
    """List what there is, one line each."""

    what: Positional[Literal["spaces", "methods", "devices", "tasks", "costs", "networks", "recipes"]]
    """Which list."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> Answer:
        from netsmith.listing import listing

        found = listing(self.what)
        wide = max(map(len, found))
        return Answer({self.what: found}, [f"{name:{wide}}  {text}" for name, text in found.items()])


Asked = TypeVar("Asked", bound=BudgetOptions)


def config_among(arguments: Sequence[str]) -> Path | None:
    """The file that the last --config names."""
    config = None
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            config = Path(arguments[i + 1])
        elif argument.startswith("--config="):
            config = Path(argument.removeprefix("--config="))
    return config


def before(kind: type[BudgetOptions], arguments: Sequence[str]) -> dict[str, Any]:
    """The defaults of a verb's fields: what the file says that --config names. Repeated budgets are gathered, not
    added to these."""
    config = config_among(arguments)
    known = vars(read_options(config, kind) if config else kind())
    return {**known, "budget": (), "config": config, "unless_given": known["budget"]}


def given(kind: type[Asked], verb: Any, budget: tuple[str, ...]) -> Asked:
    """The options among a verb's fields; ``budget``: where none was given."""
    own: dict[str, Any] = {field.name: getattr(verb, field.name) for field in fields(kind)}
    return kind(**{**own, "budget": own["budget"] or budget})


def planned(data: dict[str, Any]) -> list[str]:
    """What a plan says to a person."""
    devices, batch, group = data["devices"], data["batch"], data["norm_group"]
    links = "x".join(map(str, data["sides"])) if data["topology"] == "torus" else "ring"
    where = f"on {devices:,} devices ({links})" if devices > 1 else "on one device"
    ms = {name: f"{1e3 * data[name]:,.2f}" for name in ("step", "compute", "gradients", "hidden", "norms")}
    hidden = f", {ms['hidden']} of them hidden" if data["hidden"] else ""
    speed, cost = "as given", ""
    if data["device_tflops"] is not None:
        speed = f"if it reaches {100 * data['utilisation']:.3g} % of {data['device_tflops']:g} TFLOP/s"
    if data["cost"] is not None:
        cost = f"; {data['cost']:,.2f} at {data['price']:g} an hour"
    return [
        f"{data['model']} at {data['resolution']} px {where}, batch {batch:,} ({batch // devices:,} a device)",
        f"step {ms['step']} ms: compute {ms['compute']}, all-reduce of gradients {ms['gradients']}{hidden}, "
        f"of batch norm {ms['norms']}" + (f" (groups of {group})" if group > 1 else ""),
        f"{data['images_per_second']:,.0f} images/s; all-reduce is {data['all_reduce_percent']:.2f} % of the step, "
        f"efficiency against one device {100 * data['efficiency']:.1f} %",
        f"{data['epochs']:,} epochs of {data['steps_per_epoch']:,.2f} steps: {data['total_steps']:,} steps, "
        f"{data['hours']:,.3f} hours, {data['device_hours']:,.1f} device hours{cost}",
        f"one device: {data['device_images_per_second']:,.4g} images/s, {speed}",
    ]


@contextmanager
def resumable(folder: Path, verb: str = "search") -> Iterator[None]:
    """Whatever stops the work carries a note with the command that continues it."""
    try:
        yield
    except BaseException as error:
        error.add_note(shlex.join(["netsmith", verb, "--resume", str(folder)]))
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
