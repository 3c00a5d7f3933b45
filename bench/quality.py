#!/usr/bin/env python3
"""What each quality option is worth: quantizes one model with every row of a table of settings, evaluates each checkpoint
with `quantmill eval` on held-out tokens, and keeps the figures in one JSON file. What the file has is not run again.

Rows are ours or GPTQModel's (those need tools/python_env.sh --interop and are slow on a CPU). Every row runs for each
bit width and each order of the calibration sequences (0: as stored, others: fixed permutations), since one order alone
moves a perplexity by one to ten per cent: judge by medians.

  bench/quality.py --quantmill build/cpu/quantmill --model build/demo/SmolLM2-135M-Instruct \\
      --calibration build/demo/calib.h5 --evaluation build/demo/eval.h5 --bits 4 3 2 --orders 4
  bench/quality.py ... --rows balanced best "GPTQModel GAR, mse" --backend cuda --jobs 4
  bench/quality.py ... --backend cuda --time 3      only times: three runs of each row and bit width, one after the other

Seconds are those of a whole run, from its start to the finished checkpoint, as the tool itself reports them; they are kept when
no other run was beside it.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from compare_gptqmodel import PEERS, Record, last_json, sha256, store_of

GAR = {"preset": "plain", "act_group_aware": True}
SEARCH = GAR | {"scale_search": "hessian"}
SIGNED = SEARCH | {"signed_scales": True}
REFINED = SIGNED | {"refit": True, "sweeps": 2}
# Name of a row -> keys of `quantization` beside bits and group_size.
OURS: dict[str, Record] = {
    "plain": {"preset": "plain"},
    "desc_act": {"preset": "plain", "desc_act": True},
    "desc_act, static_groups": {"preset": "plain", "desc_act": True, "static_groups": True},
    "GAR": GAR,
    "GAR, damp_percent auto": GAR | {"damp_percent": "auto"},
    "GAR, mse": GAR | {"scale_search": "mse"},
    "GAR, hessian": SEARCH,
    "GAR, hessian, asymmetric": SEARCH | {"sym": False},
    "GAR, hessian, signed": SIGNED,
    "GAR, hessian, signed, bf16 scales": SIGNED | {"scale_rounding": "bf16"},
    "GAR, hessian, signed, 2 sweeps": SIGNED | {"sweeps": 2},
    "GAR, hessian, signed, refit": SIGNED | {"refit": True},
    "GAR, hessian, signed, refit, 2 sweeps": REFINED,
    "GAR, hessian, signed, alpha 0.25": SIGNED | {"error_propagation_alpha": 0.25},
    "GAR, hessian, signed, alpha 0.5": SIGNED | {"error_propagation_alpha": 0.5},
    "GAR, hessian, signed, alpha 1": SIGNED | {"error_propagation_alpha": 1},
    "GAR, hessian, signed, damp 0.005": SIGNED | {"damp_percent": 0.005},
    "GAR, hessian, signed, alpha 1, damp 0.005": SIGNED | {"error_propagation_alpha": 1, "damp_percent": 0.005},
    "GAR, hessian, signed, alpha 1, damp 0.1": SIGNED | {"error_propagation_alpha": 1, "damp_percent": 0.1},
    "GAR, hessian, signed, damp auto": SIGNED | {"damp_percent": "auto"},
    "GAR, hessian, signed, 2 sweeps, damp auto": SIGNED | {"sweeps": 2, "damp_percent": "auto"},
    "GAR, hessian, signed, 2 sweeps, alpha 1": SIGNED | {"sweeps": 2, "error_propagation_alpha": 1},
    "GAR, hessian, signed, refit, 2 sweeps, alpha 0.5": REFINED | {"error_propagation_alpha": 0.5},
    "GAR, hessian, signed, refit, 2 sweeps, alpha 0.75": REFINED | {"error_propagation_alpha": 0.75},
    "GAR, hessian, signed, refit, 2 sweeps, alpha 1": REFINED | {"error_propagation_alpha": 1},
    "GAR, hessian, signed, refit, 2 sweeps, alpha 1, damp 0.1": REFINED | {"error_propagation_alpha": 1, "damp_percent": 0.1},
    "plain, original": {"preset": "plain", "propagate": "original"},
    "balanced, original": {"preset": "balanced", "propagate": "original"},
    "gptqmodel": {"preset": "gptqmodel"},
    "balanced": {"preset": "balanced"},
    "best": {"preset": "best"},
}
# Name of a row -> options of peers/quantize_gptqmodel.py.
THEIRS: dict[str, list[str]] = {
    "GPTQModel": [],
    "GPTQModel GAR": ["--act-group-aware"],
    "GPTQModel GAR, mse": ["--act-group-aware", "--mse", "2.4"],
    "GPTQModel GAR, mse, GPTAQ": ["--act-group-aware", "--mse", "2.4", "--gptaq"],
}


class Table:
    """The figures file and the runs that fill it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.lock = threading.Lock()
        arguments.work.mkdir(parents=True, exist_ok=True)
        inputs = {
            "model": sha256(arguments.model / "model.safetensors"),
            "calibration": sha256(arguments.calibration),
            "evaluation": sha256(arguments.evaluation),
            "group_size": arguments.group_size,
        }
        empty: Record = {"inputs": inputs, "runs": []}
        self.figures: Record = json.loads(arguments.output.read_text()) if arguments.output.exists() else empty
        if self.figures["inputs"] != inputs:
            sys.exit(f"{arguments.output} holds the figures of other inputs: {self.figures['inputs']}; now {inputs}")

    def save(self) -> None:
        partial = self.arguments.output.with_name(self.arguments.output.name + ".partial")
        partial.write_text(json.dumps(self.figures, indent=1) + "\n")
        os.replace(partial, self.arguments.output)

    def execute(self, name: str, command: list[str]) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"}}
        if self.arguments.gpus > 1:  # a run has one GPU, runs take turns
            turn = zlib.crc32(name.removesuffix("-eval").encode())
            environment["CUDA_VISIBLE_DEVICES"] = str(turn % self.arguments.gpus)
        log = self.arguments.work / f"{name}.log"
        with log.open("w") as stream:
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode
        if code:
            raise RuntimeError(f"{name} failed with exit code {code}; its output is in {log}")

    def store_of(self, order: int) -> Path:
        with self.lock:  # runs side by side share the file
            return store_of(self.arguments.calibration, order, self.arguments.work)

    def quantize(self, name: str, row: str, bits: int, order: int, checkpoint: Path) -> None:
        arguments = self.arguments
        if row in THEIRS:
            command = [sys.executable, str(PEERS / "quantize_gptqmodel.py"), "--model", str(arguments.model)]
            command += ["--calibration", str(self.store_of(order)), "--bits", str(bits)]
            command += ["--group-size", str(arguments.group_size), "--output", str(checkpoint), *THEIRS[row]]
            return self.execute(name, [*command, "--device", "cuda:0" if arguments.backend == "cuda" else "cpu"])
        settings = OURS[row]
        job = {
            "model": str(arguments.model.resolve()),
            "output": {
                "directory": str(checkpoint.resolve()),
                "format": "gptq" if settings.get("sym", True) else "gptq_v2",
            },
            "calibration": {"tokens": str(self.store_of(order).resolve())},
            "quantization": {"bits": bits, "group_size": arguments.group_size, **settings},
            "compute": {"backend": arguments.backend},
        }
        spec = arguments.work / f"{name}.yaml"
        spec.write_text(json.dumps(job))  # JSON is YAML
        self.execute(name, [str(arguments.quantmill), "run", str(spec), "--overwrite"])

    def seconds(self, name: str, row: str, checkpoint: Path) -> float:
        """Of the run that quantize() has just done."""
        if row in THEIRS:
            return last_json((self.arguments.work / f"{name}.log").read_text())["seconds"]["total"]
        return json.loads((checkpoint / "report.json").read_text())["seconds"]

    def evaluate(self, name: str, checkpoint: Path, *options: str) -> Record:
        file = self.arguments.work / f"{name}.json"
        command = [str(self.arguments.quantmill), "eval", "--model", str(checkpoint), "--backend", self.arguments.backend]
        command += ["--tokens", str(self.arguments.evaluation), "--reference", str(self.arguments.model)]
        self.execute(f"{name}-eval", [*command, *options, "--json", str(file)])
        return json.loads(file.read_text())

    def run(self, row: str, bits: int, order: int) -> None:
        name = f"{row}-{bits}bit-order{order}".replace(" ", "_").replace(",", "")
        checkpoint = self.arguments.work / name
        shutil.rmtree(checkpoint, ignore_errors=True)
        try:
            self.quantize(name, row, bits, order, checkpoint)
            seconds = self.seconds(name, row, checkpoint)
            # GPTQModel writes the tokenizer's file anew, so its sha256 is another one.
            options = ["--allow-tokenizer-mismatch"] if row in THEIRS else []
            result = self.evaluate(name, checkpoint, *options)
        except RuntimeError as error:
            print(error, flush=True)
            return
        finally:
            shutil.rmtree(checkpoint, ignore_errors=True)
        kept = ("perplexity", "perplexity_interval", "kl_divergence", "kl_divergence_interval", "top1_agreement")
        record = {"row": row, "bits": bits, "order": order, "date": date.today().isoformat()}
        if self.arguments.jobs == 1:
            record["seconds"] = seconds
        result = result.pop("reference", {}) | result  # both have a perplexity
        record |= {key: result[key] for key in (*kept, "bits_per_weight", "backend") if key in result}
        with self.lock:
            self.figures["runs"].append(record)
            self.save()
            print(json.dumps(record), flush=True)

    def time(self) -> None:
        """Repeats until each row and bit width has as many times as wanted."""
        timing = self.figures.setdefault("timing", [])
        checkpoint = self.arguments.work / "timed"
        self.quantize("warm-up", self.arguments.rows[0], self.arguments.bits[0], 0, checkpoint)
        for row in self.arguments.rows:
            for bits in self.arguments.bits:
                for _ in range(self.arguments.time - len(self.times(row, bits))):
                    shutil.rmtree(checkpoint, ignore_errors=True)
                    self.quantize("timed", row, bits, 0, checkpoint)
                    seconds = self.seconds("timed", row, checkpoint)
                    timing.append({"row": row, "bits": bits, "seconds": seconds, "date": date.today().isoformat()})
                    self.save()
                    print(json.dumps(timing[-1]), flush=True)

    def times(self, row: str, bits: int) -> list[float]:
        records = [*self.figures["runs"], *self.figures.get("timing", [])]
        return [r["seconds"] for r in records if (r["row"], r["bits"]) == (row, bits) and r.get("seconds") is not None]

    def found(self, row: str, bits: int) -> list[Record]:
        return [r for r in self.figures["runs"] if (r["row"], r["bits"]) == (row, bits)]

    def fill(self) -> None:
        arguments = self.arguments
        if "unquantized" not in self.figures:
            self.figures["unquantized"] = self.evaluate("unquantized", arguments.model)["perplexity"]
        wanted = [(row, bits, order) for order in range(arguments.orders) for row in arguments.rows for bits in arguments.bits]
        missing = [(row, bits, order) for row, bits, order in wanted if order not in {r["order"] for r in self.found(row, bits)}]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(lambda item: self.run(*item), missing))

    def markdown(self) -> str:
        bits = self.arguments.bits
        lines = [
            f"Perplexity of the unquantized model: {self.figures.get('unquantized', math.nan):.2f}.",
            "",
            "| | " + " | ".join(f"{b} bits" for b in bits) + " | KL, " + " / ".join(map(str, bits)) + " | seconds, " + " / ".join(map(str, bits)) + " |",
            "|---|" + "---|" * (len(bits) + 2),
        ]
        for row in [*THEIRS, *OURS]:
            found = {b: self.found(row, b) for b in bits}
            times = [self.times(row, b) for b in bits]
            if not any(found.values()) and not any(times):
                continue

            def median(b: int, key: str, form: str) -> str:
                values = [r[key] for r in found[b] if r.get(key) is not None]  # noqa: B023
                return format(statistics.median(values), form) if values else ""

            cells = [median(b, "perplexity", ".2f") for b in bits]
            divergences = " / ".join(median(b, "kl_divergence", ".3f") for b in bits)
            seconds = " / ".join(f"{statistics.median(t):.1f}" if t else "–" for t in times) if any(times) else ""
            lines.append(f"| {row} | {' | '.join(cells)} | {divergences} | {seconds} |")
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantmill", type=Path, required=True, metavar="BINARY")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--calibration", type=Path, required=True, metavar="STORE.h5")
    parser.add_argument("--evaluation", type=Path, required=True, metavar="STORE.h5")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--orders", type=int, default=4, metavar="N", help="of the sequences (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", default=list(OURS), choices=[*OURS, *THEIRS], metavar="ROW")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--backend", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; their seconds are not kept then")
    parser.add_argument("--time", type=int, default=0, metavar="N", help="only time: N runs of each row, none evaluated")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that runs are spread over (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=PEERS.parent / "quality.json", metavar="FILE")
    table = Table(parser.parse_args())
    if table.arguments.time:
        table.time()
    else:
        table.fill()
    print(table.markdown())


if __name__ == "__main__":
    main()
