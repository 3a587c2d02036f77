"""Images per second: our loop beside timm's train script, one process beside two, the loader beside the network.

    python benchmarks/throughput.py --timm PATH/train.py --photographs PATH/trashnet_256x192.tar
    python benchmarks/throughput.py --part loader --photographs PATH/trashnet_256x192.tar

timm's script is no part of its package: take train.py from huggingface/pytorch-image-models, of the installed version
or the nearest one to it. `--photographs` is a .tar of {train,val}/class/*.jpg; both sides get the same part of it.

Every configuration is a process of its own that stays alive. They take turns, an epoch each, so that slow phases of
the machine hit all alike; the first epoch of each is warm-up. A ratio is formed within a round; its median and range
over the rounds are reported. Rates are per second of the clock, and per processor second of all processes of a
configuration, which other jobs on the machine disturb less. timm's clock is what it prints, ours is the history of
`train`; neither has scoring or checkpoints in it. Linux only: timm's processes are held with SIGSTOP, their processor
time is read from /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from machine import RESULTS, machine, save

PARTS = ("timm", "memory", "scaling", "loader", "profile")
EPOCH_LINE = re.compile(r"Train: (\d+) \[ *(\d+)/(\d+) .*\( *([\d.]+)s, *([\d.]+)/s\).*Data: [\d.]+ \(([\d.]+)\)")
"""Epoch, step, steps, mean seconds a step, images per second, mean seconds of waiting for data."""
RATE, DECAY, EMA = 0.01, 5e-4, 0.999
"""The same for both sides: learning rate, weight decay, decay of the average where there is one."""
AREA = (0.35, 1.0)
"""Of the random resized crop: what our augmentation has, and timm is told."""
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""What `train/allocator.py` asks of glibc, as environment variables."""
GROUPS = {
    "convolution, backward": ("convolution_backward", "conv2d_backward"),
    "convolution": ("convolution", "conv2d"),
    "batch norm": ("batch_norm",),
    "activation": ("silu", "relu", "sigmoid"),
    "image augmentation": ("upsample", "flip", "randperm", "index"),
    "optimizer and average": ("Optimizer", "_fused_", "lerp"),
    "autograd's own": ("autograd",),
    "elementwise and sums": ("mul", "add", "sum", "mean", "div", "sub"),
    "copies and new memory": ("copy", "fill", "zero", "clone", "contiguous", "empty", "resize"),
}
"""What the profile's operators are counted as: the first that fits."""


# Processes that take turns --------------------------------------------------------------------------------------------


class Ours:
    """`train` in processes of its own, an epoch for each turn."""

    def __init__(self, name: str, folder: Path, spec: dict[str, Any]) -> None:
        self.name, self.folder, self.turn, self.replicas = name, folder, 0, spec.get("replicas", 1)
        job = json.dumps({**spec, "name": name, "turns": str(folder)})
        start = [sys.executable]
        if self.replicas > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.replicas}"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(spec["threads"])}
        if spec.get("asleep"):
            environment["OMP_WAIT_POLICY"] = "PASSIVE"
        self.errors = open(folder / f"{name}.log", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*start, __file__, "--job", job], env=environment, stdout=subprocess.DEVNULL, stderr=self.errors
        )

    def epoch(self) -> dict[str, float]:
        (self.folder / f"{self.name}.go{self.turn}").touch()
        files = [self.folder / f"{self.name}.{rank}.{self.turn}.json" for rank in range(self.replicas)]
        while not all(file.exists() for file in files):
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} ended early:\n{(self.folder / f'{self.name}.log').read_text()[-2000:]}")
            time.sleep(0.01)
        self.turn += 1
        done = [json.loads(file.read_text()) for file in files]
        cpu = sum(one["cpu_seconds"] for one in done)
        return {**done[0], "per_cpu_second": done[0]["images"] / cpu}

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.errors.close()


class Timm:
    """timm's train.py as it is, held between epochs."""

    def __init__(self, name: str, script: Path, options: list[str], environment: dict[str, str]) -> None:
        self.name, self.held = name, False
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(
            [sys.executable, str(script), *options], env=environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def epoch(self) -> dict[str, float]:
        """Go on until the last line of an epoch. Processor time counts from its first line: all steps but one."""
        if self.held:
            os.killpg(self.process.pid, signal.SIGCONT)
        said, began = "", 0.0
        assert self.process.stderr is not None
        for line in self.process.stderr:
            said += line
            if not (match := EPOCH_LINE.search(line)):
                continue
            step, steps = int(match[2]), int(match[3])
            cpu = processor_seconds(self.process.pid)
            if step == 0:
                began = cpu
            if step == steps - 1:
                os.killpg(self.process.pid, signal.SIGSTOP)
                self.held = True
                seconds, rate, waited = (float(match[n]) for n in (4, 5, 6))
                batch = round(rate * seconds)
                return {
                    "images": batch * steps,
                    "per_second": rate,
                    "per_cpu_second": batch * (steps - 1) / (cpu - began),
                    "data_share": waited / seconds,
                }
        raise SystemExit(f"{self.name} ended early:\n{said[-2000:]}")

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def processor_seconds(group: int) -> float:
    """Of all processes of a group that are alive."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def in_turns(makers: dict[str, Callable[[], Ours | Timm]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """What each configuration did in every round after its warm-up."""
    sides: dict[str, Ours | Timm] = {}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in makers}
    try:
        for name, make in makers.items():
            sides[name] = make()
            sides[name].epoch()
        for number in range(rounds):
            for name, side in sides.items():
                found[name].append(side.epoch())
            rates = ", ".join(f"{name} {rows[-1]['per_second']:.1f}" for name, rows in found.items())
            print(f"round {number + 1}, images/s: {rates}", flush=True)
    finally:
        for side in sides.values():
            side.close()
    return found


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def compared(found: dict[str, list[dict[str, float]]], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Medians of each configuration, and ratios within a round."""
    kinds = ("per_second", "per_cpu_second")
    configurations = {
        name: {key: summary([row[key] for row in rows]) for key in (*kinds, "data_share")}
        for name, rows in found.items()
    }
    ratios = {
        f"{one} / {other}": {
            kind: summary([a[kind] / b[kind] for a, b in zip(found[one], found[other], strict=True)]) for kind in kinds
        }
        for one, other in pairs
    }
    print("| configuration | images/s | images per processor second | waiting for data |\n|---|---|---|---|")
    for name, row in configurations.items():
        print(f"| {name} | {words(row['per_second'], 1)} | {words(row['per_cpu_second'], 1)} |", end=" ")
        print(f"{100 * row['data_share']['median']:.1f} % |")
    print("\n| ratio | by the clock | by processor seconds |\n|---|---|---|")
    for name, row in ratios.items():
        print(f"| {name} | {words(row['per_second'], 2)} | {words(row['per_cpu_second'], 2)} |")
    print(flush=True)
    return {"configurations": configurations, "ratios": ratios, "rounds": found}


def words(numbers: dict[str, float], digits: int) -> str:
    median, least, most = (f"{numbers[key]:.{digits}f}" for key in ("median", "least", "most"))
    return f"{median} ({least}-{most})"


# What our processes do ------------------------------------------------------------------------------------------------


def job(spec: dict[str, Any]) -> None:
    """Train an epoch for each turn, and write down what it took."""
    import torch

    from netsmith.tasks import open_task
    from netsmith.train.loop import train
    from netsmith.train.replicas import joined

    torch.set_num_threads(spec["threads"])
    folder, name = Path(spec["turns"]), spec["name"]
    task = open_task(f"folder:{spec['data']}", resolution=spec["pixels"])
    network, recipe = made(spec["network"], task.classes), recipe_of(spec)
    with joined(spec["device"]) as replica:
        turn, before = 0, 0.0

        def wait() -> None:
            nonlocal before
            while not (folder / f"{name}.go{turn}").exists():
                time.sleep(0.01)
            before = time.process_time()

        def ended(epoch: dict[str, float]) -> None:
            nonlocal turn
            images = len(task.split("trainval"))
            done = {
                "images": images,
                "per_second": images / epoch["seconds"],
                "cpu_seconds": time.process_time() - before,
                "data_share": epoch["data_share"],
            }
            file = folder / f"{name}.{replica.rank}.{turn}.json"
            file.with_suffix(".part").write_text(json.dumps(done))
            file.with_suffix(".part").rename(file)
            turn += 1
            wait()

        wait()
        train(
            network, task, recipe, split="trainval", on_epoch=ended, replica=replica, device=spec["device"],
            compiled=spec["compile"],
        )  # fmt: skip


def made(network: str, classes: int, stem_stride: int = 2):
    """EfficientNet-B0 of timm or ours, neither with dropout or drop path: equal work."""
    if network == "timm":
        from timm import create_model

        return create_model("efficientnet_b0", num_classes=classes)
    from netsmith.spaces.networks import efficientnet

    return efficientnet("b0", classes, stem_stride=stem_stride, dropout=0.0, drop_path=0.0)


def recipe_of(spec: dict[str, Any]):
    from netsmith.train.recipe import Recipe

    return Recipe(
        epochs=spec["epochs"],
        batch_size=spec["batch"],
        learning_rate=RATE,
        weight_decay=DECAY,
        schedule="constant",
        warmup_epochs=0.0,
        ema=EMA if spec.get("ema") else None,
        norm_replicas=spec.get("norm_replicas"),
        precision="bf16" if spec["device"] == "cuda" else "fp32",
    )


# Parts ----------------------------------------------------------------------------------------------------------------


def timm_part(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Our loop beside timm's script, with and without an average of the weights."""
    timm, ours = sides_of(asked, scratch)
    average = ("--model-ema", "--model-ema-decay", str(EMA))
    makers = {
        "timm": timm("timm"),
        "ours": ours("ours"),
        "timm, a worker more": timm("timm worker", workers=asked.workers + 1),
        "ours, own network": ours("own", network="netsmith"),
        "timm, average": timm("timm average", more=average),
        "ours, average": ours("ours average", ema=True),
    }
    pairs = [
        ("ours", "timm"), ("ours, own network", "timm"), ("ours", "timm, a worker more"),
        ("timm, a worker more", "timm"), ("ours, average", "timm, average"),
    ]  # fmt: skip
    return compared(in_turns(makers, asked.rounds), pairs)


def memory_part(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """How much of the difference is `train/allocator.py`: timm's script under the same settings of malloc."""
    timm, ours = sides_of(asked, scratch)
    makers = {
        "timm": timm("timm"),
        "timm, freed memory kept": timm("timm kept", environment=KEPT),
        "ours": ours("ours"),
    }
    pairs = [("timm, freed memory kept", "timm"), ("ours", "timm, freed memory kept"), ("ours", "timm")]
    return compared(in_turns(makers, asked.rounds), pairs)


def sides_of(asked: argparse.Namespace, scratch: Path) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What makes a configuration of timm's, and of ours: same photographs, network, optimizer and augmentation."""
    data = unpacked(asked.photographs, scratch, asked.steps * asked.batch, asked.batch)
    epochs = asked.rounds + 2  # the first warms up, and none ends the process before it is told to
    options = [
        "--data-dir", str(data), "--val-split", "val", "--model", "efficientnet_b0", "--num-classes", "6",
        "--img-size", str(asked.pixels), "-b", str(asked.batch), "--opt", "sgd", "--momentum", "0.9",
        "--lr", str(RATE), "--weight-decay", str(DECAY), "--sched", "step", "--decay-epochs", "1000",
        "--warmup-epochs", "0", "--epochs", str(epochs), "--scale", *map(str, AREA), "--color-jitter", "0",
        "--train-interpolation", "bilinear", "--smoothing", "0.1", "--device", asked.device, "--channels-last",
        "--log-interval", "100000", "--output", str(scratch / "timm"), "--checkpoint-hist", "1",
    ]  # fmt: skip
    if asked.device == "cuda":
        options += ["--amp", "--amp-dtype", "bfloat16"]
    if asked.compile:
        options += ["--torchcompile"]
    spec = {
        "data": str(data), "pixels": asked.pixels, "batch": asked.batch, "epochs": epochs, "threads": 1,
        "device": asked.device, "compile": asked.compile,
    }  # fmt: skip

    def timm(
        name: str,
        workers: int = asked.workers,
        more: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> Callable[[], Timm]:
        own = ["--workers", str(workers), "--experiment", name.replace(" ", "-"), *more]
        return lambda: Timm(name, asked.timm, [*options, *own], environment or {})

    def ours(name: str, network: str = "timm", ema: bool = False) -> Callable[[], Ours]:
        return lambda: Ours(name.replace(" ", "-"), scratch, {**spec, "network": network, "ema": ema})

    return timm, ours


def scaling_part(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The same global batch by one process with one and two threads, and by two processes of one thread each.

    Threads wait for each other by spinning, or asleep (OMP_WAIT_POLICY): on a shared machine that decides.
    """
    data = unpacked(asked.photographs, scratch, asked.steps * asked.batch, asked.batch)
    spec = {
        "data": str(data), "pixels": asked.pixels, "batch": asked.batch, "epochs": asked.rounds + 2, "threads": 1,
        "device": "cpu", "compile": False, "network": "netsmith",
    }  # fmt: skip
    variants = {
        "1 process, 1 thread": {},
        "1 process, 2 threads": {"threads": 2},
        "1 process, 2 threads that sleep": {"threads": 2, "asleep": True},
        "2 processes, own norms": {"replicas": 2, "norm_replicas": 1},
        "2 processes, joint norms": {"replicas": 2, "norm_replicas": 2},
    }

    def ours(name: str, more: dict[str, Any]) -> Callable[[], Ours]:
        return lambda: Ours(re.sub(r"\W+", "-", name), scratch, {**spec, **more})

    one = "1 process, 1 thread"
    pairs = [(name, one) for name in variants if name != one]
    pairs.append(("2 processes, joint norms", "2 processes, own norms"))
    return compared(in_turns({name: ours(name, more) for name, more in variants.items()}, asked.rounds), pairs)


def loader_part(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Batches alone, and training steps on a batch that is there: which of them is the limit."""
    import torch

    from netsmith.tasks import open_task
    from netsmith.train.allocator import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    data = unpacked(asked.photographs, scratch, 40 * asked.batch, asked.batch)
    tasks = {
        f"folder in memory, {asked.pixels} px": open_task(f"folder:{data}", resolution=asked.pixels),
        f"shards, {asked.pixels} px": open_task(f"shards:{sharded(data, scratch)}", resolution=asked.pixels),
        "cifar10, 32 px": open_task("cifar10", limit=max(50, 50 * asked.batch)),
    }
    steps = {}
    for task in tasks.values():
        if task.resolution not in steps:
            steps[task.resolution] = training_step(task, asked.batch)
    found: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in tasks}
    for number in range(asked.rounds):
        for name, task in tasks.items():
            for loaders in (0, 2):
                row = read(task, asked.batch, number, loaders)
                found[name].setdefault(f"loaders {loaders}", []).append(row)
            found[name].setdefault("compute", []).append(steps[task.resolution]())
    rows = {}
    print("| images | read, loaders 0 | read, loaders 2 | compute | read / compute, loaders 0 | loaders 2 | limit |")
    print("|---" * 7 + "|")
    for name, sides in found.items():
        rates = {side: summary([row["per_second"] for row in runs]) for side, runs in sides.items()}
        ratios = {
            side: summary(
                [a["per_second"] / b["per_second"] for a, b in zip(sides[side], sides["compute"], strict=True)]
            )
            for side in ("loaders 0", "loaders 2")
        }
        share = 1 / (1 + ratios["loaders 0"]["median"])
        best = max(row["median"] for row in ratios.values())
        limit = "compute" if best > 1 else "data"
        rows[name] = {"images_per_second": rates, "read_over_compute": ratios, "expected_share": share, "limit": limit}
        cells = [name, *(words(rates[side], 0) for side in ("loaders 0", "loaders 2", "compute"))]
        cells += [words(ratios[side], 1) for side in ("loaders 0", "loaders 2")]
        print("| " + " | ".join([*cells, f"{limit} (data {100 * share:.1f} % of a step)"]) + " |", flush=True)
    return {"tasks": rows, "rounds": found}


def read(task: Any, batch: int, epoch: int, loaders: int) -> dict[str, float]:
    """Augmented batches after the first, which waits for the loaders to start; no more than 30 of them."""
    batches = task.batches("train", batch, train=True, epoch=epoch, loaders=loaders)
    images, ahead = 0, 2 * loaders + 1  # what loaders have read while they started is not of this clock
    for _ in range(ahead):
        next(batches)
    start, busy = time.perf_counter(), time.process_time()
    for number, (_, labels) in enumerate(batches, 1):
        images += len(labels)
        if number == 30:
            break
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    batches.close()
    return {"per_second": images / seconds, "own_cpu_share": busy / seconds}


def training_step(task: Any, batch: int) -> Callable[[], dict[str, float]]:
    """Forward, loss, backward and SGD on one batch, six times; the first two are not counted."""
    import torch

    from netsmith.train.loop import loss_of
    from netsmith.train.optimizers import make_optimizer

    recipe = recipe_of({"epochs": 1, "batch": batch, "device": "cpu"})
    network = made("netsmith", task.classes, 1 if task.resolution < 64 else 2)
    network.to(memory_format=torch.channels_last).train()
    optimizer = make_optimizer(network, recipe)
    images, labels = next(task.batches("train", batch, train=True))

    def run() -> dict[str, float]:
        for number in range(6):
            if number == 2:
                start = time.perf_counter()
            optimizer.zero_grad()
            loss_of(network(images), labels, recipe).backward()
            optimizer.step()
        return {"per_second": 4 * len(labels) / (time.perf_counter() - start)}

    return run


def profile_part(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Where the seconds of our loop go: an epoch under torch.profiler, after one without it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from netsmith.tasks import open_task
    from netsmith.train.loop import train

    torch.set_num_threads(1)
    data = unpacked(asked.photographs, scratch, asked.steps * asked.batch, asked.batch)
    task = open_task(f"folder:{data}", resolution=asked.pixels)
    recipe = recipe_of({"epochs": 2, "batch": asked.batch, "ema": True, "device": "cpu"})
    profiler = profile(activities=[ProfilerActivity.CPU])
    epochs = []

    def ended(epoch: dict[str, float]) -> None:
        epochs.append(epoch["seconds"])
        if len(epochs) == 1:
            profiler.start()
        else:
            profiler.stop()

    train(made("netsmith", task.classes), task, recipe, split="trainval", on_epoch=ended)
    operators = {row.key: row.self_cpu_time_total / 1e6 for row in profiler.key_averages()}
    grouped: dict[str, float] = dict.fromkeys([*GROUPS, "other operators"], 0.0)
    for name, seconds in operators.items():
        fits = (group for group, parts in GROUPS.items() if any(part in name for part in parts))
        grouped[next(fits, "other operators")] += seconds
    grouped["outside operators"] = epochs[1] - sum(grouped.values())
    print("| where | share of an epoch |\n|---|---|")
    for name, seconds in sorted(grouped.items(), key=lambda item: -item[1]):
        print(f"| {name} | {100 * seconds / epochs[1]:.1f} % |", flush=True)
    dearest = dict(sorted(operators.items(), key=lambda item: -item[1])[:25])
    return {"seconds": {"plain": epochs[0], "profiled": epochs[1]}, "grouped": grouped, "operators": dearest}


# Data -----------------------------------------------------------------------------------------------------------------


def unpacked(archive: Path, scratch: Path, train: int, val: int) -> Path:
    """That many images of train/ and val/, chosen by a hash of their names, as folders of classes."""
    target = scratch / f"photographs-{train}"
    if target.exists():
        return target
    with tarfile.open(archive) as tar:
        members = sorted(tar.getmembers(), key=lambda member: hashlib.md5(member.name.encode()).digest())
        for split, count in (("train", train), ("val", val)):
            chosen = [member for member in members if member.isfile() and member.name.startswith(f"{split}/")][:count]
            if len(chosen) < count:
                raise SystemExit(f"{archive.name} has {len(chosen)} images in {split}/, {count} are needed")
            tar.extractall(target, chosen, filter="data")
    return target


def sharded(folder: Path, scratch: Path) -> Path:
    """The same images as webdataset shards of 256."""
    target = scratch / "shards"
    target.mkdir()
    for split in ("train", "val"):
        files = sorted((folder / split).rglob("*.jpg"), key=lambda file: hashlib.md5(file.name.encode()).digest())
        classes = sorted(path.name for path in (folder / "train").iterdir())
        for first in range(0, len(files), 256):
            with tarfile.open(target / f"{split}-{first // 256:03}.tar", "w") as tar:
                for file in files[first : first + 256]:
                    label = str(classes.index(file.parent.name)).encode()
                    for suffix, content in (("jpg", file.read_bytes()), ("cls", label)):
                        member = tarfile.TarInfo(f"{file.stem}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    return target


def parts_of(asked: argparse.Namespace) -> Iterator[tuple[str, Callable[[argparse.Namespace, Path], dict[str, Any]]]]:
    measures = (timm_part, memory_part, scaling_part, loader_part, profile_part)
    for name, measure in zip(PARTS, measures, strict=True):
        if asked.part not in (None, name):
            continue
        if name in ("timm", "memory") and not (asked.timm and asked.timm.is_file()):
            print("no timm beside ours: download train.py of huggingface/pytorch-image-models and name it by --timm\n")
            continue
        yield name, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="one alone; the others stay as they are in the results")
    parser.add_argument("--timm", type=Path, help="timm's train.py")
    parser.add_argument("--photographs", type=Path, help="a .tar of {train,val}/class/*.jpg")
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=4, help="after the warm-up")
    parser.add_argument("--workers", type=int, default=0, help="of timm; one more is measured too")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of the part timm")
    parser.add_argument("--compile", action="store_true", help="both sides through torch.compile, in the part timm")
    parser.add_argument("--name", default="throughput", help="of the file of results")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.job:
        job(asked.job)
        return
    if not (asked.photographs and asked.photographs.is_file()):
        parser.error("--photographs names no .tar")
    file = RESULTS / f"{asked.name}.json"
    earlier = json.loads(file.read_text()) if file.exists() else {}
    results = {name: earlier[name] for name in PARTS if name in earlier}
    for name, measure in parts_of(asked):
        started = machine("timm", "torchvision")
        print(f"## {name}\n", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(asked, Path(scratch))
        setting = {key: getattr(asked, key) for key in ("pixels", "batch", "steps", "rounds", "workers", "device")}
        results[name] = {"date": started["date"], "load": started["load"], "setting": setting, **found}
        save(asked.name, started, **{part: results[part] for part in PARTS if part in results})


if __name__ == "__main__":
    main()
