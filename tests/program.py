"""What the Python tests of the program share: how it is started, token stores, job specs. Needs no torch."""

import hashlib
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "build" / "demo"
VOCABULARY = 512
Sequences = list[list[int]]
Run = Callable[..., subprocess.CompletedProcess[str]]


def need(file: Path) -> None:
    """Skips a test for want of a file; where all tests must run (QUANTMILL_REQUIRE_PYTHON) it fails."""
    if not file.exists():
        give_up = pytest.fail if os.environ.get("QUANTMILL_REQUIRE_PYTHON") else pytest.skip
        give_up(f"no {file}: tools/demo_data.sh makes it")


@pytest.fixture(scope="session")
def quantmill() -> Run:
    """Runs the program: quantmill("eval", "--model", …, code=0, ranks=None); with `ranks` under the MPI launcher."""
    binary = Path(os.environ.get("QUANTMILL_BINARY", ROOT / "build" / "cpu" / "quantmill"))
    launcher = shlex.split(os.environ.get("QUANTMILL_MPIEXEC", "mpirun --bind-to none --oversubscribe -n"))
    if not binary.exists():
        pytest.fail(f"no {binary}: build it first, or set QUANTMILL_BINARY", pytrace=False)
    usual = {k: v for k, v in os.environ.items() if k not in {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"}}
    usual |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

    def run(
        *words: object, code: int | None = 0, ranks: int | None = None, environment: dict[str, str] | None = None, timeout: int = 300
    ) -> subprocess.CompletedProcess[str]:
        command = [*launcher, str(ranks)] if ranks else []
        command += [str(binary), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=usual | (environment or {}), timeout=timeout)
        if code is not None and done.returncode != code:
            pytest.fail(f"{shlex.join(command)}\nexit code {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}", pytrace=False)
        return done

    return run


def random_sequences(count: int, longest: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Sequences:
    """Sequences of different lengths, one of them the longest."""
    rng = np.random.default_rng(seed)
    lengths = [longest, *rng.integers(longest // 2, longest, count - 1)]
    return [rng.integers(0, vocabulary, length).tolist() for length in lengths]


def write_store(file: Path, sequences: Sequences, model: Path, vocabulary: int = VOCABULARY) -> Path:
    """A token store made for the tokenizer of a model directory."""
    rows = np.full((len(sequences), max(map(len, sequences), default=1)), -1, np.int32)
    for row, ids in zip(rows, sequences, strict=True):
        row[: len(ids)] = ids
    with h5py.File(file, "w") as h5:
        h5["input_ids"] = rows
        h5["lengths"] = np.array([len(ids) for ids in sequences], np.int32)
        h5.attrs["vocab_size"] = vocabulary
        h5.attrs["tokenizer"] = hashlib.sha256((model / "tokenizer.json").read_bytes()).hexdigest()
        h5.attrs["source"] = "random"
    return file


def write_job(file: Path, model: Path, store: Path, output: Path, quantization: dict[str, Any], **more: Any) -> Path:
    """A job spec; `more` adds to its section `output`."""
    job = {
        "model": str(model),
        "output": {"directory": str(output), **more},
        "calibration": {"tokens": str(store)},
        "quantization": quantization,
        "compute": {"backend": "cpu"},
    }
    file.write_text(yaml.safe_dump(job))
    return file
