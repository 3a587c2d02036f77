"""DARTS, exactly: the solvable model of both orders, the second-order term against autograd, what is left behind."""

import pytest
import torch
from planted import macro, problem_of, stripes
from torch import nn

from netsmith.cost.prices import Prices
from netsmith.decisions import OneOf, decisions
from netsmith.errors import UserError
from netsmith.methods import make_method
from netsmith.methods.darts import DARTS, Relaxed, gradients, moved, unrolled_gradient, velocity
from netsmith.search.differentiable import Loop, Steps, task_loss, weights


def number(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


@pytest.mark.parametrize("xi", [0.0, pytest.param(0.1, marks=pytest.mark.slow), 0.5])
def test_the_solvable_model_ends_where_its_equations_say(xi):
    # L_search = a w - 2 a + 1, L_train = w^2 - 2 a w + a^2; first order -> (2, 2), second -> 2 / (1 + 2 xi), 1 at best.
    a, w = number(2.0), number(-2.0)

    def train_loss():
        return w**2 - 2 * a * w + a**2

    def search_loss():
        return a * w - 2 * a + 1

    for _ in range(6000):
        (slope,) = unrolled_gradient(train_loss, search_loss, [w], [a], xi)
        a.data -= 0.02 * slope
        w.data -= 0.02 * gradients(train_loss(), [w])[0]
    assert (a.item(), w.item()) == pytest.approx((2 / (1 + 2 * xi),) * 2, abs=1e-5)


def small(seed: int = 0) -> tuple[list[nn.Parameter], nn.Parameter, list]:
    """A network of two layers whose hidden units the architecture weighs, smooth, and two batches."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ws = [nn.Parameter(drawn(6, 4)), nn.Parameter(drawn(3, 6))]
    return ws, nn.Parameter(drawn(6)), [(drawn(8, 4), drawn(8, 3)) for _ in range(2)]


def loss_of(ws, alpha, batch) -> torch.Tensor:
    x, y = batch
    return ((torch.tanh(x @ ws[0].T) * alpha.softmax(0)) @ ws[1].T - y).square().mean()


@pytest.mark.parametrize("momentum", [False, True])
def test_the_second_order_is_what_autograd_differentiates_through_a_step(momentum):
    ws, alpha, (train, search) = small()
    rate = 0.1
    optimizer = torch.optim.SGD(ws, lr=rate, momentum=0.9, weight_decay=3e-4)
    if momentum:
        loss_of(ws, alpha, train).backward()
        optimizer.step()
        optimizer.zero_grad()
    direction = velocity(optimizer)
    found = unrolled_gradient(
        lambda: loss_of(ws, alpha, train), lambda: loss_of(ws, alpha, search), ws, [alpha], rate, direction
    )
    slopes = torch.autograd.grad(loss_of(ws, alpha, train), ws, create_graph=True)
    buffers = [optimizer.state[w]["momentum_buffer"] if momentum else 0 for w in ws]
    ahead = [w - rate * (0.9 * b + g + 3e-4 * w.detach()) for w, g, b in zip(ws, slopes, buffers, strict=True)]
    (exact,) = torch.autograd.grad(loss_of(ahead, alpha, search), alpha)
    assert ((found[0] - exact).norm() / exact.norm()).item() < 1e-3
    (first,) = torch.autograd.grad(loss_of(ws, alpha, search), alpha)
    assert ((first - exact).norm() / exact.norm()).item() > 0.01  # so the second term is more than nothing


def test_the_weights_are_afterwards_as_they_were_to_the_bit():
    ws, alpha, (train, search) = small()
    before = [w.detach().clone() for w in ws]
    unrolled_gradient(lambda: loss_of(ws, alpha, train), lambda: loss_of(ws, alpha, search), ws, [alpha], 0.1)
    assert all(torch.equal(a, b) for a, b in zip(ws, before, strict=True))
    assert all(w.grad is None for w in ws)
    with pytest.raises(ZeroDivisionError), moved(ws, [torch.ones_like(w) for w in ws]):
        raise ZeroDivisionError
    assert all(torch.equal(a, b) for a, b in zip(ws, before, strict=True))


def searched(order: str) -> tuple[Relaxed, Loop, list]:
    problem = problem_of(macro, shares=(0.5,), task=stripes(64))
    method = DARTS(order=order)
    searcher = Relaxed(method, problem, problem.budgets[0], [{"body": "slim"}])
    loop = Loop(problem, searcher, Steps(rhythm=1, warmup_epochs=0, batch_size=16, architecture_rate=0.1))
    batches = [next(iter(problem.task.batches(split, 16, train=True))) for split in ("search", "train")]
    return searcher, loop, batches


@pytest.mark.parametrize("order", ["first", "second"])
def test_an_architecture_step_leaves_no_trace_in_the_weights(order):
    searcher, loop, batches = searched(order)
    before = [w.detach().clone() for w in weights(searcher.supernet)]
    logits = [p.detach().clone() for p in searcher.parameters()]
    searcher.architecture_step(loop, *batches)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(searcher.supernet), strict=True))
    assert all(w.grad is None and w.requires_grad for w in weights(searcher.supernet))
    assert not all(torch.equal(a, b) for a, b in zip(logits, searcher.parameters(), strict=True))


def test_the_two_orders_agree_where_the_weights_do_not_move():
    slopes = {}
    for order in ("first", "second"):
        searcher, loop, batches = searched(order)
        loop.steps = Steps(rhythm=1, learning_rate=1e-12)
        searcher.architecture_step(loop, *batches)
        slopes[order] = [p.grad for p in searcher.parameters()]
    for a, b in zip(*slopes.values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_second_order_is_taken_where_the_next_weight_step_leads():
    searcher, loop, (search, train) = searched("second")
    searcher.supernet.double()
    search, train = ((images.double(), labels) for images, labels in (search, train))
    searcher.weight_step(loop, train)  # so that there is momentum
    buffers = {w: loop.weights.state[w]["momentum_buffer"].clone() for w in weights(searcher.supernet)}
    logits = searcher.parameters()

    def loss(batch):
        searcher.draw(torch.Generator(), learning=True)
        return task_loss(searcher.supernet, batch)

    def direction(w, gradient):
        moving = gradient + 1e-4 * w.detach()
        return moving + 0.9 * (0.9 * buffers[w] + moving)

    expected = unrolled_gradient(
        lambda: loss(train),
        lambda: searcher.objective(loss(search)),
        weights(searcher.supernet),
        logits,
        0.05,
        direction,
    )
    searcher.architecture_step(loop, search, train)
    for found, slope in zip(logits, expected, strict=True):
        assert torch.allclose(found.grad, slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_velocity_is_the_next_step(nesterov):
    w = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9, weight_decay=3e-4, nesterov=nesterov)
    for _ in range(4):
        w.grad = torch.randn(5, dtype=torch.float64)
        before, expected = w.detach().clone(), velocity(optimizer)(w, w.grad)
        optimizer.step()
        assert torch.allclose(before - w, 0.1 * expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("order", ["first", "second"])
def test_a_structure_that_did_not_run_learns_nothing(order):
    problem = problem_of(macro, shares=(0.5,), task=stripes(64))
    method = DARTS(order=order)
    searcher = Relaxed(method, problem, problem.budgets[0], [{"body": "slim"}, {"body": "broad"}])
    loop = Loop(problem, searcher, Steps(rhythm=1, warmup_epochs=0, batch_size=16, architecture_rate=0.1))
    batches = [next(iter(problem.task.batches(split, 16, train=True))) for split in ("search", "train")]
    for _ in range(4):
        before = {path: d.logits.detach().clone() for path, d in decisions(searcher.supernet).items()}
        searcher.architecture_step(loop, *batches)
        found = decisions(searcher.supernet)
        ran = found["body"].options[found["body"].drawn.indices[0]]
        moved = {
            path.split(".")[1] for path in found if path != "body" and not torch.equal(before[path], found[path].logits)
        }
        assert moved == {ran}


def test_all_options_run_in_every_step():
    searcher, _, _ = searched("first")
    for learning in (False, True):
        searcher.draw(torch.Generator().manual_seed(0), learning=learning)
        for path, decision in decisions(searcher.supernet).items():
            if path != "body" and decision.drawn is not None:
                assert decision.drawn.indices == list(range(len(decision.options)))
                assert torch.equal(decision.drawn.weights, decision.logits.softmax(0))


def test_the_paper_knows_no_cost_and_then_the_largest_weight_wins():
    def twins():
        return nn.Sequential(OneOf({"a": nn.Identity(), "b": nn.Identity()}), nn.Flatten(), nn.Linear(64, 3))

    prices = Prices(1.0, {"0": {"a": 1.0, "b": 1.0}}, "ms")
    problem = problem_of(twins, shares=(1.0,), prices=prices)
    searcher = Relaxed(DARTS(), problem, problem.budgets[0], [])
    for logits in ([1.0, 0.0], [0.0, 1.0]):
        decisions(searcher.supernet)["0"].logits.data = torch.tensor(logits)
        best = problem.allocate(searcher.values(), problem.budgets[0])
        assert best == {"0": "a" if logits[0] else "b"}


def test_the_second_order_needs_a_weight_step_to_look_at():
    with pytest.raises(UserError, match=r"steps.rhythm is 0; allowed: 1 and more"):
        make_method("darts", {"order": "second", "steps": {"rhythm": 0}})
    assert make_method("darts", {"order": "second", "steps": {"epochs": 4}}).steps.rhythm == 1
