"""Networks of timm and of a user's own module."""

import pytest
import torch

from netsmith.errors import UserError
from netsmith.spaces import open_space
from netsmith.spaces.outside import usual_resolution

SHAPE = {"classes": 7, "channels": 1, "resolution": 32}
MODULE = """
from torch import nn

def network(classes, width=4):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

def number():
    return 3
"""


def test_timm():
    assert open_space("timm:test_resnet", **SHAPE)(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert usual_resolution("timm:efficientnet_b3") == 288
    with torch.device("meta"):  # asks for shapes, so nothing is fetched
        open_space("timm:resnet18", pretrained=True, **SHAPE)


def test_a_function_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    assert open_space("module:mine:network", width=6, **SHAPE)(torch.zeros(2, 1, 9, 9)).shape == (2, 7)
    for name, sentence in [
        ("module:mine:netwrk", "module:mine:netwrk: 'mine' has no function 'netwrk'"),
        ("module:mine:number", "made a int, not an nn.Module"),
        ("module:mine", "has to look like module:package.file:function"),
        ("module:yours:network", "'yours' cannot be imported"),
    ]:
        with pytest.raises(UserError, match=sentence):
            open_space(name, **SHAPE)
    with pytest.raises(UserError, match=r"module:mine:network cannot be called: .*'depth'"):
        open_space("module:mine:network", depth=2, **SHAPE)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("timm:resnet181", {}, "timm has no network 'resnet181'; did you mean resnet18 or"),
        ("timm:test_resnet", {"wdth": 2}, "timm:test_resnet cannot be made with .*wdth"),
    ],
)
def test_what_timm_does_not_have(name, options, sentence):
    with pytest.raises(UserError, match=sentence):
        open_space(name, **SHAPE, **options)
