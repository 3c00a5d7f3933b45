#!/usr/bin/env python3
"""Whether quantization.target_bits keeps its word: quantizes one model at several budgets and with 2, 3, 4 and 8 bits
everywhere, evaluates each checkpoint with `quantmill eval`, and holds the order of the predicted losses against that of
the measured perplexities. Each uniform checkpoint has a budget of its own size beside it. What the JSON file has is not
run again; exit code 1 when the orders differ or a budget loses against the uniform choice of its size.

  bench/bit_budget.py --quantmill build/cpu/quantmill --model build/demo/SmolLM2-135M-Instruct \\
      --calibration build/demo/calib.h5 --evaluation build/demo/eval.h5 --work /tmp/budgets --output bit_budget.json
  bench/bit_budget.py ... --set compute.backend=cuda --set quantization.preset=plain
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

Record = dict[str, Any]
UNIFORM = (2, 3, 4, 8)


def quantize(arguments: argparse.Namespace, name: str, changes: list[str]) -> Record:
    """Runs one configuration and returns its figures."""
    output = arguments.work / name.replace(" ", "-")
    job = arguments.work / "job.yaml"
    spec = {
        "model": str(arguments.model.resolve()),
        "output": {"directory": str(output.resolve())},
        "calibration": {"tokens": str(arguments.calibration.resolve())},
        "quantization": {"group_size": arguments.group_size},
    }
    job.write_text(json.dumps(spec))  # JSON is YAML
    settings = [word for change in [*changes, *arguments.set] for word in ("--set", change)]
    subprocess.run([arguments.quantmill, "run", job, "--overwrite", *settings], check=True)
    report = json.loads((output / "report.json").read_text())
    evaluation = arguments.work / "eval.json"
    subprocess.run(
        [arguments.quantmill, "eval", "--model", output, "--tokens", arguments.evaluation, "--json", evaluation, *arguments.eval],
        check=True,
    )
    shutil.rmtree(output)
    measured = json.loads(evaluation.read_text())
    record = {"name": name, "bits_per_weight": report["bits_per_weight"], "perplexity": measured["perplexity"]}
    if "bit_budget" in report:
        budget = report["bit_budget"]
        record |= {key: budget[key] for key in ("target", "achieved", "predicted_loss", "uniform_loss")}
        record["choice"] = [[choice["block"], choice["group"], choice["bits"], choice["losses"]] for choice in budget["groups"]]
    return record


def run_all(arguments: argparse.Namespace) -> list[Record]:
    figures: Record = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"runs": []}
    runs: list[Record] = figures["runs"]

    def once(name: str, changes: list[str]) -> Record:
        found = next((run for run in runs if run["name"] == name), None)
        if found is None:
            found = quantize(arguments, name, changes)
            runs.append(found)
            arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
        return found

    for bits in UNIFORM:
        size = once(f"{bits} bits", [f"quantization.bits={bits}"])["bits_per_weight"]
        if bits in (3, 4):
            once(f"the size of {bits} bits", [f"quantization.target_bits={size}"])
    for budget in arguments.budgets:
        once(f"target {budget:g}", [f"quantization.target_bits={budget}"])
    return runs


def predicted(runs: list[Record], run: Record) -> float:
    """Of a uniform choice what any budget's report predicts for it."""
    if "predicted_loss" in run:
        return float(run["predicted_loss"])
    table = next(other["uniform_loss"] for other in runs if "uniform_loss" in other)
    return float(table[run["name"].split()[0]])


def problems(runs: list[Record]) -> list[str]:
    found = []
    # Losses of 2 bits everywhere are no small errors, and 8 bits leave none: neither is a budget between 2.5 and 5.
    ordered = sorted((run for run in runs if run["name"].startswith(("target", "the size"))), key=lambda run: predicted(runs, run))
    for better, worse in zip(ordered, ordered[1:], strict=False):
        if better["perplexity"] > worse["perplexity"]:
            found.append(f"{better['name']} is predicted to be better than {worse['name']}, and measured worse")
    for bits in (3, 4):
        alike, budget = (next(r for r in runs if r["name"] == name) for name in (f"{bits} bits", f"the size of {bits} bits"))
        if budget["perplexity"] >= alike["perplexity"]:
            found.append(f"{bits} bits everywhere are not beaten at their size")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("quantmill", "model", "calibration", "evaluation", "work", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.5, 2.75, 3, 3.5, 4, 4.5, 5])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every run")
    parser.add_argument("--eval", action="append", default=[], metavar="WORD", help="further words for `quantmill eval`")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    runs = run_all(arguments)
    print("| configuration | bits a weight | predicted loss | perplexity |\n|---|---|---|---|")
    for run in sorted(runs, key=lambda run: run["bits_per_weight"]):
        print(f"| {run['name']} | {run['bits_per_weight']:.3f} | {predicted(runs, run):.4g} | {run['perplexity']:.3f} |")
    found = problems(runs)
    print("\n".join(found) or "the predicted order is the measured one, and uniform choices are beaten at their size")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
