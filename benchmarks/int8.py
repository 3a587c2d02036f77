"""Int8 files: ours beside NNCF's ONNX route, same network, same calibration images, one interleaved timing.

    python benchmarks/int8.py --data ../shared/data --nncf /path/to/other/venv/bin/python      # some ten minutes

NNCF (3.4.0) needs a place of its own: `python -m venv other; other/bin/pip install nncf==3.4.0 onnx onnxruntime`.
Without --nncf the rows are fp32 and ours. Nothing is trained in int8: both quantise the same fp32 file after training.

Speed: timm's ResNet-18 at 224 px with 1000 classes; weights as drawn, norms with statistics of noise. Accuracy: a
ResNet of eight blocks, 16 to 128 channels wide, trained on CIFAR-10 images at 32 px, scored on `test` through the
runtime.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from machine import machine, save
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from netsmith.blocks.quantized import calibrate
from netsmith.cost.device import OrtCpu
from netsmith.cost.meter import measure
from netsmith.decisions import derive
from netsmith.ship.agreement import agree
from netsmith.ship.export import calibration_images, export
from netsmith.spaces import open_space
from netsmith.spaces.from_model import INT8, in_either
from netsmith.tasks import open_task
from netsmith.train.loop import train
from netsmith.train.recipe import Recipe

NNCF = """
import sys, nncf, numpy, onnx
source, target, images = sys.argv[1:]
items = [{"image": image[None]} for image in numpy.load(images)]
onnx.save(nncf.quantize(onnx.load(source), nncf.Dataset(items), subset_size=len(items)), target)
"""


def with_norms(network: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """Statistics and shifts of the norms as after some training, so that numbers stay in range layer after layer."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # of all batches alike
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, std=0.1, generator=generator)
    with torch.no_grad():
        for _ in range(4):
            network.train()(torch.randn(8, *shape, generator=generator))
    return network.eval()


def small_resnet() -> nn.Module:
    sizes = {"channels": (16, 32, 64, 128), "stem_type": "deep", "stem_width": 8}
    network = ResNet(BasicBlock, (2, 2, 2, 2), num_classes=10, **sizes)
    network.maxpool = nn.Identity()
    return network


def all_int8(network: nn.Module, shape: tuple[int, int, int], images: Tensor) -> nn.Module:
    space = in_either(copy.deepcopy(network), shape)
    made = derive(space, dict.fromkeys(space.reference, INT8))  # pyright: ignore
    calibrate(made, lambda: images)
    return made.eval()


def files(
    network: nn.Module, shape: tuple[int, int, int], images: Tensor, folder: Path, nncf: Path | None
) -> tuple[dict[str, Path], nn.Module]:
    folder.mkdir()
    found = {"fp32": export(network, shape, folder / "fp32.onnx")}
    quantised = all_int8(network, shape, images)
    found["netsmith"] = export(quantised, shape, folder / "netsmith.onnx", images=images)
    if nncf:
        np.save(folder / "images.npy", images.contiguous().numpy())
        words = [str(nncf), "-c", NNCF, str(found["fp32"]), str(folder / "nncf.onnx"), str(folder / "images.npy")]
        subprocess.run(words, check=True, capture_output=True)
        found["nncf"] = folder / "nncf.onnx"
    return found, quantised


def timed(found: dict[str, Path], shape: tuple[int, int, int], seconds: float) -> dict[str, dict]:
    measured = measure({name: OrtCpu().load(file, shape) for name, file in found.items()}, seconds=seconds)
    base = measured["fp32"]
    return {
        name: {
            "milliseconds": round(one.median_ms, 4), "ci95": [round(end, 4) for end in one.ci95],
            "fastest": round(one.minimum_ms, 4), "settled": one.settled,  # False: other work was on the machine
            "of_fp32": round(one.median_ms / base.median_ms, 4),
            "fastest_of_fp32": round(one.minimum_ms / base.minimum_ms, 4),
            "bytes": found[name].stat().st_size,
        }
        for name, one in measured.items()
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("NETSMITH_DATA"), help="folder with CIFAR-10 images"
    )
    parser.add_argument("--nncf", type=Path, help="the Python interpreter of an environment with NNCF")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each interleaved timing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = machine("timm", "onnx")
    if arguments.nncf:
        asked = "from importlib.metadata import version as v; print(v('nncf'), v('onnx'))"
        found = subprocess.run([str(arguments.nncf), "-c", asked], check=True, capture_output=True, text=True)
        started["versions"] |= dict(zip(("nncf", "onnx (nncf's)"), found.stdout.split(), strict=True))
    results: dict = {"calibration_images": 0, "threads": 1, "speed": {}, "accuracy": []}
    with tempfile.TemporaryDirectory() as place:
        shape = (3, 224, 224)
        torch.manual_seed(0)
        network = with_norms(open_space("timm:resnet18", classes=1000, channels=3, resolution=224), shape)
        images = torch.randn(32, *shape, generator=torch.Generator().manual_seed(2))
        made, _ = files(network, shape, images, Path(place) / "resnet18", arguments.nncf)
        results["speed"] = {"network": "timm:resnet18, 224 px", **timed(made, shape, arguments.seconds)}
        print(results["speed"])

        task = open_task("cifar10", arguments.data and Path(arguments.data), resolution=32)
        results["calibration_images"] = len(calibration_images(task))
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            network = small_resnet()
            recipe = Recipe.default(task, epochs=arguments.epochs, batch_size=64)
            train(network, task, recipe, split="trainval", seed=seed)
            folder = Path(place) / f"seed{seed}"
            made, quantised = files(network, task.input_shape, calibration_images(task), folder, arguments.nncf)
            rows = timed(made, task.input_shape, arguments.seconds)
            for name, file in made.items():
                found = agree(quantised if name == "netsmith" else network, file, task)
                rows[name] |= {"accuracy": found.accuracy_exported, "same_class_as_pytorch": found.same_class}
                rows[name] |= {"largest_difference": found.relative_diff}
            in_pytorch = agree(quantised, made["netsmith"], task).accuracy
            results["accuracy"].append({"seed": seed, "epochs": arguments.epochs, "fake_quantised": in_pytorch, **rows})
            print(results["accuracy"][-1])
    print(save("int8", started, **results))


if __name__ == "__main__":
    main()
