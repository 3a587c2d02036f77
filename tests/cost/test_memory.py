"""Peak memory: MCUNet's numbers, and any order of any graph against brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netsmith.blocks.mobile import ConvBn, MBConv
from netsmith.cost.memory import PeakMemory, peak_elements, peak_of
from netsmith.errors import UserError

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
