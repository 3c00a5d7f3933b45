#!/usr/bin/env python3
"""What layer groups and shared calibration gain on two cores, with `propagate: original`. Wants a quiet machine; about two minutes each.

    bench/layer_scaling.py             two groups of one rank against one rank, each rank bound to a core of its own
    bench/layer_scaling.py --split     also two ranks in one group, which split the sequences
    bench/layer_scaling.py --outputs   three checkpoints from one calibration against the first alone, one process

Rounds alternate between the cases, and medians are compared. First it checks that all cases write the same bytes, and that
the bytes which went between ranks are those of the formulas in docs/algorithm.md; else it ends with an error.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SCHEMES = [{"bits": 4, "group_size": 64}, {"bits": 3, "group_size": 64}, {"bits": 8, "group_size": -1}]
MPIRUN = ["mpirun", "--map-by", "core", "--bind-to", "core", "-n"]


class Result(NamedTuple):
    report: dict[str, Any]
    digests: list[dict[str, str]]  # of the files of each checkpoint
    wall: float
    processor: float

    def work_seconds(self) -> float:
        return self.report["layers"]["stream_seconds"] + self.report["layers"]["solve_seconds"]


def digests(directory: Path) -> dict[str, str]:
    found = {}
    for file in directory.glob("*.safetensors"):
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        file.unlink()
    return found


def run(arguments: argparse.Namespace, schemes: list[dict[str, int]], ranks: int = 0, groups: int = 1) -> Result:
    """One job that writes a checkpoint for each scheme; without `ranks` one process on all cores."""
    with tempfile.TemporaryDirectory() as work:
        outputs = [{"directory": f"{work}/out{i}", "quantization": scheme} for i, scheme in enumerate(schemes)]
        job = {
            "model": str(arguments.model.resolve()),
            "calibration": {"tokens": str(arguments.tokens.resolve()), "sequences": arguments.sequences},
            "quantization": {"preset": "plain", "propagate": "original"},
            "outputs": outputs,
            "compute": {"backend": "cpu", "layer_groups": groups},
        }
        (Path(work) / "job.yaml").write_text(json.dumps(job))
        environment = {k: v for k, v in os.environ.items() if k not in {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"}}
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        if ranks:
            environment["OMP_NUM_THREADS"] = "1"
        command = [*MPIRUN, str(ranks)] if ranks else []
        command += [str(arguments.binary), "run", f"{work}/job.yaml", "--log-level", "error"]
        begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        wall, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        report = json.loads((Path(work) / "out0" / "report.json").read_text())
        return Result(report, [digests(Path(output["directory"])) for output in outputs], wall, processor)


def require(holds: bool, what: str) -> None:
    if not holds:
        sys.exit(f"error: {what}")


def check_traffic(name: str, report: dict[str, Any], config: dict[str, Any], ranks: int, groups: int) -> None:
    """Bytes that reach other ranks, counted and by the formula; fp32 activations."""
    hidden, inner, blocks = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"] * config.get("head_dim", hidden // config["num_attention_heads"])
    sums = blocks * (ranks // groups - 1) * sum(n * (n + 1) // 2 * 8 for n in [hidden, heads, hidden, inner])
    stream = (groups - 1) * report["tokens"] * hidden * 4
    counted = report["layers"]["bytes_between_ranks"]
    print(f"{name}: Hessians a block {counted['sum'] / blocks:,.0f} bytes, hidden states {counted['stream']:,}, as the formulas say")
    require((counted["sum"], counted["stream"]) == (sums, stream), f"{name}: {counted}, by the formulas {sums} and {stream}")


def compare_groups(arguments: argparse.Namespace) -> None:
    config = json.loads((arguments.model / "config.json").read_text())
    cases = [(1, 1), (2, 2), *([(2, 1)] if arguments.split else [])]
    results: dict[tuple[int, int], list[Result]] = {case: [] for case in cases}
    for _ in range(arguments.rounds):
        for case in cases:
            results[case].append(run(arguments, SCHEMES[:1], *case))
    first = results[1, 1][0]
    alone = statistics.median(result.work_seconds() for result in results[1, 1])
    for (ranks, groups), found in results.items():
        name = f"{groups} x {ranks // groups}"
        require(all(result.digests == first.digests for result in found), f"{name} wrote other bytes than 1 x 1")
        if ranks > 1:
            check_traffic(name, found[0].report, config, ranks, groups)
        middle = sorted(found, key=Result.work_seconds)[len(found) // 2].report["layers"]
        work = statistics.median(result.work_seconds() for result in found)
        print(
            f"{name}: stream and solve {work:.2f} s (rounds {', '.join(f'{r.work_seconds():.2f}' for r in found)}); stream "
            f"{middle['stream_seconds']:.2f} s, of which waited {middle['waited_seconds']:.2f} s, bubble {100 * middle['bubble']:.1f}%; "
            f"solve {middle['solve_seconds']:.2f} s; efficiency {alone / ranks / work:.3f}"
        )


def compare_outputs(arguments: argparse.Namespace) -> None:
    together, alone = [], []
    for _ in range(arguments.rounds):
        alone.append(run(arguments, SCHEMES[:1]))
        together.append(run(arguments, SCHEMES))
    singles = [alone[0].digests[0], *(run(arguments, [scheme]).digests[0] for scheme in SCHEMES[1:])]
    require(all(result.digests == singles for result in together), "the three checkpoints are not those of three jobs")
    for kind in ("wall", "processor"):
        seconds = [statistics.median(getattr(result, kind) for result in results) for results in (alone, together)]
        print(f"{kind} time: one checkpoint {seconds[0]:.1f} s, three {seconds[1]:.1f} s, {seconds[1] / seconds[0]:.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "build/demo/SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=Path, default=ROOT / "build/demo/calib.h5")
    parser.add_argument("--binary", type=Path, default=ROOT / "build/cpu/quantmill")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--split", action="store_true")
    parser.add_argument("--outputs", action="store_true")
    arguments = parser.parse_args()
    print(f"{arguments.sequences} sequences, {arguments.rounds} rounds, load average {os.getloadavg()[0]:.1f} at the start")
    (compare_outputs if arguments.outputs else compare_groups)(arguments)
    print(f"load average {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
