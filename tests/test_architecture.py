"""Architectures as data: legal samples, mutations, crossings, enumeration, JSON."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn

from netsmith import architecture as arch
from netsmith.decisions import OneOf, Rule, decisions, parents
from netsmith.errors import UserError


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_enumeration_is_complete_and_has_no_duplicates(nested):
    model = nested()
    found = [arch.dumps(a) for a in arch.enumerate_architectures(model)]
    assert len(found) == len(set(found)) == 48
    generator = rng()
    assert {arch.dumps(arch.sample(model, generator)) for _ in range(1000)} == set(found)


def test_samples_are_legal_round_trip_and_repeat(nested):
    model = nested()
    for seed in range(50):
        a = arch.sample(model, rng(seed))
        arch.check(model, a)
        assert arch.loads(arch.dumps(a)) == a
        assert arch.sample(model, rng(seed)) == a


def test_mutation_changes_one_decision_and_what_opens_below(nested):
    model, generator = nested(), rng()
    outer = parents(model)
    for _ in range(300):
        a = arch.sample(model, generator)
        before = dict(a)
        b = arch.mutate(model, a, generator)
        assert a == before
        arch.check(model, b)
        changed = {path for path in set(a) & set(b) if a[path] != b[path]}
        assert len(changed) == 1
        (path,) = changed
        for other in set(a) ^ set(b):
            assert outer[other][0] == path


def test_mutation_reaches_everything(nested):
    model, generator = nested(), rng()
    a, seen = arch.sample(model, generator), set()
    for _ in range(2000):
        a = arch.mutate(model, a, generator)
        seen.add(arch.dumps(a))
    assert len(seen) == 48


def test_a_child_takes_every_decision_from_a_parent_that_has_it(nested):
    model, generator = nested(), rng()
    mixed = 0
    for _ in range(500):
        first, second = arch.sample(model, generator), arch.sample(model, generator)
        child = arch.crossover(model, first, second, generator)
        arch.check(model, child)
        for path, option in child.items():
            known = {parent[path] for parent in (first, second) if path in parent}
            assert option in (known or arch.outline(model).options[path])
        mixed += child not in (first, second)
    assert mixed > 50
    a = arch.sample(model, generator)
    assert arch.crossover(model, a, a, generator) == a


def test_a_child_differs_between_two_points_only():
    model, generator = nn.Sequential(*(OneOf({"a": nn.Identity(), "b": nn.Identity()}) for _ in range(6))), rng()
    first, second = ({str(i): option for i in range(6)} for option in "ab")
    spans = Counter("".join(arch.crossover(model, first, second, generator).values()) for _ in range(2000))
    assert all("a" not in text.strip("a") for text in spans)
    assert len(spans) == 1 + 6 * 7 // 2  # nothing, or one stretch of b


def test_nothing_to_mutate_returns_the_same():
    model = nn.Sequential(OneOf({"only": nn.Identity()}))
    assert arch.mutate(model, {"0": "only"}, rng()) == {"0": "only"}


def test_argmax_follows_the_logits(nested):
    model = nested()
    for target in arch.enumerate_architectures(model):
        for decision in decisions(model).values():
            decision.logits.data.zero_()
        for path, option in target.items():
            decision = decisions(model)[path]
            decision.logits.data[decision.index(option)] = 1
        assert arch.argmax(model) == target


def test_check_refuses_extras_missing_and_unknown(nested):
    model = nested()
    a = next(a for a in arch.enumerate_architectures(model) if a["first"] == "k3")
    arch.check(model, a)
    with pytest.raises(UserError, match=r"leaves 'first.k3.hidden' open"):
        arch.check(model, {k: v for k, v in a.items() if k != "first.k3.hidden"})
    with pytest.raises(UserError, match=r"'first.k5.hidden', which is no active decision"):
        arch.check(model, {**a, "first.k5.hidden": 8})
    with pytest.raises(UserError, match="'nowhere'"):
        arch.check(model, {**a, "nowhere": 8})
    for path, option in (("first", "k7"), ("first.k3.hidden", 5), ("first.k3.hidden", "4")):
        with pytest.raises(UserError, match="unknown option"):
            arch.check(model, {**a, path: option})


@given(st.dictionaries(st.text(), st.text() | st.integers(-(2**53), 2**53)))
def test_json_round_trip(data):
    assert arch.loads(arch.dumps(data)) == data


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1.5}', '{"a": true}', '{"a": null}', '{"a": {"b": 1}}'])
def test_other_json_is_refused(text):
    with pytest.raises(UserError):
        arch.loads(text)


class Ruled(nn.Module):
    """Four edges of which so many are not "none", and a choice that is free and has one inside."""

    def __init__(self, at_least: int = 2, at_most: int = 2) -> None:
        super().__init__()
        names = ["none", "a", "b", "c"]
        self.edges = nn.ModuleList([OneOf({n: nn.Identity() for n in names[: 2 + i % 3]}) for i in range(4)])
        inner = OneOf({"x": nn.Identity(), "y": nn.Identity()})
        self.free = OneOf({"deep": nn.Sequential(inner), "none": nn.Identity()})
        self.rules = (Rule(tuple(f"edges.{i}" for i in range(4)), "none", at_least, at_most),)


SPANS = pytest.mark.parametrize("span", [(2, 2), (1, 2), (0, 4), (1, 4), (3, 4)])


def working(a: dict) -> int:
    return sum(a[f"edges.{i}"] != "none" for i in range(4))


@SPANS
def test_rules_bound_what_is_enumerated_sampled_and_reached_by_mutation(span):
    model, generator = Ruled(*span), rng()
    everything = list(arch.enumerate_architectures(Ruled(0, 4)))
    legal = [a for a in everything if span[0] <= working(a) <= span[1]]
    assert list(arch.enumerate_architectures(model)) == legal
    for a in everything:
        if a in legal:
            arch.check(model, a)
        else:
            with pytest.raises(UserError, match=rf"are not 'none': {working(a)} are not"):
                arch.check(model, a)
    for _ in range(200):
        child = arch.crossover(model, *(legal[int(i)] for i in torch.randint(len(legal), (2,))), generator)
        assert child in legal
    a, seen = arch.sample(model, generator), set()
    for _ in range(60 * len(legal)):
        b = arch.mutate(model, a, generator)
        assert b != a
        assert sum(a[f"edges.{i}"] != b[f"edges.{i}"] for i in range(4)) <= 2
        seen.add(arch.dumps(b))
        a = b
    assert seen == {arch.dumps(a) for a in legal}


@SPANS
def test_samples_under_a_rule_are_uniform(span):
    model, generator = arch.outline(Ruled(*span)), rng()
    legal = {arch.dumps({f"edges.{i}": a[f"edges.{i}"] for i in range(4)}) for a in arch.enumerate_architectures(model)}
    drawn = [arch.sample(model, generator) for _ in range(2000)]
    counts = Counter(
        arch.dumps({path: o for path, o in a.items() if path != "free" and "deep" not in path}) for a in drawn
    )
    assert set(counts) <= legal
    assert chisquare([counts[a] for a in legal]).pvalue > 1e-3


@SPANS
def test_extremes_and_the_most_probable_keep_the_rule(span):
    model, generator = Ruled(*span), random.Random(0)
    legal = list(arch.enumerate_architectures(model))
    lines = arch.outline(model)
    for _ in range(50):
        prices = {path: {o: generator.uniform(-1, 1) for o in options} for path, options in lines.options.items()}
        totals = [sum(prices[path][option] for path, option in a.items()) for a in legal]
        for largest, end in ((True, max(totals)), (False, min(totals))):
            found = arch.extreme(prices, lines.parents, lines.rules, largest=largest)
            assert found in legal
            assert sum(prices[path][option] for path, option in found.items()) == pytest.approx(end, abs=1e-12)
        for path, decision in decisions(model).items():
            decision.logits.data = torch.tensor([3 * prices[path][o] for o in decision.options])
        logs = {
            p: dict(zip(d.options, d.logits.log_softmax(0).tolist(), strict=True)) for p, d in decisions(model).items()
        }
        best = arch.argmax(model)
        assert best in legal
        ruled = lines.rules[0].paths
        assert sum(logs[p][best[p]] for p in ruled) == pytest.approx(
            max(sum(logs[p][a[p]] for p in ruled) for a in legal)
        )
        assert best["free"] == max(logs["free"], key=logs["free"].__getitem__)
