"""How long the exact knapsack takes to prove its answer, and what CBC (through PuLP, if installed) takes beside it.

    python benchmarks/allocate.py [--rounds 3]     # writes benchmarks/results/allocate.json

Instances: layers x options; values uncorrelated with the prices, or the logarithm of the price plus noise (what
capacity and accuracy look like, and the hard case); one limit or two; the limit at 40 % of the way from cheapest to
dearest. Each round is a new seed; the solvers take turns on it, so that slow phases of the machine hit both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import statistics
import time
from dataclasses import dataclass

from machine import machine, save

from netsmith.architecture import extreme
from netsmith.search.allocate import Limit, Options, allocate, diverse

SIZES = [(22, 9), (50, 30), (100, 197)]
SECONDS = 20.0  # for each solver and instance; beyond it counts as unproven


@dataclass(frozen=True)
class Prices:
    constant: float
    options: Options


def instance(layers: int, options: int, correlated: bool, limits: int, seed: int) -> tuple[Options, list[Limit]]:
    generator = random.Random(f"{layers} {options} {correlated} {limits} {seed}")
    tables = [{f"l{i}": {o: generator.uniform(0.05, 1.0) for o in range(options)} for i in range(layers)} for _ in "ab"]

    def value(path: str, option: int) -> float:
        if not correlated:
            return generator.random()
        return math.log(sum(table[path][option] for table in tables[:limits])) + generator.gauss(0, 0.05)

    values = {path: {option: value(path, option) for option in row} for path, row in tables[0].items()}
    asked = []
    for table in tables[:limits]:
        low, high = (
            sum(table[path][option] for path, option in extreme(table, largest=largest).items())
            for largest in (False, True)
        )
        asked.append(Limit(Prices(0.0, table), at_most=low + 0.4 * (high - low)))
    return values, asked


def cbc(values: Options, limits: list[Limit]) -> dict | None:
    import pulp

    program = pulp.LpProblem("knapsack", pulp.LpMaximize)
    x = {
        path: {option: pulp.LpVariable(f"{path}_{option}", cat="Binary") for option in row}
        for path, row in values.items()
    }
    program += pulp.lpSum(values[path][option] * x[path][option] for path in x for option in x[path])
    for row in x.values():
        program += pulp.lpSum(row.values()) == 1
    for limit in limits:
        table = limit.prices.options
        program += (
            pulp.lpSum(table[path][option] * x[path][option] for path in x for option in x[path]) <= limit.at_most
        )
    program.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=0, timeLimit=SECONDS))
    if pulp.LpStatus[program.status] != "Optimal" or program.sol_status != pulp.LpSolutionOptimal:
        return None
    return {path: next(option for option in row if row[option].value() > 0.5) for path, row in x.items()}


def measure(rounds: int) -> list[dict]:
    solvers = {"netsmith": lambda values, limits: allocate(values, limits, time_limit=SECONDS)}
    with contextlib.suppress(ImportError):
        import pulp  # noqa: F401

        solvers["cbc"] = cbc
    allocate(*instance(3, 3, False, 1, 0))  # load scipy
    cases = []
    for layers, options in SIZES:
        for correlated in (False, True):
            for limits in (1, 2):
                seconds: dict[str, list[float]] = {name: [] for name in solvers}
                best: dict[str, list[float | None]] = {name: [] for name in solvers}
                for seed in range(rounds):
                    values, asked = instance(layers, options, correlated, limits, seed)
                    for name, solve in solvers.items():
                        begin = time.perf_counter()
                        try:
                            found = solve(values, asked)
                        except Exception as error:
                            print(f"  {name}: {error}")
                            found = None
                        seconds[name].append(time.perf_counter() - begin)
                        kept = found is not None and all(limit.holds(found) for limit in asked)
                        best[name].append(math.fsum(values[p][o] for p, o in found.items()) if kept else None)
                case = {
                    "layers": layers,
                    "options": options,
                    "values": "log of the price" if correlated else "uncorrelated",
                    "limits": limits,
                    "seeds": list(range(rounds)),
                }
                for name in solvers:
                    times = sorted(seconds[name])
                    case[name] = {
                        "median_s": round(statistics.median(times), 4),
                        "min_s": round(times[0], 4),
                        "max_s": round(times[-1], 4),
                        "unproven_or_wrong": best[name].count(None),
                    }
                if "cbc" in solvers:
                    pairs = [(a, b) for a, b in zip(best["netsmith"], best["cbc"], strict=True) if None not in (a, b)]
                    case["largest_difference_of_optima"] = max((abs(a - b) / abs(a) for a, b in pairs), default=None)
                print(json.dumps(case), flush=True)
                cases.append(case)
    return cases


def measure_diverse(rounds: int) -> dict:
    seconds, worse = [], []
    for seed in range(rounds):
        values, limits = instance(50, 30, True, 1, seed)
        begin = time.perf_counter()
        found = diverse(values, limits, k=10, overlap=0.8)
        seconds.append(time.perf_counter() - begin)
        first, *_, last = (math.fsum(values[p][o] for p, o in one.items()) for one in found)
        worse.append((first - last) / abs(first))
    case = {
        "diverse": "10 solutions, overlap 0.8, 50 layers x 30 options, log of the price, 1 limit",
        "seeds": list(range(rounds)),
        "median_s": round(statistics.median(seconds), 3),
        "min_s": round(min(seconds), 3),
        "max_s": round(max(seconds), 3),
        "tenth_worse_by_median": round(statistics.median(worse), 5),
    }
    print(json.dumps(case))
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="instances of each kind")
    rounds = parser.parse_args().rounds
    started = machine("pulp")
    save("allocate", started, time_limit_s=SECONDS, cases=measure(rounds), diverse=measure_diverse(rounds))


if __name__ == "__main__":
    main()
