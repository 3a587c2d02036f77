"""How open options are mixed in a forward pass.

A gate turns a decision's logits into a `Draw`: which options run, with which weights. `draw` draws for every decision
that the pass will reach; the forward pass itself is then deterministic, and an expected cost can use the same draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netsmith.decisions import Draw, Option, decisions, walk

Gate = Callable[[Tensor, torch.Generator], Draw]


def softmax(logits: Tensor, generator: torch.Generator) -> Draw:
    """All options, weighted by their probabilities (DARTS)."""
    return Draw(list(range(len(logits))), logits.softmax(0))


@dataclass(frozen=True)
class Gumbel:
    """All options, weighted by a sample of the relaxed one-hot distribution (FBNet section 3.2; Jang et al. 2017).

    m_i = softmax_i((theta_i + g_i) / tau), g_i ~ Gumbel(0, 1).
    """

    temperature: float = 5.0

    def __call__(self, logits: Tensor, generator: torch.Generator) -> Draw:
        uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp_min(1e-20)
        noise = -(-uniform.log()).log()
        weights = ((logits + noise.to(logits)) / self.temperature).softmax(0)
        return Draw(list(range(len(logits))), weights)


def single_path(logits: Tensor, generator: torch.Generator) -> Draw:
    """One option, drawn from the probabilities; its weight is 1 and carries no gradient."""
    index = int(torch.multinomial(logits.detach().softmax(0).cpu(), 1, generator=generator))
    return Draw([index], torch.ones(1, dtype=logits.dtype, device=logits.device))


def uniform_path(logits: Tensor, generator: torch.Generator) -> Draw:
    """One option, every option equally likely: fair training of all before any is preferred."""
    index = int(torch.randint(len(logits), (1,), generator=generator))
    return Draw([index], torch.ones(1, dtype=logits.dtype, device=logits.device))


def binary(logits: Tensor, generator: torch.Generator) -> Draw:
    """One option, drawn from the probabilities p, as a binary gate g: a weight of 1 that carries the gradient
    dL/dalpha_i = sum_j dL/dg_j p_j (delta_ij - p_i), for which the others run as well (ProxylessNAS section 3.2)."""
    active = int(torch.multinomial(logits.detach().softmax(0).cpu(), 1, generator=generator))
    return _binary(logits, [active, *(i for i in range(len(logits)) if i != active)])


def two_path(logits: Tensor, generator: torch.Generator) -> Draw:
    """A `binary` gate between two options only, drawn by their probabilities (ProxylessNAS section 3.2.1): whatever
    the number of options, two run."""
    pair = torch.multinomial(logits.detach().softmax(0).cpu(), min(2, len(logits)), generator=generator).tolist()
    chances = logits.detach()[pair].softmax(0).cpu()
    active = int(torch.multinomial(chances, 1, generator=generator))
    return _binary(logits, [pair[active], *(i for i in pair if i != pair[active])])


def _binary(logits: Tensor, indices: list[int]) -> Draw:
    q = logits[indices].softmax(0)
    gates = torch.zeros_like(q)
    gates[0] = 1
    return Draw(indices, gates + (q - q.detach()), binary=True)


def draw(model: nn.Module, gate: Gate | Mapping[str, Gate], generator: torch.Generator) -> None:
    """Draw for every decision of ``model`` that the next pass reaches, and forget what was drawn for the others; with a
    mapping, one gate per decision path."""
    ran: set[tuple[str, Option]] = set()
    for path, decision, owner in walk(model):
        decision.drawn = None
        if owner is None or owner in ran:
            decision.drawn = (gate[path] if isinstance(gate, Mapping) else gate)(decision.logits, generator)
            ran |= {(path, decision.options[i]) for i in decision.drawn.indices}


def fix(model: nn.Module, architecture: Mapping[str, Option]) -> None:
    """Run exactly ``architecture`` inside the supernet, until the next draw."""
    for path, decision in decisions(model).items():
        if path in architecture:
            decision.drawn = Draw([decision.index(architecture[path])], torch.ones(1, device=decision.logits.device))


def release(model: nn.Module) -> None:
    """Forget what was drawn: all options run again."""
    for decision in decisions(model).values():
        decision.drawn = None
