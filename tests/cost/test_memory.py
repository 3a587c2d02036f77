"""Peak memory: MCUNet's numbers, and any order of any graph against brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Summed
from torch import nn

from netsmith.blocks.mobile import ConvBn, Head, MBConv
from netsmith.cost.counts import Flash
from netsmith.cost.memory import Operator, PeakMemory, Ram, least_order, moments, peak_elements, peak_of
from netsmith.errors import UserError
from netsmith.graph.channels import channels
from netsmith.graph.slimmable import Slimmable

INT8 = PeakMemory(bytes_per_element=1)


def test_golden_numbers_of_two_convolutions():
    # specs/nas-hardware-cost.md, section E: 192 + 1024 = 1216, then 1024 + 512 = 1536.
    first, second = ConvBn(3, 16, 3), ConvBn(16, 32, 3, stride=2)
    assert INT8(first, (3, 8, 8)) == 1216
    assert INT8(second, (16, 8, 8)) == 1536
    assert INT8(nn.Sequential(first, second), (3, 8, 8)) == 1536
    assert PeakMemory()(nn.Sequential(first, second), (3, 8, 8)) == 4 * 1536


def test_golden_numbers_of_the_residual_block():
    block = MBConv(16, 16, hidden=96)
    assert INT8(block, (16, 8, 8)) == 13312
    # Stage by stage, the input kept for the sum: expand 7168, depthwise 13312, project 8192, sum 3072.
    x, expanded, filtered, projected, y = range(5)
    sizes = dict(enumerate((1024, 6144, 6144, 1024, 1024)))
    operators = [
        (x, 1024, []),
        (expanded, 6144, [x]),
        (filtered, 6144, [expanded]),
        (projected, 1024, [filtered]),
        (y, 1024, [x, projected]),
    ]
    assert [peak_of([*operators[: i + 1], (9, 0, [x])], sizes | {9: 0}) for i in range(5)] == [
        1024,
        7168,
        13312,
        13312,
        13312,
    ]
    assert peak_of([(x, 0, []), *operators[3:]], sizes | {filtered: 6144}) == 8192


@given(st.data())
def test_brute_force_liveness(data):
    count = data.draw(st.integers(1, 12))
    sizes = {i: data.draw(st.integers(0, 100)) for i in range(count)}
    operators = [
        (i, sizes[i], data.draw(st.lists(st.sampled_from(range(i)), unique=True)) if i else []) for i in range(count)
    ]
    moments = []
    for now in range(count):
        needed = [b for b in range(now) if any(b in inputs for _, _, inputs in operators[now:])]
        moments.append(sizes[now] + sum(sizes[b] for b in needed))
    assert peak_of(operators, sizes) == max(moments)


class Residual(nn.Module):
    """Pre-activation: the ReLU must not overwrite what the sum still needs."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.conv = nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.relu(x))


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        kept, changed = x.chunk(2, dim=1)
        return torch.cat([kept, self.conv(changed)], 1)


def test_an_activation_overwrites_only_what_nobody_reads_later():
    assert peak_elements(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), (4, 5, 5)) == 2 * 100
    assert peak_elements(Residual(), (4, 5, 5)) == 3 * 100


def test_parts_of_a_tensor_are_no_new_tensors():
    # x (100) is alive until the concatenation, with the convolution's 50 and the result's 100.
    assert peak_elements(Split(), (4, 5, 5)) == 100 + 50 + 100


def test_the_gate_of_squeeze_excite_keeps_its_input_alive():
    # At the product: the filtered tensor (6144), the gate (96), the product (6144); and the block's input (1024).
    assert INT8(MBConv(16, 16, hidden=96, squeeze=4), (16, 8, 8)) == 1024 + 6144 + 96 + 6144


def test_what_cannot_be_traced_is_unknown_not_zero():
    class Moody(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match="peak memory of Moody is unknown"):
        PeakMemory()(Moody(), (3, 4, 4))


# Orders ---------------------------------------------------------------------------------------------------------------


def orders(operators):
    """All in which each runs after what it reads was written."""
    for order in itertools.permutations(range(len(operators))):
        done = set()
        for i in order:
            if not all(b in done for b in operators[i].inputs):
                break
            done.add(operators[i].output)
        else:
            yield [operators[i] for i in order]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_least_order_is_that_of_brute_force(data):
    count = data.draw(st.integers(1, 7))
    sizes = {i: data.draw(st.integers(0, 100)) for i in range(count)}
    operators = [
        Operator(i, sizes[i], data.draw(st.lists(st.sampled_from(range(i)), unique=True, max_size=3)) if i else [])
        for i in range(count)
    ]
    found = least_order(operators, sizes)
    assert sorted(found) == sorted(operators)
    assert peak_of(found, sizes) == min(peak_of(order, sizes) for order in orders(operators))
    shuffled = data.draw(st.sampled_from([*itertools.islice(orders(operators), 20)]))
    assert peak_of(least_order(shuffled, sizes), sizes) == peak_of(found, sizes), "however they were listed"


class Arms(nn.Module):
    """The broad arm first: its result is small, so that the other one, run first, has to be kept meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.broad, self.narrow = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 64, 1), nn.Conv2d(64, 8, 1)

    def forward(self, x):
        kept = self.first(x)
        return kept + self.narrow(self.broad(x))


def test_a_better_order_keeps_less():
    place = 5 * 5
    assert PeakMemory(bytes_per_element=1)(Arms(), (4, 5, 5)) == (8 + 64 + 8) * place
    assert Ram()(Arms(), (4, 5, 5)) == (4 + 64 + 8) * place


def test_an_operator_runs_before_what_it_reads_is_overwritten():
    class Overwritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            before = self.before(x)
            return before + self.after(x.relu())

    operators, sizes = PeakMemory(reorder=True).operators(Overwritten(), (4, 5, 5))
    written = [op.output for op in operators]
    assert written.index(0) < written.index(1) < len(written) - 1 - written[::-1].index(0)
    assert peak_of(operators, sizes) == 300


def test_a_sum_may_overwrite_a_summand_that_nothing_else_reads():
    # x, the convolution's result, and the sum: or the sum in place of one of them.
    assert PeakMemory(1)(Residual(), (4, 5, 5)) == 300
    assert PeakMemory(1, sums_in_place=True)(Residual(), (4, 5, 5)) == 300, "x, x after the ReLU, the convolution's"
    block = MBConv(16, 16, hidden=96)
    assert PeakMemory(1, sums_in_place=True)(block, (16, 8, 8)) == 13312, "the peak is elsewhere"
    small = MBConv(16, 16, hidden=8)
    assert PeakMemory(1)(small, (16, 8, 8)) == 3 * 1024
    assert PeakMemory(1, sums_in_place=True)(small, (16, 8, 8)) == 1024 + 512 + 1024, "the last convolution is the peak"


# Moments --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [PeakMemory(), Ram()], ids=["as run", "least order"])
def test_the_largest_moment_is_the_peak_at_any_widths(memory):
    def block(channels: int) -> nn.Module:
        return nn.Sequential(ConvBn(channels, channels, 3), nn.ReLU(), ConvBn(channels, channels, 3))

    network = nn.Sequential(ConvBn(1, 16, 3), Summed(block(16)), ConvBn(16, 24, 3, stride=2), Head(24, 16, 3))
    space = Slimmable(network, channels(network, (1, 8, 8)), step=4)
    options = {path: [int(n) for n in space.width(path).options] for path in space.groups}
    found = moments(space, options, (1, 8, 8), memory)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        widths = {p: row[int(torch.randint(len(row), (1,), generator=generator))] for p, row in options.items()}
        assert max(price.of(widths) for price in found) == pytest.approx(memory(space.narrowed(widths), (1, 8, 8)))
    assert len(found) < 8, "moments that are never the largest are left out"


def test_bytes_of_weights_in_int8():
    # 3*3*4*8 weights, eight biases of which batch norm is a part; 8*2 weights and two biases.
    network = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    assert Flash()(network, (4, 3, 3)) == 288 + 4 * 8 + 16 + 4 * 2
