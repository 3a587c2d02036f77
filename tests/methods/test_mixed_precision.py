"""HAWQ-V3's integer program on the published numbers of ResNet-18, and the method that ships."""

import itertools
import random
import statistics

import pytest
import torch
from planted import new_run, small, stripes, toy_for
from torch.nn import functional as F

from netsmith.blocks.quantized import Fixed, calibrate, quantized
from netsmith.blocks.quantizers import span, symmetric
from netsmith.cost.bits import BitOps, Layer, layers
from netsmith.cost.prices import Prices
from netsmith.errors import UserError
from netsmith.methods import make_method
from netsmith.methods.mixed_precision import (
    MixedPrecision,
    between,
    least_sensitive,
    sensitivities,
)
from netsmith.run import read_events
from netsmith.search.allocate import Infeasible, Limit
from netsmith.search.hessian import traces


def row(text: str) -> list[float]:
    return [float(word) for word in text.split()]


# HAWQ's published arrays for the 19 inner layers of ResNet-18; traces are already divided by the number of weights.
TRACE = row(
    ".06857826 .03162379 .03298575 .01205663 .02222431 .00596336 .06931772 .00807129 .00372905 .00530698 .00209011"
    " .00737569 .00210454 .00151197 .00158041 .00078146 .00451841 .00098745 .00072944"
)
ERROR = {
    8: row(
        ".0235 .0125 .0102 .0082 .0145 .0344 .0023 .0287 .0148 .0333 .0682 .0027 .0448 .0336 .0576 .1130 .0102 .0947"
        " .0532"
    ),
    4: row(
        "6.7430 3.9691 3.3281 2.6796 4.7277 10.5966 .6827 9.0942 4.8857 10.7599 21.7546 .8603 14.5324 10.9651 18.7706"
        " 36.4044 3.1572 29.6994 17.4016"
    ),
}
WEIGHTS = [36864] * 4 + [73728, 147456, 8192, 147456, 147456, 294912, 589824, 32768, 589824, 589824, 1179648, 2359296]
WEIGHTS += [131072, 2359296, 2359296]
STAGE = [57802752, 115605504, 6422528, 115605504, 115605504]
MACS = [115605504] * 4 + STAGE * 3
LATENCY = {
    4: row(
        ".21094404 .21092674 .21104113 .21086851 .13642465 .19167506 .02532183 .19148203 .19142914 .11395316 .20556011"
        " .01917474 .20566918 .20566509 .13185102 .22287786 .01790088 .22304611 .22286099"
    ),
    8: row(
        ".36189111 .36211718 .31141909 .30454471 .19184896 .38948934 .0334169 .38904905 .3892859 .19134735 .34307431"
        " .02802354 .34313329 .34310756 .21117103 .37376585 .02896843 .37398187 .37405185"
    ),
}
TIES = [("4", "6"), ("9", "11"), ("14", "16")]
LAYERS = [str(index) for index in range(19)]
OMEGA = {p: {b: TRACE[i] * ERROR[b][i] for b in (4, 8)} for i, p in enumerate(LAYERS)}


def tabulated(price) -> Prices:
    return Prices(0.0, {p: {b: price(i, b) for b in (4, 8)} for i, p in enumerate(LAYERS)})


PRICES = {
    "size": tabulated(lambda i, b: Layer(MACS[i], WEIGHTS[i]).weight_bytes(b) / 2**20),
    "bops": tabulated(lambda i, b: Layer(MACS[i], WEIGHTS[i]).bitops(b, b) / 1024e6),
    "latency": tabulated(lambda i, b: LATENCY[b][i]),
}
# bit_config.py of Zhen-Dong/HAWQ, without the first layer.
PUBLISHED = [
    ("size", 0.25, "8888888888888844444", -1.18941),
    ("size", 0.5, "8888888888888884844", -1.23321),
    ("size", 0.75, "8888888888888488884", -1.27427),
    ("bops", 0.25, "8884848444444444444", -0.84729),
    ("bops", 0.5, "8884888848884444444", -1.09202),
    ("bops", 0.75, "8888888848888484884", -1.22775),
    ("latency", 0.25, "8884848444444444444", -0.84729),
    ("latency", 0.5, "8888848848884484844", -1.10504),
    ("latency", 0.75, "8888888848888484884", -1.22775),
]


def objective(bits: dict) -> float:
    """HAWQ's: what the layers at 8 bits save."""
    return sum(OMEGA[p][8] - OMEGA[p][4] for p in LAYERS if bits[p] == 8)


def solved(price: str, share: float, **options) -> dict:
    prices = PRICES[price]
    return least_sensitive(OMEGA, [Limit(prices, between(prices, share), name=price)], **options)


@pytest.mark.parametrize(("price", "share", "published", "value"), PUBLISHED)
def test_resnet18s_nine_published_configurations(price, share, published, value):
    found = solved(price, share, ties=TIES)
    assert "".join(str(found[p]) for p in LAYERS) == published
    assert objective(found) == pytest.approx(value, abs=1e-5)
    assert PRICES[price].of(found) <= between(PRICES[price], share)


def test_resnet18s_limits_and_sums():
    ends = {name: (between(prices, 0), between(prices, 1)) for name, prices in PRICES.items()}
    assert ends["size"] == pytest.approx((5.3203, 10.6406), abs=1e-4)
    assert ends["bops"] == pytest.approx((26.4929, 105.9717), abs=1e-4)
    assert ends["latency"] == pytest.approx((3.1487, 5.3437), abs=1e-4)
    assert sum(r[4] for r in OMEGA.values()) == pytest.approx(1.307713, abs=1e-6)
    assert sum(r[8] for r in OMEGA.values()) == pytest.approx(0.004258, abs=1e-6)


@pytest.mark.parametrize("price", PRICES)
def test_more_budget_is_never_worse(price):
    values = [objective(solved(price, share / 10, ties=TIES)) for share in range(11)]
    assert values == sorted(values, reverse=True)
    assert values[0] == 0
    assert values[-1] == pytest.approx(objective(dict.fromkeys(LAYERS, 8)))


@pytest.mark.parametrize("price", PRICES)
def test_better_than_bits_at_random_and_the_other_way_round_worse(price):
    generator = random.Random(0)
    prices, limit = PRICES[price], between(PRICES[price], 0.5)
    omega = []
    for _ in range(20):
        bits = dict.fromkeys(LAYERS, 8)
        for path in generator.sample(LAYERS, 19):
            if prices.of(bits) > limit:
                bits[path] = 4
        omega.append(objective(bits))
    best = objective(solved(price, 0.5))
    upside_down = {p: {b: -o for b, o in r.items()} for p, r in OMEGA.items()}
    worst = objective(least_sensitive(upside_down, [Limit(prices, limit, at_least=0.95 * limit)]))
    assert best <= min(omega)
    assert worst > statistics.median(omega)


@pytest.mark.parametrize("seed", range(20))
def test_equals_brute_force(seed):
    generator = random.Random(seed)
    names = [str(index) for index in range(generator.randint(1, 7))]
    omega = {p: {b: generator.random() / b for b in generator.choice([(2, 4, 8), (8,), (4, 8)])} for p in names}
    same = [p for p in names if len(omega[p]) == 3]
    ties = [same[:2]] if len(same) > 1 and generator.random() < 0.5 else []
    prices = [
        Prices(0.3, {p: {b: b * (1 + generator.random()) for b in r} for p, r in omega.items()}) for _ in range(2)
    ]
    limits = [Limit(p, between(p, generator.choice([0.2, 0.5, 0.9]))) for p in prices]
    every = [dict(zip(omega, bits, strict=True)) for bits in itertools.product(*omega.values())]
    allowed = [
        bits
        for bits in every
        if all(x.holds(bits) for x in limits) and all(bits[p] == bits[tie[0]] for tie in ties for p in tie)
    ]
    if not allowed:
        with pytest.raises(Infeasible):
            least_sensitive(omega, limits, ties)
        return
    found = least_sensitive(omega, limits, ties)
    assert found in allowed
    assert sum(omega[p][b] for p, b in found.items()) == pytest.approx(
        min(sum(omega[p][b] for p, b in bits.items()) for bits in allowed)
    )


def test_a_dozen_layers_equal_dynamic_programming():
    generator = random.Random(1)
    names = [str(index) for index in range(12)]
    omega = {p: {b: generator.random() / b for b in (2, 4, 8)} for p in names}
    weights = {p: generator.randint(1, 9) for p in names}
    prices = Prices(0.0, {p: {b: float(b * weights[p]) for b in (2, 4, 8)} for p in names})
    limit = int(between(prices, 0.4))
    least = {0: 0.0}
    for p in names:
        step: dict[int, float] = {}
        for spent, value in least.items():
            for b in (2, 4, 8):
                if (total := spent + b * weights[p]) <= limit:
                    step[total] = min(step.get(total, float("inf")), value + omega[p][b])
        least = step
    found = least_sensitive(omega, [Limit(prices, limit)])
    assert sum(omega[p][b] for p, b in found.items()) == pytest.approx(min(least.values()))


def test_ties_that_cannot_be():
    for second in (("1", "2"), ("2", "1")):
        with pytest.raises(UserError, match=r"as [12], [12]: '1' is tied twice"):
            least_sensitive(OMEGA, [], [("0", "1"), second])
    with pytest.raises(UserError, match="as 0, x: 'x' is no layer"):
        least_sensitive(OMEGA, [], [("0", "x")])
    for wrong in ({8: 0.0}, {2: 0.0, 4: 0.0, 8: 0.0}):
        with pytest.raises(UserError, match="'18' cannot be tied to '0': its options are"):
            least_sensitive({**OMEGA, "18": wrong}, [], [("0", "18")])


SHAPE = (3, 8, 8)


def test_from_a_network_to_its_bits():
    network, x = small(), torch.randn(16, *SHAPE)
    y = torch.randint(0, 4, (16,))
    paths = ["0", "2", "5"]
    found = traces(network, lambda n: F.cross_entropy(n(x), y), paths, torch.Generator().manual_seed(0), draws=20)
    omega = sensitivities(network, found, (2, 4, 8))
    weight = network[2].weight
    error = (symmetric(*span(weight, 0), 4)(weight) - weight).square().sum().item()
    assert omega["2"][4] == pytest.approx(max(found["2"], 0) / weight.numel() * error)
    assert all(r[2] >= r[4] >= r[8] >= 0 for r in omega.values())
    omega["0"] = {8: omega["0"][8]}  # the first layer is fixed
    table = layers(network, SHAPE)
    prices = Prices(0.0, {p: {b: table[p].bitops(b, b) for b in omega[p]} for p in paths}, "")
    bits = least_sensitive(omega, [Limit(prices, between(prices, 0.5), name="BitOPs")], [("2", "5")])
    assert bits["0"] == 8
    assert bits["2"] == bits["5"]

    def both(b):
        return Fixed(torch.clone, b), Fixed(torch.clone, b)

    made = quantized(network, {p: both(b) for p, b in bits.items()})
    assert BitOps()(made, SHAPE) == prices.of(bits)


# The method that ships ----------------------------------------------------------------------------------------------


def test_the_program_takes_the_least_harm_of_all_networks_within_the_budget(tmp_path):
    problem = toy_for("mixed_precision", [0.3], task=stripes(64))
    with new_run(tmp_path / "run") as run:
        (values,) = MixedPrecision(images=32).search(problem, run)
    assert all(row["fp32"] == 0.0 >= row["int8"] for row in values.values())
    (budgets,) = problem.budgets

    def worth(network: dict) -> float:
        return sum(values[path][option] for path, option in network.items())

    every = (dict(zip(values, options, strict=True)) for options in itertools.product(*values.values()))
    within = [network for network in every if problem.predicted(budgets[0], network) <= budgets[0].limit]
    assert 1 < len(within) < 2 ** len(values)
    assert problem.allocate(values, budgets) == max(within, key=worth)


def test_harm_is_the_divergence_of_the_network_with_that_layer_in_int8(tmp_path):
    problem = toy_for("mixed_precision", [0.3], task=stripes(64))
    method = MixedPrecision(images=32)
    with new_run(tmp_path / "run") as run:
        harms = method.harms(problem, run)
        images, _ = method.scored(problem, run)
    path = "1.conv"
    made = problem.network({**problem.reference, path: "int8"}).eval()
    calibrate(made, lambda: images)
    with torch.no_grad():
        ours, theirs = (n(images).double().log_softmax(1) for n in (made, problem.network(problem.reference).eval()))
    assert harms[path] == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(1).mean()), rel=1e-6)
    assert harms[path] > 0


def test_fewer_bits_are_simulated_and_no_more(tmp_path):
    problem = toy_for("mixed_precision", [0.3], task=stripes(64))
    with new_run(tmp_path / "run") as run:
        plain = MixedPrecision(images=32).search(problem, run)
    with new_run(tmp_path / "more") as run:
        assert MixedPrecision(images=32, simulate=(4, 2)).search(problem, run) == plain
    found = [event for event in read_events(tmp_path / "more") if event["kind"] == "simulated_bits"]
    assert [event["bits"] for event in found] == [4, 2]
    with pytest.raises(UserError, match="simulate"):
        make_method("mixed_precision", {"simulate": [1]})
