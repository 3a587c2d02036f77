"""Recalibration: plain means over the batches, and nothing else changes."""

import copy

import torch
from torch import nn

from netsmith.train.batchnorm import recalibrate


def network() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.2), nn.Dropout(0.5), nn.BatchNorm2d(4)]
    return nn.Sequential(*layers, nn.BatchNorm2d(4, track_running_stats=False)).double()


def batches(count: int) -> list[torch.Tensor]:
    return list(torch.randn(count, 6, 3, 8, 8, dtype=torch.float64) + 2)


def test_statistics_are_the_means_over_the_batches():
    model, given = network(), batches(5)
    model[1].running_mean.fill_(100.0)
    recalibrate(model, given)
    with torch.no_grad():
        outputs = [model[0](images) for images in given]
    for found, statistic in ((model[1].running_mean, torch.mean), (model[1].running_var, torch.var)):
        by_hand = torch.stack([statistic(y, (0, 2, 3)) for y in outputs]).mean(0)
        assert torch.allclose(found, by_hand, rtol=1e-12)
    # Dropout is off: what comes in is normalised, so that the next layer sees mean 0.
    assert model[3].running_mean.abs().max() < 1e-12


def test_nothing_else_changes():
    for training in (True, False):
        model = network().train(training)
        model[3].eval()
        before = copy.deepcopy(model)
        recalibrate(model, batches(2))
        assert [part.training for part in model.modules()] == [part.training for part in before.modules()]
        assert (model[1].momentum, model[3].momentum) == (0.2, 0.1)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
        assert not torch.equal(model[1].running_var, before[1].running_var)


def test_no_batches_change_nothing():
    model = network()
    before = copy.deepcopy(model.state_dict())
    recalibrate(model, [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
