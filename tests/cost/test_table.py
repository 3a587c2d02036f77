import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from netsmith.blocks.mobile import MBConv
from netsmith.cost.device import OrtCpu
from netsmith.cost.imported import import_table
from netsmith.cost.latency import profile_space
from netsmith.cost.prices import atoms
from netsmith.cost.table import Calibration, Entry, LatencyTable, MissingEntry, TableDevice, entry_key
from netsmith.errors import UserError
from netsmith.spaces import open_space

DATA = Path(os.environ.get("NETSMITH_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
with_data = pytest.mark.skipif(not (DATA / "nas").is_dir(), reason="the published tables are not here")


def entry(ms: float) -> Entry:
    return Entry(ms, 0.01, 20, time.time(), {"onnxruntime": "1"})


def test_round_trip_newest_counts_and_devices_are_apart(tmp_path: Path):
    table = LatencyTable(tmp_path / "t.sqlite")
    table.put("cpu", {"a": entry(1.0), "b": entry(2.0)})
    table.put("cpu", {"a": entry(1.5)})
    again = LatencyTable(tmp_path / "t.sqlite")
    assert again.get("cpu", ["a", "b"]) == {"a": 1.5, "b": 2.0}
    assert again.entries("cpu")["a"].versions == {"onnxruntime": "1"}
    assert again.missing("gpu", ["a", "b", "a"]) == ["a", "b"]


def test_missing_entry_is_an_error_that_names_it(tmp_path: Path):
    table = LatencyTable(tmp_path / "t.sqlite")
    for kind in (UserError, KeyError, MissingEntry):
        with pytest.raises(kind) as caught:
            table.get("cpu", ["MBConv(8, 8, kernel=3, hidden=24) @ 8x16x16"])
        assert str(caught.value).startswith("no latency of MBConv(8, 8, kernel=3, hidden=24) @ 8x16x16 on cpu")


def writer(path: Path, code: str) -> subprocess.Popen[bytes]:
    head = "import pathlib\nfrom netsmith.cost.table import LatencyTable, Entry\n"
    script = head + f"table = LatencyTable(pathlib.Path({str(path)!r}))\n" + code
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)


def test_several_processes_open_and_write_at_once(tmp_path: Path):
    """Each opens new files at the same moment as the others: creating a table waits as writing to it does."""
    code = (
        "import pathlib, sys, time\n"
        "from netsmith.cost.table import LatencyTable, Entry\n"
        "number, start, folder = int(sys.argv[1]), float(sys.argv[2]), pathlib.Path(sys.argv[3])\n"
        "for file in range(20):\n"
        "    time.sleep(max(0, start + file / 10 - time.time()))\n"
        "    for i in range(5):\n"
        "        entry = Entry(i / 100, 0, 1, 0, {})\n"
        "        LatencyTable(folder / f'{file}.sqlite').put('cpu', {f'{number}/{i}': entry})\n"
    )
    start = str(time.time() + 4)
    writers = [subprocess.Popen([sys.executable, "-c", code, str(n), start, str(tmp_path)]) for n in range(3)]
    assert [process.wait() for process in writers] == [0, 0, 0]
    assert [len(LatencyTable(tmp_path / f"{file}.sqlite").entries("cpu")) for file in range(20)] == [15] * 20


def test_a_killed_writer_leaves_whole_groups(tmp_path: Path):
    path = tmp_path / "t.sqlite"
    code = (
        "for group in range(10**6):\n"
        "    table.put('cpu', {f'{group}/{i}': Entry(1.0, 0, 1, 0, {}) for i in range(10)})\n"
        "    print(group, flush=True)\n"
    )
    process = writer(path, code)
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    entries = LatencyTable(path).entries("cpu")
    assert len(entries) >= 50
    assert len(entries) % 10 == 0
    LatencyTable(path).put("cpu", {"after": entry(1.0)})


def test_profile_measures_what_is_missing_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NETSMITH_CACHE", str(tmp_path))
    table, device = LatencyTable(), OrtCpu()
    assert table.path == tmp_path / "latency.sqlite"
    blocks = {h: MBConv(8, 8, hidden=h) for h in (8, 64, 256)}
    items = {entry_key(b, (8, 24, 24)): (lambda b=b: b, (8, 24, 24)) for b in blocks.values()}
    seen = []
    spent = table.profile(device, items, lambda done, todo: seen.append((done, todo)), group=2)
    assert seen == [(2, 3), (3, 3)]
    assert spent > 0
    times = list(table.get(device.fingerprint(), items).values())
    assert times[0] < times[1] < times[2]
    assert table.profile(device, items, lambda done, todo: seen.append((done, todo))) == 0.0
    assert len(seen) == 2
    table.put(device.fingerprint(), dict.fromkeys(items, entry(1e6)))  # as if from a machine in trouble
    assert table.profile(device, items, again=True) > 0
    assert max(table.get(device.fingerprint(), items).values()) < 1e3


def test_profile_names_the_layer_it_cannot_measure(tmp_path: Path):
    device = TableDevice("phone", {})
    with pytest.raises(UserError, match=r"cannot measure x: phone is a table .* can predict"):
        LatencyTable(tmp_path / "t.sqlite").profile(device, {"x": (nn.Identity, (3, 4, 4))})


def test_calibration_recovers_a_planted_law():
    law = (0.05, 1.1, -0.004, 2e-7)
    rng = np.random.default_rng(0)
    networks = np.stack([rng.uniform(0.1, 3, 15), rng.integers(4, 20, 15), rng.uniform(1e4, 2e6, 15)], 1)
    measured = law[0] + networks @ np.array(law[1:])
    fitted = Calibration.fit(networks.tolist(), measured.tolist())
    assert (fitted.constant, fitted.scale, fitted.per_layer) == pytest.approx(law[:3], abs=1e-6)
    assert fitted.per_weight == pytest.approx(law[3], abs=1e-12)
    assert fitted.errors()["largest"] < 1e-6
    assert fitted.predict([2.0, 10, 1e6]) == pytest.approx(law[0] + 2 * law[1] + 10 * law[2] + 1e6 * law[3])


def test_calibration_with_few_networks():
    assert Calibration.fit([], []) == Calibration()
    assert Calibration().predict([3.0, 7, 1e5]) == 3.0
    one = Calibration.fit([[2.0, 5, 1e4]], [1.5])
    assert (one.constant, one.per_layer, one.per_weight) == (0, 0, 0)
    assert one.predict([4.0, 9, 1e4]) == pytest.approx(3.0)
    alike = Calibration.fit([[2.0, 5, 1e4]] * 9, [1.5] * 8 + [1.6])  # of networks alike there is one to learn from
    assert (alike.constant, alike.per_layer, alike.per_weight) == (0, 0, 0)
    assert alike.scale == pytest.approx(0.755, rel=1e-2)
    four = Calibration.fit([[1, 9, 5], [2, 3, 8], [3, 5, 2], [4, 7, 6]], [1.5, 2.5, 3.5, 4.5])
    assert (four.constant, four.scale, four.per_layer) == pytest.approx((0.5, 1.0, 0.0))
    noisy = Calibration.fit([[1, 1, 1], [2, 1, 1]], [1.0, 3.0])
    assert noisy.scale == pytest.approx((1 + 2 / 3) / (1 + 4 / 9))  # least squares of the relative error
    with pytest.raises(ValueError, match="positive"):
        Calibration.fit([[1.0, 1, 1]], [0.0])
    with pytest.raises(ValueError, match="2 networks and 1 measured"):
        Calibration.fit([[1.0, 1, 1], [2.0, 1, 1]], [1.0])


MEASURED = """
0.057 9 1.2e5 0.0289, 0.567 10 1.51e7 0.8706, 0.21 10 4.65e6 0.1954, 0.12 10 3.83e6 0.0932, 0.109 10 9.2e5 0.0814,
0.158 10 1.74e6 0.1405, 0.134 10 9.0e5 0.1089, 0.19 10 7.52e6 0.1728, 0.141 10 2.02e6 0.1173, 0.125 10 4.9e5 0.0979,
0.152 10 1.39e6 0.1347, 0.159 10 1.03e6 0.1394, 0.134 10 4.9e5 0.1018, 0.181 10 9.8e5 0.153, 0.296 10 2.4e6 0.398
"""
"""Sum of entries, layers, weights and milliseconds of networks that LANA's full pool makes of a ResNet-10t at 8 px."""


def test_no_layer_saves_more_than_the_shortest_takes():
    """Where all networks but one have as many layers, that one says what a layer saves, and a constant pays for it."""
    *parts, measured = np.array([row.split() for row in MEASURED.split(",")], float).T
    networks = np.stack(parts, 1)
    loose = Calibration.fit(networks.tolist(), measured.tolist())
    assert loose.constant > 0.1  # of a network that takes 0.03
    assert loose.predict([0.0042, 1, 0]) < loose.constant - 0.01  # a layer that takes less than none
    fitted = Calibration.fit(networks.tolist(), measured.tolist(), 0.0042)
    assert fitted.constant < 0.01
    assert fitted.predict([0.0042, 1, 0]) == pytest.approx(fitted.constant)
    assert [fitted.predict(n) / m - 1 for n, m in zip(networks, measured, strict=True)] == pytest.approx(
        list(fitted.residuals)
    )
    assert abs(fitted.residuals[0]) < 0.1
    networks[::2, 1] += 3
    law = 0.05 + networks @ np.array([1.1, -0.003, 2e-8])
    within = Calibration.fit(networks.tolist(), law.tolist(), 0.0042)  # a layer that saves less is found all the same
    assert (within.constant, within.scale, within.per_layer) == pytest.approx((0.05, 1.1, -0.003), abs=1e-6)
    few = Calibration.fit([[2.0, 5, 1e4]], [1.5], 0.1)
    assert (few.scale, few.per_layer) == (0.75, 0.0)


def test_own_tables_are_imported(tmp_path: Path):
    file = tmp_path / "board.csv"
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([["key", "ms"], ["MBConv(8, 8, kernel=3, hidden=24) @ 8x16x16", 0.25]])
    device = import_table(file)
    assert device.name == "board"
    assert device.get(["MBConv(8, 8, kernel=3, hidden=24) @ 8x16x16"]) == {
        "MBConv(8, 8, kernel=3, hidden=24) @ 8x16x16": 0.25
    }
    with pytest.raises(MissingEntry, match="no latency of other in the table board"):
        device.get(["other"])
    (tmp_path / "board.json").write_text(json.dumps({"a": 1.0}))
    assert import_table(tmp_path / "board.json").get(["a"]) == {"a": 1.0}
    for name, text in {"x.csv": "a,b\n1,2\n", "x.json": "[1, 2]", "y.json": "{", "z.json": '{"a": "fast"}'}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="no latency table of a known format"):
            import_table(tmp_path / name)
    with pytest.raises(UserError, match="cannot read"):
        import_table(tmp_path / "absent.csv")
    whole = gzip.compress(b'{"a": 1.0}' * 100)
    (tmp_path / "torn.json.gz").write_bytes(whole[:12] + bytes([255 - whole[12]]) + whole[13:])
    with pytest.raises(UserError, match="cannot read"):
        import_table(tmp_path / "torn.json.gz")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="no latency table of a known format"):
        import_table(tmp_path / "deep.json")
    (tmp_path / "parts.json").write_text('{"cpu": {"base": -5}}')
    with pytest.raises(UserError, match=r"gives -5\.0 ms for what all networks have"):
        import_table(tmp_path / "parts.json", "cpu")


def test_a_cache_that_cannot_be_used_is_named(tmp_path: Path):
    (tmp_path / "latency.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match=r"latency\.sqlite cannot be used: file is not a database; delete it"):
        LatencyTable(tmp_path / "latency.sqlite")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be used: .*NETSMITH_CACHE"):
        LatencyTable(tmp_path / "file" / "latency.sqlite")


@with_data
def test_tf_nas_table_has_the_keys_our_blocks_print():
    device = import_table(DATA / "nas" / "lut_tfnas.json.gz", "cpu")
    assert device.constant_ms == pytest.approx(9.356, abs=1e-3)
    blocks = {
        entry_key(MBConv(16, 24, hidden=128, stride=2), (16, 112, 112)): 12.0286,
        entry_key(MBConv(192, 320, kernel=5, hidden=1536, squeeze=384, act="swish"), (192, 7, 7)): 9.583678,
    }
    assert device.get(blocks) == pytest.approx(blocks, rel=1e-4)
    narrow = entry_key(MBConv(192, 320, hidden=192, act="swish", expand=False), (192, 7, 7))
    assert device.get([narrow])[narrow] == pytest.approx(0.793, abs=1e-3)
    assert all(ms > 0 for ms in device.table.values())
    assert "hidden=191," not in "".join(key for key in device.table if key.startswith("MBConv(192"))
    with pytest.raises(UserError, match="allowed: gpu, cpu"):
        import_table(DATA / "nas" / "lut_tfnas.json.gz")


@with_data
def test_single_path_table_fits_its_space():
    device = import_table(DATA / "nas" / "lut_singlepath_pixel1.json.gz")
    assert device.constant_ms == 19.6
    assert len(device.table) == 4 * 10
    first = entry_key(MBConv(16, 24, hidden=96, stride=2), (16, 112, 112))
    repeated = entry_key(MBConv(24, 24, kernel=5, hidden=144), (24, 56, 56))
    assert device.get([first])[first] == 9.2015
    assert device.get([repeated])[repeated] == pytest.approx(np.mean([9.1518, 9.1756, 9.1567]), rel=1e-4)


def test_a_table_in_the_words_of_proxylessnas_prices_its_space(tmp_path):
    with torch.device("meta"):
        space = open_space("proxylessnas", classes=1000, channels=3, resolution=224)
    rows, number = {}, 0.0
    for atom in atoms(space, (3, 224, 224)):
        channels, size, _ = atom.shape
        number += 1.0
        if isinstance(atom.module, MBConv):
            told = atom.module.options
            after = size // told["stride"]
            name = f"expanded_conv-input:{size}x{size}x{channels}-output:{after}x{after}x{told['outputs']}"
            expand = told["hidden"] // channels
            skip = int(told["stride"] == 1 and channels == told["outputs"])
            rows[f"{name}-expand:{expand}-kernel:{told['kernel']}-stride:{told['stride']}-idskip:{skip}"] = number
    rows["Conv-input:224x224x3-output:112x112x32"] = 40.0
    rows["Conv_1-input:7x7x320-output:7x7x1280"] = 20.0
    rows["Logits-input:7x7x1280-output:1000"] = 2.5
    rows["expanded_conv-input:56x56x24-output:56x56x24-expand:6-kernel:7-stride:1-idskip:0"] = 999.0
    file = tmp_path / "phone.yaml"
    file.write_text("".join(f"{name}: {{mean: {ms}, count: 50}}\n" for name, ms in rows.items()))
    device = import_table(file)
    latency = profile_space(space, (3, 224, 224), device, LatencyTable(tmp_path / "table.sqlite"))
    assert latency.raw.constant == pytest.approx(40 + 22.5 + rows[next(iter(rows))])
    wide = latency.raw.options["layer2"]["k7_e6"]
    names = [name for name in rows if "56x56x24-output:56x56x24-expand:6-kernel:7" in name and "skip:1" in name]
    assert wide == rows[names[0]]
    assert latency.raw.options["layer2"]["skip"] == 0
    text = file.read_text()
    file.write_text(text + "Conv_1-input:7x7x432-output:7x7x1728: {mean: 30.0}\n")  # of another network, without Logits
    heads = {key: ms for key, ms in import_table(file).table.items() if key.startswith("Head(")}
    assert heads == {"Head(320, 1280, classes=1000, act='relu6') @ 320x7x7": 22.5}
    file.write_text("a: [\n")
    with pytest.raises(UserError, match="no latency table of a known format"):
        import_table(file)


@with_data
def test_fasterseg_table_reads():
    device = import_table(DATA / "nas" / "lut_fasterseg_1080ti.json.gz")
    assert len(device.table) == 667
    key = "ConvNorm(128, 64, kernel=1, stride=1) @ 128x64x128"
    assert device.get([key])[key] == pytest.approx(0.045677, rel=1e-4)
    assert "ff(128) @ 128x128x256" in device.table
