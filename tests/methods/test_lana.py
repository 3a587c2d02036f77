"""LANA, exactly: the original is untouched, every candidate learns alone, harms are what they say."""

import copy
import math

import planted
import pytest
import torch
from planted import new_run, opened_network, problem_of, stripes
from torch import nn
from torch.nn import functional as F

from netsmith.decisions import derive
from netsmith.errors import UserError
from netsmith.methods import check_searchable, lana, make_method
from netsmith.methods.lana import LANA, regress, taken
from netsmith.search.problem import LAST_RESORT, LEARNT
from netsmith.ship.weights import tensors


@pytest.fixture(scope="module")
def problem():
    return problem_of(opened_network, [0.6], task=stripes(64))


def options(**changed):
    return LANA(**{**planted.OPTIONS["lana"], **changed})


def test_the_original_is_there_bit_for_bit(problem):
    space = problem.build().eval()
    plain = derive(space, problem.reference).eval()
    images = torch.randn(4, 1, 8, 8)
    with taken(space, problem.reference):
        assert torch.equal(space(images), plain(images))
    assert isinstance(derive(space, {"first": "identity", "second": "original"}).first, nn.Identity)


def test_one_candidate_learns_and_nothing_else_has_a_gradient(problem):
    space = problem.build()
    before = copy.deepcopy(space.state_dict())
    inputs, wanted = torch.randn(4, 8, 8, 8), torch.randn(4, 8, 8, 8)
    candidate = space.first.candidate("conv")
    error = regress(candidate, inputs, wanted)
    candidate.train()
    expected = F.mse_loss(candidate(inputs), wanted) / wanted.square().mean()
    assert error.item() == pytest.approx(expected.item(), rel=1e-4)
    mine = set(candidate.parameters())
    assert all(p.grad is not None for p in mine)
    assert all(p.grad is None for p in space.parameters() if p not in mine)
    changed = {name for name, tensor in space.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all(name.startswith("first.conv.") for name in changed)  # running statistics


def test_learning_lowers_the_error_and_leaves_the_original_alone(problem, tmp_path):
    space = problem.build()
    before = copy.deepcopy(derive(space, problem.reference).state_dict())
    pool = {path: ["conv", "point", "identity"] for path in problem.reference}
    with new_run(tmp_path / "run") as run:
        errors = []
        run.progress = lambda name, done, total, note: errors.append(float(note.split()[1]))
        options(epochs=8, learning_rate=1e-2).learn(problem, run, space, pool)
        again = problem.build()
        options(epochs=8).learn(problem, run, again, pool)  # reads what was learnt
    assert errors[-1] < 0.8 * errors[0]
    assert all(torch.equal(t, before[n]) for n, t in derive(space, problem.reference).state_dict().items())
    assert all(torch.equal(t, space.state_dict()[n]) for n, t in again.state_dict().items())
    assert {name.split(".")[1] for name in tensors(tmp_path / "run" / LEARNT)} == {"conv", "point"}


@pytest.mark.parametrize("score", ["loss", "kl"])
def test_harms_are_those_of_the_swapped_networks(problem, score, tmp_path):
    space, method = problem.build(), options(score=score, images=64)
    pool = {"first": ["identity", "conv"], "second": ["point"]}
    with new_run(tmp_path / "run") as run:
        values = method.values(problem, run, space, pool)
    assert values["first"]["original"] == values["second"]["original"] == 0.0
    images, labels = (torch.cat(part) for part in zip(*problem.task.batches("train", 64, train=False), strict=True))

    def harm(network) -> float:
        logits = derive(space, network).eval()(images)
        if score == "loss":
            return F.cross_entropy(logits, labels).item()
        answers = derive(space, problem.reference).eval()(images).softmax(1)
        return (answers * (answers.log() - logits.log_softmax(1))).sum(1).mean().item()

    own = harm(problem.reference)
    for path, row in pool.items():
        for option in row:
            assert -values[path][option] == pytest.approx(harm({**problem.reference, path: option}) - own, abs=1e-5)


def test_the_best_network_is_the_one_that_scores_best(problem, tmp_path):
    space, method = problem.build(), options(images=64, solutions=4, overlap=0.5)
    pool = {path: ["identity", "conv", "point"] for path in problem.reference}
    with new_run(tmp_path / "run") as run:
        values = method.values(problem, run, space, pool)
        best = method.best(problem, run, space, values, problem.budgets[0])
    networks = problem.diverse(values, problem.budgets[0], 4, 0.5)
    assert len(networks) > 1
    assert all(sum(a[path] == b[path] for path in a) <= 1 for a in networks for b in networks if a is not b)
    batches = method._scoring_batches(problem)
    harms = [method._harm(space, batches, [torch.zeros(1)] * len(batches), network) for network in networks]
    assert best == networks[harms.index(min(harms))]


def test_what_is_dearer_than_the_original_is_the_last_resort(problem, tmp_path):
    priced = problem_of(opened_network, [0.6], task=stripes(64))
    row = priced.latency.options["first"]
    row["conv"] = 2 * row["original"]
    with new_run(tmp_path / "run") as run:
        (values,) = options().search(priced, run)
    assert values["first"]["conv"] == LAST_RESORT
    assert LAST_RESORT / 2 < values["second"]["conv"] < math.inf


def test_nothing_to_learn_needs_no_training(problem, tmp_path):
    space = problem.build()
    with new_run(tmp_path / "run") as run:
        options().learn(problem, run, space, {path: ["identity"] for path in problem.reference})
    assert not (tmp_path / "run" / LEARNT).exists()


def test_errors_that_are_no_number_stop_it(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(lana, "regress", lambda *_: torch.tensor(math.nan))
    with new_run(tmp_path / "run") as run, pytest.raises(UserError, match="error became nan in epoch 1"):
        options().learn(problem, run, problem.build(), {"first": ["conv"]})


def test_a_space_without_an_original_is_refused():
    with pytest.raises(UserError, match="lana cannot search the space 'macro': its decision 'body' does not replace"):
        check_searchable("lana", planted.macro(), "macro")
    assert make_method("lana").solutions == 20
