"""LANA (Molchanov et al. 2021, arXiv:2107.10624): replace layers of a trained network, learnt alone, chosen together.

Every candidate learns to do what the layer in its place does, on that layer's own input, so that all learn in parallel
and none needs the others. How much each alone harms the network is its price in accuracy; an integer program takes the
cheapest harm within the budget. The best of several such networks goes on to be fine-tuned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor, nn
from torch.nn import functional as F

from netsmith.cost.budget import Budget
from netsmith.cost.prices import Options
from netsmith.decisions import Architecture, Decision, Draw, OneOf, Option, decisions
from netsmith.errors import UserError
from netsmith.run import Run, atomically
from netsmith.search.problem import LAST_RESORT, LEARNT, Problem, prefer
from netsmith.spaces.from_model import ORIGINAL
from netsmith.train.checkpoint import load_state, save_state

BATCH = 128
"""Images at a time while scoring."""


@dataclass(frozen=True, kw_only=True)
class LANA:
    """Sections 3.1 to 3.3; the fine-tuning is the run's recipe, with distillation from the original network."""

    epochs: NonNegativeInt = 3
    """Passes of each candidate over the training images (one in the paper, of ImageNet's); 0: they stay as drawn."""
    batch_size: PositiveInt = 128
    """Images a step of these."""
    learning_rate: PositiveFloat = 3e-3
    """Of Adam, falling along a cosine (ours)."""
    pool: ClassVar = "small"
    """Of `netsmith compress`, where none is asked for."""
    score: Literal["loss", "kl"] = "loss"
    """What a replacement costs: the rise of the loss, or the divergence from the original's answers (Puzzle's)."""
    images: PositiveInt = 2000
    """Training images that replacements and networks are scored on (ours; the paper takes about 6,000)."""
    solutions: PositiveInt = 20
    """Networks of the integer program that are scored whole (K; 100 in the paper)."""
    overlap: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Choices that two of them may share (O / N)."""

    def refuses(self, decision: Decision) -> str | None:
        if isinstance(decision, OneOf) and ORIGINAL in decision.options:
            return None
        return "does not replace a layer of a network that is there (netsmith compress has such)"

    def search(self, problem: Problem, run: Run) -> list[Options]:
        space = problem.build()
        pool = {path: self._cheaper(problem, path) for path in problem.reference}
        if self.epochs:
            self.learn(problem, run, space, pool)
        values = self.values(problem, run, space, pool)
        weight = 1.0 + sum(max(map(abs, row.values())) for row in values.values())
        found = []
        for number, budgets in enumerate(problem.budgets):
            best = run.once(f"lana-best-{number}", lambda b=budgets: self.best(problem, run, space, values, b))
            found.append(prefer(values, best, weight))
        dearer = {path: dict.fromkeys(row, LAST_RESORT) for path, row in problem.latency.options.items()}
        return [{path: dearer[path] | dict(row) for path, row in values.items()} for values in found]

    def _cheaper(self, problem: Problem, path: str) -> list[Option]:
        """The candidates that take less time than the layer they would replace: the others have nothing to give."""
        row = problem.latency.options[path]
        own = row[problem.reference[path]]
        return [option for option, milliseconds in row.items() if milliseconds < own]

    # Phase 1: every candidate learns the layer in its place -------------------------------------------------------

    def learn(self, problem: Problem, run: Run, space: nn.Module, pool: dict[str, list[Option]]) -> None:
        """Train all candidates on what the original's layers receive and return; they end up in `LEARNT` and in
        ``space``."""
        layers, checkpoint = _layers(space), run.checkpoint("lana-pool.pt")
        places = [(path, option, layers[path].candidate(str(option))) for path in pool for option in pool[path]]
        learning = nn.ModuleDict({f"{path}.{option}".replace(".", "/"): part for path, option, part in places})
        if next(learning.parameters(), None) is None:
            return

        def learnt() -> int:
            optimizer = torch.optim.Adam(learning.parameters(), lr=self.learning_rate)
            epoch = 0
            if checkpoint.exists():
                state = load_state(checkpoint)
                learning.load_state_dict(state["candidates"])
                optimizer.load_state_dict(state["optimizer"])
                epoch = state["epoch"]
                run.rewind(state["mark"])
            while epoch < self.epochs:
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
                error = self._learn_epoch(problem, run, space, pool, optimizer, epoch)
                epoch += 1
                run.event("lana_epoch", epoch=epoch, error=error)
                run.progress("candidates learn", epoch, self.epochs, f"error {error:.3f} of the layers' outputs")
                state = {"candidates": learning.state_dict(), "optimizer": optimizer.state_dict()}
                save_state(checkpoint, {**state, "epoch": epoch, "mark": run.mark()})
            found = {
                name: tensor.contiguous().clone()
                for path, option, part in places
                for name, tensor in part.state_dict(prefix=f"{path}.{option}.").items()
            }
            with atomically(run.path / LEARNT) as temporary:
                temporary.write_bytes(serialised(found))
            return epoch

        run.once("lana-pool", learnt)
        checkpoint.unlink(missing_ok=True)
        for taught in (space, problem.supernet):
            taught.load_state_dict(load_file(run.path / LEARNT), strict=False)

    def _learn_epoch(
        self,
        problem: Problem,
        run: Run,
        space: nn.Module,
        pool: dict[str, list[Option]],
        optimizer: torch.optim.Optimizer,
        epoch: int,
    ) -> float:
        """One pass; returns the mean error over candidates and steps."""
        layers, errors = _layers(space), []
        batches = problem.task.batches("train", self.batch_size, train=True, seed=run.seed("lana"), epoch=epoch)
        space.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        space.eval()  # the original's norms stay as they are
        for images, _ in batches:
            with taken(space, problem.reference):
                seen = _features(space, layers, images)
            optimizer.zero_grad()
            for path, options in pool.items():
                for option in options:
                    candidate = layers[path].candidate(str(option))
                    if next(candidate.parameters(), None) is not None:
                        errors.append(regress(candidate, *seen[path]))
            optimizer.step()
        error = float(torch.stack(errors).mean())
        if not math.isfinite(error):
            raise UserError(
                f"the candidates' error became {error} in epoch {epoch + 1}: a lower learning_rate may help"
            )
        space.eval()
        return error

    # Phase 2: what each replacement costs, and the integer program -------------------------------------------------

    def values(self, problem: Problem, run: Run, space: nn.Module, pool: dict[str, list[Option]]) -> Options:
        """Minus the harm of every option, with all other layers the original's; the original's is exactly 0."""

        def scored() -> list:
            space.eval()
            batches = self._scoring_batches(problem)
            with taken(space, problem.reference):
                answers = [_logits(space, images) for images, _ in batches]
            own = self._harm(space, batches, answers, problem.reference)
            rows, total, done = [], sum(map(len, pool.values())), 0
            for path, options in pool.items():
                for option in options:
                    harm = self._harm(space, batches, answers, {**problem.reference, path: option}) - own
                    rows.append([path, option, harm])
                    done += 1
                    run.progress("replacements scored", done, total, f"{path} {option}: {harm:+.3f}")
            run.event("lana_scores", rows=rows)
            return rows

        values: Options = {path: {option: 0.0} for path, option in problem.reference.items()}
        for path, option, harm in run.once("lana-scores", scored):
            if math.isfinite(harm):
                values[path][option] = -harm
        return values

    def best(
        self, problem: Problem, run: Run, space: nn.Module, values: Options, budgets: list[Budget]
    ) -> Architecture:
        """The best of the program's networks, assembled and scored whole: harms do not quite add up."""
        space.eval()
        batches = self._scoring_batches(problem)
        with taken(space, problem.reference):
            answers = [_logits(space, images) for images, _ in batches]
        networks = problem.diverse(values, budgets, self.solutions, self.overlap)
        scored = []
        for number, network in enumerate(networks):
            scored.append(self._harm(space, batches, answers, network))
            run.progress("networks scored", number + 1, len(networks), f"{scored[-1]:.3f}")
        run.event("lana_networks", harm=scored, networks=networks)
        return networks[min(range(len(networks)), key=lambda i: (not math.isfinite(scored[i]), scored[i]))]

    def _scoring_batches(self, problem: Problem) -> list[tuple[Tensor, Tensor]]:
        """The first images of ``train``, as the test has its own."""
        batches = problem.task.batches("train", BATCH, train=False)
        return list(islice(batches, -(-self.images // BATCH)))

    def _harm(
        self, space: nn.Module, batches: list[tuple[Tensor, Tensor]], answers: list[Tensor], network: Architecture
    ) -> float:
        """The loss of a network, or its divergence from the original's ``answers``: a mean over images."""
        total = images = 0.0
        with taken(space, network):
            for (pictures, labels), answer in zip(batches, answers, strict=True):
                logits = _logits(space, pictures)
                if self.score == "loss":
                    total += float(F.cross_entropy(logits, labels, reduction="sum"))
                else:
                    total += float(
                        F.kl_div(logits.log_softmax(1), answer.log_softmax(1), reduction="sum", log_target=True)
                    )
                images += len(labels)
        return total / images


def regress(candidate: nn.Module, inputs: Tensor, wanted: Tensor) -> Tensor:
    """Add the gradients of ``|wanted - candidate(inputs)|^2 / |wanted|^2`` to the candidate's parameters and to no
    others; returns that error, a scalar. Both are ``(n, channels, height, width)`` and carry no gradient."""
    candidate.train()
    error = F.mse_loss(candidate(inputs), wanted) / wanted.square().mean().clamp_min(1e-12)
    error.backward()
    candidate.eval()
    return error.detach()


@contextmanager
def taken(space: nn.Module, network: Architecture) -> Iterator[None]:
    """Let ``space`` be the network that an architecture names."""
    for path, decision in decisions(space).items():
        decision.drawn = Draw([decision.index(network[path])], torch.ones(1))
    try:
        yield
    finally:
        for decision in decisions(space).values():
            decision.drawn = None


def _layers(space: nn.Module) -> dict[str, OneOf]:
    return {path: decision for path, decision in decisions(space).items() if isinstance(decision, OneOf)}


def _logits(space: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return space(images)


def _features(space: nn.Module, layers: dict[str, OneOf], images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What goes into every layer and what comes out, in one pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(path: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # An activation in place may write over either before the candidates read it.
            seen[path] = inputs[0].clone(), output.clone()

        return hook

    handles: Iterable = [layer.register_forward_hook(note(path)) for path, layer in layers.items()]
    with torch.no_grad():
        space(images)
    for handle in handles:
        handle.remove()
    return seen
