"""RARTS, exactly: the solvable model's fixed points, the three updates against the Lagrangian, the limits of beta."""

import copy
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from planted import macro, problem_of, stripes
from torch import nn

from netsmith.decisions import decisions
from netsmith.errors import UserError
from netsmith.gates import softmax
from netsmith.methods import make_method, rarts
from netsmith.methods.rarts import RARTS, Pair
from netsmith.search.differentiable import LONGEST, CostLoss, Loop, Steps, weights


class Toy(nn.Module):
    """A network that is one number w, and an architecture that is one number a."""

    def __init__(self, w: float, a: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.logits = nn.Parameter(torch.tensor(a, dtype=torch.float64))


RATE = 0.01


def toy_loss(network: Toy, batch: str) -> torch.Tensor:
    w, a = network.w, network.logits
    return a * w - 2 * a + 1 if batch == "search" else w**2 - 2 * a * w + a**2


class Solvable(Pair):
    """The searcher on the toy: no space, no costs."""

    def __init__(self, method: RARTS) -> None:
        self.method, self.supernet, self.targets, self.structural = method, Toy(-2.0, 2.0), {}, set()
        self.twin = self.twin_weights = self.train_loss = None

    def parameters(self):
        return [self.supernet.logits]

    def objective(self, loss):
        return loss

    def mix(self, network, generator, gate):
        pass

    def split(self) -> None:
        self.twin = Toy(-2.0, 2.0)
        self.twin.logits = self.supernet.logits
        self.twin_weights = torch.optim.SGD([self.twin.w], lr=RATE)


def rounds(method: RARTS, count: int, monkeypatch, each=lambda searcher: None) -> Solvable:
    monkeypatch.setattr(rarts, "task_loss", toy_loss)
    monkeypatch.setattr(rarts, "LONGEST", 1e9)
    searcher = Solvable(method)
    loop = SimpleNamespace(
        weights=torch.optim.SGD([searcher.supernet.w], lr=RATE),
        architecture=torch.optim.SGD([searcher.supernet.logits], lr=RATE),
        generator=torch.Generator(),
        rate=RATE,
    )
    for _ in range(count):
        searcher.architecture_step(loop, "search", "train")
        each(searcher)
    return searcher


@pytest.mark.parametrize(
    ("order", "weight", "coupling", "solution"),
    [
        ("gauss_seidel", 10, 10, (1.081081, 1.027027, 0.918919)),
        pytest.param("jacobi", 5, 20, (1.081081, 0.972973, 0.918919), marks=pytest.mark.slow),
        pytest.param("gauss_seidel", 10, 1, (2.105263, 2.0, -0.105263), marks=pytest.mark.slow),
        ("jacobi", 1, 1, (4.0, 2.0, -2.0)),
    ],
)
def test_the_solvable_model_ends_at_its_fixed_point(order, weight, coupling, solution, monkeypatch):
    searcher = rounds(RARTS(train_weight=weight, coupling=coupling, order=order), 5000, monkeypatch)
    found = (searcher.supernet.logits.item(), searcher.supernet.w.item(), searcher.twin.w.item())
    assert found == pytest.approx(solution, abs=2e-6)
    a = 4 * weight * coupling / (4 * weight * coupling - coupling - 2 * weight)
    assert found == pytest.approx((a, a * (1 - 1 / (2 * weight)), 2 - a), abs=1e-6)


def test_the_updates_are_the_lagrangians_gradients(monkeypatch):
    weight, beta, rate = 3.0, 0.7, RATE
    searcher = rounds(RARTS(train_weight=weight, coupling=beta), 1, monkeypatch)
    w, y, a = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-2.0, -2.0, 2.0))

    def lagrangian():
        search = a * y - 2 * a + 1
        return search + weight * (w**2 - 2 * a * w + a**2) + beta / 2 * (y - w) ** 2

    for variable in (w, y, a):  # each sees what the one before has changed
        (slope,) = torch.autograd.grad(lagrangian(), variable)
        variable.data -= rate * slope
    found = (searcher.supernet.w.item(), searcher.twin.w.item(), searcher.supernet.logits.item())
    assert found == pytest.approx((w.item(), y.item(), a.item()), rel=1e-12)


def test_the_lagrangian_falls_in_every_round(monkeypatch):
    weight, beta, values = 10.0, 10.0, []

    def note(searcher) -> None:
        w, y, a = searcher.supernet.w.item(), searcher.twin.w.item(), searcher.supernet.logits.item()
        values.append(a * y - 2 * a + 1 + weight * (w - a) ** 2 + beta / 2 * (y - w) ** 2)

    rounds(RARTS(train_weight=weight, coupling=beta), 300, monkeypatch, note)
    assert all(b < a for a, b in pairwise(values))


def test_uncoupled_and_without_the_training_loss_the_logits_follow_first_order_darts_at_y(monkeypatch):
    searcher = rounds(RARTS(train_weight=0.0, coupling=0.0), 1, monkeypatch)
    y = -2.0 - RATE * 2.0  # dL_search/dy = a
    assert searcher.supernet.logits.item() == pytest.approx(2.0 - RATE * (y - 2), rel=1e-12)
    assert searcher.supernet.w.item() == -2.0


@pytest.mark.slow
def test_a_strong_coupling_is_one_network(monkeypatch):
    gaps, away = [], []
    for beta in (1.0, 10.0, 100.0):
        searcher = rounds(RARTS(train_weight=10.0, coupling=beta), 2500, monkeypatch)
        gaps.append(abs(searcher.supernet.w.item() - searcher.twin.w.item()))
        away.append(abs(searcher.supernet.logits.item() - 40 / 39))  # where w = y: a = 4 lambda / (4 lambda - 1)
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]
    assert away[0] > 5 * away[1] > 25 * away[2]


def pair(order: str = "gauss_seidel", learning_rate: float = 0.05, **options) -> tuple[Pair, Loop, list]:
    problem = problem_of(macro, shares=(0.5,), task=stripes(64))
    steps = Steps(rhythm=1, warmup_epochs=1, batch_size=16, architecture_rate=0.1, learning_rate=learning_rate)
    searcher = Pair(RARTS(steps=steps, order=order, **options), problem, problem.budgets[0], [{"body": "slim"}])
    batches = [next(iter(problem.task.batches(split, 16, train=True))) for split in ("search", "train")]
    return searcher, Loop(problem, searcher, steps), batches


@pytest.mark.parametrize("order", ["gauss_seidel", "jacobi"])
def test_two_copies_of_the_weights_and_one_of_the_logits(order):
    searcher, loop, batches = pair(order)
    searcher.weight_step(loop, batches[1])
    assert searcher.twin is None  # the warm-up trains one
    trained = [w.detach().clone() for w in weights(searcher.supernet)]
    logits = [p.detach().clone() for p in searcher.parameters()]
    searcher.architecture_step(loop, *batches)
    for mine, other in zip(weights(searcher.supernet), weights(searcher.twin), strict=True):
        assert mine is not other
    for mine, other in zip(decisions(searcher.supernet).values(), decisions(searcher.twin).values(), strict=True):
        assert mine.logits is other.logits
    moved = [not torch.equal(a, b) for a, b in zip(trained, weights(searcher.supernet), strict=True)]
    assert any(moved)
    assert any(not torch.equal(a, b) for a, b in zip(trained, weights(searcher.twin), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(logits, searcher.parameters(), strict=True))


def test_the_batch_norms_of_the_copies_see_their_own_half():
    searcher, loop, batches = pair()
    for _ in range(2):
        searcher.architecture_step(loop, *batches)
    norms = [m for m in searcher.supernet.modules() if isinstance(m, nn.BatchNorm2d)]
    others = [m for m in searcher.twin.modules() if isinstance(m, nn.BatchNorm2d)]
    assert any(not torch.equal(a.running_mean, b.running_mean) for a, b in zip(norms, others, strict=True))
    assert not {id(m.running_mean) for m in norms} & {id(m.running_mean) for m in others}


def test_the_second_copy_learns_from_its_own_half_alone():
    searcher, loop, batches = pair(learning_rate=1e-12)
    searcher.split()
    alone = copy.deepcopy(searcher.twin).train()
    for _ in range(2):  # y's step, and that of the logits
        searcher.mix(alone, torch.Generator(), softmax)
        alone(batches[0][0])
    searcher.architecture_step(loop, *batches)
    for (name, mine), (_, expected) in zip(searcher.twin.named_buffers(), alone.named_buffers(), strict=True):
        assert torch.allclose(mine, expected, atol=1e-5), name


def test_both_copies_step_with_the_rate_of_the_epoch():
    searcher, loop, batches = pair()
    loop.epoch = 10
    searcher.architecture_step(loop, *batches)
    assert searcher.twin_weights.param_groups[0]["lr"] == loop.rate < 0.02


def test_the_coupling_is_not_cut():
    searcher, loop, batches = pair(coupling=10.0)
    searcher.split()
    with torch.no_grad():
        for w in weights(searcher.twin):
            w += 1.0
    apart = [(w - y).detach().clone() for w, y in zip(weights(searcher.supernet), weights(searcher.twin), strict=True)]
    searcher.descend(loop.weights, searcher.supernet, batches[1], 100.0, loop.generator, logits_too=False)
    data = [w.grad - 10.0 * gap for w, gap in zip(weights(searcher.supernet), apart, strict=True)]
    assert torch.cat([g.flatten() for g in data]).norm().item() == pytest.approx(LONGEST, rel=1e-3)
    assert torch.cat([w.grad.flatten() for w in weights(searcher.supernet)]).norm() > 10 * LONGEST


def test_every_structure_is_charged():
    problem = problem_of(macro, shares=(0.5,), task=stripes(64))
    searcher = Pair(RARTS(), problem, problem.budgets[0], [{"body": "slim"}, {"body": "broad"}])
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(20):
        searcher.charge(torch.tensor(1.0), generator)
        body = decisions(searcher.supernet)["body"]
        seen |= {body.options[i] for i in body.drawn.indices}
    assert seen == {"slim", "broad"}


def test_no_second_derivative_is_taken(monkeypatch):
    searcher, loop, batches = pair()
    graphs = []
    original = torch.autograd.graph._engine_run_backward

    def watched(*args, **kwargs):
        graphs.append(args[3])  # create_graph
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.autograd.graph, "_engine_run_backward", watched)
    monkeypatch.setattr("torch.autograd._engine_run_backward", watched)
    searcher.architecture_step(loop, *batches)
    assert len(graphs) >= 5
    assert not any(graphs)


def test_the_price_enters_the_logits_whatever_its_form():
    slopes = {}
    for form in ("relative", "power"):
        searcher, _, _ = pair(cost=CostLoss(form=form))
        searcher.split()
        for logits in searcher.parameters():
            logits.grad = torch.ones_like(logits)
        searcher.charge(torch.tensor(2.0), torch.Generator())
        leaf = torch.tensor(2.0, requires_grad=True)
        searcher.mix(searcher.supernet, torch.Generator(), searcher.gate(learning=True))
        objective = searcher.objective(leaf)
        by_hand = torch.autograd.grad(objective, [leaf, *searcher.parameters()], allow_unused=True)
        for logits, price in zip(searcher.parameters(), by_hand[1:], strict=True):
            expected = by_hand[0] * torch.ones_like(logits) + (0 if price is None else price)
            assert torch.allclose(logits.grad, expected, atol=1e-5)
        slopes[form] = by_hand[0].item()
    assert slopes["relative"] == 1
    assert slopes["power"] != 1


def test_another_rhythm_is_refused():
    with pytest.raises(UserError, match=r"steps.rhythm is 2; allowed: 1"):
        make_method("rarts", {"steps": {"rhythm": 2}})
