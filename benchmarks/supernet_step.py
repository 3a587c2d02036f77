"""What a step of a search costs: time and memory, as ratios to the largest single network of the same space.

    python benchmarks/supernet_step.py                                   # ours, some five minutes
    python benchmarks/supernet_step.py --nni-python SCRATCH/bin/python   # NNI 3.0's DARTS and ProxylessNAS beside it
    python benchmarks/supernet_step.py --plinio CLONE                    # PLiNIO's supernet (eml-eda/plinio at 3d6b5e0)

The space: stem 16, six layers 16-24-24-40-40-80-80 with stride 2 on the odd ones, MBConv, kernel 3 or 5, expansion 1, 3
or 6; 32 px, batch 64, one thread. For PruNet the same macro with one open width (up to expansion 6) per kernel. The
largest single network has kernel 5 and expansion 6 throughout. For RepNAS the same channels and strides with its six
branches in every layer, of which a third run; its ratios are to the network with all of them.

Every configuration is a process of its own. Eight at a time take turns, one step each, beside the largest network, so
that slow phases of the machine hit all alike; a time is the median of processor seconds. `saved` is what autograd
keeps for the backward pass, in bytes and without parameters, exact and the same every time; `grown` is by how much
the largest resident size of the process (ru_maxrss) grew over that before the network was built. A weight step is
forward, backward, clipping and SGD, an architecture step forward, backward to the logits and Adam, both as
`search/differentiable.py` has them.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

BATCH, PIXELS, CLASSES = 64, 32, 10
WIDTHS = (16, 24, 24, 40, 40, 80, 80)
PLACES = ("start", "middle", "end")
TOGETHER = 8
"""Processes that take turns."""
PROCESSES = 3
"""Fresh ones for each number of widths: the median counts, for allocators differ from start to start."""
SUPERNETS = (
    "fbnet-all",
    "fbnet-one",
    "proxylessnas-two_path",
    "proxylessnas-binary",
    "proxylessnas-reinforce",
    "darts-first",
    "darts-second",
    "rarts-gauss_seidel",
    "rarts-jacobi",
)
"""RARTS has no weight step of its own after the warm-up: its architecture step is the whole round of w, y and alpha."""
ONE_STEP = ("pad_nas", "repnas")
"""PAD-NAS learns no logits; RepNAS learns them in the weight step."""
BASE = {"repnas": "branches", "branches": "branches"}
"""The largest single network where it is another one."""
ASKED = {
    "prunet_start": 2.5, "prunet_mean": 1.8, "widths_percent": 5.0,
    "proxylessnas_seconds": 1.5, "proxylessnas_saved": 1.3, "darts_seconds": 7.5,
}  # fmt: skip


# What is measured. The processes import only what they need, for NNI's lacks our dependencies. -----------------------


def network(candidates: Callable[[int, int, int], nn.Module]) -> nn.Module:
    from netsmith.blocks.mobile import ConvBn

    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=ConvBn(3, WIDTHS[0], 3))
    for i, (inputs, outputs) in enumerate(pairwise(WIDTHS)):
        parts[f"layer{i}"] = candidates(inputs, outputs, 2 if i % 2 == 0 else 1)
    parts.update(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), linear=nn.Linear(WIDTHS[-1], CLASSES))
    return nn.Sequential(parts)


def blocks(inputs: int, outputs: int, stride: int) -> dict[str, nn.Module]:
    from netsmith.blocks.mobile import MBConv

    return {
        f"k{k}_e{e}": MBConv(inputs, outputs, kernel=k, hidden=e * inputs, stride=stride)
        for k in (3, 5)
        for e in (1, 3, 6)
    }


def choices() -> nn.Module:
    from netsmith.decisions import OneOf

    return network(lambda i, o, s: OneOf(blocks(i, o, s)))


def branches(inputs: int, outputs: int, stride: int) -> nn.Module:
    from netsmith.blocks.reparam import Branches

    return Branches(inputs, outputs, stride=stride)


def open_widths(count: int) -> Callable[[int, int, int], nn.Module]:
    """Per kernel a block that offers `count` widths from expansion 1 to 6; 0: multiples of 8."""
    from netsmith.blocks.mobile import MBConv
    from netsmith.decisions import OneOf, Width

    def layer(inputs: int, outputs: int, stride: int) -> nn.Module:
        offered = range(inputs, 6 * inputs + 1, 8)
        if count:
            offered = [inputs + round(i * 5 * inputs / (count - 1)) for i in range(count)]
        return OneOf({f"k{k}": MBConv(inputs, outputs, kernel=k, hidden=Width(offered), stride=stride) for k in (3, 5)})

    return layer


class Batch:
    """One fixed batch, standing in for a task."""

    input_shape = (3, PIXELS, PIXELS)

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(BATCH, 3, PIXELS, PIXELS, generator=generator)
        self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(CLASSES, (BATCH,), generator=generator)

    def without_test(self) -> Batch:
        return self

    def batches(self, *_: object, **__: object):
        yield self.images, self.labels


Step = Callable[[], None]


def ours(name: str) -> tuple[Step, Step | None]:
    """(weight step, architecture step) of "largest", "fixed", "branches", "prunet-COPIES[-WIDTHS]" or
    METHOD[-VARIANT]."""
    kind, *options = name.split("-")
    if kind in ("largest", "fixed"):  # runs in NNI's Python too
        option = {"largest": "k5_e6", "fixed": "k3_e3"}[kind]
        return plain_step(network(lambda i, o, s: blocks(i, o, s)[option])), None
    if kind == "branches":
        from netsmith.decisions import decisions, derive

        space = network(branches)
        return plain_step(derive(space, dict.fromkeys(decisions(space), "on"))), None

    from netsmith.search.differentiable import Loop, Steps

    build = {"prunet": prunet, "pad_nas": pad_nas, "repnas": repnas}.get(kind, functools.partial(supernet, kind))
    problem, searcher = build(*options)
    warmup = 0 if searcher.joint else 100  # nothing is pruned in it
    loop = Loop(problem, searcher, Steps(epochs=1000, warmup_epochs=warmup))
    batch = Batch()

    def weight() -> None:
        searcher.supernet.train()
        searcher.weight_step(loop, (batch.images, batch.labels)).item()

    def architecture() -> None:
        searcher.supernet.train()
        searcher.architecture_step(loop, (batch.images, batch.labels), (batch.images, batch.labels)).item()

    return weight, architecture if searcher.parameters() and not searcher.joint else None


def prunet(copies: str, count: str = "0"):
    from netsmith.methods.prunet import PruNet, Pruning

    problem = problem_of(lambda: network(open_widths(int(count))))
    method = PruNet(copies=copies, headroom=0.0, check_every=10**9)  # pyright: ignore[reportArgumentType]
    return problem, Pruning(method, problem, problem.budgets[0], {})


def pad_nas():
    from netsmith.methods.pad_nas import SinglePath

    problem = problem_of(choices)
    return problem, SinglePath(problem, [])


def repnas():
    from netsmith.methods.repnas import RepNAS, Sampled

    problem = problem_of(lambda: network(branches))
    return problem, Sampled(problem, RepNAS().count(problem, []))


def supernet(kind: str, variant: str = ""):
    """The searcher of a method whose options all stay, every layer a choice of six blocks."""
    from netsmith.methods import make_method
    from netsmith.methods.darts import Relaxed
    from netsmith.methods.fbnet import Stochastic
    from netsmith.methods.proxylessnas import Gated, Sampled
    from netsmith.methods.rarts import Pair

    option = {"fbnet": "paths", "proxylessnas": "gradient", "darts": "order", "rarts": "order"}[kind]
    method = make_method(kind, {option: variant})
    build = {"fbnet": Stochastic, "darts": Relaxed, "rarts": Pair, "proxylessnas": Gated}[kind]
    build = Sampled if variant == "reinforce" else build
    problem = problem_of(choices)
    return problem, build(method, problem, problem.budgets[0], [])


def problem_of(build: Callable[[], nn.Module]):
    """The search problem under half the multiply-accumulates of the largest network, which stand in for its latency."""
    from netsmith.cost.budget import Budget
    from netsmith.cost.counts import Macs
    from netsmith.cost.prices import tabulate
    from netsmith.search.problem import Problem
    from netsmith.train.recipe import Recipe

    prices = tabulate(build(), Macs(), Batch.input_shape)
    problem = Problem(Batch(), build, [], prices, Recipe())
    problem.budgets = [[Budget("latency", 0.5 * prices.of(problem.reference), "ms")]]
    return problem


def plain_step(model: nn.Module) -> Step:
    """The weight step of a network with nothing open."""
    batch, model = Batch(), model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)

    def step() -> None:
        loss = F.cross_entropy(model(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        loss.item()

    return step


def nni(name: str) -> tuple[Step, Step | None]:
    """NNI's supernets, stepped as its `DartsLightningModule.training_step` does, without the trainer around it."""
    import warnings

    warnings.simplefilter("ignore")
    from nni.nas.nn.pytorch import LayerChoice, ModelSpace
    from nni.nas.strategy import DARTS, Proxyless

    class Space(ModelSpace):
        def __init__(self) -> None:
            super().__init__()
            number = iter(range(10))
            self.net = network(lambda i, o, s: LayerChoice(blocks(i, o, s), label=f"layer{next(number)}"))

        def forward(self, x):
            return self.net(x)

    strategy = {"darts": DARTS, "proxyless": Proxyless}[name.removeprefix("nni-")]()
    model = strategy.mutate_model(Space()).to(memory_format=torch.channels_last)
    choices = [module for module in model.modules() if hasattr(module, "_arch_alpha")]
    assert len(choices) == 6
    alphas = list({id(module._arch_alpha): module._arch_alpha for module in choices}.values())
    known = {id(alpha) for alpha in alphas}
    weights = [p for p in model.parameters() if id(p) not in known]
    sgd = torch.optim.SGD(weights, 0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
    adam = torch.optim.Adam(alphas, 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    batch = Batch()

    def resample() -> None:
        memo: dict = {}
        for module in choices:
            memo.update(module.resample(memo))

    def architecture() -> None:
        resample()
        adam.zero_grad()
        loss = F.cross_entropy(model(batch.images), batch.labels)
        loss.backward()
        adam.step()
        loss.item()

    def weight() -> None:
        resample()
        loss = F.cross_entropy(model(batch.images), batch.labels)
        sgd.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 5.0)
        sgd.step()
        loss.item()

    model.train()
    return weight, architecture


def plinio(_: str) -> tuple[Step, None]:
    """PLiNIO's supernet: one step trains weights and choices together, loss plus cost."""
    from plinio.cost import params
    from plinio.methods import SuperNet
    from plinio.methods.supernet import SuperNetModule

    space = network(lambda i, o, s: SuperNetModule(list(blocks(i, o, s).values())))
    model = SuperNet(space, cost=params, input_shape=Batch.input_shape).to(memory_format=torch.channels_last)
    sgd = torch.optim.SGD([p for _, p in model.named_net_parameters()], 0.05, momentum=0.9, weight_decay=1e-4)
    adam = torch.optim.Adam([p for _, p in model.named_nas_parameters()], 3e-4)
    batch = Batch()

    def step() -> None:
        loss = F.cross_entropy(model(batch.images), batch.labels) + 1e-6 * model.cost
        sgd.zero_grad()
        adam.zero_grad()
        loss.backward()
        sgd.step()
        adam.step()
        loss.item()

    model.train()
    return step, None


def saved_bytes(step: Step) -> int:
    """Bytes of all tensors that autograd keeps during a step, each once, parameters left out."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            base = tensor._base
            if base is None or not isinstance(base, nn.Parameter):
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(name: str, which: str) -> None:
    """A step for every line on stdin; the answer is its processor seconds. The last answer is the memory."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make = {"nni": nni, "plinio": plinio}.get(name.split("-")[0], ours)
    plain_step(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)))()
    before = resident()
    weight, architecture = make(name)
    step = weight if which == "weight" else architecture
    assert step is not None
    step()
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() != "end":
            started = time.process_time()
            step()
            print(time.process_time() - started, flush=True)
            continue
        grown = resident() - before
        print(json.dumps({"saved": saved_bytes(step), "grown": grown, "torch": torch.__version__}), flush=True)


# The one who asks. ----------------------------------------------------------------------------------------------------


class Worker:
    plinio = ""
    """Folder that holds the package."""

    def __init__(self, python: str, name: str, which: str) -> None:
        self.python, self.name, self.which, self.seconds = python, name, which, []
        paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1] / "src"), self.plinio])}
        self.process = subprocess.Popen(
            [python, __file__, "--serve", name, which],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=paths,
        )  # fmt: skip
        if self.answer() != "ready":
            raise RuntimeError(f"{name} {which} did not start")

    def answer(self) -> str:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line[0] in "r0123456789{":
                return line.strip()
        raise RuntimeError(f"{self.name} {self.which} ended")

    def ask(self, text: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return self.answer()

    def step(self) -> None:
        self.seconds.append(float(self.ask("step")))

    def end(self) -> dict:
        memory = json.loads(self.ask("end"))
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        return memory


def compare(kinds: list[tuple[str, str, str]], rounds: int) -> list[dict]:
    """A row per (python, name, step). They run a few at a time, since each process keeps up to a gigabyte, every few
    beside the largest network in the same python."""
    rows = [row for group in batched(kinds, TOGETHER) for row in _in_turn(group, rounds)]
    first = {(row["name"], row["step"], row["torch"]): row for row in reversed(rows)}
    return [row for row in rows if row is first[row["name"], row["step"], row["torch"]]]


def batched(kinds: list, count: int) -> list[list]:
    return [kinds[i : i + count] for i in range(0, len(kinds), count)]


def _in_turn(group: list[tuple[str, str, str]], rounds: int) -> list[dict]:
    largest = dict.fromkeys((python, BASE.get(name, "largest"), "weight") for python, name, _ in group)
    workers = [Worker(*kind) for kind in dict.fromkeys([*largest, *group])]
    for _ in range(rounds):
        for worker in workers:
            worker.step()
    rows = []
    for worker in workers:
        times = sorted(worker.seconds)
        row = {"name": worker.name, "step": worker.which, "seconds": statistics.median(times),
               "quartiles": [times[len(times) // 4], times[-1 - len(times) // 4]], **worker.end()}  # fmt: skip
        rows.append(row)
        wanted = row["torch"], BASE.get(row["name"], "largest")
        base = next(other for other in rows if (other["torch"], other["name"]) == wanted)
        for key in ("seconds", "saved", "grown"):
            row[f"{key}_ratio"] = row[key] / base[key]
    return rows


def over_a_search(copies: str, headroom: float, epochs: int, steps: int) -> dict:
    """Run PruNet's search on CIFAR-10 images at a small batch, and after every epoch time both steps at batch 64.

    The structure after each epoch is what counts; each time is a ratio to the largest network's step right before it.
    """
    from netsmith.methods.prunet import PruNet, Pruning
    from netsmith.search.differentiable import Loop, Steps
    from netsmith.search.sampling import capacity
    from netsmith.tasks import open_task

    torch.manual_seed(0)
    small = 16
    task = open_task("cifar10", limit=round(2 * steps * small), search_fraction=0.5)
    problem = problem_of(lambda: network(open_widths(0)))
    problem.task = task.without_test()
    start = problem.allocate(capacity(problem), problem.budgets[0])
    searcher = Pruning(PruNet(copies=copies, headroom=headroom), problem, problem.budgets[0], start)
    loop = Loop(problem, searcher, Steps(epochs=epochs, warmup_epochs=epochs // 5, batch_size=small))
    largest = ours("largest")[0]
    batch, found = Batch(), []
    generator = torch.Generator().manual_seed(1)

    def timed(step: Step) -> float:
        started = time.process_time()
        step()
        return time.process_time() - started

    def weight() -> None:
        searcher.supernet.train()
        searcher.draw(generator, learning=False)
        F.cross_entropy(searcher.supernet(batch.images), batch.labels).backward()

    def architecture() -> None:
        from netsmith.search.differentiable import weights

        frozen = weights(searcher.supernet)
        for parameter in frozen:
            parameter.requires_grad_(False)
        searcher.draw(generator, learning=True)
        loss = searcher.objective(F.cross_entropy(searcher.supernet(batch.images), batch.labels))
        if loss.requires_grad:  # else all is decided
            loss.backward()
        for parameter in frozen:
            parameter.requires_grad_(True)

    for epoch in range(epochs):
        before = {name: tensor.clone() for name, tensor in searcher.supernet.state_dict().items()}
        pairs = {"weight": [], "architecture": []}
        for _ in range(3):
            base = timed(largest)
            pairs["weight"].append(timed(weight) / base)
            pairs["architecture"].append(timed(architecture) / base)
        memory = {"weight": saved_bytes(weight), "architecture": saved_bytes(architecture)}
        for parameter in searcher.supernet.parameters():
            parameter.grad = None
        searcher.supernet.load_state_dict(before)
        found.append(
            {
                "epoch": epoch,
                "learning": epoch >= loop.steps.warmup_epochs,
                **{name: statistics.median(values) for name, values in pairs.items()},
                "saved": memory,
                "blocks": sum(len(layer.options) for layer in searcher.layers().values()),
                "open_widths": sum(not node.closed for node in searcher._alive_prunodes().values()),
            }
        )
        loop.train_epoch(0)
    learning = [row for row in found if row["learning"]]
    # Every epoch has weight steps; architecture steps only those after the warm-up, as many again.
    mean = (sum(r["weight"] for r in found) + sum(r["architecture"] for r in learning)) / (len(found) + len(learning))
    single = saved_bytes(largest)
    for row in found:
        row["saved"] = {name: value / single for name, value in row["saved"].items()}
    return {
        "copies": copies,
        "headroom": headroom,
        "epochs": epochs,
        "mean": mean,
        "weight_mean": statistics.mean(r["weight"] for r in found),
        "architecture_mean": statistics.mean(r["architecture"] for r in learning),
        "start": found[0],
        "middle": found[len(found) // 2],
        "end": found[-1],
        "saved_mean": statistics.mean(
            [r["saved"]["weight"] for r in found] + [r["saved"]["architecture"] for r in learning]
        ),
        "course": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nni-python", default="", help="a Python with NNI 3.0; without it NNI is left out")
    parser.add_argument("--plinio", default="", help="the folder of PLiNIO's sources; without it PLiNIO is left out")
    parser.add_argument("--rounds", type=int, default=7, help="steps of every configuration")
    parser.add_argument("--epochs", type=int, default=10, help="of the searches that are followed")
    parser.add_argument("--steps", type=int, default=15, help="of each kind in an epoch of those searches")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(*asked.serve)
        return
    from machine import machine, save

    torch.set_num_threads(1)
    started, own = machine(), sys.executable
    kinds = [(own, "largest", "weight"), (own, "fixed", "weight")]
    prunets = ["prunet-shared", "prunet-separate"]
    for name in (*SUPERNETS, *prunets):
        kinds += [(own, name, "weight"), (own, name, "architecture")]
    kinds += [(own, name, "weight") for name in ONE_STEP]
    if asked.nni_python:
        kinds.append((asked.nni_python, "largest", "weight"))  # their torch may be another
        for name in ("nni-darts", "nni-proxyless"):
            kinds += [(asked.nni_python, name, "weight"), (asked.nni_python, name, "architecture")]
    if asked.plinio:
        Worker.plinio = asked.plinio
        kinds.append((own, "plinio-supernet", "weight"))
    rows = compare(kinds, asked.rounds)
    print("| configuration | step | CPU s (quartiles) | time | saved | grown |\n|---|---|---|---|---|---|")
    for r in rows:
        low, high = r["quartiles"]
        print(f"| {r['name']} | {r['step']} | {r['seconds']:.3f} ({low:.3f}-{high:.3f}) | x{r['seconds_ratio']:.2f} | "
              f"x{r['saved_ratio']:.2f} | x{r['grown_ratio']:.2f} |")  # fmt: skip
    widths = []
    for copies in ("shared", "separate"):
        for count in (4, 8, 16, 32, 64):
            ends = []
            for _ in range(PROCESSES):
                worker = Worker(own, f"prunet-{copies}-{count}", "architecture")
                worker.step()
                ends.append(worker.end())
            middle = {key: statistics.median(end[key] for end in ends) for key in ("saved", "grown")}
            widths.append({"copies": copies, "widths": count, **middle})
    flat = {}
    for copies in ("shared", "separate"):
        for key in ("saved", "grown"):
            values = [row[key] for row in widths if row["copies"] == copies]
            flat[f"{copies}_{key}_percent"] = 100 * (max(values) / min(values) - 1)
    print("4 to 64 widths, largest over smallest:", ", ".join(f"{k} {v:.1f}" for k, v in flat.items()), flush=True)
    searches = []
    for copies, headroom in (("shared", 2.0), ("shared", 0.0), ("separate", 0.0)):
        found = over_a_search(copies, headroom, asked.epochs, asked.steps)
        searches.append(found)
        course = ", ".join(f"{k} {found[k]['weight']:.2f}/{found[k]['architecture']:.2f}" for k in PLACES)
        print(
            f"prunet {copies}, headroom {headroom}: mean x{found['mean']:.2f} (weight steps "
            f"{found['weight_mean']:.2f}, architecture {found['architecture_mean']:.2f}), saved "
            f"x{found['saved_mean']:.2f}; weight/architecture: {course}",
            flush=True,
        )
    save("supernet_step", started, asked=ASKED, rows=rows, widths=widths, flat=flat, searches=searches)


if __name__ == "__main__":
    main()
