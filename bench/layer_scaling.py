#!/usr/bin/env python3
"""Two groups of one rank against one rank, each rank bound to one core: efficiency of the stream and the solve, and the
bytes that went between ranks beside the formula of docs/scaling.md. Needs two quiet cores.

    bench/layer_scaling.py --model build/demo/SmolLM2-135M-Instruct --tokens build/demo/calib.h5
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
JOB = """\
model: {model}
output: {{directory: {output}}}
calibration: {{tokens: {tokens}, sequences: {sequences}}}
quantization: {{bits: 4, group_size: 64, propagate: original}}
compute: {{backend: cpu, layer_groups: {groups}}}
"""


def run(arguments: argparse.Namespace, work: Path, ranks: int, groups: int) -> dict[str, Any]:
    output = work / f"out-{ranks}-{groups}"
    job = work / "job.yaml"
    job.write_text(JOB.format(output=output, groups=groups, **vars(arguments)))
    environment = {k: v for k, v in os.environ.items() if k not in {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"}}
    environment |= {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = ["mpirun", "--map-by", "core", "--bind-to", "core", "-n", str(ranks), str(ROOT / "build/cpu/quantmill"), "run", str(job)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((output / "report.json").read_text())
    for file in output.glob("*.safetensors"):
        file.unlink()
    return report


def work_seconds(report: dict[str, Any]) -> float:
    return report["layers"]["stream_seconds"] + report["layers"]["solve_seconds"]


def print_traffic(name: str, report: dict[str, Any], config: dict[str, Any], ranks: int, groups: int) -> None:
    """Bytes of a block that reach other ranks, counted and by the formula; fp32 activations."""
    hidden, inner, blocks = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"] * config.get("head_dim", hidden // config["num_attention_heads"])
    widths = [hidden, heads, hidden, inner]
    group = ranks // groups
    sums = (group - 1) * sum(n * (n + 1) // 2 * 8 for n in widths)
    stream = (groups - 1) * report["tokens"] * hidden * 4
    counted = report["layers"]["bytes_between_ranks"]
    print(f"{name}: Hessians a block {counted['sum'] / blocks:.0f} bytes, formula {sums}; stream {counted['stream']} bytes, formula {stream}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--sequences", default="all")
    parser.add_argument("--split", action="store_true", help="also two ranks in one group, which split the sequences")
    arguments = parser.parse_args()
    arguments.model, arguments.tokens = arguments.model.resolve(), arguments.tokens.resolve()
    config = json.loads((arguments.model / "config.json").read_text())
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        placements = [(1, 1), (2, 2), *([(2, 1)] if arguments.split else [])]
        reports = {placement: run(arguments, work, *placement) for placement in placements}
    alone = work_seconds(reports[1, 1])
    for (ranks, groups), report in reports.items():
        layers = report["layers"]
        print(
            f"{groups} x {ranks // groups}: stream {layers['stream_seconds']:.1f} s, solve {layers['solve_seconds']:.1f} s, "
            f"waited {layers['waited_seconds']:.1f} s, bubble {100 * layers['bubble']:.1f}%, "
            f"efficiency {alone / ranks / work_seconds(report):.3f}"
        )
        if ranks > 1:
            print_traffic(f"{groups} x {ranks // groups}", report, config, ranks, groups)


if __name__ == "__main__":
    main()
