"""The loop: it learns, resumes bit for bit, stops when it must, and its loss is the textbook's."""

import errno
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from netsmith.errors import UserError
from netsmith.tasks import open_task
from netsmith.tasks.classification import Task
from netsmith.train.loop import evaluate, loss_of, train
from netsmith.train.recipe import Recipe

SHORT = Recipe(epochs=3, batch_size=64, learning_rate=0.05, ema=0.9)
ONCE = replace(SHORT, epochs=1)
ONE_STEP = replace(ONCE, batch_size=1000)


@pytest.fixture(scope="module")
def digits():
    return open_task("digits")


@pytest.fixture(scope="module")
def few():
    return open_task("digits", limit=300)


def network(dropout: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(32, 10),
    )


def equal(first: nn.Module, second: nn.Module) -> bool:
    return all(a.equal(b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


class Killed(BaseException):
    pass


def train_one_epoch_of(recipe: Recipe, module: nn.Module, task: Task, path: Path) -> None:
    def die(_) -> None:
        raise Killed

    with pytest.raises(Killed):
        train(module, task, recipe, checkpoint=path, on_epoch=die)


def test_digits_are_learnt_in_seconds(digits):
    module = network(0.0)
    history = train(module, digits.without_test(), Recipe.default(digits, epochs=12))
    assert evaluate(module, digits, "test") >= 0.95
    assert history[-1]["loss"] < history[0]["loss"]
    assert not module.training
    assert all(parameter.is_contiguous() for parameter in module.parameters())


@pytest.mark.parametrize(
    "recipe",
    [
        SHORT,
        replace(SHORT, optimizer="adamw", learning_rate=0.01, mixup=0.4, cutmix=1.0, randaugment=5),
        replace(SHORT, ema=None, schedule="linear", precision="bf16"),
        replace(SHORT, optimizer="rmsprop", learning_rate=0.003, distillation=0.5),
    ],
    ids=["sgd", "adamw-mix", "bf16", "rmsprop-distilled"],
)
def test_a_killed_run_ends_like_an_undisturbed_one(few, tmp_path, recipe):
    undisturbed, teacher = network(), network()
    train(undisturbed, few, recipe, seed=1, teacher=teacher)
    path = tmp_path / "train.pt"
    steps = 0

    def die_now_and_then(*_):
        nonlocal steps
        steps += 1
        if steps in (2, 8, 16):  # inside each epoch; the second time two of its four steps are done
            raise Killed

    for _ in range(4):
        module = network()
        torch.manual_seed(123)  # what else was drawn must not matter
        module.register_forward_pre_hook(die_now_and_then)
        try:
            history = train(module, few, recipe, seed=1, teacher=teacher, checkpoint=path)
        except Killed:
            continue
        break
    assert equal(module, undisturbed)
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3]


def test_a_continued_run_tells_of_the_epochs_before(few, tmp_path):
    undisturbed, module, path, seen = network(), network(), tmp_path / "train.pt", []
    whole = train(undisturbed, few, SHORT)
    train_one_epoch_of(SHORT, module, few, path)
    assert not equal(module, undisturbed)
    history = train(module, few, SHORT, checkpoint=path, on_epoch=seen.append)
    assert equal(module, undisturbed)
    assert seen == history
    assert [epoch["loss"] for epoch in history] == [epoch["loss"] for epoch in whole]
    again = network()
    assert len(train(again, few, SHORT, checkpoint=path)) == 3  # nothing is left to do
    assert equal(again, undisturbed)


def test_the_recipe_can_forbid_mirroring(few):
    photographs = replace(few, flip=True)
    modules = {mirror: network() for mirror in (None, True, False)}
    for mirror, module in modules.items():
        train(module, photographs, replace(ONCE, mirror=mirror))
    assert equal(modules[None], modules[True])
    assert not equal(modules[None], modules[False])
    train(unmirrored := network(), few, ONCE)
    assert equal(unmirrored, modules[False])


@pytest.mark.parametrize(
    "augmentation", [{"randaugment": 9}, {"mixup": 0.4}, {"cutmix": 1.0}], ids=lambda a: next(iter(a))
)
def test_the_recipes_augmentation_changes_what_the_network_sees(few, augmentation):
    seen = []
    for recipe in (ONE_STEP, replace(ONE_STEP, **augmentation)):
        module = network()
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        train(module, few, recipe)
    plain, augmented = seen
    assert not plain.equal(augmented)


def test_the_learning_rate_rises_for_an_epoch_and_falls_with_every_step(few):
    rates = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        history = train(network(), few, SHORT)  # three epochs of four steps, the first of them for the warm-up
    finally:
        hook.remove()
    cosine = [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx([SHORT.learning_rate * share for share in (0.25, 0.5, 0.75, 1, *cosine)])
    assert [epoch["learning_rate"] for epoch in history] == rates[3::4]


def test_what_is_kept_is_the_average_of_the_weights(few):
    start, last, kept = network(), network(), network()
    train(last, few, replace(ONE_STEP, ema=None))
    train(kept, few, ONE_STEP)
    for before, after, average in zip(start.parameters(), last.parameters(), kept.parameters(), strict=True):
        assert torch.allclose(average, 0.1 * before + 0.9 * after, atol=1e-6)  # a tenth: the decay of the first step


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_recipe_says_how_precisely_the_network_computes(few, precision, dtype):
    module, seen = network(), set()
    module.register_forward_hook(lambda _module, _inputs, logits: seen.add(logits.dtype))
    train(module, few, replace(ONE_STEP, precision=precision))
    assert seen == {dtype}


def test_a_teacher_teaches_and_learns_nothing(few):
    alone, taught, teacher = network(), network(), network().train()
    train(alone, few, ONCE)
    train(taught, few, replace(ONCE, distillation=0.5), teacher=teacher)
    assert not equal(taught, alone)
    assert equal(teacher, network())  # its batch norms too: it is asked as a trained network is, without dropout


def test_the_global_generator_is_left_alone(few):
    state = torch.get_rng_state()
    module = network()
    torch.set_rng_state(state)
    train(module, few, ONCE)
    assert torch.get_rng_state().equal(state)


def test_foreign_checkpoints_are_refused(few, tmp_path):
    path = tmp_path / "train.pt"
    train(network(), few, SHORT, checkpoint=path)
    with pytest.raises(UserError, match="the list of images is '' there and 'another' here"):
        train(network(), replace(few, fingerprint="another"), SHORT, checkpoint=path)
    with pytest.raises(UserError, match=r"learning_rate is 0\.05 there and 0\.1 here"):
        train(network(), few, replace(SHORT, learning_rate=0.1), checkpoint=path)
    with pytest.raises(UserError, match="seed is 0 there and 1 here"):
        train(network(), few, SHORT, seed=1, checkpoint=path)
    with pytest.raises(UserError, match="the network"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), few, SHORT, checkpoint=path)
    torch.save({"weights": 1}, path)
    with pytest.raises(UserError, match="not the checkpoint of a training"):
        train(network(), few, SHORT, checkpoint=path)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(few, tmp_path):
    path = tmp_path / "train.pt"
    train_one_epoch_of(SHORT, network(), few, path)
    good = path.read_bytes()
    module = network()
    calls = 0

    def poison(_module, _inputs, output):
        nonlocal calls
        calls += 1
        return output * math.nan if calls == 3 else output

    module.register_forward_hook(poison)
    with pytest.raises(UserError, match=r"the loss became nan in epoch 2, step 3 of 4, at learning rate 0\.0\d+"):
        train(module, few, SHORT, checkpoint=path)
    assert path.read_bytes() == good


def test_weights_that_explode_in_the_last_step_are_not_saved(few, tmp_path):
    module = network()
    module[0].weight.register_hook(lambda grad: grad + math.inf)
    with pytest.raises(UserError, match="a weight became infinite in epoch 1, step 1 of 1"):
        train(module, few, ONE_STEP, checkpoint=tmp_path / "train.pt")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_last_checkpoint(few, tmp_path, monkeypatch):
    path = tmp_path / "train.pt"
    train_one_epoch_of(SHORT, network(), few, path)
    good = path.read_bytes()

    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"no space left to write .*train\.pt"):
            train(network(), few, SHORT, checkpoint=path)
    assert path.read_bytes() == good
    assert [file.name for file in tmp_path.iterdir()] == ["train.pt"]


def test_distillation_wants_a_teacher(few):
    with pytest.raises(UserError, match=r"recipe\.distillation is 0\.5, but there is no teacher"):
        train(network(), few, replace(SHORT, distillation=0.5))


def test_label_smoothing_by_hand():
    logits = torch.tensor([[math.log(0.7), math.log(0.2), math.log(0.1)]])
    loss = loss_of(logits, torch.tensor([0]), Recipe(label_smoothing=0.3))
    expected = -(0.8 * math.log(0.7) + 0.1 * math.log(0.2) + 0.1 * math.log(0.1))
    assert abs(loss.item() - expected) < 1e-6


def test_distillation_by_hand():
    student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    recipe = Recipe(label_smoothing=0, distillation=0.25, temperature=2.0)
    p, q = 1 / (1 + math.exp(2)), 1 / (1 + math.exp(-1))  # first class, at temperature 2: teacher, student
    gap = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    expected = 0.75 * math.log(1 + math.exp(-2)) + 0.25 * 4 * gap
    assert abs(loss_of(student, torch.tensor([0]), recipe, teacher).item() - expected) < 1e-6
    same = loss_of(student, torch.tensor([0]), replace(recipe, distillation=1.0), student)
    assert abs(same.item()) < 1e-6


def test_mixed_targets_are_the_mixture_of_two_losses():
    logits = torch.randn(1, 4)
    mixed = loss_of(logits, torch.tensor([[0.3, 0.0, 0.7, 0.0]]), Recipe(label_smoothing=0))
    parts = [loss_of(logits, torch.tensor([c]), Recipe(label_smoothing=0)) for c in (0, 2)]
    assert torch.allclose(mixed, 0.3 * parts[0] + 0.7 * parts[1])


def test_evaluate_counts(few):
    class Always(nn.Module):
        def forward(self, images):
            return nn.functional.one_hot(torch.full((len(images),), 3), 10).float()

    labels = few.split("test").labels
    assert evaluate(Always(), few, "test") == (labels == 3).sum().item() / len(labels)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")
def test_compiled_is_the_same_training(few):
    plain, compiled = network(dropout=0.0), network(dropout=0.0)
    expected = train(plain, few, ONCE)
    found = train(compiled, few, ONCE, compiled=True)
    assert found[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-4)
    for one, other in zip(plain.state_dict().values(), compiled.state_dict().values(), strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1e-3)
