"""PAD-NAS: the spaces' sizes, what is dropped and what stays bit for bit, the window, the stages."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planted import OPTIONS, macro, new_run, problem_of, search, stripes

from netsmith.architecture import check, outline, sample
from netsmith.cost.budget import Budget
from netsmith.decisions import derive
from netsmith.errors import UserError
from netsmith.methods import make_method, pad_nas
from netsmith.methods.pad_nas import PADNAS, SinglePath, Window, frequencies, low_ranked
from netsmith.run import read_events
from netsmith.search.differentiable import Steps, learn
from netsmith.search.nsga2 import Individual
from netsmith.search.sampling import at_budget, usage
from netsmith.spaces import open_space
from netsmith.train.batchnorm import recalibrate
from netsmith.train.checkpoint import load_state
from netsmith.train.loop import evaluate


@pytest.mark.parametrize(
    ("variant", "size"), [("basic", 3 * 6**6 * 7**15), ("large", 3 * 18**6 * 19**15)], ids=["basic", "large"]
)
def test_the_spaces_have_the_papers_sizes(variant, size):
    with torch.device("meta"):
        options = outline(open_space("pad_nas", variant=variant)).options
    assert math.prod(map(len, options.values())) == size
    assert size == pytest.approx({"basic": 6.64e17, "large": 1.55e27}[variant], rel=1e-2)


def test_stages_get_the_papers_shares_of_the_epochs():
    def stages(epochs: int, m: int) -> list[tuple[int, float]]:
        method = PADNAS(steps=Steps(epochs=epochs, learning_rate=0.5), stages=m)
        return [(s.epochs, s.learning_rate) for s in map(method.schedule, range(1, m))]

    assert stages(240, 4) == [(120, 0.5), (80, 0.1), (40, 0.1)]
    assert stages(240, 2) == [(240, 0.5)]
    for m in range(2, 9):
        for epochs in range(max(m - 1, 4), 40):
            lengths = [length for length, _ in stages(epochs, m)]
            assert sum(lengths) == epochs
            assert min(lengths) >= 1


# What is dropped --------------------------------------------------------------------------------------------------


def test_frequencies_of_the_active_sum_to_one():
    space, generator = outline(macro()), torch.Generator().manual_seed(0)
    drawn = [sample(space, generator) for _ in range(20)]
    shares = frequencies(space, drawn)
    assert {path: list(row) for path, row in shares.items()} == space.options
    for path, row in shares.items():
        having = [a[path] for a in drawn if path in a]
        assert sum(row.values()) == pytest.approx(1.0 if having else 0.0, abs=1e-12)
        for option, p in row.items():
            assert p == having.count(option) / max(1, len(having))
    nothing = {path for path in space.options if not any(path in a for a in drawn)}
    assert nothing  # some block was never drawn: there the sum is 0, not NaN


def layers(*choices: str) -> list[dict]:
    return [{f"l{i}": option for i, option in enumerate(choice)} for choice in choices]


@pytest.mark.parametrize("count", [8, 64, 256])
def test_one_percent_means_never_whatever_the_population(count):
    space = pad_nas.Outline({"l0": list("abc")}, {})
    counted = layers(*"a" * (count - 1), "b")
    dropped = PADNAS(evidence=0).rare(space, counted, [])
    assert dropped == [{"path": "l0", "option": "c", "probability": 0.0}]


def test_a_threshold_never_empties_a_layer_nor_drops_what_a_budget_needs():
    space = pad_nas.Outline({"l0": list("abc"), "l1": list("abc")}, {})
    counted = layers(*["ab"] * 10, *["bb"] * 9, "cb")
    method = PADNAS(threshold=0.99, evidence=0)
    kept = {(d["path"], d["option"]) for d in method.rare(space, counted, [])}
    assert {(p, o) for p, row in space.options.items() for o in row} - kept == {("l0", "a"), ("l1", "b")}
    assert ("l0", "c") not in {(d["path"], d["option"]) for d in method.rare(space, counted, layers("cb"))}


def test_without_evidence_nothing_goes():
    space = pad_nas.Outline({"l0": list("abc")}, {})
    assert PADNAS(evidence=2).rare(space, layers(*"aaaab"), []) == []
    assert [d["option"] for d in PADNAS(evidence=2).rare(space, layers(*"aaaaab"), [])] == ["c"]
    assert PADNAS(evidence=0).rare(space, [], []) == []  # nobody has that decision


def test_only_low_ranks_count():
    chain = [Individual({"n": n}, [n, n]) for n in range(12)]
    assert [one.architecture["n"] for one in low_ranked(chain, 10)] == list(range(9))


def test_what_survives_is_inherited_bit_for_bit():
    searcher = SinglePath(problem_of(), [])
    generator = torch.Generator().manual_seed(0)
    for tensor in searcher.supernet.state_dict().values():  # buffers too have a value of their own
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    before = {name: tensor.clone() for name, tensor in searcher.supernet.state_dict().items()}
    path = "body.slim.stage1_0"
    gone = [{"path": path, "option": "ir5"}, {"path": f"{path}.ir5.hidden", "option": 4}]
    gone += [{"path": f"{path}.ir.hidden", "option": 32}]
    assert searcher.drop(gone) == [gone[0], gone[2]]  # the second went with the first
    assert searcher.space.options[path] == ["ir", "fused", "skip"]
    assert f"{path}.ir5.hidden" not in searcher.space.options
    after = searcher.supernet.state_dict()
    assert {name for name in before if name not in after} == {n for n in before if n.startswith(f"{path}.ir5.")}
    own = [name for name in after if not name.endswith("logits")]
    assert all(torch.equal(after[name], before[name]) for name in own)
    assert any(name.endswith("running_var") for name in own)


TINY = {"population": 4, "iterations": 1}

# The search -------------------------------------------------------------------------------------------------------


def individuals(folder: Path, stage: int) -> list[dict]:
    files = folder.glob(f"stages/pad_nas-stage{stage}-evolution-*.json")
    return [architecture for file in files for architecture, _ in json.loads(file.read_text())["value"]]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_sets_only_shrink_and_nobody_is_outside_of_window_or_set(seed, tmp_path):
    problem = problem_of(task=stripes(64))
    outcome = search("pad_nas", tmp_path / "run", problem=problem, seed=seed)
    events = read_events(tmp_path / "run")
    sets = dict(outline(macro()).options)
    tightest, loosest = (budget.limit for (budget,) in problem.budgets)
    for stage in (1, 2, 3):
        found = individuals(tmp_path / "run", stage)
        assert len(found) >= 8
        for architecture in found:
            check(macro(), architecture)
            assert all(option in sets[path] for path, option in architecture.items())
            assert 0.85 * tightest <= problem.latency.of(architecture) <= loosest * (1 + 1e-9)
        gone = [e for e in events if e["kind"] == "removed" and e["search"] == f"pad_nas-stage{stage}"]
        assert bool(gone) == (stage < 3)
        for event in gone:
            sets[event["path"]] = [option for option in sets[event["path"]] if option != event["option"]]
        epochs = [e for e in events if e["kind"] == "search_epoch" and e["search"] == f"pad_nas-stage{stage + 1}"]
        for path, row in (epochs[0]["probabilities"] if epochs else {}).items():
            assert [str(option) for option in sets[path]] == list(row)
            assert sum(row.values()) == pytest.approx(1)
    for values, budgets in zip(outcome.values, problem.budgets, strict=True):  # nor does a correction bring one back
        for scale in (0.8, 0.9, 1.1):
            architecture = problem.allocate(values, budgets, {"latency": scale}, least=0.95)
            assert all(option in sets[path] for path, option in architecture.items())


def test_what_is_scored_counted_and_spared(tmp_path, monkeypatch):
    """Errors are those of inherited weights on `search`; low ranks are counted; every budget keeps a network."""
    problem, noted, kept = problem_of(task=stripes(64)), [], PADNAS.rare
    monkeypatch.setattr(
        PADNAS,
        "rare",
        lambda self, *given, **named: noted.append((given[1], named["spared"])) or kept(self, *given, **named),
    )
    search("pad_nas", tmp_path / "run", problem=problem, rank=2)
    stage = json.loads((tmp_path / "run/stages/pad_nas-stage1-evolution-0.json").read_text())["value"]
    scored = [Individual(*pair) for pair in stage]
    assert [one.architecture for one in scored[:2]] == json.loads(
        (tmp_path / "run/stages/pad_nas-window.json").read_text()
    )["value"]
    with new_run(tmp_path / "again") as run:
        batches = list(replace(PADNAS(), calibration=2)._calibrating(problem, run))
    left = [{"body": one.architecture["body"]} for one in scored]  # the structures that the race left
    searcher = SinglePath(problem, left)
    searcher.restore(load_state(tmp_path / "run/checkpoints/pad_nas-stage1.pt")["searcher"])
    for one in scored:
        network = derive(searcher.supernet, one.architecture)
        recalibrate(network, batches)
        assert one.objectives[0] == 1 - evaluate(network, problem.task, "search")
    assert len(noted) == 2
    for counted, spared in noted:
        assert 0 < len(counted) < 8  # of a population of eight
        for one, (budget,) in zip(spared, problem.budgets, strict=True):
            assert problem.latency.of(one) <= budget.limit


def test_too_few_epochs_for_the_stages_are_refused_at_once():
    with pytest.raises(UserError, match=r"steps\.epochs is 2; allowed: 3, one a stage, or more"):
        make_method("pad_nas", {"steps": {"epochs": 2}})


def test_a_stage_starts_where_the_last_one_ended(tmp_path, monkeypatch):
    """The searches in between score with other batch norm statistics, and leave the supernet's alone."""
    starts = []

    def noting(problem, run, name, make, steps):
        starts.append({key: tensor.clone() for key, tensor in make().supernet.state_dict().items()})
        return learn(problem, run, name, make, steps)

    monkeypatch.setattr(pad_nas, "learn", noting)
    search("pad_nas", tmp_path / "run", problem=problem_of(shares=(0.5,), task=stripes(64)))
    for stage in (2, 3):
        ended = load_state(tmp_path / "run" / "checkpoints" / f"pad_nas-stage{stage - 1}.pt")["searcher"]["supernet"]
        own = [name for name in starts[stage - 1] if not name.endswith("logits")]
        assert all(torch.equal(starts[stage - 1][name], ended[name]) for name in own)
    open_ = [sum(t.numel() for name, t in start.items() if name.endswith("logits")) for start in starts]
    assert open_[2] < open_[0]


def test_two_stages_are_plain_one_shot_search(tmp_path):
    problem = problem_of(shares=(0.5,), task=stripes(64))
    outcome = search("pad_nas", tmp_path / "run", problem=problem, stages=2)
    assert list(outcome.tensors) == ["pad_nas-stage1.pt"]
    assert not [event for event in read_events(tmp_path / "run") if event["kind"] == "removed"]
    scored = individuals(tmp_path / "run", 1)
    method = PADNAS(steps=Steps(**OPTIONS["pad_nas"]["steps"]), stages=2)
    with new_run(tmp_path / "plain") as run:
        chosen = {"body": outcome.architectures[0]["body"]}
        plain = learn(problem, run, "pad_nas-stage1", lambda: SinglePath(problem, [chosen]), method.schedule(1))
    trained = plain.supernet.state_dict()
    assert all(torch.equal(t, trained[name]) for name, t in outcome.tensors["pad_nas-stage1.pt"].items())
    assert outcome.architectures[0] in scored


def test_the_window_hangs_below_the_largest_network_where_the_budget_is_above_it(tmp_path):
    problem = problem_of(shares=(1.4,), task=stripes(64))
    largest = problem.reference
    window = Window.around(problem, [largest], 0.85)
    assert window.least == [pytest.approx(0.85 / 1.4)]
    assert window.holds(largest)
    outcome = search("pad_nas", tmp_path / "run", problem=problem)
    assert len(individuals(tmp_path / "run", 1)) > 8
    check(macro(), outcome.architectures[0])


def test_budgets_of_several_metrics_and_peak_memory(tmp_path):
    problem = problem_of(task=stripes(64))
    dearest = problem.latency.of(problem.reference)
    problem.budgets = [[Budget("latency", 0.5 * dearest, "ms"), Budget("peak_memory", 6000, "B")]]
    outcome = search("pad_nas", tmp_path / "run", problem=problem, stages=3, evolution=TINY)
    assert usage(problem, outcome.architectures[0], problem.budgets[0]) <= 1 + 1e-9


def test_networks_are_drawn_from_the_space_that_is_left():
    problem, searcher = problem_of(shares=(0.3,)), SinglePath(problem_of(), [{"body": "slim"}])
    searcher.drop([{"path": "body.slim.stage1_0", "option": "ir"}])
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        found = at_budget(problem, problem.budgets[0], generator, space=searcher.space)
        check(searcher.space, found)
        assert found["body"] == "slim"
        assert found["body.slim.stage1_0"] != "ir"
        derive(searcher.supernet, found)
