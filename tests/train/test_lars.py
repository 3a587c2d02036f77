"""LARS, to the digit [efficientnet-supercomputer.md]."""

import copy

import pytest
import torch

from netsmith.train.lars import Lars


def step(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, gradient: list[float]) -> list[float]:
    weight.grad = torch.tensor(gradient, dtype=weight.dtype)
    optimizer.step()
    return weight.tolist()


def weight(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def test_golden_steps():
    w = weight(3.0, 4.0)
    optimizer = Lars([w], 2.0)
    assert step(optimizer, w, [0.6, 0.8]) == pytest.approx([2.994, 3.992], abs=1e-8)
    assert step(optimizer, w, [0.6, 0.8]) == pytest.approx([2.982612, 3.976816], abs=1e-8)
    assert step(optimizer, w, [-0.3, 0.4]) == pytest.approx([2.97832684, 3.95519677], abs=1e-8)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_first_step_knows_only_the_gradients_direction(scale):
    w = weight(3.0, 4.0)
    found = step(Lars([w], 2.0, weight_decay=0.0), w, [0.6 * scale, 0.8 * scale])
    assert found == pytest.approx([2.994, 3.992], abs=1e-12)
    assert (weight(3.0, 4.0) - w).norm().item() == pytest.approx(2.0 * 1e-3 * 5, abs=1e-12)


def test_nothing_to_trust():
    w = weight(0.0, 0.0)
    assert step(Lars([w], 0.5), w, [1.0, -2.0]) == [-0.5, 1.0]
    w = weight(3.0, 4.0)
    assert step(Lars([w], 0.5, weight_decay=0.1), w, [0.0, 0.0]) == pytest.approx([3 - 0.15, 4 - 0.2])


def test_what_is_not_adapted_follows_plain_momentum_bit_for_bit():
    w, plain = weight(3.0, 4.0), weight(3.0, 4.0)
    optimizer = Lars([{"params": [w], "adapt": False}], 0.5, momentum=0.9)
    buffer = torch.zeros(2, dtype=torch.float64)
    for gradient in ([0.6, 0.8], [0.1, -0.8], [-0.3, 0.4]):
        step(optimizer, w, gradient)
        buffer = 0.9 * buffer + 0.5 * torch.tensor(gradient, dtype=torch.float64)
        plain.data -= buffer
    assert torch.equal(w, plain)


def test_a_later_rate_does_not_change_past_steps():
    w = weight(3.0, 4.0)
    optimizer = Lars([{"params": [w], "adapt": False}], 1.0)
    step(optimizer, w, [1.0, 0.0])
    optimizer.param_groups[0]["lr"] = 0.0
    assert step(optimizer, w, [1.0, 0.0]) == pytest.approx([3 - 1 - 0.9, 4.0])


def test_nesterov_looks_ahead():
    w = weight(3.0, 4.0)
    optimizer = Lars([{"params": [w], "adapt": False}], 1.0, nesterov=True)
    assert step(optimizer, w, [1.0, 0.0]) == pytest.approx([3 - 1.9, 4.0])


def test_its_state_goes_on():
    w = weight(3.0, 4.0)
    optimizer = Lars([w], 2.0)
    step(optimizer, w, [0.6, 0.8])
    other = weight(*w.tolist())
    fresh = Lars([other], 1.0)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert step(fresh, other, [0.6, 0.8]) == step(optimizer, w, [0.6, 0.8])
