#!/usr/bin/env python3
"""Times a whole run on the CPU and says where the time goes, beside the floor of each stage.

Runs `quantmill run` with plain GPTQ on the demo model (./demo.sh makes it), reads report.json, and prints for each stage seconds,
GFLOP/s and the share of the peak: OpenBLAS's own multi-threaded rate, measured by bench_gemm just before. It first checks the
result: `quantmill inspect` must accept the checkpoint.
"""

import argparse
import csv
import io
import json
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def peak_gflops(build: Path) -> float:
    """OpenBLAS's own rate: what bench_gemm reports as 100%."""
    text = subprocess.run(
        [build / "bench/bench_gemm", "--csv", "--only", "4096", "--repetitions", "5"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row["unit"] == "GFLOP/s"]
    return max(float(row["rate"]) / float(row["share"]) for row in rows)


def operations(report: dict) -> dict[str, float]:
    """Operations of each stage (docs/algorithm.md, "What it costs"); attention is left out of the forward pass."""
    groups = {(linear["block"], linear["group"]): linear for linear in report["linears"]}
    tokens = report["tokens"]
    widths = [group["columns"] for group in groups.values()]
    return {
        "forward": 2.0 * tokens * sum(linear["rows"] * linear["columns"] for linear in report["linears"]),
        "hessian": float(tokens) * sum(n * n for n in widths),
        "factor": sum(n**3 for n in widths) / 3.0,
        "solve": float(sum(linear["rows"] * linear["columns"] ** 2 for linear in report["linears"])),
    }


def seconds(report: dict, stage: str) -> float:
    groups = {(linear["block"], linear["group"]): linear for linear in report["linears"]}
    return sum(group[f"{stage}_seconds"] for group in groups.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build/cpu")
    parser.add_argument(
        "--demo", type=Path, default=ROOT / "build/demo", help="model and tokens that ./demo.sh made"
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=128)
    arguments = parser.parse_args()

    peak = peak_gflops(arguments.build)
    with tempfile.TemporaryDirectory(dir=arguments.build) as scratch:
        job = Path(scratch) / "job.yaml"
        job.write_text(
            json.dumps(
                {
                    "model": str(arguments.demo / "SmolLM2-135M-Instruct"),
                    "output": {"directory": str(Path(scratch) / "out")},
                    "calibration": {
                        "tokens": str(arguments.demo / "calib.h5"),
                        "sequences": arguments.sequences,
                    },
                    "quantization": {"preset": "plain", "bits": arguments.bits, "group_size": 64},
                }
            )
        )  # JSON is YAML
        binary = arguments.build / "quantmill"
        subprocess.run([binary, "run", job, "--log-level", "warn"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([binary, "inspect", Path(scratch) / "out"], check=True, stdout=subprocess.DEVNULL)
        report = json.loads((Path(scratch) / "out/report.json").read_text())

    print(
        f"{report['tokens']} tokens, {arguments.bits} bits, {report['threads']} threads, peak {peak:.0f} GFLOP/s"
    )
    print(f"{'stage':<10}{'seconds':>9}{'GFLOP/s':>9}{'peak':>6}{'floor s':>9}")
    for stage, work in operations(report).items():
        spent = seconds(report, stage)
        print(
            f"{stage:<10}{spent:9.2f}{work / spent * 1e-9:9.0f}{work / spent * 1e-9 / peak:6.0%}{work / peak * 1e-9:9.2f}"
        )
    print(f"{'read/write':<10}{seconds(report, 'io'):9.2f}\n{'whole run':<10}{report['seconds']:9.2f}")


if __name__ == "__main__":
    main()
