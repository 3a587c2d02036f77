"""Latency tables measured by others: read into keys of ours where a row is the same layer.

Formats: our own CSV (header `key,ms`) and JSON (`{key: ms}`), plain or gzipped, and four published ones, told apart by
their content: ProxylessNAS (mit-han-lab/proxylessnas, YAML), TF-NAS (AberHu/TF-NAS), single-path NAS
(dstamoulis/single-path-nas), FasterSeg (TAMU-VITA/FasterSeg).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import yaml

from netsmith.cost.table import TableDevice
from netsmith.errors import UserError, unknown
from netsmith.run import load_yaml

ACTS = {"relu": "", "relu6": ", act='relu6'", "swish": ", act='swish'"}


def import_table(file: Path, part: str | None = None) -> TableDevice:
    """The table in a file, as a device that can only predict. `part`: which one of a file that holds several ("gpu"
    or "cpu").

    Rows of 0 ms and less are left out (TF-NAS smoothed over widths, and its narrowest can be negative): asking for
    them raises. Errors: UserError for a file that is missing, of no known format, or whose part is not known.
    """
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode()
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read the latency table {file}: {error}") from error
    name = file.name.split(".")[0]
    constant = 0.0
    try:
        data: Any = _parsed(text, file)
        if isinstance(data, dict) and data and all(isinstance(v, dict) and "mean" in v for v in data.values()):
            entries = _proxyless(data)
        elif isinstance(data, dict) and data and all(isinstance(v, dict) and "base" in v for v in data.values()):
            if part is None or part not in data:
                raise unknown(f"part of {file.name}", str(part), data)
            entries, constant, name = _tf_nas(data[part]), float(data[part]["base"]), f"{name}-{part}"
        elif part is not None:
            raise UserError(f"{file.name} is a single table and has no part {part!r}")
        elif isinstance(data, dict) and set(data) == {str(i) for i in range(22)}:
            entries, constant = _single_path(data), SINGLE_PATH_REST_MS
        else:
            entries = {_faster_seg_key(key): float(ms) for key, ms in data.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error, yaml.YAMLError) as error:
        raise UserError(f"{file} is no latency table of a known format: {error}") from error
    if not 0 <= constant < math.inf:
        raise UserError(f"{file} gives {constant} ms for what all networks have; allowed: 0 or more")
    return TableDevice(name, {key: ms for key, ms in entries.items() if ms > 0 and math.isfinite(ms)}, constant)


def _parsed(text: str, file: Path) -> Any:
    if ".csv" in file.suffixes:
        return _csv(text)
    if {".yaml", ".yml"} & set(file.suffixes):
        return load_yaml(text)
    return json.loads(text)


def _csv(text: str) -> dict[str, float]:
    rows = csv.DictReader(io.StringIO(text))
    if not {"key", "ms"} <= set(rows.fieldnames or ()):
        raise ValueError(f"the columns are {rows.fieldnames}; key and ms are needed")
    return {row["key"]: float(row["ms"]) for row in rows}


def _block(
    size: int, inp: int, out: int, kernel: int, hidden: int, stride: int, squeeze: int = 0, act: str = "relu"
) -> str:
    """What `blocks.MBConv` prints, at a square input; without expansion where it has as many channels as go in."""
    extra = (f", stride={stride}" if stride > 1 else "") + (f", squeeze={squeeze}" if squeeze else "") + ACTS[act]
    extra += ", expand=False" if hidden == inp else ""
    return f"MBConv({inp}, {out}, kernel={kernel}, hidden={hidden}{extra}) @ {inp}x{size}x{size}"


def _proxyless(rows: dict[str, Any]) -> dict[str, float]:
    """Rows such as `expanded_conv-input:56x56x24-output:56x56x24-expand:6-kernel:7-stride:1-idskip:1: {mean: 2.1}`, in
    milliseconds; `Conv` is the stem, `Conv_1` and `Logits` together are the head.

    A block that keeps its shape has a shortcut with `idskip` 1 only, as all of ours: rows without it are left out.
    """
    entries: dict[str, float] = {}
    features: list[tuple[int, int, int, float]] = []
    """(pixels, inputs, outputs, ms) of the last convolution."""
    logits: dict[int, tuple[int, float]] = {}
    """Its inputs -> (classes, ms)."""
    for name, row in rows.items():
        kind, *told = name.split("-")
        facts = dict(fact.split(":") for fact in told)
        before, after = ([int(n) for n in facts[side].split("x")] for side in ("input", "output"))
        ms = float(row["mean"])
        if kind == "expanded_conv":
            size, _, inp = before
            expand, kernel, stride, skip = (int(facts[fact]) for fact in ("expand", "kernel", "stride", "idskip"))
            if skip or stride > 1 or inp != after[-1]:
                entries[_block(size, inp, after[-1], kernel, expand * inp, stride, act="relu6")] = ms
        elif kind == "Conv":
            size, _, inp = before
            stride = size // after[0]
            entries[f"ConvBn({inp}, {after[-1]}, kernel=3, stride={stride}, act='relu6') @ {inp}x{size}x{size}"] = ms
        elif kind == "Conv_1":
            features.append((before[0], before[-1], after[-1], ms))
        else:
            logits[before[-1]] = after[-1], ms
    for size, inp, out, ms in features:
        if out in logits:
            classes, more = logits[out]
            entries[f"Head({inp}, {out}, classes={classes}, act='relu6') @ {inp}x{size}x{size}"] = ms + more
    return entries


def _tf_nas(rows: dict[str, Any]) -> dict[str, float]:
    """`MBInvertedResBlock_<H>_<Cin>_<SE>_<Cout>_k<k>_s<s>_<act>`, one value per hidden width; SE = `squeeze`.

    Their block (models/layers.py) has no expansion when the width is at most Cin, and is then Cin wide: Cin is read so,
    and what stands at smaller widths, smoothed or negative, is left out. GPU values are for batches of 32, CPU
    for 1. `base` (stem, first block, head) becomes the constant.
    """
    entries = {}
    for name, row in rows.items():
        if name == "base":
            continue
        match = re.fullmatch(r"MBInvertedResBlock_(\d+)_(\d+)_(\d+)_(\d+)_k(\d)_s(\d)_(\w+)", name)
        if not match:
            raise ValueError(f"row {name!r}")
        size, inp, squeeze, out, kernel, stride = map(int, match.groups()[:6])
        for width, ms in list(enumerate(row["ms"], row["widths"][0]))[inp - 1 :]:
            entries[_block(size, inp, out, kernel, width, stride, squeeze, match[7])] = float(ms)
    return entries


SINGLE_PATH_REST_MS = 19.6  # stem, blocks 0 and 21, head and logits together (data/README.md)
SINGLE_PATH_STAGES = ((16, 24, 2, 112), (24, 40, 2, 56), (40, 80, 2, 28), (80, 96, 1, 14), (96, 192, 2, 14))


def _single_path(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """Blocks 1-20 of the single-path space at 224 pixels: five stages of four blocks, the first of each with the
    stage's stride.

    Assumed: the stages of the repository's MnasNet-like supernet (24, 40, 80, 96, 192 channels, strides 2 2 2 1 2),
    ReLU, no squeeze, hidden = expansion x input channels. The values fit: equal blocks within a stage, larger first
    ones. Blocks 0 and 21 are fixed and inside the constant. The table's equal layers differ by noise (up to 3 %); the
    mean of the repeats counts, for their key is one.
    """
    found: dict[str, list[float]] = {}
    for number in range(1, 21):
        stage, repeat = divmod(number - 1, 4)
        inp, out, stride, size = SINGLE_PATH_STAGES[stage]
        if repeat:
            inp, stride, size = out, 1, size // stride
        for option, (kernel, expand) in {"0": (3, 3), "1": (3, 6), "2": (5, 3), "3": (5, 6)}.items():
            found.setdefault(_block(size, inp, out, kernel, expand * inp, stride), []).append(
                float(rows[str(number)][option])
            )
    return {key: sum(values) / len(values) for key, values in found.items()}


def _faster_seg_key(name: str) -> str:
    """`ConvNorm_H64_W128_Cin128_Cout64_kernel1_stride1` -> `ConvNorm(128, 64, kernel=1, stride=1) @ 128x64x128`; else
    unchanged.

    None of FasterSeg's layers is a block of ours; the keys only read like ours.
    """
    match = re.fullmatch(r"(\w+?)_H(\d+)_W(\d+)_C(?:in)?(\d+)((?:_[A-Za-z]+\d+)*)", name)
    if not match:
        return name
    options = re.findall(r"_([A-Za-z]+)(\d+)", match[5])
    sizes = [match[4], *(value for option, value in options if option == "Cout")]
    named = [f"{option}={value}" for option, value in options if option != "Cout"]
    return f"{match[1]}({', '.join(sizes + named)}) @ {match[4]}x{match[2]}x{match[3]}"
