"""Architectures as data: legal samples, mutations, crossings, enumeration, JSON."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netsmith import architecture as arch
from netsmith.decisions import OneOf, decisions, parents
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
