"""Predicts the published step costs of EfficientNet-B2 and -B5 on 128 to 1,024 cores of TPU v3 from the row of 128.

    python benchmarks/plan.py

The table is that of Wongpanich et al. 2020 (arXiv:2011.00071) as our notes have it; its shares of all-reduce are not
verified. The speed of one device is fitted to images/ms on 128 cores, which is then met by construction; nothing else
is fitted. A device is a chip: it has two cores, and the links. Beside the prediction: images/ms if nothing were lost
(linear), and how the share of all-reduce moves with what is assumed of the links.
"""

from __future__ import annotations

import torch
from machine import machine, save

from netsmith.spaces.networks import NETWORKS, RESOLUTIONS
from netsmith.train.scaling import Cluster, Load, Prediction, predict

PUBLISHED = {
    "efficientnet_b2": {128: (57.57, 2.1), 256: (113.73, 2.6), 512: (227.13, 2.5), 1024: (451.35, 2.81)},
    "efficientnet_b5": {128: (9.76, 0.89), 256: (19.48, 1.24), 512: (38.55, 1.24), 1024: (77.44, 1.03)},
}
"""Network -> cores -> images/ms, and the share of the step in all-reduce in percent."""
IMAGES_PER_CORE = 32
CORES_PER_CHIP = 2
PEAK = 123.0
"""TFLOP/s of a chip in bfloat16 (cloud.google.com/tpu/docs/v3)."""
LINKS = {"bandwidth": 83.0, "link_latency": 1.0}
"""GB/s and microseconds, both assumed. The bandwidth: 340 TB/s of all-reduce for a pod of 1,024 chips with four links
each (the same page; its bisection of 6.4 TB/s over 64 links would give 100). The latency: not published for v3."""
OTHERS = {
    "all four links at once": {"bandwidth": 332.0, "link_latency": 1.0},
    "half the bandwidth": {"bandwidth": 41.5, "link_latency": 1.0},
    "latency 5 us": {"bandwidth": 83.0, "link_latency": 5.0},
    "no batch norm over groups": {"bandwidth": 83.0, "link_latency": 1.0, "norm_images": 0},
    "one ring of all chips": {"bandwidth": 83.0, "link_latency": 1.0, "topology": "ring"},
}


def at(load: Load, cores: int, rate: float, *, batch: int = 0, topology: str = "torus", **asked) -> Prediction:
    """``rate``: images/s of a chip. ``batch``: 32 images a core where it is not given."""
    links = {name: asked.pop(name) for name in LINKS}
    cluster = Cluster(devices=cores // CORES_PER_CHIP, topology=topology, **links)  # type: ignore[arg-type]
    return predict(cluster, load, images_per_second=rate, batch=batch or IMAGES_PER_CORE * cores, epochs=350, **asked)


def fitted(load: Load, cores: int, images_per_ms: float, **asked) -> float:
    """Images/s of a chip with which the prediction for so many cores has this throughput."""
    step = IMAGES_PER_CORE * cores / (1e3 * images_per_ms)
    return IMAGES_PER_CORE * CORES_PER_CHIP / (step - at(load, cores, 1.0, **asked).all_reduce)


def main() -> None:
    started = machine()
    rows, rates, shares, loads = [], {}, [], {}
    print("| network | cores | images/ms, published | predicted | off, % | linear, off, % "
          "| all-reduce %, published | predicted |")  # fmt: skip
    print("|---" * 8 + "|")
    for model, table in PUBLISHED.items():
        with torch.device("meta"):
            load = loads[model] = Load.of(NETWORKS[model](), RESOLUTIONS[model])
        rate = fitted(load, 128, table[128][0], **LINKS)
        used = rate / load.images_per_second(PEAK, 1.0)
        rates[model] = {"images_per_second_per_chip": rate, "images_per_second_per_core": rate / CORES_PER_CHIP,
                        "utilisation": used}  # fmt: skip
        for cores, (images, share) in table.items():
            found, linear = at(load, cores, rate, **LINKS), table[128][0] * cores / 128
            predicted = found.images_per_second / 1e3
            row = {
                "model": model,
                "cores": cores,
                "images_per_ms": {"published": images, "predicted": predicted, "linear": linear},
                "off_percent": 100 * (predicted / images - 1),
                "linear_off_percent": 100 * (linear / images - 1),
                "all_reduce_percent": {"published": share, "predicted": found.all_reduce_percent},
                "ms": {name: 1e3 * getattr(found, name) for name in ("step", "compute", "gradients", "norms")},
                "norm_group": found.norm_group,
            }
            rows.append(row)
            print(f"| {model} | {cores:,} | {images} | {predicted:.2f} | {row['off_percent']:+.2f} "
                  f"| {row['linear_off_percent']:+.2f} | {share} | {found.all_reduce_percent:.2f} |")  # fmt: skip
        for name, asked in OTHERS.items():
            other = fitted(load, 128, table[128][0], **asked)
            found = {cores: at(load, cores, other, **asked) for cores in table}
            off = {cores: 100 * (found[cores].images_per_second / 1e3 / table[cores][0] - 1) for cores in table}
            shares.append({"model": model, "assumed": name, **asked, "off_percent": off,
                           "all_reduce_percent": {n: one.all_reduce_percent for n, one in found.items()}})  # fmt: skip
    print("\n| network | assumed | all-reduce %, 128 cores | 1,024 cores | images/ms on 1,024, off, % |")
    print("|---" * 5 + "|")
    for row in shares:
        first, last = row["all_reduce_percent"][128], row["all_reduce_percent"][1024]
        print(f"| {row['model']} | {row['assumed']} | {first:.2f} | {last:.2f} | {row['off_percent'][1024]:+.2f} |")
    for model, one in rates.items():
        print(f"{model}: {one['images_per_second_per_core']:.1f} images/s a core, "
              f"{100 * one['utilisation']:.1f} % of {PEAK:g} TFLOP/s a chip")  # fmt: skip
    rate = rates["efficientnet_b5"]["images_per_second_per_chip"]
    found = at(loads["efficientnet_b5"], 1024, rate, batch=65_536, **LINKS)
    minutes = {epochs: found.hours * 60 * epochs / 350 for epochs in (350, 232)}
    print(f"B5 at 65,536 on 1,024 cores: 350 epochs {minutes[350]:.1f} min, 232 epochs {minutes[232]:.1f} min, "
          f"published 64 min: {350 * 64 / minutes[350]:.0f} epochs at this rate")  # fmt: skip
    hour = {"published_minutes": 64, "predicted_minutes": minutes, "step_ms": 1e3 * found.step}
    save("plan", started, links=LINKS, peak_tflops=PEAK, devices=rates, rows=rows, other_links=shares, b5_65536=hour)


if __name__ == "__main__":
    main()
