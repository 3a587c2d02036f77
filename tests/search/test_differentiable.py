"""The supernet loop: it tells broken losses, follows structural edits, and mends optimizer state with them."""

import math
from dataclasses import replace

import pytest
import torch
from planted import BRIEF, macro, new_run, problem_of, stripes
from torch import nn

from netsmith.decisions import OneOf, decisions
from netsmith.errors import UserError
from netsmith.methods.fbnet import FBNet, Stochastic
from netsmith.methods.prunet import PruNet, Pruning
from netsmith.search import differentiable
from netsmith.search.differentiable import CostLoss, Steps, follow, latency_factor, learn, remove_option, weights


def searcher(kind: str, problem):
    if kind == "fbnet":
        return Stochastic(FBNet(), problem, problem.budgets[0], [{"body": "slim"}])
    return Pruning(PruNet(headroom=0.0), problem, problem.budgets[0], {"body": "slim"})


class Witness(differentiable.Searcher):
    """The smallest searcher: a linear network and one logit. It notes what the loop does with them."""

    def __init__(self) -> None:
        self.supernet = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        self.supernet.register_forward_hook(self._passed)
        self.logit = nn.Parameter(torch.ones(1))
        self.learning = False
        self.passes: list[tuple[str, str]] = []
        self.noise: list[float] = []

    def _passed(self, module, inputs, output) -> None:
        self.passes.append(("architecture" if self.learning else "weights", "bright" if inputs[0].any() else "dark"))

    def parameters(self) -> list[nn.Parameter]:
        return [self.logit]

    def draw(self, generator: torch.Generator, *, learning: bool) -> None:
        self.learning = learning
        self.noise.append(torch.rand((), generator=generator).item())

    def objective(self, loss: torch.Tensor) -> torch.Tensor:
        return loss + self.logit.sum()


def witnessed(task=None, **steps) -> differentiable.Loop:
    """64 images to train on and 32 to search on, in batches of 16."""
    problem = problem_of(task=task or stripes(64))
    return differentiable.Loop(problem, Witness(), Steps(**{"epochs": 4, "batch_size": 16, **steps}))


def test_weights_learn_on_train_and_after_the_warm_up_the_architecture_on_search():
    task = replace(stripes(64), mean=(0.0,))
    task.splits["train"].source.fill_(0)
    task.splits["search"].source.fill_(255)
    loop = witnessed(task, warmup_epochs=1)
    weights_only = [("weights", "dark")] * 4
    loop.train_epoch(0)
    assert loop.searcher.passes == weights_only
    loop.train_epoch(0)
    assert loop.searcher.passes == [*weights_only, *weights_only, *[("architecture", "bright")] * 2]


def test_the_rate_of_the_weights_falls_along_a_cosine():
    loop, rates = witnessed(learning_rate=0.1), []
    for _ in range(4):
        entry, _ = loop.train_epoch(0)
        assert loop.weights.param_groups[0]["lr"] == entry["learning_rate"]
        rates.append(entry["learning_rate"])
    assert rates == pytest.approx([0.1, 0.05 + 0.05 * math.sqrt(0.5), 0.05, 0.05 - 0.05 * math.sqrt(0.5)])


def test_a_steep_loss_does_not_throw_the_weights_far():
    steep = replace(stripes(64), std=(1e-4,))
    loop = witnessed(steep, batch_size=64, learning_rate=0.1, momentum=0.9, weight_decay=0.0)
    before = nn.utils.parameters_to_vector(loop.searcher.supernet.parameters()).detach()
    loop.train_epoch(0)
    moved = nn.utils.parameters_to_vector(loop.searcher.supernet.parameters()).detach() - before
    # One step of rate 0.1 along a gradient cut to length 5; Nesterov counts the first gradient 1 + 0.9 times.
    assert moved.norm().item() == pytest.approx(0.1 * 1.9 * 5, rel=1e-4)


def test_every_pass_draws_noise_of_its_own_and_a_repeated_search_the_same():
    first, again = witnessed(warmup_epochs=1), witnessed(warmup_epochs=1)
    for loop in (first, again):
        loop.train_epoch(0)
        loop.train_epoch(0)
    noise = first.searcher.noise
    assert len(set(noise)) == len(noise) == 4 + 4 + 2
    assert again.searcher.noise == noise


def test_a_logit_turns_quickly_and_fades_where_nothing_holds_it():
    loop = witnessed(architecture_rate=0.1, architecture_decay=0.0)
    logit = loop.searcher.logit
    for gradient in (1.0, -1.0):
        logit.grad = torch.tensor([gradient])
        loop.architecture.step()
    # Adam with beta_1 = 0.5: after 1 and -1 the mean is (-1 + 0.5) / (1 + 0.5), so the second step goes back already.
    assert logit.item() == pytest.approx(1 - 0.1 + 0.1 / 3, abs=1e-6)
    loop = witnessed(architecture_rate=0.1)
    loop.searcher.logit.grad = torch.zeros(1)
    loop.architecture.step()
    assert loop.searcher.logit.item() == pytest.approx(1 - 0.1, abs=1e-4)  # Adam's first step has the rate's size


@pytest.mark.parametrize("kind", ["fbnet", "prunet"])
def test_a_loss_that_is_no_number_names_epoch_and_step(kind, tmp_path):
    problem = problem_of(task=stripes(64))
    steps = Steps(epochs=3, warmup_epochs=1, batch_size=16, learning_rate=1e35)
    with (
        new_run(tmp_path / "run") as run,
        pytest.raises(UserError, match=r"the supernet's loss became (nan|inf) in epoch \d, step \d; a lower learning"),
    ):
        learn(problem, run, "x", lambda: searcher(kind, problem), steps)


def test_a_broken_loss_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    problem = problem_of(task=stripes(64))
    steps, entropy, calls = Steps(epochs=3, warmup_epochs=2, batch_size=16), differentiable.F.cross_entropy, []

    def breaking(*args):
        calls.append(1)
        return entropy(*args) * (math.nan if len(calls) == 7 else 1)

    monkeypatch.setattr(differentiable.F, "cross_entropy", breaking)
    with new_run(tmp_path / "run") as run:
        with pytest.raises(UserError, match="became nan in epoch 2, step 3"):
            learn(problem, run, "x", lambda: searcher("fbnet", problem), steps)
        state = differentiable.load_state(run.checkpoint("x.pt"))
    assert state["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in state["searcher"]["supernet"].values())


def test_weights_are_everything_but_logits():
    problem = problem_of()
    for kind in ("fbnet", "prunet"):
        model = searcher(kind, problem).supernet
        logits = [p for name, p in model.named_parameters() if name.endswith("logits")]
        assert len(weights(model)) + len(logits) == len(list(model.parameters()))
        assert not {id(p) for p in logits} & {id(p) for p in weights(model)}


def test_weight_steps_leave_the_logits_alone_and_architecture_steps_the_weights():
    problem = problem_of(task=stripes(64))
    for kind in ("fbnet", "prunet"):
        found = searcher(kind, problem)
        loop = differentiable.Loop(problem, found, Steps(epochs=2, warmup_epochs=1, batch_size=16))
        before = [p.clone() for p in found.parameters()]
        loop.train_epoch(0)
        assert all(torch.equal(a, b) for a, b in zip(before, found.parameters(), strict=True))
        frozen = {name: p.clone() for name, p in found.supernet.named_parameters() if not name.endswith("logits")}
        loop.architecture_epoch(0)
        assert all(torch.equal(p, frozen[n]) for n, p in found.supernet.named_parameters() if n in frozen)
        assert all(p.requires_grad for p in weights(found.supernet))


def test_moments_of_the_surviving_logits_move_up():
    layer = OneOf({name: nn.Identity() for name in "abcd"})
    optimizer = torch.optim.Adam([layer.logits], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (layer.logits @ torch.tensor([1.0, -2.0, 3.0, -4.0])).square().backward()
        optimizer.step()
    state = optimizer.state[layer.logits]
    first, second, count = state["exp_avg"].clone(), state["exp_avg_sq"].clone(), state["step"].clone()
    logits = layer.logits.detach().clone()
    remove_option(layer, "b", optimizer)
    assert torch.equal(layer.logits, logits[[0, 2, 3]])
    assert torch.equal(state["exp_avg"], first[[0, 2, 3]])
    assert torch.equal(state["exp_avg_sq"], second[[0, 2, 3]])
    assert torch.equal(state["step"], count)
    layer.logits.sum().backward()
    optimizer.step()  # goes on with the same parameter
    assert optimizer.state[layer.logits]["exp_avg"].shape == (3,)


def test_a_follower_forgets_what_is_gone_and_takes_up_what_is_new():
    stays, goes, comes = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.SGD([stays, goes], lr=0.1, momentum=0.9)
    (stays.sum() + goes.sum()).backward()
    optimizer.step()
    momentum = optimizer.state[stays]["momentum_buffer"]
    follow(optimizer, [stays, comes])
    assert optimizer.param_groups[0]["params"] == [stays, comes]
    assert set(optimizer.state) == {stays}
    assert optimizer.state[stays]["momentum_buffer"] is momentum


def test_a_search_in_which_all_is_decided_goes_on(tmp_path):
    problem = problem_of(task=stripes(64))

    def decided():
        found = searcher("prunet", problem)
        for layer in found.layers().values():
            for option in [o for o in layer.options if o != "ir"]:
                layer.remove(option)
        for node in found._alive_prunodes().values():
            node.close()
        return found

    with new_run(tmp_path / "run") as run:
        ended = learn(problem, run, "x", decided, Steps(epochs=2, warmup_epochs=0, batch_size=16))
    assert {path: d.options for path, d in decisions(ended.supernet).items() if path.count("_")}


def test_the_two_sided_penalty():
    costs = {"latency": torch.tensor(8.0), "params": torch.tensor(30.0)}
    assert CostLoss(weight=3.0)(torch.tensor(1.0), costs, {"latency": 10.0, "params": 20.0}).item() == pytest.approx(
        1 + 3 * 0.7
    )
    assert CostLoss()(torch.tensor(1.0), {}, {}) == 1  # peak memory alone: the knapsack keeps it
    with pytest.raises(KeyError):
        CostLoss()(torch.tensor(1.0), costs, {"macs": 1.0})


def test_the_latency_factor_has_no_unit():
    # Milliseconds or microseconds: LAT counts in units of the target.
    milli = latency_factor(torch.tensor(2.0), 4.0, 0.2, 0.6)
    micro = latency_factor(torch.tensor(2000.0), 4000.0, 0.2, 0.6)
    assert milli.item() == pytest.approx(micro.item(), rel=1e-6)
    assert latency_factor(torch.tensor(4.0), 4.0, 1.0, 1.0).item() == pytest.approx(3.0)


def test_a_space_is_built_the_same_every_time():
    problem = problem_of(macro)
    first, second = problem.build().state_dict(), problem.build().state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_the_supernet_mirrors_as_the_recipe_says():
    seen = []
    for mirror in (False, True):
        problem = problem_of(task=replace(stripes(64), flip=True), recipe=replace(BRIEF, mirror=mirror))
        loop = differentiable.Loop(problem, Witness(), Steps(epochs=4, batch_size=64))
        seen.append(next(loop._batches("train", 0))[0])
    assert not torch.equal(*seen)


def test_every_pass_over_the_search_split_has_an_order_of_its_own():
    loop = differentiable.Loop(problem_of(task=stripes(64)), Witness(), Steps(epochs=4, batch_size=32))
    endless = loop._endless("search", 0)
    assert not torch.equal(next(endless)[1], next(endless)[1])
