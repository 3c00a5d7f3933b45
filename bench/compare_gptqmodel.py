#!/usr/bin/env python3
"""Compares quantmill with GPTQModel: perplexity and time, same model, same tokens, same settings, same cores.

For every bit width and every order of the calibration sequences (0: as stored, others: fixed permutations) it
quantizes with GPTQModel (symmetric; act_group_aware, desc_act and mse off; damping 0.05 / 0.01), and with --quantmill
with ours; evaluates each checkpoint by bench/peers/perplexity.py; and keeps the figures in one JSON file. What the file
has already is not run again. Each step is a process of its own.

Needs tools/python_env.sh --interop. Examples:
  bench/compare_gptqmodel.py --model build/demo/SmolLM2-135M-Instruct --calibration build/demo/calib.h5 \\
      --evaluation build/demo/eval.h5 --bits 4 3 --orders 4 --group-size 64 --quantmill build/cpu/quantmill
  bench/compare_gptqmodel.py ... --bits 4 --orders 1 --quantmill build/cpu/quantmill --time --cores 0,1
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np

PEERS = Path(__file__).resolve().parent / "peers"
PEER, OURS = "gptqmodel", "quantmill"
Record = dict[str, Any]


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def cpu_seconds_of_children() -> float:
    """Processor time of all finished steps: unlike wall time, hardly touched by what else the machine does."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def last_json(text: str) -> Record:
    """The JSON object on the last line that is one; tools talk before it."""
    return json.loads(next(line for line in reversed(text.splitlines()) if line.startswith("{")))


def store_of(calibration: Path, order: int, work: Path) -> Path:
    """The calibration store with its sequences in the given order, a copy in `work` unless it is as stored."""
    if order == 0:
        return calibration
    file = work / f"order-{order}.h5"
    if not file.exists():
        with h5py.File(calibration) as source, h5py.File(file, "w") as target:
            rows = np.random.default_rng(order).permutation(len(source["lengths"]))
            for name in ("input_ids", "lengths"):
                target[name] = source[name][:][rows]
            for key, value in source.attrs.items():
                target.attrs[key] = value
    return file


class Comparison:
    """The figures file and the steps that fill it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.work: Path = arguments.work
        self.file: Path = arguments.output
        self.work.mkdir(parents=True, exist_ok=True)
        inputs = {
            "model": sha256(arguments.model / "model.safetensors"),
            "calibration": sha256(arguments.calibration),
            "evaluation": sha256(arguments.evaluation),
            "group_size": arguments.group_size,
        }
        versions = {name: version(name) for name in ("gptqmodel", "torch", "transformers")}
        empty: Record = {"inputs": inputs, "versions": versions, "runs": [], "timing": []}
        self.figures: Record = json.loads(self.file.read_text()) if self.file.exists() else empty
        if self.figures["inputs"] != inputs:
            sys.exit(f"{self.file} holds the figures of other inputs: {self.figures['inputs']}; now {inputs}")

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(self.file.name + ".partial")
        partial.write_text(json.dumps(self.figures, indent=1) + "\n")
        os.replace(partial, self.file)

    def execute(self, name: str, command: list[str]) -> tuple[str, Record]:
        """Runs one step, its output going to a log file; returns that output and how it ran."""
        pinned = ["taskset", "-c", self.arguments.cores] if self.arguments.cores else []
        environment = {k: v for k, v in os.environ.items() if k not in {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"}}
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        load = os.getloadavg()[0]
        begin, cpu_begin = time.perf_counter(), cpu_seconds_of_children()
        log = self.work / f"{name}.log"
        with log.open("w") as stream:
            code = subprocess.run(
                [*pinned, *command], stdout=stream, stderr=subprocess.STDOUT, env=environment
            ).returncode
        if code:
            sys.exit(f"{name} failed with exit code {code}; its output is in {log}")
        circumstances = {
            "process_seconds": round(time.perf_counter() - begin, 2),
            "process_cpu_seconds": round(cpu_seconds_of_children() - cpu_begin, 2),
            "date": date.today().isoformat(),
            "processor": processor(),
            "cores": self.arguments.cores or f"{len(os.sched_getaffinity(0))} (not pinned)",
            "device": self.arguments.device,
            "nice": os.nice(0),
            "load_before": round(load, 2),
            "load_after": round(os.getloadavg()[0], 2),
        }
        return log.read_text(errors="replace"), circumstances

    def perplexity(self, name: str, model: Path, *options: str) -> float:
        command = [sys.executable, str(PEERS / "perplexity.py"), "--model", str(model), *options]
        command += ["--evaluation", str(self.arguments.evaluation), "--device", self.arguments.device]
        return last_json(self.execute(f"{name}-perplexity", command)[0])["perplexity"]

    def quantize(self, tool: str, bits: int, order: int, checkpoint: Path) -> Record:
        """Quantizes with one tool and returns the record of the run."""
        name = f"{tool}-{bits}bit-order{order}"
        store = store_of(self.arguments.calibration, order, self.work)
        if tool == PEER:
            command = [
                sys.executable,
                str(PEERS / "quantize_gptqmodel.py"),
                "--model",
                str(self.arguments.model),
            ]
            command += [
                "--calibration",
                str(store),
                "--bits",
                str(bits),
                "--group-size",
                str(self.arguments.group_size),
            ]
            command += ["--device", self.arguments.device, "--output", str(checkpoint)]
        else:
            job = {
                "model": str(self.arguments.model.resolve()),
                "output": {"directory": str(checkpoint.resolve()), "format": "gptq"},
                "calibration": {"tokens": str(store.resolve())},
                "quantization": {
                    "preset": "plain",
                    "bits": bits,
                    "group_size": self.arguments.group_size,
                    "sym": True,
                    "desc_act": False,
                },
                "compute": {"backend": "cuda" if self.arguments.device.startswith("cuda") else "cpu"},
            }
            job["quantization"] |= {
                "damp_percent": 0.05,
                "damp_auto_increment": 0.01,
                "true_sequential": True,
            }
            spec = self.work / f"{name}.yaml"
            spec.write_text(json.dumps(job))  # JSON is YAML
            command = ["mpirun", "--bind-to", "none", "--oversubscribe", "-n", "1"]
            command += [str(self.arguments.quantmill.resolve()), "run", str(spec.resolve()), "--overwrite"]
        shutil.rmtree(checkpoint, ignore_errors=True)
        output, circumstances = self.execute(name, command)
        details = last_json(output) if tool == PEER else {}
        return {"tool": tool, "bits": bits, "order": order, **details, **circumstances}

    def compare(self) -> None:
        """Runs what is missing: perplexities of the references, then every tool, width and order."""
        arguments, figures = self.arguments, self.figures
        if "unquantized" not in figures:
            figures["unquantized"] = self.perplexity("unquantized", arguments.model)
            self.save()
        for tool in [OURS, PEER] if arguments.quantmill else [PEER]:
            for bits in arguments.bits:
                for order in range(arguments.orders):
                    if self.found(tool, bits, order):
                        continue
                    checkpoint = self.work / f"{tool}-checkpoint"
                    record = self.quantize(tool, bits, order, checkpoint)
                    record["perplexity"] = self.perplexity(f"{tool}-{bits}bit-order{order}", checkpoint)
                    figures["runs"].append(record)
                    self.save()
                    print(json.dumps(record), flush=True)
        for bits in arguments.bits:
            if str(bits) not in figures.setdefault("round_to_nearest", {}):
                options = ["--round-to-nearest", str(bits), "--group-size", str(arguments.group_size)]
                figures["round_to_nearest"][str(bits)] = self.perplexity(
                    f"nearest-{bits}bit", arguments.model, *options
                )
                self.save()

    def found(self, tool: str, bits: int, order: int) -> Record | None:
        wanted = (tool, bits, order)
        return next((run for run in self.figures["runs"] if (run["tool"], run["bits"], run["order"]) == wanted), None)

    def time(self) -> None:
        """Quantizes with ours and theirs one after the other on the same cores and adds both records to `timing`."""
        for bits in self.arguments.bits:
            pair = {tool: self.quantize(tool, bits, 0, self.work / f"{tool}-checkpoint") for tool in (OURS, PEER)}
            pair["ratio"] = round(pair[PEER]["seconds"]["total"] / pair[OURS]["process_seconds"], 2)
            self.figures["timing"].append(pair)
            self.save()
            print(json.dumps(pair), flush=True)

    def table(self) -> None:
        """Prints the perplexities side by side with their medians."""
        print(f"unquantized perplexity {self.figures['unquantized']:.3f}")
        for bits in self.arguments.bits:
            print(f"{bits} bits, round to nearest {self.figures['round_to_nearest'][str(bits)]:.2f}")
            for tool in (PEER, OURS):
                runs = [run for order in range(self.arguments.orders) if (run := self.found(tool, bits, order))]
                if runs:
                    values = [run["perplexity"] for run in runs]
                    listed = "  ".join(f"{value:8.3f}" for value in values)
                    print(f"  {tool:10} {listed}   median {statistics.median(values):8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--calibration", type=Path, required=True, metavar="STORE.h5")
    parser.add_argument("--evaluation", type=Path, required=True, metavar="STORE.h5")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument(
        "--orders", type=int, default=4, metavar="N", help="orders of the sequences (default: %(default)s)"
    )
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:0 (default: %(default)s)")
    parser.add_argument("--quantmill", type=Path, metavar="BINARY", help="run ours too")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/peers"),
        metavar="DIR",
        help="logs, stores, checkpoints (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=PEERS / "perplexity.json",
        metavar="FILE",
        help="the figures (default: bench/peers/perplexity.json)",
    )
    parser.add_argument("--cores", metavar="LIST", help="pin every step to these cores, as taskset -c has it")
    parser.add_argument("--time", action="store_true", help="only measure times, ours and theirs one after the other")
    arguments = parser.parse_args()
    if arguments.time and not (arguments.quantmill and arguments.cores):
        parser.error("--time needs --quantmill and --cores")
    comparison = Comparison(arguments)
    if arguments.time:
        comparison.time()
    else:
        comparison.compare()
        comparison.table()


if __name__ == "__main__":
    main()
