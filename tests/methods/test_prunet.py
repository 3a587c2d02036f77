"""PruNet's three tiers, exactly: what the sheet lists under "How to verify", on supernets of a few channels."""

import copy
import math
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import BRISK, branched, macro, new_run, priced, problem_of, search, stripes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from netsmith import gates
from netsmith.architecture import enumerate_architectures
from netsmith.blocks.mobile import ConvBn, FusedMBConv, Head, MBConv
from netsmith.blocks.prunode import Prunode
from netsmith.cost.budget import Budget
from netsmith.cost.prices import expected
from netsmith.decisions import Draw, OneOf, Width, decisions
from netsmith.errors import UserError
from netsmith.methods import prunet as module
from netsmith.methods.prunet import PruNet, Pruning
from netsmith.run import read_events
from netsmith.search.differentiable import CostLoss, Loop, Steps, learn, remove_option, weights
from netsmith.search.problem import prefer
from netsmith.search.race import Finals, finalists
from netsmith.search.sampling import at_budget

COPIES = pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])


def image(channels: int = 8, count: int = 2) -> torch.Tensor:
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def scattered(module: nn.Module) -> nn.Module:
    """Double precision, batch norms as after some training."""
    module.double()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None:
            for tensor in (part.weight.data, part.bias.data, part.running_mean):
                tensor.uniform_(0.5, 1.5)
            part.running_var.uniform_(0.5, 2)
    return module


def prunode(widths=(4, 8, 16, 24), *, separate: bool = False, block=MBConv, outputs: int = 8, **options) -> Prunode:
    node = scattered(Prunode(block(8, outputs, hidden=Width(widths), **options), separate=separate))
    if separate:
        node.second = copy.deepcopy(node.block)
    return node


def drawn(node: Prunode) -> Prunode:
    node.hidden.drawn = node.open()
    return node


def lean(node: Prunode, winner: int, by: float = 60.0) -> None:
    with torch.no_grad():
        node.logits.copy_(torch.tensor([by, -by]) if winner == 0 else torch.tensor([-by, by]))


# Tier 1: the bi-path block -----------------------------------------------------------------------------------------


def macs_and_saved_bytes(node: Prunode) -> tuple[int, int]:
    saved: dict[int, int] = {}

    def note(tensor):
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = image(count=1).requires_grad_()
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = drawn(node)(x)
    assert out.requires_grad
    return counter.get_total_flops() // 2, sum(saved.values())


@COPIES
@pytest.mark.parametrize("block", [MBConv, FusedMBConv])
def test_memory_and_macs_do_not_depend_on_the_number_of_widths(separate, block):
    few = prunode((1, 22, 43, 64), separate=separate, block=block)
    many = prunode(range(1, 65), separate=separate, block=block)
    assert macs_and_saved_bytes(few) == macs_and_saved_bytes(many)
    sizes = [sum(p.numel() for name, p in n.named_parameters() if name != "hidden.logits") for n in (few, many)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("block", [MBConv, FusedMBConv])
def test_the_cost_is_that_of_two_candidates_and_of_one_when_weights_are_shared(block):
    def macs(width: int) -> int:
        with FlopCounterMode(display=False) as counter:
            block(8, 8, hidden=width).double()(image(count=1))
        return counter.get_total_flops() // 2

    separate, shared = prunode(separate=True, block=block), prunode(block=block)
    assert macs_and_saved_bytes(separate)[0] == macs(4) + macs(24)
    assert macs_and_saved_bytes(shared)[0] == macs(24) + 2 * 24  # and making the mask


@pytest.mark.parametrize("block", [MBConv, FusedMBConv])
@pytest.mark.parametrize("outputs", [8, 12], ids=["residual", "plain"])
def test_separate_and_shared_copies_agree_when_their_weights_do(block, outputs):
    # The mixture stands before the last batch norm when shared and behind it when separate. In eval mode batch norm is
    # affine and the weights sum to one, so the order does not matter. In train mode each copy is normalised by the
    # statistics of its own width, and squeeze-excite sees the mixture, not the widths: there they differ.
    def pair(**options):
        shared = prunode(block=block, outputs=outputs, **options)
        separate = copy.deepcopy(shared)
        separate.second = copy.deepcopy(separate.block)  # equal weights
        for node in (shared, separate):
            node.logits.data = torch.tensor([0.3, -0.4], dtype=torch.float64)
        return drawn(shared), drawn(separate)

    shared, separate = pair()
    x = image()
    assert (shared.eval()(x) - separate.eval()(x)).abs().max() < 1e-10
    assert (shared.train()(x) - separate.train()(x)).abs().max() > 1e-3
    squeezed, apart = pair(squeeze=4)
    assert (squeezed.eval()(x) - apart.eval()(x)).abs().max() > 1e-6


@COPIES
@pytest.mark.parametrize("winner", [0, 1])
def test_closing_on_a_certain_winner_leaves_the_output_unchanged(separate, winner):
    node = prunode(separate=separate, squeeze=4).eval()
    lean(node, winner)
    before = drawn(node)(image())
    node.close()
    assert node.closed
    assert node.second is None
    assert (drawn(node)(image()) - before).abs().max() < 1e-12


@COPIES
@pytest.mark.parametrize("winner", [0, 1])
def test_collapse_leaves_the_output_unchanged_when_the_copies_are_equal(separate, winner):
    node = prunode(separate=separate, squeeze=4).eval()
    block = copy.deepcopy(node.block)
    node.low, node.high = 1, 2
    lean(node, winner)
    assert node.move(0.6, momentum=True)
    assert node.closed
    assert node.second is None
    width = node.hidden.options[1 + winner]
    y = block.body_at(image(), width)
    two = image() + 0.3 * y + 0.7 * y  # a == b, both paths still there
    assert (drawn(node)(image()) - two).abs().max() < 1e-12


def test_the_winners_copy_stays_when_a_pair_closes():
    for winner in (0, 1):
        node = prunode(separate=True)
        node.low, node.high = 1, 2
        copies = [node.block, node.second]
        lean(node, winner)
        node.move(0.6, momentum=True)
        assert node.block is copies[winner]


def test_a_single_path_runs_in_its_own_copy():
    node = prunode(separate=True, outputs=12).eval()
    for i, copied in ((0, node.block), (3, node.second)):
        node.hidden.drawn = Draw([i], torch.ones(1))
        assert torch.equal(node(image()), copied.body_at(image(), node.hidden.options[i]))
    scattered(node.second)
    node.hidden.drawn = Draw([3], torch.ones(1))
    assert not torch.allclose(node(image()), node.block.body_at(image(), 24))


@pytest.mark.parametrize("options", [{"squeeze": 4}, {"block": FusedMBConv}, {"outputs": 24}, {"kernel": 5}])
def test_channels_gained_on_growth_are_the_winners(options):
    node = prunode((4, 8, 16, 24), separate=True, **options)
    with torch.no_grad():
        for parameter in node.second.parameters():
            parameter.add_(torch.randn(parameter.shape))
        for buffer in node.second.buffers():
            buffer.add_(3)
    before = copy.deepcopy(node.block)
    lean(node, 1)
    node.move(0.6, momentum=True)
    assert (node.low, node.high) == (1, 3)
    hidden = slice(4, 8)
    assert_grown(node.block, before, node.second, hidden)


def assert_grown(block, before, wide, hidden: slice) -> None:
    """Hidden channels in the slice are the wide copy's, all others what they were."""
    grown = 0
    for name, tensor in block.state_dict().items():
        was, source, expectation = before.state_dict()[name], wide.state_dict()[name], None
        if name.startswith("project.conv") or name == "squeeze.reduce.weight":
            expectation = was.clone()
            expectation[:, hidden] = source[:, hidden]
        elif tensor.dim() and not name.startswith(("project", "squeeze.reduce")):
            expectation = was.clone()
            expectation[hidden] = source[hidden]
        grown += expectation is not None
        assert torch.equal(tensor, was if expectation is None else expectation), name
    assert grown >= 6


def test_a_move_resets_what_was_learned_about_the_old_pair():
    node = prunode()
    optimizer = torch.optim.Adam([node.logits])
    drawn(node)(image()).sum().backward()
    optimizer.step()
    assert optimizer.state[node.logits]
    lean(node, 0)
    assert node.move(0.6, momentum=True, optimizer=optimizer)
    assert node.logits.tolist() == [0.0, 0.0]
    assert node.logits not in optimizer.state
    assert not node.move(0.6, momentum=True)  # nothing is known about the new pair


def bracket(peak: int, momentum: bool, seed: int) -> tuple[int, int]:
    """The sheet's toy: 24 widths, a quadratic utility, noisy gradients, Adam at 0.05, a check every 10 steps."""
    node = Prunode(MBConv(2, 2, hidden=Width(range(1, 25))), separate=False)
    optimizer = torch.optim.Adam([node.logits], lr=0.05)
    generator = torch.Generator().manual_seed(seed)
    moves = 0
    for step in range(1, 2001):
        pair = torch.tensor([node.low, node.high]) + 1.0
        utility = -(((pair - peak) / 24) ** 2) + 0.002 * torch.randn(2, generator=generator)
        loss = -(node.logits.softmax(0) * utility).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            moves += node.move(0.6, momentum=momentum, optimizer=optimizer)
        if node.closed:
            break
    node.close()
    return node.hidden.options[node.low], moves


@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "steady"])
@pytest.mark.parametrize("peak", [1, 5, 12, 20, 24])
def test_the_bracketing_search_finds_the_best_width_within_one_step(peak, momentum):
    for seed in range(3):
        found, moves = bracket(peak, momentum, seed)
        assert abs(found - peak) <= 1
        assert moves <= 23


def play(utility: list[float], momentum: bool) -> list[tuple[int, int]]:
    node = Prunode(MBConv(2, 2, hidden=Width(range(1, len(utility) + 1))), separate=False)
    pairs = [(node.low, node.high)]
    while not node.closed:
        lean(node, 0 if utility[node.low] >= utility[node.high] else 1)
        assert node.move(0.6, momentum=momentum)
        pairs.append((node.low, node.high))
    return pairs


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.floats(-1, n + 1))), st.booleans())
def test_the_best_width_stays_between_the_two_on_a_symmetric_curve(curve, momentum):
    count, peak = curve
    utility = [-abs(n - peak) for n in range(count)]
    best = max(range(count), key=utility.__getitem__)
    for low, high in play(utility, momentum):
        assert any(utility[n] == utility[best] for n in range(low, high + 1))
    assert low == high


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=20), st.lists(st.integers(1, 50), max_size=20))
def test_the_best_width_stays_between_the_two_on_any_unimodal_curve_without_momentum(rises, falls):
    utility = [0.0]
    for change in [*rises, *(-f for f in falls)]:
        utility.append(utility[-1] + change)
    if len(utility) < 2:
        return
    best = utility.index(max(utility))
    assert all(low <= best <= high for low, high in play(utility, momentum=False))


def test_momentum_can_overtake_the_peak_of_a_lopsided_curve():
    # The sheet says that the best width always stays between the two. With doubled moves that holds for symmetric
    # curves only: here the wide end is better than the narrow end all along, and the peak is at the third width.
    utility = [0.0, 1.0, 100.0, *(50.0 - i for i in range(20))]
    assert any(low > 2 for low, _ in play(utility, momentum=True))
    assert all(low <= 2 <= high for low, high in play(utility, momentum=False))


# A supernet with Prunodes ------------------------------------------------------------------------------------------


def pruning(share: float = 0.4, build=macro, **options) -> Pruning:
    problem = problem_of(build, shares=(share,))
    chosen = {"body": "slim"} if build is macro else {}
    return Pruning(PruNet(headroom=0.0, **options), problem, problem.budgets[0], chosen)


def adam(searcher: Pruning) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(searcher.parameters(), lr=0.1)
    sum(parameter.sum() for parameter in searcher.parameters()).backward()
    optimizer.step()
    return optimizer


def lopsided(searcher: Pruning, seed: int = 0) -> Pruning:
    generator = torch.Generator().manual_seed(seed)
    for parameter in searcher.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return searcher


def test_the_two_widths_learn_from_architecture_steps_alone():
    searcher = pruning()
    own = {id(parameter) for parameter in weights(searcher.supernet)}
    assert not any(id(parameter) in own for parameter in searcher.parameters())
    assert len(own) + len(decisions(searcher.supernet)) + len(searcher.prunodes) == len(
        list(searcher.supernet.parameters())
    )
    loop = Loop(searcher.problem, searcher, Steps(epochs=1, warmup_epochs=0, batch_size=16))
    searcher.method = PruNet(check_every=10**6)
    loop.architecture_epoch(0)
    assert all(node.logits.abs().sum() > 0 for node in searcher.prunodes.values())


def test_near_the_end_a_prunode_asks_for_less_confidence():
    searcher = pruning(confidence=0.55, check_every=1)
    optimizer = adam(searcher)
    node = searcher.prunodes["body.slim.stage1_0.ir.hidden"]
    with torch.no_grad():
        node.logits.copy_(torch.tensor([0.53, 0.47]).log())
    widest = node.high
    searcher.stepped(0.8, optimizer)
    assert node.high == widest
    searcher.stepped(0.9, optimizer)  # half way down to 0.5: 0.525
    assert node.high == widest - 1


def test_noise_enters_the_mixture_and_not_the_expected_cost():
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.0, 1.0):
        searcher = lopsided(pruning(temperature=temperature))
        layer, mixtures, excess = searcher.layers()["body.slim.stage1_0"], [], searcher.excess()
        for _ in range(2):
            searcher.draw(generator, learning=False)
            mixtures.append(layer.drawn.weights)
        assert torch.equal(*mixtures) == (temperature == 0)
        assert searcher.excess() == excess


def test_probabilities_sum_to_one_after_every_removal(monkeypatch):
    searcher = lopsided(pruning())
    optimizer = adam(searcher)
    removed = []

    def checked(decision, option, optimizer):
        remove_option(decision, option, optimizer)
        removed.append(option)
        searcher._mix(gates.softmax, torch.Generator())
        for layer in searcher.layers().values():
            assert layer.draw().weights.sum().item() == pytest.approx(1, abs=1e-6)
        assert searcher.supernet(torch.zeros(2, 1, 8, 8)).isfinite().all()

    monkeypatch.setattr("netsmith.methods.prunet.remove_option", checked)
    for progress in (0.25, 0.5, 0.75, 1.0):
        searcher.sweep(progress, optimizer)
    assert len(removed) >= 8


def test_the_threshold_starts_at_nothing_and_ends_where_it_should(monkeypatch):
    searcher = pruning(layer_pruning=False)
    for layer in searcher.layers().values():
        layer.logits.data[:3] = torch.tensor([0.0, -20.0, -30.0])
    optimizer = adam(searcher)
    assert searcher.sweep(0.0, optimizer) == []
    thresholds = []
    monkeypatch.setattr(searcher, "_prune_blocks", lambda threshold, _: thresholds.append(threshold) or [])
    for progress in (0.0, 0.5, 1.0):
        searcher.sweep(progress, optimizer)
    assert thresholds == [0.0, 0.25, 0.5]


def test_nothing_dies_at_the_start_of_a_search():
    searcher = pruning()
    steps = 3 * 4  # the least that a search has: the first threshold is 1/12 of its end
    assert searcher._prune_blocks(0.5 / steps, adam(searcher)) == []


def test_the_last_block_is_never_removed():
    searcher = lopsided(pruning())
    events = searcher._prune_blocks(1.1, adam(searcher))
    for layer in searcher.layers().values():
        assert len([option for option in layer.options if option != "skip"]) == 1
    left = defaultdict(list)
    for event in events:
        left[event["path"]].append(event["probability"])
    assert all(len(row) == 2 for row in left.values())


def test_the_lowest_goes_first_and_the_others_are_weighed_anew():
    searcher = pruning(layer_pruning=False)
    layer = searcher.layers()["body.slim.stage1_0"]
    with torch.no_grad():
        layer.logits[:3] = torch.tensor([0.48, 0.32, 0.2]).log()
    events = searcher._prune_blocks(0.35, torch.optim.Adam(searcher.parameters()))
    mine = [event for event in events if event["path"] == "body.slim.stage1_0"]
    # 0.32 lies below 0.35, but not its share of what is left, 0.4.
    assert [(event["option"], round(event["probability"], 4)) for event in mine] == [("fused", 0.2)]


def test_what_a_rule_needs_is_never_removed():
    searcher = pruning(build=branched)
    with torch.no_grad():
        for decision in decisions(searcher.supernet).values():
            decision.logits[decision.options.index("on")] = -5.0
    searcher._prune_blocks(0.4, adam(searcher))
    left = {path: decision.options for path, decision in decisions(searcher.supernet).items()}
    rules = searcher.problem.outline.rules
    assert rules
    assert all(rule.can_hold(left) for rule in rules)
    assert sum(options == ["off"] for options in left.values()) > len(left) / 2


# Tier 3 -------------------------------------------------------------------------------------------------------------


def test_a_depth_gate_is_a_skip_candidate_of_the_rest_of_the_probability():
    searcher = lopsided(pruning())
    scattered(searcher.supernet)
    optimizer = adam(searcher)
    searcher.depth = {}
    searcher._prune_layers(0.5, optimizer)
    path = "body.slim.stage1_1"
    with torch.no_grad():
        searcher.depth[path].fill_(-0.3)
    searcher.supernet.eval()
    searcher._mix(gates.softmax, torch.Generator())
    layer, x = searcher.layers()[path], image(8)
    s = torch.tensor(-0.3, dtype=torch.float64).sigmoid()
    blocks = [option for option in layer.options if option != "skip"]
    p = layer.logits.detach()[[layer.index(option) for option in blocks]].softmax(0)
    bodies = [layer.candidate(option)(x) - x for option in blocks]
    residual = x + s * sum(q * body for q, body in zip(p, bodies, strict=True))
    drawn_weights = dict(zip((layer.options[i] for i in layer.drawn.indices), layer.drawn.weights, strict=True))
    assert drawn_weights["skip"].item() == pytest.approx(1 - s.item(), abs=1e-6)
    layer.drawn = Draw(layer.drawn.indices, torch.cat([s * p, (1 - s)[None]]))
    assert (layer(x) - residual).abs().max() < 1e-10


def test_skip_is_absent_before_its_time():
    searcher = lopsided(pruning(layers_from=0.5))
    optimizer = adam(searcher)
    ran = []
    for layer in searcher.layers().values():
        if "skip" in layer.options:
            layer.candidate("skip").register_forward_hook(lambda *_: ran.append(1))
    for progress in (0.1, 0.49):
        searcher.sweep(progress, optimizer)
        searcher._mix(gates.softmax, torch.Generator())
        searcher.supernet(torch.zeros(2, 1, 8, 8))
        assert not searcher.depth
    assert not ran
    searcher.sweep(0.5, optimizer)
    searcher._mix(gates.softmax, torch.Generator())
    searcher.supernet(torch.zeros(2, 1, 8, 8))
    assert set(searcher.depth) == {"body.slim.stage1_0", "body.slim.stage1_1", "body.slim.stage2_1"}
    assert len(ran) == 3
    assert all(d.sigmoid().item() == pytest.approx(0.7) for d in searcher.depth.values())


def numbered() -> nn.Module:
    """Layers that say nothing of their stage, as in the space `fbnet`."""

    def layer(inputs: int, outputs: int) -> OneOf:
        options: dict[str, nn.Module] = {"ir": MBConv(inputs, outputs, hidden=Width((4, 8, 16)))}
        return OneOf(options | ({"skip": nn.Identity()} if inputs == outputs else {}))

    widths = [(8, 12), (12, 12), (12, 12), (12, 16), (16, 16)]
    layers = {f"layer{i}": layer(*pair) for i, pair in enumerate(widths)}
    return nn.Sequential(OrderedDict(stem=ConvBn(1, 8, 3), **layers, head=Head(16, 16, 3)))


@pytest.mark.parametrize(("build", "stages"), [(macro, 2), (numbered, 2)], ids=["stage1_0", "layer0"])
def test_at_most_one_layer_of_a_stage_goes_in_a_sweep_and_never_one_that_changes_the_shape(build, stages):
    searcher = pruning(1e-3, build, block_pruning=False)
    optimizer = adam(searcher)
    searcher.sweep(0.5, optimizer)
    count = len(searcher.depth)
    changing = [path for path, layer in searcher.layers().items() if "skip" not in layer.options]
    assert changing
    gone = []
    for _ in range(count + 1):
        for d in searcher.depth.values():
            d.data.fill_(-9.0)
        gone.append([event["path"] for event in searcher.sweep(0.9, optimizer)])
    assert len(gone[0]) == stages
    assert all(len({searcher.stages[path] for path in row}) == len(row) for row in gone)
    assert sum(map(len, gone)) == count
    for path, layer in searcher.layers().items():
        assert layer.options == (["ir", "ir5", "fused"][: len(layer.options)] if path in changing else ["skip"])
    assert searcher.supernet(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_nothing_is_removed_once_the_expected_cost_has_reached_the_target():
    searcher = pruning(5.0, block_pruning=False)
    optimizer = adam(searcher)
    searcher.sweep(0.5, optimizer)
    for d in searcher.depth.values():
        d.data.fill_(-9.0)
    assert searcher.excess() < 0
    assert searcher.sweep(0.75, optimizer) == []
    assert not searcher.kept
    assert searcher.sweep(1.0, optimizer) == []
    assert searcher.kept == set(searcher.depth)


@pytest.mark.parametrize(("progress", "margin"), [(0.5, 0.4), (0.75, 0.2), (1.0, 0.0)])
def test_the_margin_falls_from_when_layers_may_go_to_nothing_at_the_end(progress, margin):
    searcher = pruning(1e-3, layers_from=0.5, layer_margin=0.4, block_pruning=False)
    optimizer = adam(searcher)
    searcher.sweep(0.5, optimizer)
    goes, stays = "body.slim.stage1_0", "body.slim.stage2_1"
    for outside, decided in ((-0.01, False), (0.01, True)):
        for path, s in ((goes, 0.5 - margin - outside), (stays, 0.5 + margin + outside)):
            searcher.depth[path].data.fill_(math.log(s / (1 - s)))
        if margin or decided:  # at the end nothing stays open
            events = searcher.sweep(progress, optimizer)
            assert [event["path"] for event in events] == [goes] * decided
            assert (stays in searcher.kept) == decided


def test_the_expected_cost_exceeds_when_any_budget_is_exceeded():
    problem = problem_of()
    for limits, over in (((1e9, 1.0), True), ((1e-9, 1e9), True), ((1e9, 1e9), False)):
        budgets = [Budget("latency", limits[0], "ms"), Budget("params", limits[1], "")]
        assert (Pruning(PruNet(headroom=0.0), problem, budgets, {"body": "slim"}).excess() > 0) == over


def test_a_clear_layer_is_kept_for_good():
    searcher = pruning(block_pruning=False)
    optimizer = adam(searcher)
    searcher.sweep(0.5, optimizer)
    searcher.depth["body.slim.stage1_1"].data.fill_(math.log(9.5))  # s = 0.905, above 0.5 + 0.4 at the start only
    searcher.sweep(0.5, optimizer)
    assert searcher.kept == {"body.slim.stage1_1"}
    assert all(parameter is not searcher.depth["body.slim.stage1_1"] for parameter in searcher.parameters())
    searcher._mix(gates.softmax, torch.Generator())
    ran = {path: {layer.options[i] for i in layer.drawn.indices} for path, layer in searcher.layers().items()}
    assert {path for path in searcher.depth if "skip" not in ran[path]} == searcher.kept


# The search as a whole ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
def test_expected_latency_is_the_mean_over_all_networks(gated):
    searcher = lopsided(pruning(build=numbered))
    if gated:
        searcher._prune_layers(0.5, adam(searcher))
        for i, d in enumerate(searcher.depth.values()):
            d.data = torch.tensor(0.3 * i)
    searcher._mix(gates.softmax, torch.Generator())
    found, prices = decisions(searcher.supernet), searcher.problem.prices["latency"]
    weight = {path: {d.options[i]: w.item() for i, w in d.draw().pairs()} for path, d in found.items()}
    total = mean = 0.0
    for architecture in enumerate_architectures(numbered()):
        probability = math.prod(weight[path].get(option, 0.0) for path, option in architecture.items())
        total += probability
        mean += probability * prices.of(architecture)
    assert total == pytest.approx(1, abs=1e-6)
    assert expected(searcher.supernet, prices, drawn=True).item() == pytest.approx(
        mean, rel=1e-6
    )  # logits in single precision
    assert searcher.excess() == pytest.approx(mean / searcher.targets["latency"] - 1, rel=1e-6)


def test_values_say_what_the_search_has_learned():
    searcher = pruning(block_pruning=False)
    searcher.sweep(0.5, adam(searcher))
    gated, fixed = "body.slim.stage1_1", "body.slim.stage2_0"  # where the shape changes nothing can be skipped
    with torch.no_grad():
        searcher.depth[gated].fill_(0.0)  # s = 0.5
        for path in (gated, fixed):
            searcher.layers()[path].logits[:3] = torch.tensor([0.0, -1.0, -9.0])
    node = searcher.prunodes[f"{gated}.ir.hidden"]
    node.low, node.high = 1, 3
    values = searcher.values()
    assert values[gated] == pytest.approx({"ir": 0.05 + 0.5 * 2, "ir5": 0.05 + 0.5 * 1, "fused": 0.05, "skip": 0.0})
    assert values[fixed] == pytest.approx({"ir": 2.05, "ir5": 1.05, "fused": 0.05})
    widths = values[f"{gated}.ir.hidden"]  # 16 is the wider of the two that are left
    assert [widths[n] for n in (4, 8, 16, 32)] == pytest.approx([math.log(1 / 4), math.log(1 / 2), 0, math.log(2) / 4])


def test_a_restored_search_is_where_it_was():
    searcher, again = (pruning(copies="separate") for _ in range(2))
    optimizer = adam(lopsided(searcher))
    searcher.stepped(0.5, optimizer)
    searcher.sweep(0.5, optimizer)
    kept = "body.slim.stage1_1"
    searcher.depth[kept].data.fill_(9.0)
    searcher.sweep(0.5, optimizer)
    moving, closing = list(searcher._alive_prunodes().values())[:2]
    for _ in range(2):
        lean(moving, 1)
        moving.move(0.6, momentum=True)
    lean(closing, 1)
    closing.close()
    assert (searcher.kept, moving.speed, moving.closed, closing.second) == ({kept}, 2, False, None)

    again.restore(searcher.state())
    left, right = searcher.state(), again.state()
    for name in ("supernet", "depth"):
        mine, theirs = left.pop(name), right.pop(name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())
    assert right == left


def brisk(searcher_options: dict, tmp_path, share: float = 0.3):
    problem = problem_of(shares=(share,), task=stripes(64))
    method = PruNet(**{"headroom": 0.0, "check_every": 1, "layers_from": 0.3, "layer_margin": 0.1, **searcher_options})
    steps = Steps(**{**BRISK, "epochs": 6})
    with new_run(tmp_path / "run") as run:
        searcher = learn(
            problem, run, "x", lambda: Pruning(method, problem, problem.budgets[0], {"body": "slim"}), steps
        )
    return searcher, read_events(tmp_path / "run")


def test_everything_is_decided_at_the_end(tmp_path):
    searcher, _ = brisk({"confidence": 0.999, "check_every": 10**6}, tmp_path)  # Prunodes never move by themselves
    assert all(node.closed for node in searcher.prunodes.values() if isinstance(node.block, MBConv | FusedMBConv))
    for path, layer in searcher.layers().items():
        assert len(layer.options) == 1 or path in searcher.kept
        assert len([option for option in layer.options if option != "skip"]) <= 1


@pytest.mark.parametrize("tier", ["prunode", "block_pruning", "layer_pruning"])
def test_each_tier_can_be_switched_off(tier, tmp_path):
    searcher, events = brisk({tier: False, "cost": CostLoss(weight=10.0)}, tmp_path, share=0.08)
    removed = {event["tier"] for event in events if event["kind"] == "removed"}
    widths = [event["widths"] for event in events if event["kind"] == "search_epoch"]
    if tier == "prunode":
        assert not any(widths)
    elif tier == "block_pruning":
        assert 2 not in removed
        assert widths[0] != widths[-1]
    else:
        assert removed == {2}
        assert not searcher.depth
    values = searcher.values()
    architecture = searcher.problem.allocate(values, searcher.problem.budgets[0])
    assert searcher.problem.latency.of(architecture) <= searcher.problem.budgets[0][0].limit


@pytest.mark.parametrize("copies", ["shared", "separate"])
def test_optimizers_follow_what_is_removed(copies, tmp_path):
    problem = problem_of(shares=(0.1,), task=stripes(64))
    method = PruNet(headroom=0.0, check_every=1, copies=copies, layers_from=0.3, layer_margin=0.1)
    searcher = Pruning(method, problem, problem.budgets[0], {"body": "slim"})
    loop = Loop(problem, searcher, Steps(**{**BRISK, "epochs": 5}))
    before = len(weights(searcher.supernet))
    for _ in range(5):
        loop.train_epoch(0)
        for optimizer, alive in (
            (loop.weights, weights(searcher.supernet)),
            (loop.architecture, searcher.parameters()),
        ):
            assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, alive))
            assert set(map(id, optimizer.state)) <= set(map(id, alive))
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    assert name == "step" or value is None or value.shape == parameter.shape
    assert len(weights(searcher.supernet)) < before


def test_removed_prunodes_free_their_weights():
    searcher = lopsided(pruning())
    searcher.sweep(1.0, adam(searcher))
    alive = {id(module) for module in searcher.supernet.modules()}
    for node in searcher.prunodes.values():
        assert id(node) in alive or not list(node.block.parameters())


@dataclass
class Rehearsal:
    """A search in which nothing is trained: of a race the first entrant wins, and a supernet stays as it was made."""

    supernets: dict[str, Pruning] = field(default_factory=dict)
    races: dict[str, list[dict]] = field(default_factory=dict)

    def learn(self, problem, run, name, make, steps, **_) -> Pruning:
        self.supernets[name] = make()
        return self.supernets[name]

    def race(self, problem, run, name, entrants, **_) -> list[tuple[dict, float]]:
        self.races[name] = entrants
        return [(architecture, 0.5) for architecture in entrants]


@pytest.fixture
def rehearse(monkeypatch, tmp_path):
    def search(problem, **options) -> Rehearsal:
        played = Rehearsal()
        monkeypatch.setattr("netsmith.methods.prunet.learn", played.learn)
        monkeypatch.setattr("netsmith.methods.prunet.race", played.race)
        with new_run(tmp_path / "run") as run:
            PruNet(**options).search(problem, run)
        return played

    return search


def test_random_networks_at_the_budget_race_with_the_best_of_each_structure(rehearse):
    problem = problem_of(shares=(0.3,))
    entrants = rehearse(problem, starts=2, finals=Finals(samples=1)).races["start-0"]
    assert [entrant["body"] for entrant in entrants[:2]] == ["slim", "broad"]
    assert len(entrants) == 4
    limit = problem.budgets[0][0].limit
    assert all(0.97 * limit <= problem.latency.of(drawn) <= limit for drawn in entrants[2:])
    assert entrants[2] != entrants[3]


def test_what_the_supernet_was_built_around_is_a_finalist(rehearse):
    races = rehearse(problem_of(shares=(0.3,)), starts=1, finals=Finals(samples=1)).races
    start, (first, *found) = races["start-0"][0], races["finalists-0"]
    assert first == start
    assert len(found) == 1


def test_a_shared_warm_up_takes_the_supernet_of_the_dearest_start(rehearse):
    problem = problem_of(shares=(0.3, 0.6, 0.4))
    supernets = rehearse(problem, starts=0, finals=Finals(samples=1), headroom=0.0).supernets
    assert supernets.keys() == {"warm-0", "prune-0", "prune-1", "prune-2"}
    assert supernets["warm-0"].targets == supernets["prune-1"].targets


# Fronts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headroom", [0.0, pytest.param(2.0, marks=pytest.mark.slow)])
def test_budgets_of_a_front_share_the_warm_up_under_their_own_ceilings(headroom, tmp_path):
    problem = problem_of(shares=(0.1, 0.8), task=stripes(64))
    search("prunet", tmp_path / "run", problem=problem, headroom=headroom)
    events = [event for event in read_events(tmp_path / "run") if event["kind"] == "search_epoch"]
    epochs = defaultdict(list)
    for event in events:
        epochs[event["search"]].append(event["epoch"])
    warm = [name for name in epochs if name.startswith("warm")]
    assert all(epochs[name] == [1] for name in warm)
    assert epochs["prune-0"] == epochs["prune-1"] == [2, 3, 4, 5, 6]
    top = {name: [w for e in events if e["search"] == name for _, w in e["widths"].values()] for name in epochs}
    if headroom:
        assert max(top["prune-0"]) < max(top["prune-1"])


def test_budgets_whose_starts_have_other_layers_do_not_share_a_warm_up(tmp_path, monkeypatch):
    """Their supernets hold other layers: the weights of one do not fit into the other."""
    problem = problem_of(numbered, shares=(0.3, 0.9), task=stripes(64))
    narrow = {path: row[0] for path, row in problem.outline.options.items() if path not in problem.parents}
    starts = []
    for left_out in (["layer1", "layer2"], ["layer1"], ["layer1", "layer2"]):
        chosen = {path: "skip" if path in left_out else "ir" for path in narrow}
        starts.append(chosen | {f"{path}.ir.hidden": 8 for path, option in chosen.items() if option == "ir"})
    problem.budgets.append(problem.budgets[1])
    monkeypatch.setattr(PruNet, "_start", lambda self, problem, run, name, budgets: starts[int(name[-1])])
    outcome = search("prunet", tmp_path / "run", problem=problem, headroom=2.0)
    assert len(outcome.architectures) == 3
    searches = {event["search"] for event in read_events(tmp_path / "run") if event["kind"] == "search_epoch"}
    assert searches == {"warm-0", "warm-1", "prune-0", "prune-1", "prune-2"}


def test_a_block_that_cannot_run_at_two_widths_is_named():
    block = MBConv(8, 8, hidden=Width((4, 8)))
    block.channels = block._modules.pop("hidden")
    searcher = Pruning.__new__(Pruning)
    searcher.supernet, searcher.method = nn.Sequential(block), PruNet()
    with pytest.raises(UserError, match=r"MBConv at '0' cannot run at two widths: .* such as MBConv"):
        searcher._insert_prunodes()


# The supernet around a network -------------------------------------------------------------------------------------


def around(share: float = 0.5, **options) -> tuple[Pruning, dict]:
    problem = problem_of(macro, shares=(share,))
    start = at_budget(problem, problem.budgets[0], torch.Generator().manual_seed(3))
    return Pruning(PruNet(**options), problem, problem.budgets[0], start), start


@pytest.mark.parametrize("share", [0.15, 0.3, 0.6])
@pytest.mark.parametrize("headroom", [1.0, 2.0])
def test_the_supernet_holds_its_start_and_no_dearer_layers(share, headroom):
    searcher, start = around(share, headroom=headroom)
    prices = searcher.problem.latency
    for path, layer in searcher.layers().items():
        if start[path] == "skip":
            assert layer.options == ["skip"]
            continue
        assert start[path] in layer.options
        inside = f"{path}.{start[path]}.hidden"
        own = prices.at(path, start[path]) + (prices.at(inside, start[inside]) if inside in start else 0.0)
        for block in layer.options:
            if (node := searcher.prunodes.get(f"{path}.{block}.hidden")) is not None:
                widths = node.hidden.options
                assert len(widths) >= 2
                assert all(prices.at(f"{path}.{block}.hidden", n) <= headroom * own * (1 + 1e-9) for n in widths[2:])
        if inside in start and (node := searcher.prunodes.get(inside)) is not None:
            assert start[inside] in node.hidden.options


def test_layers_that_were_never_opened_come_back_for_slack_alone():
    searcher, start = next(found for share in (0.1, 0.15, 0.2) if "skip" in (found := around(share))[1].values())
    problem, budgets = searcher.problem, searcher.problem.budgets[0]
    skipped = [path for path, option in start.items() if option == "skip"]
    assert skipped
    assert searcher.still >= set(skipped)
    values = prefer(searcher.values(), {"body": start["body"]}, 1e3)
    everything = problem.allocate(values, [replace(budgets[0], limit=1e9)])
    assert all(everything[layer] != "skip" for layer in skipped)
    # A width more, anywhere, is worth more than nothing, and a found layer more than one of these.
    for layer, options in searcher.layers().items():
        if layer not in skipped:
            worst = min(values[layer][option] for option in options.options if option != "skip")
            assert worst > max(values[other][option] for other in skipped for option in values[other])
    generator = torch.Generator().manual_seed(0)
    drawn = finalists(problem, budgets, values, Finals(samples=8, noise=0.5), generator, still=searcher.still)
    assert len(drawn) > 1
    prices = problem.latency

    def least(layer: str, option: str) -> float:
        inside = prices.options.get(f"{layer}.{option}.hidden", {None: 0.0})
        return prices.at(layer, option) + min(inside.values())

    for architecture in drawn:
        free = budgets[0].limit - prices.of(architecture)
        out = [layer for layer in skipped if architecture[layer] == "skip"]
        assert all(free < least(layer, option) for layer in out for option in values[layer] if option != "skip")


def test_the_aim_falls_from_where_the_supernet_starts_to_the_budget():
    """The cost term is |E / aim - 1|: it vanishes at the start, and at E = T from `settled` on."""
    searcher, _ = around(0.2, headroom=0.0)
    assert searcher.first_excess > 0
    nothing = torch.zeros(())
    weight = searcher.method.cost.weight
    searcher.progress = 0.0
    assert searcher.objective(nothing).item() == pytest.approx(0, abs=1e-5)
    for progress in (searcher.method.settled, 1.0):
        searcher.progress = progress
        assert searcher.objective(nothing).item() == pytest.approx(weight * searcher.excess(), rel=1e-5)
    searcher.progress = searcher.method.settled / 2
    share = (1 + searcher.first_excess) / (1 + searcher.first_excess / 2)
    assert searcher.objective(nothing).item() == pytest.approx(weight * (share - 1), rel=1e-4)


def test_the_toy_has_more_than_one_structure():
    shapes, _ = priced(macro, (1, 8, 8))
    assert decisions(shapes)["body"].options == ["slim", "broad"]


def test_the_start_stays_in_the_race_and_unopened_layers_stay_still(tmp_path, monkeypatch):
    problem, seen, draw = problem_of(shares=(0.15,)), {}, module.finalists
    start = at_budget(problem, problem.budgets[0], torch.Generator().manual_seed(3))  # it skips layers
    monkeypatch.setattr(PruNet, "_start", lambda *_: start)
    monkeypatch.setattr(module, "learn", lambda p, run, name, make, steps, **_: make())
    monkeypatch.setattr(module, "race", lambda p, run, name, entrants, **o: seen.update(o) or [(start, 0.5)])
    monkeypatch.setattr(module, "finalists", lambda *a, **o: seen.update(o) or draw(*a, **o))
    with new_run(tmp_path / "run") as run:
        PruNet(finals=Finals(samples=1)).search(problem, run)
    assert seen["always"] == [start]
    assert {path for path, option in start.items() if option == "skip"} <= seen["still"]
