"""ProxylessNAS, exactly: the gradient through the gates, what runs and is kept, what stays as it was; REINFORCE."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from planted import branched, macro, problem_of, stripes
from torch import nn

from netsmith.architecture import enumerate_architectures
from netsmith.blocks.mobile import ConvBn
from netsmith.cost.prices import Prices
from netsmith.decisions import Draw, OneOf, decisions
from netsmith.errors import UserError
from netsmith.gates import binary, two_path
from netsmith.methods import check_searchable
from netsmith.methods.darts import DARTS, Relaxed
from netsmith.methods.proxylessnas import Gated, ProxylessNAS, Sampled
from netsmith.search.differentiable import CostLoss, Loop, Steps, weights

KERNELS = (1, 3, 5, 7)


def layer() -> OneOf:
    """Four convolutions with logits that are not equal."""
    found = OneOf({f"k{k}": nn.Conv2d(3, 4, k, padding=k // 2) for k in KERNELS}).double()
    found.logits.data = torch.tensor([0.5, -0.3, 0.1, 0.8], dtype=torch.float64)
    return found


def images(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def loss_of(y: torch.Tensor) -> torch.Tensor:
    return (y.sin() * torch.linspace(0, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()


@pytest.mark.parametrize("gate", [binary, two_path])
def test_the_gradient_of_the_logits_is_the_papers(gate):
    for seed in range(6):
        one = layer()
        one.drawn = gate(one.logits, torch.Generator().manual_seed(seed))
        indices = one.drawn.indices
        y = one(images())
        loss_of(y).backward()
        # By hand: dL/dg_j = <dL/dy, o_j(x)>, dL/dalpha_i = sum_j dL/dg_j q_j (delta_ij - q_i), q over what was drawn.
        with torch.no_grad():
            outputs = [one.candidate(one.options[i])(images()) for i in indices]
        leaf = outputs[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss_of(leaf), leaf)
        through = torch.stack([(slope * output).sum() for output in outputs])
        q = one.logits.detach()[indices].softmax(0)
        by_hand = torch.zeros(4, dtype=torch.float64)
        by_hand[indices] = q * (through - q @ through)
        assert torch.equal(y, outputs[0])
        assert torch.allclose(one.logits.grad, by_hand, rtol=0, atol=1e-10)
        assert one.logits.grad.sum().item() == pytest.approx(0, abs=1e-10)


def test_the_gradient_of_a_gate_is_a_finite_difference_of_a_real_valued_one():
    one, step = layer(), 1e-6
    one.drawn = two_path(one.logits, torch.Generator().manual_seed(0))
    active, other = one.drawn.indices
    gates = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    one.drawn = Draw([active, other], gates, binary=True)
    loss_of(one(images())).backward()
    for j in range(2):
        around = []
        for sign in (step, -step):
            shifted = gates.detach().clone()
            shifted[j] += sign
            one.drawn = Draw([active, other], shifted.requires_grad_())  # all run, weighted
            around.append(loss_of(one(images())).item())
        assert gates.grad[j].item() == pytest.approx((around[0] - around[1]) / (2 * step), rel=1e-6)


def test_keeping_all_outputs_gives_the_same_gradient_as_running_them_on_the_way_back():
    # The official code's modes full and full_v2.
    one = layer()
    one.drawn = binary(one.logits, torch.Generator().manual_seed(0))
    loss_of(one(images())).backward()
    again = one.logits.grad.clone()
    one.logits.grad = None
    drawn = binary(one.logits, torch.Generator().manual_seed(0))
    first, *others = [one.candidate(one.options[i])(images()) for i in drawn.indices]
    kept = [first, *(output.detach() for output in others)]
    loss_of(sum(w * output for w, output in zip(drawn.weights, kept, strict=True))).backward()
    assert torch.allclose(one.logits.grad, again, rtol=0, atol=1e-12)


def test_over_all_draws_a_linear_loss_gives_the_exact_gradient():
    # sum_i p_i dL/dalpha given that i is active = d/dalpha E_g[L], where L is linear in the output.
    one, slope = layer(), torch.randn(5, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = one.logits.softmax(0)
    with torch.no_grad():
        losses = torch.stack([(slope * one.candidate(o)(images())).sum() for o in one.options])
    (exact,) = torch.autograd.grad(p @ losses, one.logits)
    mean = torch.zeros(4, dtype=torch.float64)
    for active in range(4):
        one.logits.grad = None
        rest = [i for i in range(4) if i != active]
        q = one.logits[[active, *rest]].softmax(0)
        hard = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
        one.drawn = Draw([active, *rest], hard + (q - q.detach()), binary=True)
        (slope * one(images())).sum().backward()
        mean += p.detach()[active] * one.logits.grad
    assert torch.allclose(mean, exact, atol=1e-10)


def test_a_skip_beside_a_shortcut_is_the_papers_zero():
    """There block = x + mixed(x) with a zero among the options; here x + f(x) with an identity among them."""
    x = images().requires_grad_()
    convolution = nn.Conv2d(3, 3, 3, padding=1).double()

    class Residual(nn.Module):
        def forward(self, x):
            return x + convolution(x)

    class Zero(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    for active in range(2):
        ours = OneOf({"f": Residual(), "skip": nn.Identity()}).double()
        theirs = OneOf({"f": convolution, "zero": Zero()}).double()
        gradients = []
        for decision, shortcut in ((ours, 0.0), (theirs, 1.0)):
            q = decision.logits[[active, 1 - active]].softmax(0)
            gates = torch.tensor([1.0, 0.0], dtype=torch.float64) + (q - q.detach())
            decision.drawn = Draw([active, 1 - active], gates, binary=True)
            loss_of(decision(x) + shortcut * x).backward()
            gradients.append(decision.logits.grad)
        assert torch.allclose(*gradients, atol=1e-10)  # the update of an edge whose zero runs is not skipped


def test_only_the_active_path_is_kept_however_many_options_there_are():
    def kept(count: int, gate) -> int:
        one = OneOf({f"c{i}": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)) for i in range(count)})
        one.drawn = gate(one.logits, torch.Generator().manual_seed(0))
        found: dict[int, int] = {}

        def pack(tensor):
            found[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = one(torch.randn(2, 3, 16, 16))
        y.sum().backward()
        return sum(found.values())

    alone = kept(2, lambda logits, _: Draw([0], torch.ones(1)))
    output = 2 * 8 * 12 * 12 * 4
    images_ = 2 * 3 * 16 * 16 * 4
    for gate in (two_path, binary):
        few, many = kept(2, gate), kept(16, gate)
        assert many - few < 1000  # only the gates themselves
        assert few <= alone + output + images_ + 1000


def test_what_the_others_compute_is_gone_before_the_next_one_runs():
    alive: list[weakref.ref] = []
    most = []

    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            y = self.conv(x)
            alive.append(weakref.ref(y))
            most.append(sum(ref() is not None for ref in alive))
            return y

    one = OneOf({f"c{i}": Noting() for i in range(8)})
    one.drawn = binary(one.logits, torch.Generator().manual_seed(0))
    one(torch.randn(2, 3, 8, 8)).sum().backward()
    assert len(alive) == 8
    assert max(most) <= 2


def gated(method: ProxylessNAS = ProxylessNAS(), build=macro, kind=Gated, **steps):  # noqa: B008
    problem = problem_of(build, shares=(0.5,), task=stripes(64))
    chosen = [{"body": "slim"}] if build is macro else []
    searcher = kind(method, problem, problem.budgets[0], chosen)
    given = {"rhythm": 1, "warmup_epochs": 0, "batch_size": 16, "epochs": 4, "architecture_rate": 0.1}
    return searcher, Loop(problem, searcher, replace(method.steps, **{**given, **steps}))


def test_costs_are_those_of_the_structure_that_runs():
    problem = problem_of(macro, shares=(0.5,), task=stripes(64))
    alone = {}
    for structure in ("slim", "broad"):
        one = Relaxed(DARTS(), problem, problem.budgets[0], [{"body": structure}])
        one.draw(torch.Generator(), learning=True)
        alone[structure] = one.costs()["latency"].item()
    assert alone["broad"] > 1.1 * alone["slim"]
    searcher = Gated(ProxylessNAS(), problem, problem.budgets[0], [{"body": "slim"}, {"body": "broad"}])
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(12):
        searcher.draw(generator, learning=True)
        before = {path: d.drawn for path, d in decisions(searcher.supernet).items()}
        cost = searcher.costs()["latency"]
        assert all(d.drawn is before[path] for path, d in decisions(searcher.supernet).items())
        body = decisions(searcher.supernet)["body"]
        structure = body.options[body.drawn.indices[0]]
        assert cost.item() == pytest.approx(alone[structure], rel=1e-6)
        seen.add(structure)
    assert seen == {"slim", "broad"}


def test_a_path_without_any_branch_is_refused():
    for method, options in (("proxylessnas", {}), ("fbnet", {"paths": "one"})):
        with pytest.raises(
            UserError, match=f"{method} cannot search the space 'mine': .* leaves its block without any"
        ):
            check_searchable(method, branched(), "mine", options)
    check_searchable("fbnet", branched(), "mine")


def test_a_step_moves_no_probability_that_was_not_drawn():
    searcher, loop = gated()
    searcher.supernet.double()
    found = {path: d for path, d in decisions(searcher.supernet).items() if path not in searcher.structural}
    for decision in found.values():
        decision.logits.data = torch.randn(len(decision.options), dtype=torch.float64)
    batches = [(x.double(), y) for x, y in searcher.problem.task.batches("search", 16, train=True)]
    moved = 0
    for _ in range(3):
        for batch in batches:
            before = {path: d.logits.detach().softmax(0) for path, d in found.items()}
            searcher.architecture_step(loop, batch, None)
            for path, decision in found.items():
                if decision.drawn is None:
                    continue
                after, drawn = decision.logits.detach().softmax(0), decision.drawn.indices
                rest = [i for i in range(len(after)) if i not in drawn]
                assert torch.allclose(after[rest], before[path][rest], rtol=0, atol=1e-12)
                assert after[drawn].sum().item() == pytest.approx(before[path][drawn].sum().item(), abs=1e-12)
                moved += not torch.equal(after[drawn], before[path][drawn])
    assert moved > 10


def test_a_weight_step_reaches_one_path_only():
    searcher, loop = gated()
    searcher.weight_step(loop, next(iter(searcher.problem.task.batches("train", 16, train=True))))
    for path, decision in decisions(searcher.supernet).items():
        if isinstance(decision, OneOf) and path not in searcher.structural:
            touched = {
                option
                for option in decision.options
                if any(p.grad is not None for p in decision.candidate(option).parameters())
            }
            (active,) = decision.drawn.indices
            assert touched <= {decision.options[active]}
            assert touched or decision.options[active] == "skip"


def test_an_architecture_step_leaves_the_weights_alone():
    searcher, loop = gated()
    before = [p.clone() for p in weights(searcher.supernet)]
    searcher.architecture_step(loop, next(iter(searcher.problem.task.batches("search", 16, train=True))), None)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(searcher.supernet), strict=True))
    assert all(p.grad is None for p in weights(searcher.supernet))


def test_the_expected_cost_is_the_whole_one_with_the_gradient_of_the_pair():
    options = {"a": 1.0, "b": 4.0, "c": 16.0}

    def chain():
        return nn.Sequential(*(OneOf({name: nn.Identity() for name in options}) for _ in range(2)))

    prices = Prices(2.0, {"0": options, "1": options}, "ms")
    problem = problem_of(chain, shares=(1.0,), prices=prices)
    searcher = Gated(ProxylessNAS(), problem, problem.budgets[0], [])
    found = decisions(searcher.supernet)
    for decision in found.values():
        decision.logits.data = torch.randn(3)
    p = {path: decision.logits.detach().double().softmax(0) for path, decision in found.items()}
    enumerated = sum(
        prices.of(a) * math.prod(p[path][list(options).index(o)].item() for path, o in a.items())
        for a in enumerate_architectures(chain())
    )
    searcher.draw(torch.Generator().manual_seed(0), learning=True)
    cost = searcher.costs()["latency"]
    assert cost.item() == pytest.approx(enumerated, rel=1e-6)
    cost.backward()
    for decision in found.values():
        drawn = decision.drawn.indices
        f = torch.tensor([list(options.values())[i] for i in drawn])
        q = decision.logits.detach()[drawn].softmax(0)
        by_hand = torch.zeros(3)
        by_hand[drawn] = q * (f - q @ f)
        assert torch.allclose(decision.logits.grad, by_hand, atol=1e-5)


def test_of_equally_good_operations_the_cheap_one_wins():
    def twins():
        return nn.Sequential(
            ConvBn(1, 4, 3), OneOf({"dear": nn.Identity(), "cheap": nn.Identity()}), nn.Flatten(), nn.Linear(256, 3)
        )

    prices = Prices(1.0, {"1": {"dear": 2.0, "cheap": 1.0}}, "ms")
    for share, winner in ((1.0, "dear"), (2 / 3, "cheap")):
        problem = problem_of(twins, shares=(share,), prices=prices)
        searcher = Gated(ProxylessNAS(cost=CostLoss(weight=3.0)), problem, problem.budgets[0], [])
        loop = Loop(problem, searcher, Steps(architecture_rate=0.05, architecture_momentum=0.0, architecture_decay=0.0))
        batch = next(iter(problem.task.batches("search", 16, train=True)))
        for _ in range(150):
            searcher.architecture_step(loop, batch, None)
        decision = decisions(searcher.supernet)["1"]
        assert decision.logits.softmax(0)[decision.index(winner)].item() > 0.9


# REINFORCE --------------------------------------------------------------------------------------------------------


def test_the_advantage_is_against_the_mean_of_before(monkeypatch):
    searcher, loop = gated(ProxylessNAS(gradient="reinforce", networks=2, baseline_decay=0.9), kind=Sampled)
    batch = next(iter(searcher.problem.task.batches("search", 16, train=True)))
    rewards = iter([1.0, 1.0, 3.0, 3.0])
    monkeypatch.setattr(searcher, "reward", lambda accuracy, costs: next(rewards))

    def moved() -> bool:
        gradients = [d.logits.grad for d in decisions(searcher.supernet).values()]
        return any(gradient is not None and bool(gradient.any()) for gradient in gradients)

    searcher.architecture_step(loop, batch, None)  # as good as the mean: nothing to learn
    assert (searcher.baseline, moved()) == (1.0, False)
    searcher.architecture_step(loop, batch, None)  # both are better than the mean by 2
    assert (searcher.baseline, moved()) == (pytest.approx(0.9 * 1 + 0.1 * 3), True)


def test_a_noisy_bandit_finds_the_best_arm(monkeypatch):
    def arms():
        return nn.Sequential(OneOf({f"a{i}": nn.Identity() for i in range(4)}), nn.Flatten(), nn.Linear(64, 3))

    prices = Prices(1.0, {"0": dict.fromkeys((f"a{i}" for i in range(4)), 1.0)}, "ms")
    problem = problem_of(arms, shares=(1.0,), prices=prices)
    searcher = Sampled(ProxylessNAS(gradient="reinforce", baseline_decay=0.9), problem, problem.budgets[0], [])
    loop = Loop(problem, searcher, Steps(architecture_rate=0.05, architecture_momentum=0.0, architecture_decay=0.0))
    noise = torch.Generator().manual_seed(0)

    def reward(accuracy, costs) -> float:
        arm = decisions(searcher.supernet)["0"].drawn.indices[0]
        return 2 + (arm == 2) + torch.randn((), generator=noise).item()

    monkeypatch.setattr(searcher, "reward", reward)
    for _ in range(150):
        searcher.architecture_step(loop, (torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.long)), None)
    assert decisions(searcher.supernet)["0"].logits.softmax(0)[2].item() > 0.9


def test_latency_enters_the_reward():
    searcher, _ = gated(ProxylessNAS(gradient="reinforce", exponent=0.5), kind=Sampled)
    target = searcher.targets["latency"]
    assert searcher.reward(0.8, {"latency": torch.tensor(4 * target)}) == pytest.approx(0.4)
    assert searcher.reward(0.8, {}) == 0.8  # no cost that adds up: accuracy alone


def test_reinforce_counts_what_was_drawn_and_nothing_else():
    searcher, _ = gated(ProxylessNAS(gradient="reinforce"), kind=Sampled)
    for seed in range(5):
        searcher.draw(torch.Generator().manual_seed(seed), learning=True)
        by_hand = 0.0
        for path, decision in decisions(searcher.supernet).items():
            owner = searcher.problem.parents.get(path)
            outer = decisions(searcher.supernet)[owner[0]] if owner else None
            active = outer is None or outer.options[outer.drawn.indices[0]] == owner[1] if path != "body" else False
            if active:
                by_hand -= torch.tensor(float(len(decision.options))).log().item()
        assert searcher._log_probability().item() == pytest.approx(by_hand, rel=1e-5)


def test_by_default_one_architecture_step_comes_before_every_fifth_of_the_weights():
    steps = replace(ProxylessNAS().steps, batch_size=16, warmup_epochs=0)
    problem = problem_of(task=stripes(11 * 16))
    done = []

    class Counted(Gated):
        def weight_step(self, loop, batch):
            done.append("weights")
            return super().weight_step(loop, batch)

        def architecture_step(self, loop, batch, beside):
            done.append("architecture")
            return super().architecture_step(loop, batch, beside)

    loop = Loop(problem, Counted(ProxylessNAS(), problem, problem.budgets[0], []), steps)
    loop.train_epoch(seed=0)
    batches = done.count("weights")
    assert batches >= 6
    order = [name for step in range(batches) for name in (["architecture"] * (step % 5 == 0) + ["weights"])]
    assert done == order
