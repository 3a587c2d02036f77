"""Open decisions, their removal, and the networks derived from them."""

import copy
import io

import pytest
import torch
from torch import nn

from netsmith import gates
from netsmith.architecture import enumerate_architectures, sample
from netsmith.blocks.mobile import ConvBn, MBConv
from netsmith.decisions import Decision, Draw, OneOf, Places, Rule, Width, decisions, derive, logits, parents, rules
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


@pytest.mark.parametrize("training", [True, False])
def test_one_choice_in_many_places_with_weights_of_their_own(tied, training):
    model, x = tied().train(training), torch.randn(IMAGES).double()
    assert [p for p in decisions(model) if "open" in p] == [f"edges.{e}.open.{i}.hidden" for e in "ab" for i in "012"]
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        architecture = sample(model, generator)
        child = derive(model, architecture)
        assert not any(isinstance(module, Decision) for module in child.modules())
        gates.fix(model, architecture)
        with torch.no_grad():
            assert torch.equal(child(x), model(x))
        assert isinstance(child.edges["a"], Places)
        assert len({id(p) for p in child.parameters()}) == len(list(child.parameters()))


def test_mixed_places_are_mixed_place_by_place(tied):
    edge, x = tied().edges["a"].eval(), torch.randn(2, 8, 4, 4).double()
    with torch.no_grad():
        edge.logits.normal_()
        for place in range(3):
            parts = [edge.candidate(option)[place](x) for option in edge.options]
            expected = sum(p * part for p, part in zip(edge.logits.softmax(0), parts, strict=True))
            assert (edge(x, place) - expected).abs().max() < 1e-12


def test_rules_are_named_from_the_whole_model_and_gone_from_what_is_derived(tied):
    model = nn.Sequential(tied())
    assert rules(model) == (Rule(("0.edges.a", "0.edges.b"), "skip", 1, 2),)
    assert str(rules(model)[0]) == "1 to 2 of 0.edges.a, 0.edges.b are not 'skip'"
    child = derive(model, sample(model, torch.Generator()))
    assert rules(child) == ()
    assert rules(model)  # the supernet keeps its own


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((Rule(("edges.c",), "skip", 0, 1),), "'edges.c' is no decision"),
        ((Rule(("edges.a.open.0.hidden",), 4, 0, 1),), "'edges.a.open.0.hidden' is nested"),
        ((Rule(("edges.a",), "skip", 0, 1), Rule(("edges.a",), "conv", 0, 1)), "'edges.a' has two rules"),
        ((Rule(("edges.a", "edges.b"), "skip", 3, 3),), "no network keeps the rule that 3 of edges.a, edges.b"),
        ((Rule(("edges.a", "edges.b"), "none", 0, 1),), "no network keeps the rule"),
    ],
)
def test_rules_that_make_no_sense_are_refused(tied, given, message):
    model = tied()
    model.rules = given
    with pytest.raises(UserError, match=message):
        rules(model)
