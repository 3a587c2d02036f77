"""The command line as a user meets it: help, answers, bad input, interruptions, and one real run through every verb."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import netsmith
import netsmith.job
import netsmith.pipeline
import netsmith.profiling
from netsmith.cli import VERBS, main
from netsmith.cost.latency import calibrate
from netsmith.errors import PromiseBroken, UserError
from netsmith.listing import method_table
from netsmith.methods import METHODS
from netsmith.options import read_config
from netsmith.prepare import check
from netsmith.run import Run, load_yaml, read_events

HEAVY = ["torch", "torchvision", "timm", "scipy", "optuna"]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["netsmith"])


# Help -----------------------------------------------------------------------------------------------------------------


def test_help_loads_the_standard_library_alone():  # which is what keeps it under 0.1 s
    code = (
        "import sys; before = set(sys.modules); from netsmith.cli import main; main(['--help']);"
        "print({m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    ran = run_python(code)
    assert ran.stdout.endswith("{'netsmith'}\n"), ran
    assert all(f"  {verb} " in ran.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb, capsys):
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: netsmith {verb}" in text
    assert "--json" in text
    assert "None" not in text


def test_verbs_and_lists_load_nothing_heavy():
    code = (
        "import sys; from netsmith.cli import main; main(['search', '--help']); main(['list', 'methods']); "
        f"main(['search', '--task', 'digts']); print([m for m in {HEAVY} if m in sys.modules])"
    )
    ran = run_python(code)
    assert ran.stdout.endswith("[]\n"), ran.stderr


@pytest.mark.parametrize("what", ["spaces", "methods", "devices", "tasks", "costs"])
def test_lists(what, capsys):
    assert main(["list", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["list", what, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[what]
    assert [line.split()[0] for line in lines] == list(found)
    assert all(found.values())
    assert what != "methods" or list(found) == list(METHODS)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("serch", "unknown verb 'serch'; did you mean 'search'?"),
        ("search --bugdet x", "did you mean '--budget'?"),
        ("search --epochs x", "--epochs: 'x' is no INT"),
        ("search --epochs", "Missing value for argument '--epochs'"),
        ("search digits", "cannot place 'digits'"),
        ("search --task digts", "did you mean 'digits'?"),
        ("search --method prunt", "did you mean 'prunet'?"),
        ("search --space prunet_smll", "did you mean 'prunet_small'?"),
        ("search --device ort-cpu:thread=2", "did you mean 'threads'?"),
        ("search --budget latency<5ms", "only <= can be asked for"),
        ("search --budget latency<=5m", "takes no unit 'm'"),
        ("search --budget latncy<=5ms", "did you mean 'latency'?"),
        ("search --budget params<=1M --budget params<=2M", "params is given more than once"),
        ("search --table no.csv", "no.csv does not exist"),
        ("search --config no.yaml", "no.yaml cannot be read"),
        ("search --resume nowhere", "nowhere is no run of netsmith"),
        ("search --resume nowhere --seed 3", "--resume takes no other options"),
        ("search --task folder:nowhere", "there is no such folder"),
        ("search --task cifar100 --data nowhere", "the data folder nowhere does not exist"),
        ("search --seed 99999999999", "seed is 99999999999; allowed: 0 to 4294967295"),
        ("search --config around.yaml", "around.yaml: a mapping holds itself"),
        ("train nowhere", "nowhere is no run of netsmith"),
        ("train", "neither a RUN nor a --model"),
        ("ship nowhere", "nowhere is no run of netsmith"),
        ("measure nowhere", "nowhere does not exist"),
        ("measure .", "holds no model.onnx"),
        ("profile --space fbnt", "did you mean 'fbnet'?"),
        ("profile --space fbnet --resolution 8", "needs 64 px"),
        ("report", "no run folder was given"),
        ("report nowhere", "does not exist"),
        ("list space", "spaces"),
    ],
)
def test_bad_input_is_one_sentence(line, said, capsys, tmp_path):
    Path("around.yaml").write_text("recipe: &a {x: *a}\n")
    assert main(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("netsmith: ")
    assert printed.err.count("\n") == 1
    assert said in printed.err
    assert printed.out == ""
    assert not (tmp_path / "runs").exists()


def test_bad_files(tmp_path, capsys):
    (tmp_path / "bad.onnx").write_text("no protobuf")
    assert main(["measure", "bad.onnx"]) == 2
    assert "bad.onnx cannot be loaded by ONNX Runtime" in capsys.readouterr().err
    (tmp_path / "table.csv").write_text("key,ms\nReLU() @ 3x8x8,1.0\n")
    assert main(["profile", "--task", "digits", "--table", "table.csv"]) == 2
    assert "in the table table" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "one" / "cat").mkdir(parents=True)
    (tmp_path / "one" / "cat" / "a.png").write_text("no image")
    assert main(["search", "--task", "folder:one"]) == 2
    assert "single class" in capsys.readouterr().err
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "problem.yaml").write_text("format: 0\ntask: digits\n")
    assert main(["search", "--resume", "old"]) == 2
    assert "format 0; this netsmith reads format 1" in capsys.readouterr().err


def test_an_error_is_an_object_with_json(capsys):
    assert main(["search", "--method", "prunt", "--json"]) == 2
    assert "did you mean 'prunet'" in json.loads(capsys.readouterr().out)["error"]


def test_as_a_program():
    ran = subprocess.run([sys.executable, "-m", "netsmith", "serch"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("netsmith: unknown verb")


# A search, its pipeline replaced --------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(monkeypatch):
    """Replaces the job of a search by a function of the run and where progress goes."""

    def replace(job):
        monkeypatch.setattr(netsmith.pipeline, "search", job)

    return replace


def raising(error):
    def job(run, say):
        raise error

    return job


RESULT = {
    "method": "prunet",
    "task": "digits",
    "kept": True,
    "verdict": "kept: 1 ms",
    "metric": {"name": "accuracy", "test": 0.9, "test_exported": 0.9},
    "budgets": [{"metric": "latency", "limit": 1.0, "unit": "ms", "measured": 0.9, "kept": True}],
    "cost": {"params": 1e6, "macs": 1e6, "latency_ms": {"median": 0.9, "ci95": [0.89, 0.91]}},
    "reference": {"metric": {"test": 0.95}, "cost": {"params": 2e6, "latency_ms": {"median": 2.0}}},
}


def answering(result):
    def job(run, say):
        say.stage("work")
        say.progress("epochs", 1, 2, "loss 0.5")
        run.write_json("result.json", result)
        return result

    return job


def test_a_search_ends_with_table_verdict_and_report(pipeline, capsys):
    pipeline(answering(RESULT))
    assert main(["search"]) == 0
    printed = capsys.readouterr()
    assert "reference" in printed.out
    assert "found" in printed.out
    assert "kept: 1 ms" in printed.out
    assert printed.out.splitlines()[-1] == "report: runs/digits-prunet-1/report.html"
    assert Path("runs/digits-prunet-1/report.html").is_file()
    assert "runs/digits-prunet-1: prunet for digits" in printed.err
    assert "work" in printed.err


def test_json_is_one_object_and_nothing_else(pipeline, capsys):
    pipeline(answering(RESULT))
    assert main(["search", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["metric"] == RESULT["metric"]
    assert answer["run"] == "runs/digits-prunet-1"


def test_a_broken_promise_exits_with_3(pipeline, capsys):
    pipeline(answering(RESULT | {"kept": False, "verdict": "broken: 2 ms against a limit of 1 ms"}))
    assert main(["search"]) == 3
    printed = capsys.readouterr()
    assert "BROKEN" in printed.out
    assert printed.err.endswith("netsmith: broken: 2 ms against a limit of 1 ms\n")
    assert main(["search", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["kept"] is False


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PromiseBroken("no exported network kept its budget"), 3, "no exported network kept its budget"),
        (UserError("no such thing"), 2, "no such thing"),
        (KeyboardInterrupt(), 130, "continue with: netsmith search --resume"),
        (RuntimeError("oops"), 1, "unexpected RuntimeError: oops"),
    ],
)
def test_json_is_one_object_whatever_happens(error, code, said, pipeline, capsys):
    pipeline(raising(error))
    assert main(["search", "--json"]) == code
    assert said in json.loads(capsys.readouterr().out)["error"]


def test_what_libraries_print_does_not_mix_with_the_answer():
    program = f"""
import os, netsmith.pipeline, netsmith.cli
def job(run, say):
    os.write(1, b"noise of a solver")
    print("and of Python, which is written late")
    run.write_json("result.json", {RESULT!r})
    return {RESULT!r}
netsmith.pipeline.search = job
raise SystemExit(netsmith.cli.main(["search", "--json"]))
"""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=buffered)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["kept"]


def test_a_config_may_be_a_pipe(pipeline):
    pipeline(answering(RESULT))
    reading, writing = os.pipe()
    os.write(writing, b"budget: [params<=5]\nmethod: random\n")
    os.close(writing)
    assert main(["search", "--config", f"/dev/fd/{reading}", "--out", "here"]) == 0
    os.close(reading)
    with Run.open("here") as run:
        assert run.problem["budget"] == ["params<=5"]


def test_ctrl_c_says_how_to_continue(pipeline, capsys):
    pipeline(raising(KeyboardInterrupt()))
    assert main(["search"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "netsmith: stopped; continue with: netsmith search --resume runs/digits-prunet-1"
    pipeline(answering(RESULT))
    assert main(["search", "--resume", "runs/digits-prunet-1"]) == 0


def test_the_command_to_continue_can_be_pasted(pipeline, capsys):
    pipeline(raising(KeyboardInterrupt()))
    assert main(["search", "--out", "my run"]) == 130
    assert capsys.readouterr().err.endswith("netsmith search --resume 'my run'\n")


def test_an_error_within_a_run(pipeline, capsys):
    pipeline(raising(UserError("training broke down: the loss became nan")))
    assert main(["search"]) == 2
    assert capsys.readouterr().err.endswith("netsmith: training broke down: the loss became nan\n")


def test_a_bug_is_one_line_and_its_traceback_a_file(pipeline, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("NETSMITH_CACHE", str(tmp_path / "cache"))
    pipeline(raising(RuntimeError("first line\nsecond line")))
    assert main(["search"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("netsmith: unexpected RuntimeError: first line (this is a bug; the traceback is in ")
    (file,) = (tmp_path / "cache" / "errors").iterdir()
    assert "Traceback" in file.read_text()
    assert "--resume runs/digits-prunet-1" in file.read_text()


def test_flags_override_the_file(pipeline, capsys):
    Path("asked.yaml").write_text("budget: [latency<=0.3x]\nmethod: fbnet\nseed: 5\nmethod_options: {temperature: 2}\n")
    pipeline(answering(RESULT))
    assert main(["search", "--config", "asked.yaml", "--seed", "6", "--out", "here", "--baselines"]) == 0
    with Run.open("here") as run:
        assert run.problem["seed"] == 6
        assert run.problem["method"] == "fbnet"
        assert run.problem["budget"] == ["latency<=0.3x"]
        assert run.problem["baselines"] == []
        assert run.problem["method_options"] == {"temperature": 2}
    budgets = ["--budget", "params<=1M", "--budget=latency<=0.2x,0.4x"]
    assert main(["search", "--config=asked.yaml", "--out", "there", *budgets]) == 0
    with Run.open("there") as run:
        assert run.problem["budget"] == ["params<=1M", "latency<=0.2x,0.4x"]


# A real run through every verb ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """The smallest real search: two layers a stage, one epoch, a random network."""
    folder = tmp_path_factory.mktemp("real")
    asked = {"method": "random", "baselines": [], "epochs": 1, "space_options": {"depth": 1, "expansion": 1}}
    (folder / "asked.yaml").write_text(yaml.safe_dump(asked))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETSMITH_CACHE", str(folder / "cache"))
        for user in (netsmith.job, netsmith.profiling):  # less time than a search takes to calibrate
            patch.setattr(user, "calibrate", lambda *args, **_: calibrate(*args, seconds=1.0))
        assert main(["search", "--config", str(folder / "asked.yaml"), "--out", str(folder / "run"), "--json"]) in (
            0,
            3,
        )
        yield folder / "run"


def test_the_result_says_all_that_it_should(real_run):
    result = json.loads((real_run / "result.json").read_text())
    for key in ("method", "space", "task", "seed", "parity_max_abs_diff"):
        assert result[key] is not None
    assert set(result["metric"]) == {"name", "test", "test_exported"}
    assert set(result["budgets"][0]) == {"metric", "limit", "unit", "measured", "kept"}
    assert {"params", "macs", "peak_memory_bytes", "file_bytes", "latency_ms"} <= set(result["cost"])
    assert {"predicted", "median", "ci95"} <= set(result["cost"]["latency_ms"])
    assert set(result["reference"]) == {"metric", "cost"}
    assert {"profile", "search", "train", "ship"} <= set(result["seconds"])
    assert (real_run / "report.html").is_file()
    assert netsmith.load(real_run).training is False


def test_resuming_a_finished_run_gives_the_same_answer(real_run, capsys):
    before = json.loads((real_run / "result.json").read_text())
    assert main(["search", "--resume", str(real_run), "--json"]) in (0, 3)
    assert json.loads(capsys.readouterr().out).items() >= before.items()


def test_measure_a_run_and_a_file(real_run, capsys):
    for target in (real_run, real_run / "model.onnx"):
        assert main(["measure", str(target), "--seconds", "0.5", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        (network,) = answer["networks"]
        assert network["ci95"][0] <= network["latency_ms"] <= network["ci95"][1]
        assert network["iterations"] > 0
        assert answer["versions"]["onnxruntime"]
        assert "ort-cpu" in answer["fingerprint"]
    assert main(["measure", str(real_run), "--seconds", "0.5"]) == 0
    assert "ms (95 % interval" in capsys.readouterr().out


def test_measure_says_what_was_timed(real_run, capsys):
    for device, name in (("ort-cpu", "model.onnx"), ("torch-cpu", "weights.safetensors")):
        assert main(["measure", str(real_run), "--device", device, "--seconds", "0.5"]) == 0
        assert capsys.readouterr().out.startswith(f"{real_run / name}: ")


def test_ship_again(real_run, capsys):
    code = main(["ship", str(real_run), "--json"])
    assert code == (0 if json.loads(capsys.readouterr().out)["kept"] else 3)


def test_ship_in_the_folder_itself(real_run, capsys, monkeypatch):
    monkeypatch.chdir(real_run)
    code = main(["ship", ".", "--json"])
    assert code == (0 if json.loads(capsys.readouterr().out)["kept"] else 3)


def test_training_again_without_its_data_loses_nothing(real_run, capsys, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(real_run, folder)
    problem = (folder / "problem.yaml").read_text()
    (folder / "problem.yaml").write_text(problem.replace("task: digits", "task: folder:/no/such"))
    before = sorted(folder.rglob("*"))
    assert main(["train", str(folder)]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("seconds", ["0", "-3", "nan", "inf"])
def test_measuring_takes_time(seconds, real_run, capsys):
    assert main(["measure", str(real_run), "--seconds", seconds]) == 2
    assert "allowed: more than 0" in capsys.readouterr().err


@pytest.mark.slow
def test_train_again_gives_the_same_network(real_run, capsys):
    before = (real_run / "weights.safetensors").read_bytes()
    (real_run / "weights.safetensors").unlink()
    assert main(["train", str(real_run), "--json"]) in (0, 3)
    capsys.readouterr()
    assert (real_run / "weights.safetensors").read_bytes() == before


def test_train_longer(real_run, capsys, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(real_run, folder)
    assert main(["train", str(folder), "--epochs", "0"]) == 2
    assert "epochs is 0; allowed: 1 or more" in capsys.readouterr().err
    assert main(["train", str(folder), "--epochs", "2", "--json"]) in (0, 3)
    result = json.loads(capsys.readouterr().out)
    assert result["architecture"] == json.loads((real_run / "result.json").read_text())["architecture"]
    assert load_yaml((folder / "problem.yaml").read_text())["recipe"]["epochs"] == 2
    trained = [event["epoch"] for event in read_events(folder) if event["kind"] == "train_epoch"]
    assert trained[-2:] == [1, 2]


def test_profile(real_run, capsys):
    line = ["profile", "--space", "fbnet_small", "--task", "digits", "--networks", "4"]
    assert main([*line, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["new_entries"] > 0
    assert answer["error"]["networks"] == 4
    assert answer["range_ms"][0] < answer["range_ms"][1]
    assert main([*line[:-1], "0"]) == 0  # the table remembers
    assert "measured now" not in capsys.readouterr().out
    assert main([*line[:-1], "0", "--again", "--json"]) == 0
    anew = json.loads(capsys.readouterr().out)
    assert anew["new_entries"] >= answer["new_entries"]
    assert anew["entries"] == answer["entries"]


def test_profile_with_one_network_or_none_to_test_on(real_run, capsys):
    line = ["profile", "--space", "fbnet_small", "--task", "digits", "--networks"]
    assert main([*line, "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["error"]["kendall_tau"] is None
    assert main([*line, "-5"]) == 2
    assert "networks is -5; allowed: 0 or more" in capsys.readouterr().err
    assert main(["profile", "--channels", "0"]) == 2
    assert "channels is 0; allowed: 1 or more" in capsys.readouterr().err


def test_a_table_that_is_far_off_says_so(real_run, capsys, monkeypatch):
    off = {"networks": 1, "mean_percent": 36.0, "largest_percent": 36.0, "kendall_tau": 1.0}
    monkeypatch.setattr(netsmith.profiling, "table_error", lambda predicted, measured: off)
    line = ["profile", "--space", "fbnet_small", "--task", "digits", "--networks", "1"]
    assert main(line) == 0
    assert "--again measures every layer anew" in capsys.readouterr().out


def test_a_budget_that_cannot_be_kept(real_run, capsys):
    asked = ["--config", str(real_run.parent / "asked.yaml"), "--budget", "latency<=1us", "--out", "small"]
    assert main(["search", *asked]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    nearest = re.search(r"the smallest network needs .*; the nearest that can be kept: (latency<=\S+s)$", last)
    assert nearest, last
    assert not Path("small").exists()  # nothing was searched that could be gone on with
    assert main(["search", *asked[:2], "--budget", "latency<=0.01x", "--out", "relative"]) == 2
    assert re.search(r"nearest that can be kept: latency<=0\.\d+x$", capsys.readouterr().err.splitlines()[-1])


# The README -----------------------------------------------------------------------------------------------------------

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_lists_the_methods():
    assert method_table() in README.read_text(), f"paste this into README.md:\n{method_table()}"


def test_the_readme_names_what_exists():
    text = README.read_text()
    for line in re.findall(r"^    (netsmith .*?)(?: +#.*)?$", text, re.M):
        verb = line.split()[1]
        assert verb in VERBS, line
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (README.parent / link).exists(), link
    for block in re.findall(r"```yaml\n(.*?)```", text, re.S):
        Path("asked.yaml").write_text(block)
        check(read_config(Path("asked.yaml")))
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(block, "README.md", "exec")
        for imported in re.findall(r"^(?:from|import) .*$", block, re.M):
            exec(imported)
