"""`netsmith train --model`: from names to a judged file, alone and by several processes, one of which is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import netsmith
from netsmith.cli import main
from netsmith.errors import UserError
from netsmith.options import TrainingOptions
from netsmith.run import load_yaml
from netsmith.tasks import open_task
from netsmith.train.loop import evaluate
from netsmith.training import _open, make_recipe, train_network


class Silent:
    def stage(self, name: str) -> None: ...
    def progress(self, name: str, done: int, total: int, note: str = "") -> None: ...
    def line(self, text: str) -> None: ...


SMALL = {"model": "amoebanet_a", "model_options": {"cells": 3, "width": 16, "dropout": 0.0}}


def options(folder: Path, **changes) -> TrainingOptions:
    asked = {"epochs": 1, "out": folder, "recipe": "efficientnet_rmsprop_4096", "batch_size": 256, **SMALL, **changes}
    return TrainingOptions(**asked)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict:
    """The result of a training that has ended, with its folder."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = train_network(options(folder), Silent())
    assert result is not None
    return result


def test_a_training_from_names_to_a_judged_file(finished):
    folder = Path(finished["run"])
    assert finished["model"] == "amoebanet_a"
    assert finished["replicas"] == 1
    assert finished["cost"]["latency_ms"]["median"] > 0
    assert finished["metric"]["test"] == pytest.approx(finished["metric"]["test_exported"], abs=0.01)
    assert len(finished["history"]) == 1
    stored = json.loads((folder / "result.json").read_text())
    assert stored == {key: value for key, value in finished.items() if key != "run"}
    assert evaluate(netsmith.load(folder), open_task("digits"), "test") == finished["metric"]["test"]
    assert (folder / "model.onnx").stat().st_size == finished["cost"]["file_bytes"]
    # Once more: nothing is left to do. Another problem does not go into the same folder.
    assert train_network(options(folder), Silent()) == finished
    with pytest.raises(UserError, match="is the run of another problem"):
        train_network(options(folder, seed=1), Silent())


def test_the_recipe_is_scaled_to_what_there_is():
    task = open_task("digits")
    published = make_recipe(options(Path(), batch_size=None, recipe="efficientnet_lars_65536"), task, "cpu", 1154)
    assert published.batch_size == 32  # 1,154 images: 36 steps an epoch
    assert published.peak == pytest.approx(0.081 * 32 / 256)
    assert published.warmup_epochs == pytest.approx(43 / 350)
    half = make_recipe(options(Path(), recipe="graphcore_b0_half_resolution"), task, "cuda", 1154)
    assert half.resolutions == (6,)
    assert half.precision == "bf16"
    own = make_recipe(options(Path(), recipe_options={"learning_rate": 0.5}, accumulate=4), task, "cpu", 1154)
    assert (own.learning_rate, own.accumulate, own.precision) == (0.5, 4, "fp32")
    plain = make_recipe(options(Path(), recipe=None, batch_size=None, epochs=None), task, "cpu", 1154)
    assert plain == replace(type(plain).default(task))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "neither a RUN nor a --model was given"),
        (["--model", "efficentnet_b0"], "unknown network 'efficentnet_b0'; did you mean 'efficientnet_b0'"),
        (["--model", "resnet50", "--recipe", "lars"], "unknown recipe 'lars'"),
        (["--model", "resnet50", "--batch-size", "0"], "batch_size is 0; allowed: 1 or more"),
        (["--model", "resnet50", "--save-every", "0"], "save_every is 0; allowed: 1 or more"),
        (["--model", "resnet50", "--seed", "-1"], "seed is -1; allowed: 0 to"),
        (["--model", "resnet50", "--task", "digitz"], "unknown task 'digitz'; did you mean 'digits'"),
        (["somewhere", "--model", "resnet50"], "a RUN takes --epochs alone"),
    ],
)
def test_bad_options_are_one_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_stopped_training_is_gone_on_with_by_the_same_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = replace(options(Path()), out=None, epochs=2)
    events = []

    class Impatient(Silent):
        def progress(self, name: str, done: int, total: int, note: str = "") -> None:
            events.append((name, done))
            if len(events) == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_network(asked, Impatient())
    result = train_network(asked, Impatient())
    assert result is not None
    assert result["run"] == "runs/digits-amoebanet_a-1"
    undisturbed = train_network(replace(asked, out=tmp_path / "other"), Silent())
    assert undisturbed is not None
    weights = [(tmp_path / place / "weights.safetensors").read_bytes() for place in (result["run"], "other")]
    assert weights[0] == weights[1]


def test_without_a_folder_a_finished_run_is_left_alone(tmp_path, monkeypatch, finished):
    monkeypatch.chdir(tmp_path)
    asked = load_yaml((Path(finished["run"]) / "problem.yaml").read_text())
    shutil.copytree(finished["run"], "runs/digits-amoebanet_a-1")
    with _open(options(Path(), out=None), {key: value for key, value in asked.items() if key != "format"}) as run:
        assert run.path == Path("runs/digits-amoebanet_a-2")
    Path("runs/digits-amoebanet_a-1/result.json").unlink()
    with _open(options(Path(), out=None), {key: value for key, value in asked.items() if key != "format"}) as run:
        assert run.path == Path("runs/digits-amoebanet_a-1")


def test_other_verbs_and_a_training(capsys, finished):
    run = finished["run"]
    assert main(["ship", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"]
    assert main(["report", run]) == 0
    page = Path(capsys.readouterr().out.strip()).read_text()
    for part in (f"{100 * finished['metric']['test_exported']:.2f} %", finished["trained_on"], torch.__version__):
        assert part in page
    for verb in (["search", "--resume", run], ["train", run]):
        assert main(verb) == 2
        assert "is a training" in capsys.readouterr().err


def torchrun(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", "--monitor-interval", "0.2", "-m", "netsmith", "train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    )


def replicas_of(process: subprocess.Popen) -> dict[int, int]:
    """Rank -> process id."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(place.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            variables = place.joinpath("environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if parent == process.pid:
            found |= {int(v[5:]): int(place.name) for v in variables if v.startswith(b"RANK=")}
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_one_of_two_replicas_is_killed_and_the_training_goes_on(tmp_path):
    """torchrun stops the other, starts both anew, and they go on from the last checkpoint (where to: test_replicas)."""
    config = tmp_path / "ask.yaml"
    epochs = 2
    asked = options(Path("run"), epochs=epochs, save_every=1, out=None)
    names = ("model", "model_options", "recipe", "batch_size", "epochs", "save_every")
    config.write_text(yaml.safe_dump({name: getattr(asked, name) for name in names}))
    process = torchrun(tmp_path, "--config", str(config), "--out", "run", "--json")
    deadline, checkpoint = time.monotonic() + 120, tmp_path / "run" / "checkpoints" / "train.pt"
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(replicas_of(process)[1], signal.SIGKILL)
    out, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    result = json.loads(out.splitlines()[-1])  # before it, perhaps, that a connection was lost
    assert "bug" not in out + said
    assert result["replicas"] == 2
    assert [epoch["epoch"] for epoch in result["history"]] == list(range(1, epochs + 1))
    assert said.count("amoebanet_a on digits, 2 epochs") == 2  # it was started twice


@pytest.mark.slow
def test_only_the_first_replica_says_what_is_wrong(tmp_path):
    process = torchrun(tmp_path, "--model", "resnet50", "--task", "folder:nowhere")
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert said.count("netsmith: folder:") == 3  # at the start and after each of two restarts
