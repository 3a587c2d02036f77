"""HAQ (Wang et al. 2019, arXiv:1811.08886): an agent walks through the layers and gives each its bits.

What it gives, a wall lowers until the budget is kept; how well the network then does is its reward. The agent is DDPG's
(Lillicrap et al. 2016, arXiv:1509.02971): an actor that names an action for a layer, and a critic of the two.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from netsmith.blocks.quantized import NO_BITS, calibrate, option_bits
from netsmith.cost.budget import TOLERANCE
from netsmith.cost.prices import Options
from netsmith.decisions import Architecture, Decision, decisions, derive
from netsmith.run import Run
from netsmith.search.problem import Problem, prefer
from netsmith.ship.export import calibration_images
from netsmith.train.checkpoint import load_state, save_state
from netsmith.train.loop import train

SAVED = 5
"""Episodes from one checkpoint to the next."""
BATCH = 64
"""Images at a time while scoring."""

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class HAQ:
    """Section 3, with the constants of the official code. One decision gives a layer the bits of its weights and of its
    inputs (there two, in turn), and what the options are says the space."""

    pool: ClassVar = "bits"
    """Of `netsmith compress`, where none is asked for."""
    episodes: PositiveInt = 200
    """Networks that are tried for each budget (600)."""
    warmup_episodes: NonNegativeInt = 20
    """First episodes, with actions at random, in which the agent does not learn."""
    images: PositiveInt = 512
    """Held-out training images that a network is scored on (10,000 of ImageNet)."""
    fine_tuning: NonNegativeInt = 0
    """Epochs that a network is trained before it is scored (one, of 20,000 images); 0: its ranges are shown and no
    more."""
    fine_tuning_rate: PositiveFloat = 1e-3
    """Learning rate of that."""
    reward: PositiveFloat = 0.1
    """For a point of accuracy above the original's (lambda; points of 100 are our reading)."""
    noise: PositiveFloat = 0.5
    """Standard deviation of the actions around the actor's, cut at 0 and 1 (sigma)."""
    noise_decay: Share = 0.99
    """Factor on the noise each episode after the warm-up."""
    hidden: PositiveInt = 300
    """Width of the two hidden layers of actor and critic."""
    actor_rate: PositiveFloat = 1e-4
    """Adam's rate for the actor."""
    critic_rate: PositiveFloat = 1e-3
    """Adam's rate for the critic."""
    tau: Share = 0.01
    """How far the targets follow in a step."""
    discount: Share = 1.0
    """Of what comes later (gamma)."""
    batch_size: PositiveInt = 64
    """Steps that the agent learns from at a time."""
    replay: PositiveInt = 128
    """Episodes that it remembers."""
    baseline: Share = 0.5
    """Share of the past in the moving mean of rewards, which is taken off them."""

    def refuses(self, decision: Decision) -> str | None:
        return None if option_bits(decision) else NO_BITS

    def search(self, problem: Problem, run: Run) -> list[Options]:
        return [self._searched(problem, run, number) for number in range(len(problem.budgets))]

    def _searched(self, problem: Problem, run: Run, number: int) -> Options:
        """An agent of its own for each budget."""
        tried = run.once(f"haq-{number}", lambda: Walk(self, problem, run, number).learn())
        run.checkpoint(f"haq-{number}.pt").unlink(missing_ok=True)
        return worth([(architecture, accuracy) for architecture, accuracy in tried], problem.outline.options)


def worth(tried: Sequence[tuple[Architecture, float]], options: Mapping[str, Sequence]) -> Options:
    """The most accurate network that was tried, first of several, before all others; beside it an option is worth the
    mean accuracy of the networks that had it, or, where none had, the least that any has.

    ``tried``: networks with their accuracies, 0 to 1.
    """
    had: dict[tuple, list[float]] = defaultdict(list)
    for architecture, accuracy in tried:
        for choice in architecture.items():
            had[choice].append(accuracy)
    mean = {choice: fmean(accuracies) for choice, accuracies in had.items()}
    least = min(mean.values(), default=0.0)
    values = {path: {option: mean.get((path, option), least) for option in row} for path, row in options.items()}
    best, _ = max(tried, key=lambda one: one[1])
    return prefer(values, best, 1.0 + len(values))


class Walk:
    """The agent's walks through the layers, for one of the problem's budgets."""

    def __init__(self, method: HAQ, problem: Problem, run: Run, number: int = 0) -> None:
        self.method, self.problem, self.run, self.number = method, problem, run, number
        self.budgets = problem.budgets[number]
        self.space = problem.build().eval()
        calibrate(self.space, lambda: calibration_images(problem.task))
        bits = {path: option_bits(decision) for path, decision in decisions(self.space).items()}
        self.options = {path: sorted(row, key=lambda o, row=row: row[o]) for path, row in bits.items()}
        self.layers = layer_states(problem)
        seed = run.seed("haq-images")
        batches = problem.task.batches("search", method.images, train=True, augmented=False, seed=seed)
        self.images, self.labels = next(iter(batches))
        self.agent = Agent(method, self.layers.shape[1] + 1, run.seed("haq-agent"))
        self.memory = torch.empty(0, 2 * self.agent.states + 3)
        self.tried: list[tuple[Architecture, float]] = []

    def learn(self) -> list[tuple[Architecture, float]]:
        """All networks that were tried, with their accuracies."""
        checkpoint = self.run.checkpoint(f"haq-{self.number}.pt")
        if checkpoint.exists():
            self.load(load_state(checkpoint))
        original = self.accuracy(self.problem.reference)
        while (episode := len(self.tried)) < self.method.episodes:
            generator = torch.Generator().manual_seed(self.run.seed("haq") * 1009 + episode)
            self.episode(episode, original, generator)
            architecture, accuracy = self.tried[-1]
            best = max(score for _, score in self.tried)
            self.run.event(
                "haq_episode", number=self.number, episode=episode, accuracy=accuracy, architecture=architecture
            )
            self.run.progress("bits are tried", episode + 1, self.method.episodes, f"best accuracy {best:.3f}")
            if (episode + 1) % SAVED == 0:
                save_state(checkpoint, self.state())
        return self.tried

    def episode(self, episode: int, original: float, generator: torch.Generator) -> None:
        """One walk, its reward, and after the warm-up as many lessons as there are layers."""
        method, actions = self.method, []
        learning = episode >= method.warmup_episodes
        spread = method.noise * method.noise_decay ** (episode - method.warmup_episodes)
        for features in self.layers:
            proposed = float(torch.rand(1, generator=generator))
            if learning:
                state = torch.cat([features, torch.tensor(actions[-1:] or [1.0])])
                proposed = truncated_normal(self.agent.act(state), spread, proposed)
            actions.append(proposed)
        levels = {
            path: action_bits(action, 0, len(row) - 1)
            for action, (path, row) in zip(actions, self.options.items(), strict=True)
        }
        architecture = self.within_budget(levels)
        known = next((score for one, score in self.tried if one == architecture), None)
        accuracy = self.accuracy(architecture) if known is None else known
        self.tried.append((architecture, accuracy))
        for place, (path, row) in enumerate(self.options.items()):
            level = row.index(str(architecture[path]))
            if level != levels[path]:  # what was scored is what is remembered (ours)
                actions[place] = (level + 0.5) / len(row)
        self.remember(actions, method.reward * 100 * (accuracy - original))
        if learning:
            for _ in self.layers:
                drawn = torch.randint(len(self.memory), (method.batch_size,), generator=generator)
                self.agent.learn(self.memory[drawn])

    def within_budget(self, levels: Mapping[str, int]) -> Architecture:
        """What the wall makes of ``levels``, counted from the fewest bits. Where layers that take longer with fewer
        bits leave it above the budget, the network within it that is nearest (ours)."""

        def named(levels: Mapping[str, int]) -> Architecture:
            return {path: self.options[path][level] for path, level in levels.items()}

        def excess(levels: Mapping[str, int]) -> float:
            uses = (self.problem.predicted(b, named(levels)) / b.limit for b in self.budgets)
            return math.fsum(max(0.0, use - 1 - TOLERANCE) for use in uses)

        walled = action_wall(levels, excess)
        if excess(walled) == 0:
            return named(walled)
        none: Options = {path: dict.fromkeys(row, 0.0) for path, row in self.options.items()}
        return self.problem.allocate(prefer(none, named(walled), 1.0), self.budgets)

    def accuracy(self, architecture: Architecture) -> float:
        """The share of the held-out images that are right, after the fine-tuning if any."""
        network = derive(self.space, architecture)
        if epochs := self.method.fine_tuning:
            rate, warmup = self.method.fine_tuning_rate, min(self.problem.recipe.warmup_epochs, epochs / 4)
            recipe = replace(
                self.problem.recipe, epochs=epochs, learning_rate=rate, warmup_epochs=warmup, distillation=0.0
            )
            train(network, self.problem.task, recipe, split="train", seed=self.run.seed("haq-fine-tuning"))
        with torch.inference_mode():
            right = [network.eval()(part).argmax(1) for part in self.images.split(BATCH)]
        return float((torch.cat(right) == self.labels).double().mean())

    def remember(self, actions: Sequence[float], reward: float) -> None:
        """A row for each layer: state, action, reward, the next state, and whether there is none."""
        before = torch.tensor([1.0, *actions[:-1]])
        states = torch.cat([self.layers, before[:, None]], 1)
        last = torch.zeros(len(states), 1)
        last[-1] = 1.0
        rows = [states, torch.tensor(actions)[:, None], torch.full_like(last, reward), states.roll(-1, 0), last]
        self.memory = torch.cat([self.memory, torch.cat(rows, 1)])[-self.method.replay * len(states) :]

    def state(self) -> dict:
        kept = {"tried": [list(one) for one in self.tried], "memory": self.memory.clone()}
        return {**kept, "agent": self.agent.state(), "mark": self.run.mark()}

    def load(self, state: dict) -> None:
        self.run.rewind(state["mark"])
        self.memory, self.tried = state["memory"], [(one, accuracy) for one, accuracy in state["tried"]]
        self.agent.load(state["agent"])


def layer_states(problem: Problem) -> Tensor:
    """What the agent sees of each layer, ``(layers, 8)``, each between 0 and 1 over the network: whether it is
    depthwise, channels in and out, stride, kernel, weights, places of its input, number (section 3.1, without the
    action before and without the flag for weights or inputs, which are one decision here)."""
    rows = {}
    for atom in problem.atoms:
        layer = atom.module
        if atom.owner is None or not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        places = math.prod(atom.shape[1:])
        if isinstance(layer, nn.Conv2d):
            depthwise = float(layer.groups == layer.in_channels > 1)
            row = [depthwise, layer.in_channels, layer.out_channels, layer.stride[0], layer.kernel_size[0]]
        else:
            row = [0.0, layer.in_features, layer.out_features, 0.0, 1.0]
        rows[atom.owner[0]] = [*row, layer.weight.numel(), places]
    states = torch.tensor([[*rows[path], number] for number, path in enumerate(problem.outline.options)])
    low, high = states.amin(0), states.amax(0)
    return (states - low) / torch.where(high > low, high - low, torch.ones_like(low))


def action_bits(action: float, least: int, most: int) -> int:
    """An action in [0, 1] as a number of bits, each as wide as any other: round((most - least + 1) a + least - 1/2).

    Halves go to even, as in the official code; there an odd ``least`` makes one bit too few of 0, here it is clipped.
    """
    return min(max(round((most - least + 1) * action + least - 0.5), least), most)


def action_wall(
    bits: Mapping[str, int], excess: Callable[[Mapping[str, int]], float], *, least: int = 0
) -> dict[str, int]:
    """Lower bits until nothing is in ``excess`` of the budget: round by round, from the last decision to the first, by
    one each. With two decisions for a layer, its weights and then its inputs, that is the paper's order.

    A step that brings nothing is not taken (ours: in int8 a layer may take longer). Where no step brings anything and
    it still costs too much, that is the answer. ``bits``: in the order of the network.
    """
    found, over = dict(bits), excess(bits)
    stuck = False
    while over > 0 and not stuck:
        stuck = True
        for path in reversed(list(bits)):
            lower = {**found, path: found[path] - 1}
            if over > 0 and lower[path] >= least and (after := excess(lower)) < over:
                found, over, stuck = lower, after, False
    return found


def truncated_normal(mean: float, spread: float, uniform: float) -> float:
    """A normal number cut at 0 and 1, from one that is uniform there."""
    spread = max(spread, 1e-6)
    ends = torch.special.ndtr((torch.tensor([0.0, 1.0], dtype=torch.float64) - mean) / spread)
    drawn = torch.special.ndtri(ends[0] + uniform * (ends[1] - ends[0]))
    return min(max(mean + spread * float(drawn), 0.0), 1.0)


class Agent:
    """Deep deterministic policy gradient: what it knows of layers, actions and rewards.

    ``states``: numbers in a state. A row of what it learns from is a state, an action, a reward, the next state, and 1
    where there is none.
    """

    def __init__(self, method: HAQ, states: int, seed: int = 0) -> None:
        self.method, self.states = method, states
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor = nn.Sequential(*_layers(states, method.hidden), nn.Sigmoid())
            self.critic = nn.Sequential(*_layers(states + 1, method.hidden))
        self.targets = copy.deepcopy(nn.ModuleList([self.actor, self.critic])).requires_grad_(False)
        self.of_actor = torch.optim.Adam(self.actor.parameters(), lr=method.actor_rate)
        self.of_critic = torch.optim.Adam(self.critic.parameters(), lr=method.critic_rate)
        self.baseline: float | None = None

    @torch.no_grad()
    def act(self, state: Tensor) -> float:
        """The action for a state ``(states,)``."""
        return float(self.actor(state))

    def learn(self, rows: Tensor) -> None:
        """One step of the critic, then one of the actor, then of the targets. ``rows``: ``(n, 2 states + 3)``."""
        n, method = self.states, self.method
        state, action, reward, after, last = rows.split((n, 1, 1, n, 1), 1)
        mean = float(reward.mean())
        past = mean if self.baseline is None else self.baseline
        self.baseline = method.baseline * past + (1 - method.baseline) * mean
        actor, critic = self.targets
        ahead = critic(torch.cat([after, actor(after)], 1))
        wanted = reward - self.baseline + method.discount * (1 - last) * ahead
        _step(self.of_critic, F.mse_loss(self.critic(torch.cat([state, action], 1)), wanted))
        _step(self.of_actor, -self.critic(torch.cat([state, self.actor(state)], 1)).mean())
        for target, own in zip(self.targets, (self.actor, self.critic), strict=True):
            for mine, theirs in zip(target.parameters(), own.parameters(), strict=True):
                mine.lerp_(theirs.detach(), method.tau)

    def state(self) -> dict:
        parts = (self.actor, self.critic, self.targets, self.of_actor, self.of_critic)
        return {"baseline": self.baseline, "parts": [part.state_dict() for part in parts]}

    def load(self, state: dict) -> None:
        self.baseline = state["baseline"]
        parts = (self.actor, self.critic, self.targets, self.of_actor, self.of_critic)
        for part, stored in zip(parts, state["parts"], strict=True):
            part.load_state_dict(stored)


def _layers(inputs: int, hidden: int) -> list[nn.Module]:
    return [nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)]


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
