"""The knapsack against brute force, and what it says when there is no answer."""

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from netsmith.architecture import extreme
from netsmith.cost.prices import Prices
from netsmith.errors import UserError
from netsmith.search import allocate as module
from netsmith.search.allocate import Infeasible, Limit, Unsolved, allocate, diverse


def grow(generator, prefix="", depth=0):
    """A random tree: the options of each decision, and the parents."""
    options, parents = {}, {}
    for i in range(generator.randint(1, 3) if depth else generator.randint(1, 4)):
        path = f"{prefix}d{i}"
        names = ["a", "b", "c", "d"] if generator.random() < 0.7 else [8, 16, 32]
        options[path] = names[: generator.randint(1, len(names))]
        for name in options[path]:
            if isinstance(name, str) and depth < 2 and generator.random() < 0.25:
                inner, above = grow(generator, f"{path}.{name}.", depth + 1)
                options |= inner
                parents |= {key: (path, name) for key in inner if key not in above} | above
    return options, parents


def everything(options, parents):
    """All architectures by brute force."""

    def below(path, option):
        return product([key for key in options if parents.get(key) == (path, option)])

    def product(paths):
        one = [[{p: o} | rest for o in options[p] for rest in below(p, o)] for p in paths]
        return [dict(kv for part in parts for kv in part.items()) for parts in itertools.product(*one)]

    return product([path for path in options if path not in parents])


def numbers(generator, options, whole=False):
    draw = (lambda: generator.randint(0, 9)) if whole else (lambda: generator.uniform(-1, 3))
    return {path: {option: draw() for option in row} for path, row in options.items()}


def total(table, architecture):
    return math.fsum(table[path][option] for path, option in architecture.items())


def instance(seed):
    """A random tree that brute force can list, values, and limits that bind, sometimes more than anything can keep."""
    generator = random.Random(seed)
    while True:
        options, parents = grow(generator)
        count = math.prod(len(row) for row in options.values())
        if count < 3000 and len(every := everything(options, parents)) > 1:
            break
    values, limits = numbers(generator, options, generator.random() < 0.3), []
    for _ in range(generator.randint(0, 3)):
        prices = Prices(generator.uniform(-2, 2), numbers(generator, options, generator.random() < 0.3))
        reached = sorted(prices.constant + total(prices.options, one) for one in every)
        at_most = reached[generator.randrange(len(reached))]  # met exactly by somebody
        if generator.random() < 0.1:
            at_most = reached[0] - 0.1
        at_least = reached[generator.randrange(len(reached))] if generator.random() < 0.2 else None
        limits.append(Limit(prices, at_most, at_least))
    return options, parents, every, values, limits


@pytest.mark.parametrize("core", [2, 0])
def test_equals_brute_force_on_300_random_trees(monkeypatch, core):
    """core=0 makes even small programs go by way of the relaxation and the elimination of options."""
    monkeypatch.setattr(module, "_CORE", core)
    infeasible = nested = 0
    for seed in range(300):
        _, parents, every, values, limits = instance(seed)
        nested += bool(parents)
        allowed = [one for one in every if all(limit.holds(one) for limit in limits)]
        if not allowed:
            infeasible += 1
            with pytest.raises(Infeasible) as error:
                allocate(values, limits, parents)
            for limit, (small, large) in zip(limits, error.value.reachable, strict=True):
                reached = [limit.prices.constant + total(limit.prices.options, one) for one in every]
                assert (small, large) == pytest.approx((min(reached), max(reached)))
            continue
        found = allocate(values, limits, parents)
        assert found in allowed
        best = max(total(values, one) for one in allowed)
        assert total(values, found) == pytest.approx(best, rel=1e-9, abs=1e-9)
        assert allocate(values, limits, parents) == found
    assert infeasible > 20
    assert nested > 100


def test_prices_of_pairs_equal_brute_force():
    """Layers between widths: what two options cost together, beside what each costs alone."""
    infeasible = 0
    for seed in range(100):
        generator = random.Random(seed)
        options = {f"d{i}": list(range(generator.randint(1, 4))) for i in range(generator.randint(2, 5))}
        ends = [pair for pair in itertools.combinations(options, 2) if generator.random() < 0.5]
        every, values, limits = everything(options, {}), numbers(generator, options), []
        for _ in range(generator.randint(1, 2)):
            pairs = {
                (a, b): {both: generator.uniform(-1, 3) for both in itertools.product(options[a], options[b])}
                for a, b in ends
            }
            prices = Prices(generator.uniform(-2, 2), numbers(generator, options), pairs=pairs)
            reached = sorted(map(prices.of, every))
            assert reached[0] == pytest.approx(
                min(
                    prices.constant
                    + total(prices.options, one)
                    + sum(row[one[a], one[b]] for (a, b), row in pairs.items())
                    for one in every
                )
            )
            limits.append(Limit(prices, reached[generator.randrange(1 + len(reached) // 2)]))
        allowed = [one for one in every if all(limit.holds(one) for limit in limits)]
        if not allowed:
            infeasible += 1
            with pytest.raises(Infeasible):
                allocate(values, limits)
            continue
        found = allocate(values, limits)
        assert found in allowed
        assert total(values, found) == pytest.approx(max(total(values, one) for one in allowed), rel=1e-9, abs=1e-9)
    assert 0 < infeasible < 50


def test_prices_of_pairs_need_every_option_and_decisions_of_the_top_level():
    values = {"a": {"x": 1.0, "y": 2.0}, "b": {"u": 0.0}}
    whole = {("x", "u"): 1.0, ("y", "u"): 2.0}
    prices = Prices(0.0, {"a": {"x": 0.0, "y": 0.0}, "b": {"u": 0.0}}, pairs={("a", "b"): whole})
    assert allocate(values, [Limit(prices, 1.5)]) == {"a": "x", "b": "u"}
    with pytest.raises(UserError, match="only decisions of the top level"):
        allocate(values, [Limit(prices, 1.5)], {"b": ("a", "x")})
    del whole["y", "u"]
    with pytest.raises(UserError, match="not all options of a and b"):
        allocate(values, [Limit(prices, 1.5)])


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("limits", [1, 2])
def test_leaving_options_out_changes_nothing(monkeypatch, correlated, limits):
    """The same optimum with every column in the program, on instances of the size where most are left out."""
    for seed in range(3):
        generator = random.Random(seed)
        options = {f"l{i}": list(range(25)) for i in range(7)}
        tables = [
            {p: {o: generator.uniform(0.05, 1) for o in row} for p, row in options.items()} for _ in range(limits)
        ]
        values = {
            p: {
                o: math.log(sum(t[p][o] for t in tables)) + generator.gauss(0, 0.05)
                if correlated
                else generator.random()
                for o in row
            }
            for p, row in options.items()
        }
        asked = [Limit(Prices(0, table), 2.8) for table in tables]
        quick = allocate(values, asked)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_CORE", 1000)
            whole = allocate(values, asked)
        assert total(values, quick) == pytest.approx(total(values, whole), rel=1e-9)


def test_extremes_equal_brute_force():
    for seed in range(100):
        _, parents, every, values, _ = instance(seed)
        for largest, choose in ((True, max), (False, min)):
            found = extreme(values, parents, largest=largest)
            assert found in every
            assert total(values, found) == pytest.approx(choose(total(values, one) for one in every))


def test_cuts_enumerate_all_architectures_from_best_to_worst():
    for seed in range(25):
        _, parents, every, values, limits = instance(seed)
        allowed = sorted((total(values, one) for one in every if all(x.holds(one) for x in limits)), reverse=True)[:12]
        found = []
        for best in allowed:
            found.append(allocate(values, limits, parents, forbidden=found))
            assert total(values, found[-1]) == pytest.approx(best, rel=1e-9, abs=1e-9)
        assert all(a != b for a, b in itertools.combinations(found, 2))


def test_forbidding_a_part_forbids_whatever_contains_it():
    values = {"a": {"x": 2, "y": 1}, "b": {8: 2, 16: 3}}
    assert allocate(values, []) == {"a": "x", "b": 16}
    assert allocate(values, [], forbidden=[{"a": "x"}]) == {"a": "y", "b": 16}
    assert allocate(values, [], forbidden=[{"a": "x", "b": 16}]) in ({"a": "y", "b": 16}, {"a": "x", "b": 8})
    with pytest.raises(Infeasible, match="cannot be kept all at once beside 2 excluded architectures"):
        allocate(values, [], forbidden=[{"a": "x"}, {"a": "y"}])


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_diverse_solutions_overlap_no_more_than_asked(seed, overlap, k):
    _, parents, every, values, limits = instance(seed)
    allowed = [one for one in every if all(limit.holds(one) for limit in limits)]
    if not allowed:
        with pytest.raises(Infeasible):
            diverse(values, limits, parents, k, overlap)
        return

    def shared(one, other):
        return sum(other.get(path) == option for path, option in one.items())

    def far_enough(one, earlier):
        return all(one != e and shared(e, one) <= overlap * len(e) + 1e-9 for e in earlier)

    found = diverse(values, limits, parents, k, overlap)
    for i, one in enumerate(found):
        left = [other for other in allowed if far_enough(other, found[:i])]
        assert one in left
        assert total(values, one) == pytest.approx(max(total(values, other) for other in left), rel=1e-9, abs=1e-9)
    assert len(found) == k or not any(far_enough(other, found) for other in allowed)


def test_the_message_says_what_the_smallest_network_needs():
    values = {"a": {"x": 1.0, "y": 2.0}, "a.y.b": {"u": 1.0}}
    parents = {"a.y.b": ("a", "y")}
    latency = Prices(1.5, {"a": {"x": 2.0, "y": 1.0}, "a.y.b": {"u": 3.0}}, "ms")
    with pytest.raises(Infeasible, match=r"latency <= 3.00 ms: the smallest network needs 3.50 ms") as error:
        allocate(values, [Limit(latency, 3.0, name="latency")], parents)
    assert error.value.reachable == [(3.5, 5.5)]
    with pytest.raises(Infeasible, match=r"latency >= 6.00 ms: the largest network has 5.50 ms"):
        allocate(values, [Limit(latency, 9.0, 6.0, name="latency")], parents)
    macs = Prices(0.0, {"a": {"x": 2e6, "y": 0.0}, "a.y.b": {"u": 1e6}})
    limits = [Limit(latency, 4.0, name="latency"), Limit(macs, 1.5e6, name="macs")]
    with pytest.raises(
        Infeasible, match=r"all at once \(each alone is reachable: latency from 3.50 ms, macs from 1.00M"
    ):
        allocate(values, limits, parents)


def test_a_limit_met_exactly_is_kept():
    prices = {f"d{i}": {"a": 0.1 * i, "b": 0.3} for i in range(1, 8)}
    values = {path: {"a": 0.0, "b": 1.0} for path in prices}
    for size in (1e-9, 1.0, 1e9):
        scaled = Prices(0.7 * size, {p: {o: size * x for o, x in row.items()} for p, row in prices.items()})
        dearest = dict.fromkeys(prices, "b")
        at_most = scaled.constant + sum(scaled.options[p][o] for p, o in dearest.items())
        assert allocate(values, [Limit(scaled, at_most)]) == dearest
        assert allocate(values, [Limit(scaled, at_most - 1e-6 * size)]) != dearest


def test_any_number_of_options_a_hair_above_the_limit_do_not_hide_the_one_within():
    """A hair: 1e-7 of the limit, far more than rounding."""
    prices = Prices(0.0, {"a": {"within": 1.0} | dict.fromkeys(range(200), 1.0 + 1e-7)})
    values = {"a": {"within": 0.0} | {n: 1.0 + n for n in range(200)}}
    assert allocate(values, [Limit(prices, 1.0)]) == {"a": "within"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": {"a": {"x": 1}}}, "option 'y' of decision 'a' has no value"),
        ({"values": {"a": {"x": 1, "y": 2, "z": 3}}}, "option 'z' of decision 'a' has no latency"),
        ({"values": {"a": {"x": 1, "y": 2}, "b": {"x": 1}}}, "decision 'b' has no latency"),
        ({"values": {}}, "decision 'a' has no value"),
        ({"values": {"a": {"x": 1, "y": math.nan}}}, "option 'y' of decision 'a' has the value nan"),
        ({"values": {"a": {"x": 1, "y": -math.inf}}}, "option 'y' of decision 'a' has the value -inf"),
        (
            {"limits": [Limit(Prices(0, {"a": {"x": 1, "y": math.inf}}), 3)]},
            "option 'y' of decision 'a' has the price inf",
        ),
        ({"limits": [Limit(Prices(0, {"a": {"x": 1, "y": 1}}), math.nan)]}, "the limit of price is no number"),
        ({"forbidden": [{"a": "w"}]}, "option 'w' of decision 'a' has no value"),
        ({"forbidden": [{"c": "w"}]}, "option 'w' of decision 'c' has no value"),
        ({"parents": {"a": ("c", "x")}}, "option 'x' of decision 'c' has no value"),
        ({"parents": {"a": ("a", "x")}}, "decision 'a' is nested in itself"),
        ({"values": {"a": {}}}, "decision 'a' has no options"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    prices = Prices(0.0, {"a": {"x": 1.0, "y": 2.0}})
    given = {"values": {"a": {"x": 1, "y": 2}}, "limits": [Limit(prices, 2.0, name="latency")], "parents": {}}
    with pytest.raises(UserError) as error:
        allocate(**(given | change))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1, 1, 0, 0], "chooses two options"),
        ([1, 0, 0, 0], "is no architecture"),
        ([0, 1, 1, 0], "is no architecture"),
        ([0, 1, 0, 0], "is one that was excluded"),
    ],
)
def test_a_wrong_answer_of_the_solver_is_noticed(monkeypatch, x, message):
    values = {"a": {"x": 1.0, "y": 2.0}, "a.x.b": {"u": 1.0, "v": 3.0}}
    answer = SimpleNamespace(status=0, x=np.array(x, float))
    monkeypatch.setattr(scipy.optimize, "milp", lambda *_, **__: answer)
    with pytest.raises(Unsolved, match=message):
        allocate(values, [], {"a.x.b": ("a", "x")}, forbidden=[{"a": "y"}])


def test_an_answer_over_the_limit_is_cut_off_and_the_next_is_taken(monkeypatch):
    """As a solver does that takes its tolerance for ours."""
    values = {"a": {"x": 3.0, "y": 2.0, "z": 1.0}}
    limit = Limit(Prices(0, {"a": {"x": 3.0, "y": 2.0, "z": 1.0}}), 1.5)
    honest = scipy.optimize.milp

    def sloppy(*arguments, constraints, **options):
        for constraint in constraints[1:]:
            loose = constraint.A.toarray().max(axis=1) > 1  # the limits, not the cuts
            constraint.ub = np.where(loose, np.inf, constraint.ub)
        return honest(*arguments, constraints=constraints, **options)

    monkeypatch.setattr(scipy.optimize, "milp", sloppy)
    assert allocate(values, [limit]) == {"a": "z"}
    stuck = SimpleNamespace(status=0, x=np.array([1.0, 0, 0]))
    monkeypatch.setattr(scipy.optimize, "milp", lambda *_, **__: stuck)
    with pytest.raises(Unsolved, match="excluded"):
        allocate(values, [limit])


def test_time_and_trouble_are_said(monkeypatch):
    values = {"a": {"x": 3.0, "y": 2.0}}
    for status, message in ((1, "within the time limit"), (4, "the solver failed on the knapsack: numerical")):
        answer = SimpleNamespace(status=status, x=None, message="numerical trouble")
        monkeypatch.setattr(scipy.optimize, "milp", lambda *_, answer=answer, **__: answer)
        with pytest.raises(Unsolved, match=message):
            allocate(values, [])


@pytest.mark.parametrize("core", [2, 0])
def test_out_of_time_the_best_so_far_comes_along(monkeypatch, core):
    monkeypatch.setattr(module, "_CORE", core)
    values = {"a": {"x": 3.0, "y": 2.0}, "b": {"x": 3.0, "y": 2.0}}
    prices = Prices(0, {"a": {"x": 3.0, "y": 2.0}, "b": {"x": 3.0, "y": 2.0}})
    honest = scipy.optimize.milp

    def late(*arguments, **options):
        found = honest(*arguments, **options)
        found.status = 1
        return found

    monkeypatch.setattr(scipy.optimize, "milp", late)
    with pytest.raises(Unsolved, match="of it is known") as error:
        allocate(values, [Limit(prices, 5.0)])
    assert total(values, error.value.best) == 5.0
    assert error.value.gap < 1e-6


def test_nothing_to_decide():
    assert allocate({}, [Limit(Prices(1.0, {}), 2.0)]) == {}
    with pytest.raises(Infeasible):
        allocate({}, [Limit(Prices(3.0, {}), 2.0)])


def test_scipy_is_loaded_only_when_something_is_solved():
    import subprocess
    import sys

    program = "import netsmith.search.allocate, sys; assert 'scipy' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
