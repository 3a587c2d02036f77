"""FBNet, exactly: the mask, the latency term, its gradient, the temperature; and the small experiments of its sheet."""

import math
from collections import Counter, OrderedDict

import pytest
import torch
from planted import Misled, new_run, problem_of, search, stripes
from torch import nn

from netsmith.blocks.mobile import ConvBn, Head
from netsmith.cost.prices import Prices, expected
from netsmith.decisions import OneOf, decisions
from netsmith.gates import Gumbel
from netsmith.methods.fbnet import FBNet, Stochastic
from netsmith.run import read_events
from netsmith.search.differentiable import CostLoss, Steps, latency_factor, learn
from netsmith.search.supernet import restrict


def one_layer() -> nn.Module:
    layer = OneOf({"good": ConvBn(8, 8, 3), "bad": Misled(8, 3)})
    return nn.Sequential(OrderedDict(stem=ConvBn(1, 8, 3), layer=layer, head=Head(8, 16, 3)))


def twins() -> nn.Module:
    layer = OneOf({"dear": nn.Identity(), "cheap": nn.Identity()})
    return nn.Sequential(OrderedDict(stem=ConvBn(1, 8, 3), layer=layer, head=Head(8, 16, 3)))


def supernet(method: FBNet, build=twins, *, options=None, share: float = 1.0) -> Stochastic:
    prices = Prices(1.0, {"layer": options or {"dear": 2.0, "cheap": 1.0}}, "ms")
    problem = problem_of(build, shares=(share,), prices=prices)
    return Stochastic(method, problem, problem.budgets[0], [])


def test_the_mask_of_every_draw_sums_to_one():
    problem = problem_of()
    searcher = Stochastic(FBNet(), problem, problem.budgets[0], [{"body": "slim"}, {"body": "broad"}])
    generator = torch.Generator().manual_seed(0)
    for searcher.progress in (0.0, 0.5, 1.0):
        for learning in (False, True):
            searcher.draw(generator, learning=learning)
            for path, decision in decisions(searcher.supernet).items():
                if decision.drawn is None:
                    continue  # inside the structure that does not run
                indices, weights, _ = decision.drawn
                assert weights.sum().item() == pytest.approx(1, abs=1e-6)
                assert len(indices) == (1 if path == "body" else len(decision.options))


def test_with_one_path_weights_learn_in_single_blocks_and_the_architecture_in_all():
    problem = problem_of()
    searcher = Stochastic(FBNet(paths="one"), problem, problem.budgets[0], [{"body": "slim"}])
    layer = decisions(searcher.supernet)["body.slim.stage1_0"]
    for learning, count in ((False, 1), (True, len(layer.options))):
        searcher.draw(torch.Generator().manual_seed(0), learning=learning)
        assert len(layer.drawn.indices) == count
        assert layer.drawn.weights.requires_grad == learning


def test_the_power_acts_on_the_logarithm():
    # At LAT = e^2 and beta = 0.6: (log LAT)^beta = 1.5157, log(LAT^beta) = 1.2. A target counts as e^3.
    expectation = torch.tensor(5.0 * math.exp(-1), dtype=torch.float64)
    assert latency_factor(expectation, 5.0, 1.0, 0.6).item() == pytest.approx(1.5157, abs=5e-5)
    assert latency_factor(expectation, 5.0, 0.2, 0.6).item() == pytest.approx(0.2 * 1.5157, abs=1e-5)
    assert latency_factor(torch.tensor(1e-9), 5.0, 1.0, 0.6).isfinite()  # a latency below the unit is no NaN


def test_the_gradient_of_the_expected_latency():
    # At g = 0 and tau = 1: p_i (LAT_i - sum p LAT); through the loss: times CE * alpha * beta * log^(beta - 1) / E.
    searcher = supernet(FBNet(cost=CostLoss(form="power")))
    layer = decisions(searcher.supernet)["layer"]
    layer.logits.data = torch.tensor([0.4, -0.9])
    p, prices = layer.logits.detach().softmax(0).double(), torch.tensor([2.0, 1.0], dtype=torch.float64)
    mean = 1 + p @ prices
    inner = p * (prices - p @ prices)
    expected(searcher.supernet, searcher.problem.latency).backward()
    assert torch.allclose(layer.logits.grad.double(), inner, atol=1e-6)
    layer.logits.grad = None
    layer.drawn = None
    searcher.objective(torch.tensor(0.7)).backward()
    target = searcher.targets["latency"]
    log = torch.log(mean / target * math.exp(3))
    assert torch.allclose(layer.logits.grad.double(), 0.7 * 0.2 * 0.6 * log**-0.4 / mean * inner, atol=1e-6)


def latency_only(searcher: Stochastic, steps: int = 300) -> float:
    """Train theta where every option predicts equally well; the probability of the cheap one."""
    optimizer = torch.optim.Adam(searcher.parameters(), lr=0.01, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        searcher.draw(generator, learning=True)
        optimizer.zero_grad()
        objective = searcher.objective(torch.tensor(1.0))
        objective.backward()
        optimizer.step()
    return decisions(searcher.supernet)["layer"].logits.softmax(0)[1].item()


def test_of_equally_good_operations_the_cheap_one_wins():
    assert latency_only(supernet(FBNet(cost=CostLoss(form="power")))) > 0.9


def test_without_beta_it_does_not_care():
    assert latency_only(supernet(FBNet(cost=CostLoss(form="power", beta=0.0)))) == 0.5


def test_the_two_sided_loss_aims_at_the_budget():
    # Of 3 ms and 2 ms, at a target of 3 ms the dear one is right, at 2 ms the cheap one.
    assert latency_only(supernet(FBNet(), share=1.0)) < 0.1
    assert latency_only(supernet(FBNet(), share=2 / 3)) > 0.9


def test_a_good_operation_beats_a_bad_one_in_under_300_steps(tmp_path):
    prices = Prices(1.0, {"layer": {"good": 1.0, "bad": 1.0}}, "ms")
    problem = problem_of(one_layer, shares=(1.0,), prices=prices, task=stripes(64))
    steps = Steps(epochs=60, warmup_epochs=2, batch_size=8, architecture_rate=0.02)
    with new_run(tmp_path / "run") as run:
        searcher = learn(
            problem,
            run,
            "x",
            lambda: Stochastic(FBNet(cost=CostLoss(form="power")), problem, problem.budgets[0], []),
            steps,
        )
    assert decisions(searcher.supernet)["layer"].logits.softmax(0)[0] > 0.9


def test_the_temperature_ends_where_the_papers_90_epochs_end(tmp_path):
    searcher = supernet(FBNet())
    assert searcher.temperature == 5.0
    searcher.stepped(0.5, torch.optim.Adam(searcher.parameters()))
    assert searcher.temperature == pytest.approx(5 * 0.956**45)
    problem = searcher.problem
    with new_run(tmp_path / "run") as run:
        ended = learn(
            problem,
            run,
            "x",
            lambda: Stochastic(FBNet(), problem, problem.budgets[0], []),
            Steps(epochs=2, warmup_epochs=1),
        )
    assert ended.temperature == pytest.approx(5 * 0.956**90) == pytest.approx(5 * math.exp(-0.045 * 90), rel=1e-3)


def test_noise_fades_with_the_temperature():
    logits = torch.tensor([1.0, 0.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    hot = torch.stack([Gumbel(5.0)(logits, generator).weights for _ in range(200)])
    cold = torch.stack([Gumbel(0.087)(logits, generator).weights for _ in range(200)])
    assert hot.max(1).values.mean() < 0.6 < 0.9 < cold.max(1).values.mean()


def test_one_supernet_serves_all_budgets(tmp_path):
    problem = problem_of(shares=(0.2, 0.4, 0.6, 0.8), task=stripes(64))
    outcome = search("fbnet", tmp_path / "run", problem=problem, finals={"samples": 1, "epochs": [1]})
    assert set(outcome.tensors) == {"fbnet.pt"}
    trained = Counter(event["search"] for event in read_events(tmp_path / "run") if event["kind"] == "search_epoch")
    assert trained == {"fbnet": 4}
    used = [problem.latency.of(a) / b[0].limit for a, b in zip(outcome.architectures, problem.budgets, strict=True)]
    assert all(0.85 < share <= 1 for share in used)


def test_a_structure_that_no_budget_chose_leaves_the_supernet():
    model = problem_of().build()
    restrict(model, [{"body": "slim"}, {"body": "slim"}])
    assert decisions(model)["body"].options == ["slim"]
    model = problem_of().build()
    restrict(model, [{"body": "slim"}, {"body": "broad"}])
    assert decisions(model)["body"].options == ["slim", "broad"]


def test_values_do_not_punish_a_block_for_having_a_width_inside():
    problem = problem_of()
    searcher = Stochastic(FBNet(), problem, problem.budgets[0], [{"body": "slim"}])
    values = searcher.values()  # nothing is learned yet: all blocks are equally likely
    for path, row in values.items():
        if path.startswith("body.slim") and path.endswith("hidden"):
            assert max(row.values()) >= 0
        elif path.startswith("body.slim"):
            assert row.get("skip", 0.0) <= min(row.values())
