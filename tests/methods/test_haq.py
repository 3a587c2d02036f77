"""HAQ: actions, the wall, what the agent sees, remembers and learns, and that it finds what was planted."""

import copy
import random
from statistics import fmean

import pytest
import torch
from planted import in_two_precisions, new_run, problem_of, stripes, toy_for
from torch import nn

from netsmith.cost.budget import Budget
from netsmith.cost.prices import Prices
from netsmith.decisions import OneOf, Width, decisions
from netsmith.methods.haq import HAQ, Agent, Walk, action_bits, action_wall, layer_states, truncated_normal, worth
from netsmith.search.problem import Problem


@pytest.mark.parametrize("least", [1, 2, 3])
@pytest.mark.parametrize("most", [4, 7, 8])
def test_actions_become_bits(least, most):
    assert action_bits(0.0, least, most) == least
    assert action_bits(1.0, least, most) == most
    steps = [action_bits(a / 10_000, least, most) for a in range(10_001)]
    assert steps == sorted(steps)
    counts = [steps.count(b) for b in range(least, most + 1)]
    assert max(counts) - min(counts) <= 3, "every number of bits has the same share of actions"


def wall_problem(seed: int):
    """Bits of weights and inputs, in turn, and their bit operations."""
    generator = random.Random(seed)
    names = [f"layer{index}" for index in range(generator.randint(1, 6))]
    bits = {f"{p}.{part}": generator.randint(2, 8) for p in names for part in ("weight", "input")}
    macs = {p: generator.randint(1, 9) for p in names}
    return bits, lambda given: sum(macs[p] * given[f"{p}.weight"] * given[f"{p}.input"] for p in names)


@pytest.mark.parametrize("seed", range(30))
def test_the_wall_keeps_the_budget_or_has_nothing_left_to_lower(seed):
    bits, cost = wall_problem(seed)
    for share in (0.1, 0.4, 0.7, 1.0):
        budget = share * cost(bits)

        def excess(given, budget=budget):
            return max(0.0, cost(given) - budget)

        found = action_wall(bits, excess, least=2)
        assert list(found) == list(bits)
        assert cost(found) <= budget or set(found.values()) == {2}
        assert action_wall(found, excess, least=2) == found
        assert all(2 <= found[path] <= bits[path] for path in bits)


def test_the_wall_goes_backwards_activations_first():
    bits = {"b.weight": 8, "b.input": 8, "c.weight": 8, "c.input": 8}

    def walled(budget, least=0):
        return action_wall(bits, lambda given: max(0, sum(given.values()) - budget), least=least)

    assert walled(32) == bits
    assert walled(31) == {**bits, "c.input": 7}
    assert walled(30) == {**bits, "c.input": 7, "c.weight": 7}
    assert walled(29) == {**bits, "c.input": 7, "c.weight": 7, "b.input": 7}
    assert walled(27) == dict.fromkeys(bits, 7) | {"c.input": 6}
    assert walled(0, least=3) == dict.fromkeys(bits, 3)


def test_the_wall_takes_no_step_that_brings_nothing():
    costs = {"a": [1, 5], "b": [4, 3]}  # b takes longer with fewer bits

    def excess(given):
        return max(0, sum(costs[p][level] for p, level in given.items()) - 4)

    assert action_wall({"a": 1, "b": 1}, excess) == {"a": 0, "b": 1}
    assert action_wall({"a": 0, "b": 0}, excess) == {"a": 0, "b": 0}, "stuck: within_budget goes on from there"


def test_noise_is_a_normal_cut_at_0_and_1():
    assert truncated_normal(0.3, 0.0, 0.9) == pytest.approx(0.3, abs=1e-5)
    assert truncated_normal(0.5, 0.4, 0.5) == pytest.approx(0.5)
    drawn = [truncated_normal(0.1, 0.5, (u + 0.5) / 2000) for u in range(2000)]
    assert 0 <= drawn[0] < drawn[-1] <= 1
    assert drawn == sorted(drawn)
    generator = torch.Generator().manual_seed(0)
    plain = 0.1 + 0.5 * torch.randn(200_000, generator=generator)
    plain = plain[(plain >= 0) & (plain <= 1)]
    assert fmean(drawn) == pytest.approx(float(plain.mean()), abs=0.005)


# The agent ----------------------------------------------------------------------------------------------------------


def after_adam(before, gradients, rate):
    """One first step of Adam: rate * g / (|g| + eps)."""
    return [p - rate * g / (g.abs() + 1e-8) for p, g in zip(before, gradients, strict=True)]


def test_a_lesson_by_hand():
    method = HAQ(hidden=5, actor_rate=0.01, critic_rate=0.02, tau=0.1, discount=0.9, baseline=0.5)
    agent = Agent(method, 3)
    with torch.no_grad():
        for part in agent.targets.parameters():  # so that it matters whose they are
            part.add_(0.1)
    agent.baseline = 0.4
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(6, 2 * 3 + 3, generator=generator)
    rows[:, -1] = torch.tensor([0, 0, 1, 0, 1, 0])
    actor, critic, old = copy.deepcopy((agent.actor, agent.critic, agent.targets))
    s, a, r, then, last = rows[:, :3], rows[:, 3:4], rows[:, 4:5], rows[:, 5:8], rows[:, 8:]
    agent.learn(rows)

    baseline = 0.5 * 0.4 + 0.5 * float(r.mean())
    assert agent.baseline == pytest.approx(baseline)
    with torch.no_grad():
        q = old[1](torch.cat([then, old[0](then)], 1))
    wanted = torch.where(last == 1, r - baseline, r - baseline + 0.9 * q)
    error = (critic(torch.cat([s, a], 1)) - wanted).square().mean()
    learnt = after_adam(critic.parameters(), torch.autograd.grad(error, list(critic.parameters())), 0.02)
    for mine, theirs in zip(agent.critic.parameters(), learnt, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    # The actor learns from the critic as it is now.
    worse = -agent.critic(torch.cat([s, actor(s)], 1)).mean()
    learnt = after_adam(actor.parameters(), torch.autograd.grad(worse, list(actor.parameters())), 0.01)
    for mine, theirs in zip(agent.actor.parameters(), learnt, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    for target, before, now in zip(
        agent.targets.parameters(),
        old.parameters(),
        [*agent.actor.parameters(), *agent.critic.parameters()],
        strict=True,
    ):
        torch.testing.assert_close(target, 0.9 * before + 0.1 * now)


def test_an_agent_goes_on_where_it_was():
    method = HAQ(hidden=5)
    agent, rows = Agent(method, 3), torch.rand(8, 9, generator=torch.Generator().manual_seed(0))
    agent.learn(rows)
    other = Agent(method, 3, seed=9)
    other.load(copy.deepcopy(agent.state()))
    for one in (agent, other):
        one.learn(rows)
    state = torch.tensor([0.1, 0.5, 0.9])
    assert agent.act(state) == other.act(state)
    assert 0 < agent.act(state) < 1


def test_what_is_seen_of_a_layer():
    problem = problem_of(in_two_precisions)
    states = layer_states(problem)
    paths = list(problem.outline.options)
    assert paths == ["0.conv", "1.conv", "2.conv", "3.conv", "4.conv.conv", "4.linear"]
    raw = [
        [0, 1, 8, 1, 3, 72, 64, 0],
        [0, 8, 8, 1, 3, 576, 64, 1],
        [1, 8, 8, 1, 3, 72, 64, 2],
        [0, 8, 12, 2, 3, 864, 64, 3],
        [0, 12, 16, 1, 1, 192, 16, 4],
        [0, 16, 3, 0, 1, 48, 1, 5],
    ]
    found = torch.tensor(raw).float()
    low, high = found.amin(0), found.amax(0)
    torch.testing.assert_close(states, (found - low) / (high - low))


def walk(tmp_path, problem, **options) -> Walk:
    with new_run(tmp_path) as run:
        return Walk(HAQ(**{"hidden": 16, "images": 16, **options}), problem, run)


def test_what_is_remembered(tmp_path):
    one = walk(tmp_path / "run", toy_for("haq", [0.5], task=stripes(32)), replay=2)
    actions = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    one.remember(actions, -1.5)
    rows, n = one.memory, one.agent.states
    assert n == 9
    assert rows.shape == (6, 21)
    torch.testing.assert_close(rows[:, :8], one.layers)
    torch.testing.assert_close(rows[:, 8], torch.tensor([1.0, *actions[:-1]]))
    torch.testing.assert_close(rows[:, 9], torch.tensor(actions))
    assert set(rows[:, 10].tolist()) == {-1.5}
    assert torch.equal(rows[:-1, 11:20], rows[1:, :9])
    assert rows[:, 20].tolist() == [0, 0, 0, 0, 0, 1]
    for reward in (1.0, 2.0):
        one.remember(actions, reward)
    assert one.memory[:, 10].tolist() == [1.0] * 6 + [2.0] * 6, "two episodes, the last ones"


def test_what_takes_longer_in_int8_stays_as_it_is(tmp_path):
    paths = list(problem_of(in_two_precisions).outline.options)
    prices = Prices(0.0, {path: {"fp32": 2.0, "int8": 1.0} for path in paths} | {paths[2]: {"fp32": 2.0, "int8": 9.0}})
    problem = problem_of(in_two_precisions, task=stripes(32), prices=prices)
    problem.budgets = [[Budget("latency", 7.0, "ms"), Budget("file", 1e9, "B")]]
    one = walk(tmp_path / "run", problem)
    assert one.options[paths[0]] == ["int8", "fp32"], "from the fewest bits"
    everything = {**dict.fromkeys(paths, "int8"), paths[2]: "fp32"}
    assert one.within_budget(dict.fromkeys(paths, 1)) == everything
    assert one.within_budget(dict.fromkeys(paths, 0)) == everything, "nothing to lower: the nearest that keeps it"


# What it is for -----------------------------------------------------------------------------------------------------

BEST = ["int8", "fp32", "int8", "fp32", "fp32", "int8"]
"""What six layers should have; each that has something else costs 15 points of accuracy."""


def tried(tmp_path, seed: int, warmup_episodes: int, monkeypatch) -> tuple[list, Problem]:
    """Half of the layers may stay in fp32."""
    paths = list(problem_of(in_two_precisions).outline.options)
    prices = Prices(0.0, {path: {"fp32": 2.0, "int8": 1.0} for path in paths}, "ms")
    problem = problem_of(in_two_precisions, task=stripes(32), prices=prices)
    problem.budgets = [[Budget("latency", 9.0, "ms")]]
    monkeypatch.setattr(
        Walk, "accuracy", lambda self, found: 1 - 0.15 * sum(found[p] != b for p, b in zip(paths, BEST, strict=True))
    )
    method = HAQ(episodes=70, warmup_episodes=warmup_episodes, images=16, hidden=32, actor_rate=3e-4, critic_rate=1e-2)
    with new_run(tmp_path / str(warmup_episodes), seed) as run:
        one = Walk(method, problem, run)
        one.learn()
    assert all(problem.predicted(problem.budgets[0][0], network) <= 9.0 for network, _ in one.tried)
    return one.tried, problem


@pytest.mark.parametrize("seed", [0, 1])
def test_finds_the_planted_network_and_learns_what_chance_does_not(seed, tmp_path, monkeypatch):
    found, problem = tried(tmp_path, seed, 20, monkeypatch)
    values = worth(found, problem.outline.options)
    assert list(problem.allocate(values, problem.budgets[0]).values()) == BEST
    at_random, _ = tried(tmp_path, seed, 70, monkeypatch)
    assert found[:20] == at_random[:20], "the warm-up is the same"
    assert fmean(one for _, one in found[-20:]) > 0.05 + fmean(one for _, one in at_random[-20:])


def test_values_put_the_best_first_and_then_what_did_well():
    tried = [({"a": "x", "b": "x"}, 0.5), ({"a": "y", "b": "x"}, 0.9), ({"a": "y", "b": "x"}, 0.9)]
    values = worth(tried, {"a": ["x", "y", "z"], "b": ["x"]})
    assert values == {"a": {"x": 0.5, "y": 0.9 + 3.0, "z": 0.5}, "b": {"x": pytest.approx(2.3 / 3 + 3.0)}}


def test_brief_fine_tuning_is_part_of_the_score(tmp_path):
    problem = toy_for("haq", [0.5], task=stripes(64))
    plain = walk(tmp_path / "plain", problem, images=64)
    tuned = walk(tmp_path / "tuned", problem, images=64, fine_tuning=6, fine_tuning_rate=0.1)
    everything = dict.fromkeys(problem.reference, "int8")
    assert tuned.accuracy(everything) > plain.accuracy(everything)
    assert tuned.accuracy(everything) == tuned.accuracy(everything)


def test_only_bits_are_its_business():
    assert all(HAQ().refuses(decision) is None for decision in decisions(in_two_precisions()).values())
    for other in (Width([4, 8]), OneOf({"a": nn.Conv2d(1, 2, 1), "b": nn.Conv2d(1, 2, 1)}), OneOf({"a": nn.ReLU()})):
        assert "no choice between numbers of bits" in str(HAQ().refuses(other))
