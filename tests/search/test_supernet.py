"""What supernet searches share: which networks their logits stand for, in spaces with rules and shared decisions."""

import pytest
import torch
from planted import BRISK, new_run, problem_of, search, stripes

from netsmith.architecture import check
from netsmith.decisions import decisions
from netsmith.methods.darts import DARTS, Relaxed
from netsmith.methods.fbnet import FBNet
from netsmith.search import supernet
from netsmith.search.differentiable import Loop, Steps
from netsmith.search.race import Finals
from netsmith.spaces.darts import darts
from netsmith.spaces.nasbench201 import nasbench201


def cells():
    return darts(3, 1, 8, width=2, cells=3)


def one_cell():
    return nasbench201(3, 1, 8, cells=1, width=4)


def test_of_the_edges_into_a_node_the_two_with_the_largest_weight_stay():
    problem = problem_of(cells, shares=(1.0,), task=stripes(64))
    searcher = Relaxed(DARTS(), problem, problem.budgets[0], [])
    generator = torch.Generator().manual_seed(0)
    for decision in decisions(searcher.supernet).values():
        decision.logits.data = torch.randn(len(decision.options), generator=generator)
    found = problem.allocate(searcher.values(), [])
    for kind in ("normal", "reduce"):
        for node in range(2, 6):
            strength = {}
            for i in range(node):
                edge = decisions(searcher.supernet)[f"{kind}.{i}_{node}"]
                p = dict(zip(edge.options, edge.logits.detach().softmax(0).tolist(), strict=True))
                operation = max((o for o in p if o != "none"), key=p.__getitem__)
                strength[f"{kind}.{i}_{node}"] = (p[operation], operation)
            kept = sorted(strength, key=lambda path: -strength[path][0])[:2]
            expected = {path: strength[path][1] if path in kept else "none" for path in strength}
            assert {path: found[path] for path in strength} == expected


def test_a_shared_decision_gets_the_gradient_of_all_its_places():
    problem = problem_of(one_cell, shares=(1.0,), task=stripes(64))
    searcher = Relaxed(DARTS(), problem, problem.budgets[0], [])
    loop = Loop(problem, searcher, Steps(rhythm=1, batch_size=16))
    assert len(searcher.parameters()) == 6
    searcher.architecture_step(loop, next(iter(problem.task.batches("search", 16, train=True))), None)
    assert all(logits.grad.abs().sum() > 0 for logits in searcher.parameters())


@pytest.mark.parametrize("method", ["fbnet", "proxylessnas", "darts", pytest.param("rarts", marks=pytest.mark.slow)])
def test_cells_are_searched_within_their_rules_and_the_budget(method, tmp_path):
    rhythm = {} if method == "fbnet" else {"rhythm": 1}
    for build in (one_cell, cells):
        problem = problem_of(build, shares=(0.6,), task=stripes(32))
        steps = {**BRISK, "epochs": 2, **rhythm}
        found = search(method, tmp_path / build.__name__, problem=problem, steps=steps)
        check(build(), found.architectures[0])
        assert problem.latency.of(found.architectures[0]) <= problem.budgets[0][0].limit


def test_a_front_aims_at_its_middle_and_keeps_the_structures_that_won(tmp_path, monkeypatch):
    problem, made = problem_of(shares=(0.8, 0.2, 0.4)), []
    monkeypatch.setattr(supernet, "settle", lambda *_: {"body": "slim"})
    monkeypatch.setattr(supernet, "learn", lambda p, run, name, make, steps: made.append(make()) or made[0])
    monkeypatch.setattr(supernet, "race", lambda p, run, name, entrants, **_: [(entrants[0], 0.5)])
    with new_run(tmp_path / "run") as run:
        values = FBNet(finals=Finals(samples=1)).search(problem, run)
    assert made[0].targets == {"latency": problem.budgets[2][0].limit}
    assert all(problem.allocate(v, b)["body"] == "slim" for v, b in zip(values, problem.budgets, strict=True))
