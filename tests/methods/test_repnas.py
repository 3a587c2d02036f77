"""RepNAS, exactly: the multiplier and its gradient, how many run and which, one step for weights and logits; what comes
out folds to the plain network; spaces it cannot search."""

import math
from collections import Counter

import pytest
import torch
from planted import NARROWING, QUANTISING, REPLACING, branched, problem_of, search, stripes, toy_for
from torch.nn import functional as F

from netsmith.architecture import enumerate_architectures, outline
from netsmith.blocks.reparam import Branches
from netsmith.cost.budget import Budget
from netsmith.cost.counts import BranchCount, Params
from netsmith.decisions import OneOf, Rule, derive
from netsmith.errors import UserError
from netsmith.methods import METHODS, check_searchable, make_method
from netsmith.methods.repnas import RepNAS, Sampled, largest, logistic
from netsmith.options import SearchOptions
from netsmith.prepare import default_space
from netsmith.prepare import problem_of as asked
from netsmith.run import read_events
from netsmith.search.differentiable import Loop, Steps, weights
from netsmith.search.sampling import at_budget, capacity, flat
from netsmith.ship.export import fold
from netsmith.spaces import open_space


def sampled(count: int = 8, **steps) -> tuple[Sampled, Loop]:
    problem = toy_for("repnas", task=stripes(64))
    searcher = Sampled(problem, count)
    given = {"epochs": 4, "warmup_epochs": 0, "batch_size": 16, "architecture_rate": 0.1}
    return searcher, Loop(problem, searcher, Steps(**{**given, **steps}))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return next(iter(stripes(64).batches("train", 16, train=True)))


def running(searcher: Sampled) -> set[str]:
    return {path for path, branch in searcher.branches.items() if branch.options[branch.drawn.indices[0]] == "on"}


def test_what_runs_counts_exactly_once():
    searcher, _ = sampled()
    for branch in searcher.branches.values():
        branch.logits.data = 3 * torch.randn(2)
    images, _ = batch()
    searcher.draw(torch.Generator().manual_seed(0), learning=True)
    shares = [branch.drawn.weights for path, branch in searcher.branches.items() if path in running(searcher)]
    assert all(torch.equal(share, torch.ones(1)) and share.requires_grad for share in shares)
    architecture = {path: "on" if path in running(searcher) else "off" for path in searcher.branches}
    derived = derive(searcher.supernet, architecture)
    assert torch.equal(searcher.supernet(images), derived(images))  # bit for bit


def test_the_gradient_of_the_logits_is_the_papers():
    # dL/dalpha = sigma'(r) <dL/dy, branch(x)> where a branch runs, nothing elsewhere.
    torch.manual_seed(0)
    problem = toy_for("repnas", task=stripes(64))
    searcher = Sampled(problem, 8)
    searcher.supernet.double()
    for branch in searcher.branches.values():
        branch.logits.data = torch.randn(2, dtype=torch.float64)
    noise = logistic(len(searcher.branches), torch.Generator().manual_seed(4)).double()
    searcher.draw(torch.Generator().manual_seed(4), learning=True)
    images, labels = batch()
    kept: dict[str, torch.Tensor] = {}
    hooks = []
    for path, branch in searcher.branches.items():

        def note(module, inputs, output, path=path):
            output.retain_grad()
            kept[path] = output

        hooks.append(branch.register_forward_hook(note))
    F.cross_entropy(searcher.supernet(images.double()), labels).backward()
    assert kept.keys() == running(searcher)
    for (path, branch), n in zip(searcher.branches.items(), noise, strict=True):
        if path not in kept:
            assert branch.logits.grad is None
            continue
        share = (branch.logits[0].detach() + n).sigmoid()
        by_hand = share * (1 - share) * (kept[path].grad * kept[path].detach()).sum()
        assert branch.logits.grad[0].item() == pytest.approx(by_hand.item(), rel=1e-9, abs=1e-15)
        assert branch.logits.grad[1] == 0


@pytest.mark.parametrize("count", [2, 5, 8, 24])
def test_every_step_runs_as_many_as_are_kept_and_no_block_without_one(count):
    searcher, _ = sampled(count)
    generator = torch.Generator().manual_seed(0)
    for step in range(50):
        for branch in searcher.branches.values():
            branch.logits.data = torch.randn(2, generator=generator) * step / 10
        searcher.draw(generator, learning=True)
        assert len(running(searcher)) == count
        for needing in ("layer0.", "layer2."):
            assert any(path.startswith(needing) for path in running(searcher))


def test_the_selection_of_the_warm_up_is_uniform():
    searcher, _ = sampled(8)
    generator, seen = torch.Generator().manual_seed(0), Counter()
    for _ in range(2000):
        searcher.draw(generator, learning=False)
        seen.update(running(searcher))
    for needing, free in ((("layer0", "layer2"), False), (("layer1", "layer3"), True)):
        counts = [seen[path] for path in searcher.branches if path.startswith(needing)]
        share = sum(counts) / len(counts) / 2000
        assert share < 1 / 3 if free else share > 1 / 3  # who needs one gets it first
        spread = math.sqrt(2000 * share * (1 - share))
        assert all(abs(count - 2000 * share) < 4 * spread for count in counts)


def test_the_noise_is_logistic():
    noise = logistic(20_000, torch.Generator().manual_seed(0)).double()
    for quantile in (0.1, 0.5, 0.9):
        assert (noise < math.log(quantile / (1 - quantile))).double().mean().item() == pytest.approx(quantile, abs=0.01)


def test_warm_up_moves_weights_and_then_one_step_moves_both():
    searcher, loop = sampled(warmup_epochs=1)
    before = [p.clone() for p in searcher.parameters()]
    weight = weights(searcher.supernet)[0].clone()
    entry, _ = loop.train_epoch(0)
    assert all(torch.equal(a, b) for a, b in zip(before, searcher.parameters(), strict=True))
    assert not torch.equal(weight, weights(searcher.supernet)[0])
    touched = loop.problem.task.touched.copy()
    loop.train_epoch(0)
    assert "search_loss" not in entry
    assert "search" not in touched | loop.problem.task.touched
    assert sum(not torch.equal(a, b) for a, b in zip(before, searcher.parameters(), strict=True)) > 8
    assert all(logits[1] == 0 for logits in searcher.parameters())


def test_a_logit_whose_branch_did_not_run_stays():
    searcher, loop = sampled(architecture_decay=0.1)
    for branch in searcher.branches.values():
        branch.logits.data[0] = 0.3
    for _ in range(3):  # Adam has momentum from the second step on
        before = {path: branch.logits.detach().clone() for path, branch in searcher.branches.items()}
        searcher.weight_step(loop, batch())
        for path, branch in searcher.branches.items():
            assert torch.equal(branch.logits, before[path]) == (path not in running(searcher))


def test_a_branch_that_runs_alone_learns_nothing():
    # A weak point of the method: what follows has a batch norm, to which the scale of a block makes no difference.
    torch.manual_seed(0)
    searcher, _ = sampled()
    searcher.supernet.double()
    for path, branch in searcher.branches.items():  # layer0 keeps its 3x3 alone, all others run
        branch.logits.data[0] = 50.0 if not path.startswith("layer0") or path == "layer0.kxk" else -50.0
    searcher.count = 24 - 5
    searcher.draw(torch.Generator().manual_seed(0), learning=True)
    for path in running(searcher):  # without the noise and at a steep place of sigma
        branch = searcher.branches[path]
        branch.drawn = branch.drawn._replace(weights=1 + (branch.logits[:1] - branch.logits[:1].detach()))
    images, labels = batch()
    F.cross_entropy(searcher.supernet(images.double()), labels).backward()
    steep = [
        branch.logits.grad[0].abs().item() for path, branch in searcher.branches.items() if path in running(searcher)
    ]
    alone = searcher.branches["layer0.kxk"].logits.grad[0].abs().item()
    assert alone < 1e-3 * max(steep)


def test_the_rate_of_the_logits_falls_along_a_cosine():
    _, loop = sampled(architecture_rate=0.4, warmup_epochs=1, epochs=5)
    rates = []
    for _ in range(5):
        rates.append(loop.architecture.param_groups[0]["lr"])
        loop.train_epoch(0)
    assert rates == pytest.approx([0.4, 0.4, 0.2 + 0.2 * math.sqrt(0.5), 0.2, 0.2 - 0.2 * math.sqrt(0.5)])


# The result -------------------------------------------------------------------------------------------------------


def small() -> torch.nn.Module:
    return torch.nn.Sequential(
        Branches(1, 4, kinds=("1x1", "kxk", "1xk")), Branches(4, 4, kinds=("1x1", "kxk")),
        Branches(4, 6, stride=2, kinds=("1x1", "kxk")), torch.nn.Flatten(), torch.nn.Linear(96, 3),
    )  # fmt: skip


def test_the_knapsack_takes_the_global_top_under_the_rules():
    problem = problem_of(small, task=stripes(32))
    networks = list(enumerate_architectures(problem.outline))
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        searcher = Sampled(problem, 3)
        for branch in searcher.branches.values():
            branch.logits.data[0] = torch.randn((), generator=generator)
        alphas = {path: branch.logits[0].item() for path, branch in searcher.branches.items()}
        for count in range(2, 8):
            fitting = [a for a in networks if sum(o == "on" for o in a.values()) == count]
            best = max(fitting, key=lambda a: sum(alphas[p] for p, o in a.items() if o == "on"))
            values = searcher.values(count)
            assert problem.allocate(values, [Budget("branches", float(count), "")]) == best
            assert problem.allocate(values, []) == best  # and without a budget on branches


def test_the_best_of_every_block_that_needs_one_comes_first():
    scores = {"a.x": -3.0, "a.y": -4.0, "b.x": 1.0, "b.y": 2.0}
    rules = (Rule(("a.x", "a.y"), "off", 1, 2),)
    assert largest(scores, 2, rules) == {"a.x", "b.y"}
    assert largest(scores, 0, rules) == {"a.x"}
    assert largest(scores, 2, ()) == {"b.x", "b.y"}


def test_how_many_are_kept():
    problem = toy_for("repnas", (0.34,), task=stripes(32))
    count = RepNAS().count
    assert count(problem, problem.budgets[0]) == math.floor(0.34 * 24) == 8
    assert count(problem, [Budget("params", 1e9, "")]) == 8
    assert count(problem, [Budget("branches", 5.0, "")]) == 5
    assert count(problem, [Budget("branches", 99.0, "")]) == 24
    with torch.device("meta"):
        problem.__dict__["outline"] = outline(open_space("repvgg"))
    assert count(problem, []) == 44  # of 132, as in the released mask


def test_the_result_folds_to_the_plain_network(tmp_path):
    problem = toy_for("repnas", (0.3, 0.6), task=stripes(64))
    outcome = search("repnas", tmp_path / "run", problem=problem)
    counts = []
    for architecture in outcome.architectures:
        network = problem.network(architecture)
        counts.append(BranchCount()(network, problem.input_shape))
        plain = sum(9 * i * o + o for i, o in ((1, 8), (8, 8), (8, 12), (12, 12)))
        head = sum(p.numel() for p in fold(network).head.parameters())
        assert sum(p.numel() for p in fold(network).parameters()) == plain + head
        assert Params()(network, problem.input_shape) == problem.prices["params"].constant
    assert counts == [7, 14]
    assert set(outcome.tensors) == {"repnas.pt"}  # one search for both
    epochs = [event for event in read_events(tmp_path / "run") if event["kind"] == "search_epoch"]
    assert set(epochs[-1]["probabilities"]) == set(problem.outline.options)


# What it cannot search --------------------------------------------------------------------------------------------


def test_a_space_without_branches_is_refused_in_a_sentence():
    with pytest.raises(UserError) as caught:
        asked(SearchOptions(method="repnas", space="fbnet_small", budget=("latency<=0.5x",)))
    sentence = str(caught.value)
    assert "repnas cannot search the space 'fbnet_small': its decision 'body'" in sentence
    others = [name for name in METHODS if name not in ("repnas", *REPLACING, *NARROWING, *QUANTISING)]
    assert sentence.endswith(f"methods that can: {', '.join(others)}")


def test_a_baseline_is_refused_as_well():
    with pytest.raises(UserError, match="repnas cannot search the space 'prunet_small'"):
        asked(SearchOptions(method="random", space="prunet_small", baselines=("repnas",), budget=("params<=0.5x",)))


def test_a_space_of_branches_and_blocks_is_refused():
    mixed = torch.nn.Sequential(Branches(1, 4), OneOf({"a": torch.nn.Identity(), "b": torch.nn.Identity()}))
    with pytest.raises(UserError, match="its decision '1' is not whether a branch is on or off"):
        check_searchable("repnas", mixed, "mine")
    check_searchable("repnas", branched(), "mine")
    check_searchable("fbnet", mixed, "mine")


def test_less_than_everything_that_folds_away_is_no_budget():
    with pytest.raises(UserError, match=r"latency<=0.5x cannot be kept: .* 'repvgg_small' fold to the same file"):
        asked(SearchOptions(method="repnas"))
    assert asked(SearchOptions(method="repnas", budget=("branches<=0.34x", "latency<=1x")))["space"] == "repvgg_small"


def test_one_step_teaches_both():
    with pytest.raises(UserError, match=r"steps.rhythm is 1; allowed: 0"):
        make_method("repnas", {"steps": {"rhythm": 1}})


def test_its_spaces():
    assert [default_space("repnas", side) for side in (8, 64, 224)] == ["repvgg_small"] * 2 + ["repvgg"]


# The baselines where everything folds -----------------------------------------------------------------------------


def test_baselines_spend_a_budget_on_branches():
    problem = toy_for("random", task=stripes(32))
    assert problem.work is problem.prices["macs"]  # nothing folds: as ever
    problem = toy_for("repnas", (0.34,), task=stripes(32))
    (budgets,) = problem.budgets
    found = problem.allocate(capacity(problem), budgets)
    assert sum(option == "on" for option in found.values()) == 8
    for layer in range(4):  # what computes most in training
        kinds = {path.split(".")[1] for path, o in found.items() if path.startswith(f"layer{layer}") and o == "on"}
        assert kinds >= ({"kxk", "1x1_kxk"} if layer else {"1x1_kxk"})  # the first has one channel to look at
    assert problem.allocate(flat(problem), budgets) == found
    drawn = at_budget(problem, budgets, torch.Generator().manual_seed(0))
    assert sum(option == "on" for option in drawn.values()) == 8
    assert all(option == "on" for option in problem.reference.values())


def test_the_work_of_a_branch_by_hand():
    work = toy_for("repnas", task=stripes(32)).work.options
    images = 64  # pixels
    assert work["layer1.kxk"] == {"on": 9 * 8 * 8 * images, "off": 0}
    assert work["layer1.1x1_kxk"]["on"] == (9 + 1) * 8 * 8 * images
    assert work["layer2.1xk"]["on"] == 3 * 8 * 12 * images / 4
