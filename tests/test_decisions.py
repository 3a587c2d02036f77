"""Open decisions, their removal, and the networks derived from them."""

import copy
import io

import pytest
import torch
from torch import nn

from netsmith import gates
from netsmith.architecture import enumerate_architectures, sample
from netsmith.blocks.mobile import ConvBn, MBConv
from netsmith.decisions import Decision, Draw, OneOf, Width, decisions, derive, logits, parents
from netsmith.errors import UserError
from netsmith.search.differentiable import weights

IMAGES = (4, 3, 8, 8)


def test_outer_before_inner(nested):
    model = nested()
    paths = list(decisions(model))
    assert paths == [
        "first",
        "first.k3.hidden",
        "first.k5.hidden",
        "second.hidden",
        "third",
        "third.fused.hidden",
        "third.deep.1",
    ]
    assert parents(model) == {
        "first.k3.hidden": ("first", "k3"),
        "first.k5.hidden": ("first", "k5"),
        "third.fused.hidden": ("third", "fused"),
        "third.deep.1": ("third", "deep"),
    }


def test_a_decision_can_be_the_whole_model():
    model = OneOf({"narrow": MBConv(4, 4, hidden=Width((4, 8))), "skip": nn.Identity()})
    assert parents(model) == {"narrow.hidden": ("", "narrow")}
    found = list(enumerate_architectures(model))
    assert len(found) == 3
    assert [type(derive(model, a)) for a in found] == [MBConv, MBConv, nn.Identity]


@pytest.mark.parametrize("training", [True, False])
def test_derived_equals_the_fixed_supernet_everywhere(nested, training):
    model, x = nested().train(training), torch.randn(IMAGES).double()
    for architecture in enumerate_architectures(model):
        child = derive(model, architecture)
        assert child.training is training
        assert not any(isinstance(module, Decision) for module in child.modules())
        with torch.no_grad():
            gates.fix(model, architecture)
            assert (child(x) - model(x)).abs().max() < 1e-10


def test_derive_leaves_the_supernet_and_the_random_state_alone(nested):
    model = nested()
    gates.draw(model, gates.softmax, torch.Generator())
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    drawn = {path: decision.drawn for path, decision in decisions(model).items()}
    child = derive(model, sample(model, torch.Generator()))
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        for parameter in child.parameters():
            parameter.add_(1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(decision.drawn is drawn[path] for path, decision in decisions(model).items())


def test_derived_parts_are_shared_no_more(nested):
    model = nested()
    child = derive(model, sample(model, torch.Generator()))
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in child.state_dict().values()}


def test_derive_refuses_what_is_open_or_unknown(nested):
    model = nested()
    architecture = sample(model, torch.Generator())
    with pytest.raises(UserError, match=r"leaves 'second.hidden' open"):
        derive(model, {k: v for k, v in architecture.items() if k != "second.hidden"})
    with pytest.raises(UserError, match="no option 9"):
        derive(model, {**architecture, "second.hidden": 9})
    two = MBConv(4, 4, hidden=Width((4, 8)))
    two.other = Width((1, 2))
    with pytest.raises(UserError, match="owns 2 widths"):
        derive(two, {"hidden": 4, "other": 1})


def test_one_of_is_the_mixture_of_its_candidates():
    layer = OneOf({"a": nn.Conv2d(3, 3, 1), "b": nn.Conv2d(3, 3, 3, padding=1), "c": nn.Identity()}).double()
    x = torch.randn(2, 3, 5, 5).double()
    with torch.no_grad():
        layer.logits.normal_()
        expected = sum(p * layer.candidate(o)(x) for p, o in zip(layer.logits.softmax(0), "abc", strict=True))
        assert (layer(x) - expected).abs().max() < 1e-12
        layer.drawn = Draw([2], torch.ones(1))
        assert layer(x) is x


def test_removal_renormalises_and_changes_the_output_within_the_bound():
    layer = OneOf({name: nn.Conv2d(3, 3, 3, padding=1) for name in "abcd"}).double()
    with torch.no_grad():
        layer.logits.copy_(torch.tensor([0.3, -1.0, 0.7, 0.1]))
    x = torch.randn(2, 3, 5, 5).double()
    for option in "bda":
        with torch.no_grad():
            index = layer.index(option)
            p = layer.logits.softmax(0)[index]
            outputs = {o: layer.candidate(o)(x).abs() for o in layer.options}
            before = layer(x)
            others = torch.stack([y for o, y in outputs.items() if o != option]).amax(0)
            kept = layer.remove(option)
            assert kept == [i for i in range(len(layer.options) + 1) if i != index]
            assert layer.logits.softmax(0).sum() == pytest.approx(1, abs=1e-12)
            assert ((layer(x) - before).abs() <= p * (outputs[option] + others) + 1e-12).all()
        assert option not in dict(layer.named_children())
        assert not any(name.startswith(f"{option}.") for name, _ in layer.named_parameters())
    with pytest.raises(UserError, match="last of its decision"):
        layer.remove("c")
    assert layer.options == ["c"]
    assert torch.equal(layer(x), layer.candidate("c")(x))


def test_a_removed_width_is_never_run_again():
    block = MBConv(4, 4, hidden=Width((4, 8, 12))).eval()
    block.hidden.remove(12)
    assert block.hidden.extent()[0] == block.hidden.maximum == 8
    assert derive(block, {"hidden": 8}).expand.conv.out_channels == 8
    with pytest.raises(UserError):
        derive(block, {"hidden": 12})


def test_architecture_parameters_and_weights_divide_the_parameters(nested):
    # FBNet re-implementations caught the logits in the weight optimizer by filtering names.
    model = nested()
    a, w = {id(p) for p in logits(model)}, {id(p) for p in weights(model)}
    assert not a & w
    assert a | w == {id(p) for p in model.parameters()}
    assert len(a) == len(decisions(model))


def test_a_draw_does_not_travel_with_copies(nested):
    model = nested()
    gates.draw(model, gates.Gumbel(), torch.Generator())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert all(decision.drawn is None for decision in decisions(twin).values())
    assert all(decision.drawn is not None for decision in decisions(model).values())


def test_what_cannot_be_a_decision():
    for options in ([], ["a", "a"]):
        with pytest.raises(UserError):
            Decision(options)
    for name in ("k3.e6", "forward", "logits"):
        with pytest.raises(UserError):
            OneOf({name: ConvBn(3, 3)})
    with pytest.raises(UserError):
        Width((0, 8))
    with pytest.raises(UserError, match="did you mean 'conv'"):
        OneOf({"conv": ConvBn(3, 3), "skip": nn.Identity()}).index("con")
