"""The supernet loop: it tells broken losses, follows structural edits, and mends optimizer state with them."""

import math

import pytest
import torch
from planted import macro, new_run, problem_of, stripes
from torch import nn

from netsmith.decisions import OneOf, decisions
from netsmith.errors import UserError
from netsmith.methods.fbnet import FBNet, _Supernet
from netsmith.methods.prunet import PruNet, Pruning
from netsmith.search import differentiable
from netsmith.search.differentiable import CostLoss, Steps, follow, latency_factor, learn, remove_option, weights


def searcher(kind: str, problem):
    if kind == "fbnet":
        return _Supernet(FBNet(), problem, problem.budgets[0], [{"body": "slim"}])
    return Pruning(PruNet(headroom=0.0), problem, problem.budgets[0], {"body": "slim"})


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
        loop = differentiable._Loop(problem, found, Steps(epochs=2, warmup_epochs=1, batch_size=16))
        before = [p.clone() for p in found.parameters()]
        loop.train_epoch(0)
        assert all(torch.equal(a, b) for a, b in zip(before, found.parameters(), strict=True))
        frozen = {name: p.clone() for name, p in found.supernet.named_parameters() if not name.endswith("logits")}
        loop._learn_architecture(torch.Generator().manual_seed(0), 0)
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
