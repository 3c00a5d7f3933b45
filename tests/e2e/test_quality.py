"""Perplexity of the quantized demo model against recorded figures of GPTQModel, of ourselves and of plain rounding."""

import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from program import DEMO, ROOT, Run, need, write_job

FIGURES = ROOT / "bench" / "peers" / "perplexity.json"
MODEL, CALIBRATION, EVALUATION = DEMO / "SmolLM2-135M-Instruct", DEMO / "calib.h5", DEMO / "eval.h5"
PARITY = 1.015  # median against median, each over four orders of the calibration sequences
# One order against a median of four: another order, or another order of summation, moves the perplexity by up to
# 10 % (GPTQModel's orders: 36.5 to 37.0, 64.3 to 70.9; ours: 37.1 to 37.4, 60.7 to 69.3). Mistakes cost far more:
# without the update of later columns it is plain rounding, 7 % and 160 % above. On one kind of processor with one
# OpenBLAS a run repeats its bytes; other kernels sum in another order.
NOISE = {4: 1.04, 3: 1.1}
ROUNDING = {4: 0.97, 3: 0.5}  # GPTQ gains little at 4 bits, half and more at 3
ENVIRONMENT = {"OMP_NUM_THREADS": "2", "QUANTMILL_TIMEOUT": "1000"}


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def median(figures: dict[str, Any], tool: str, bits: int) -> float:
    runs = [run["perplexity"] for run in figures["runs"] if run["bits"] == bits and run["tool"] == tool]
    assert len(runs) == 4
    return statistics.median(runs)


def recorded_run(figures: dict[str, Any], bits: int) -> float:
    """Our own run of the sequences as stored."""
    return next(run["perplexity"] for run in figures["runs"] if (run["tool"], run["bits"], run["order"]) == ("quantmill", bits, 0))


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """GPTQModel's and ours, recorded by bench/compare_gptqmodel.py; they hold for these very inputs only."""
    found: dict[str, Any] = json.loads(FIGURES.read_text())
    inputs = {"model": MODEL / "model.safetensors", "calibration": CALIBRATION, "evaluation": EVALUATION}
    for name, file in inputs.items():
        need(file)
        if sha256(file) != found["inputs"][name]:
            pytest.skip(f"{file} is not the {name} of the recorded figures: bench/compare_gptqmodel.py records new ones")
    assert found["inputs"]["group_size"] == 64
    return found


def perplexity(quantmill: Run, model: Path, file: Path, *words: object) -> float:
    quantmill("eval", "--model", model, "--tokens", EVALUATION, "--json", file, *words, environment=ENVIRONMENT, timeout=1500)
    return json.loads(file.read_text())["perplexity"]


def test_unquantized(quantmill: Run, figures: dict[str, Any], tmp_path: Path) -> None:
    assert perplexity(quantmill, MODEL, tmp_path / "eval.json") == pytest.approx(figures["unquantized"], rel=1e-3)


@pytest.mark.parametrize("bits", [4])  # 3 takes as long and is noisier; its recorded medians are checked below
def test_quantized(quantmill: Run, figures: dict[str, Any], tmp_path: Path, bits: int) -> None:
    job = write_job(tmp_path / "job.yaml", MODEL, CALIBRATION, tmp_path / "out", {"preset": "plain", "bits": bits, "group_size": 64})
    quantmill("run", job, environment=ENVIRONMENT, timeout=1500)
    got = perplexity(quantmill, tmp_path / "out", tmp_path / "eval.json")
    peer = median(figures, "gptqmodel", bits)
    print(f"{bits} bits: perplexity {got:.3f}, GPTQModel's median {peer:.3f}, rounded to nearest {figures['round_to_nearest'][str(bits)]:.3f}")
    assert figures["unquantized"] < got < ROUNDING[bits] * figures["round_to_nearest"][str(bits)]
    assert got <= PARITY * NOISE[bits] * peer
    assert got == pytest.approx(recorded_run(figures, bits), rel=NOISE[bits] - 1.0)


# Rows of the table in docs/quality.md that lie far apart, with few tokens: 80.1, 41.0 and 36.6 when this was written.
ROWS: dict[str, dict[str, Any]] = {
    "plain": {"preset": "plain"},
    "balanced": {},
    "with error propagation": {"error_propagation_alpha": 0.5},
}


def test_order_of_the_table(quantmill: Run, tmp_path: Path) -> None:
    need(CALIBRATION)
    found = {}
    for name, settings in ROWS.items():
        output = tmp_path / name
        job = write_job(tmp_path / "job.yaml", MODEL, CALIBRATION, output, {"bits": 3, "group_size": 64, **settings})
        quantmill("run", job, "--set", "calibration.sequences=4", environment=ENVIRONMENT, timeout=1500)
        found[name] = perplexity(quantmill, output, tmp_path / "eval.json", "--sequences", 4)
    print(found)
    assert found["with error propagation"] < 0.96 * found["balanced"]
    assert found["balanced"] < 0.7 * found["plain"]


@pytest.mark.parametrize("bits", [4, 3])
def test_recorded_medians(figures: dict[str, Any], bits: int) -> None:
    assert median(figures, "quantmill", bits) <= PARITY * median(figures, "gptqmodel", bits)


def recorded(row: str, bits: int) -> float:
    """Of bench/quality.json: the median over four orders of the calibration."""
    runs = json.loads((ROOT / "bench" / "quality.json").read_text())["runs"]
    found = {run["order"]: run["perplexity"] for run in runs if (run["row"], run["bits"]) == (row, bits)}
    assert sorted(found) == [0, 1, 2, 3], f"{row}, {bits} bits: {found}"
    return statistics.median(found.values())


def test_recorded_presets() -> None:
    theirs = {bits: recorded("GPTQModel GAR, mse, GPTAQ", bits) for bits in (4, 3, 2)}
    assert recorded("balanced", 4) <= theirs[4]
    assert recorded("balanced", 3) < 0.98 * theirs[3]
    assert recorded("balanced", 2) < 0.9 * theirs[2]
    unquantized = json.loads((ROOT / "bench" / "quality.json").read_text())["unquantized"]
    assert theirs[4] - recorded("best", 4) >= 0.4 * (theirs[4] - unquantized)
    assert recorded("best", 3) < 0.8 * theirs[3]
    assert recorded("best", 2) < 0.4 * theirs[2]
    table = (ROOT / "docs" / "quality.md").read_text()
    for row, name in {"best": "(`preset: best`)", "balanced": "(`preset: balanced` of an fp16 model)"}.items():
        cells = " | ".join(f"{recorded(row, bits):.{digits}f}" for bits, digits in ((4, 2), (3, 2), (2, 0)))
        assert f"{name} | {cells} |" in table
