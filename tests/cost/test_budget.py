"""Budgets as people write them, and as they must not."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netsmith.cost.budget import Budget, parse_budgets, show
from netsmith.errors import UserError


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("latency<=5ms", Budget("latency", 5.0, "ms")),
        ("latency<=250us", Budget("latency", 0.25, "ms")),
        (" latency <= 250 µs ", Budget("latency", 0.25, "ms")),
        ("latency<=1.5s", Budget("latency", 1500.0, "ms")),
        ("latency<=0.5x", Budget("latency", 0.5, "ms", relative=True)),
        ("params<=1M", Budget("params", 1e6, "")),
        ("params<=250000", Budget("params", 250000.0, "")),
        ("params<=2.5e5", Budget("params", 250000.0, "")),
        ("macs<=30M", Budget("macs", 3e7, "")),
        ("macs<=1.5G", Budget("macs", 1.5e9, "")),
        ("peak_memory<=256kB", Budget("peak_memory", 256e3, "B")),
        ("peak_memory<=256KiB", Budget("peak_memory", 256 * 1024.0, "B")),
        ("file<=1MB", Budget("file", 1e6, "B")),
        ("size<=1MiB", Budget("file", 2.0**20, "B")),
        ("file<=0.25x", Budget("file", 0.25, "B", relative=True)),
        ("branches<=44", Budget("branches", 44.0, "")),
        ("bitops<=2.5G", Budget("bitops", 2.5e9, "")),
        ("bitops<=0.3x", Budget("bitops", 0.3, "", relative=True)),
    ],
)
def test_parse_and_back(text, budget):
    assert Budget.parse(text) == budget
    assert Budget.parse(str(budget)) == budget


def test_text_is_short():
    texts = ["latency<=5ms", "latency<=250µs", "params<=1M", "peak_memory<=256kB", "file<=64KiB", "macs<=0.5x"]
    assert [str(Budget.parse(text)) for text in texts] == texts


@given(
    st.sampled_from(["latency", "params", "macs", "peak_memory", "file", "branches", "bitops"]),
    st.floats(min_value=1e-9, max_value=1e15, allow_subnormal=False),
    st.booleans(),
)
def test_every_budget_survives_its_own_text(metric, limit, relative):
    unit = Budget.parse(f"{metric}<=1x").unit
    budget = Budget(metric, limit, unit, relative)
    assert Budget.parse(str(budget)) == budget


def test_relative_is_relative_to_the_reference():
    assert Budget.parse("latency<=0.5x").absolute(8.0) == 4.0
    assert Budget.parse("latency<=5ms").absolute(8.0) == 5.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latency", "is no metric<=limit, such as latency<=5ms"),
        ("", "is no metric<=limit"),
        ("latency 5ms", "is no metric<=limit"),
        ("latancy<=5ms", "unknown budget metric 'latancy'; did you mean 'latency'"),
        ("latency<5ms", "only <= can be asked for, such as latency<=5ms"),
        ("latency==5ms", "only <= can be asked for"),
        ("latency=5ms", "only <= can be asked for"),
        ("latency>=5ms", "only <= can be asked for"),
        ("latency<=5", "latency needs a unit (allowed: µs, ms, s, x), such as latency<=5ms"),
        ("latency<=5M", "latency takes no unit 'M' (allowed: µs, ms, s, x), such as latency<=5ms"),
        ("params<=5ms", "params takes no unit 'ms'"),
        ("macs<=5kB", "macs takes no unit 'kB'"),
        ("peak_memory<=256k", "peak_memory takes no unit 'k'"),
        ("latency<=", "'' is no number with a unit"),
        ("latency<=fast", "'fast' is no number with a unit"),
        ("latency<=1,5ms", "latency needs a unit"),
        ("latency<=5ms,", "'' is no number with a unit"),
        ("latency<=0ms", "the limit 0 is not above zero"),
        ("latency<=-5ms", "the limit -5 is not above zero"),
        ("latency<=0x", "the limit 0 is not above zero"),
        ("latency<=nan", "the limit nan is not above zero"),
        ("params<=nan", "the limit nan is not above zero"),
        ("params<=inf", "the limit inf is not above zero"),
        ("params<=1e999", "not above zero and finite"),
        ("latency<=1e-999ms", "not above zero and finite"),
        ("latency<=0.5x,0.8x", "asks for 2 networks where one is meant"),
        ("latency<=5ms,5ms", "names one limit twice"),
        ("latency<=5ms<=6ms", "latency"),
        ("latency<=1_000ms", "latency"),
        ("latency<=5ms params<=1M", "latency"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_sentence(text, message):
    with pytest.raises(UserError) as error:
        Budget.parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@given(st.text(alphabet="latencyparmsf<=>,.0123456789eExkMBµ -+", max_size=25))
def test_any_text_is_parsed_or_refused(text):
    try:
        (budget,) = parse_budgets([text])[0]
    except UserError:
        return
    assert budget.limit > 0
    assert math.isfinite(budget.limit)


def test_simultaneous_budgets_and_fronts():
    def texts(*given):
        return [[str(budget) for budget in point] for point in parse_budgets(given)]

    assert texts() == [[]]
    assert texts("latency<=5ms", "size<=1MB") == [["latency<=5ms", "file<=1MB"]]
    assert texts("params<=1M", "latency<=0.3x,0.5x, 0.8x") == [
        ["params<=1M", "latency<=0.3x"],
        ["params<=1M", "latency<=0.5x"],
        ["params<=1M", "latency<=0.8x"],
    ]
    assert texts("latency<=1ms,2ms", "macs<=10M,20M", "file<=1MB") == [
        ["latency<=1ms", "macs<=10M", "file<=1MB"],
        ["latency<=2ms", "macs<=20M", "file<=1MB"],
    ]


def test_fronts_that_do_not_fit_together():
    with pytest.raises(UserError, match=r"'latency<=1ms,2ms' asks for 2 and 'macs<=1M,2M,3M' asks for 3 networks"):
        parse_budgets(["latency<=1ms,2ms", "macs<=1M,2M,3M"])
    with pytest.raises(UserError, match="budget file is given more than once; a front is written file<=A,B,C"):
        parse_budgets(["file<=1MB", "latency<=1ms", "size<=2MB"])


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0812, "ms", "81.2 µs"),
        (5.0, "ms", "5.00 ms"),
        (0.9999, "ms", "1.00 ms"),
        (1234.5, "ms", "1.23 s"),
        (2e-5, "ms", "20.0 ns"),
        (0, "ms", "0 ms"),
        (math.nan, "ms", "nan ms"),
        (math.inf, "ms", "inf ms"),
        (-0.5, "ms", "-500 µs"),
        (1234567, "", "1.23M"),
        (999_999, "", "1.00M"),
        (12, "", "12"),
        (12.34, "", "12.3"),
        (0, "", "0"),
        (3.456e10, "", "34.6G"),
        (5e12, "", "5000G"),
        (256_000, "B", "256 kB"),
        (999_900, "B", "1.00 MB"),
        (999, "B", "999 B"),
        (0, "B", "0 B"),
    ],
)
def test_show(value, unit, text):
    assert show(value, unit) == text
