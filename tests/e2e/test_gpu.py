"""The program on a GPU: the same bytes however ranks share it and whatever memory it may take, and close to the CPU's result."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import FAMILIES, make_checkpoint, overflow_at
from program import Run, random_sequences, write_job, write_store
from test_same_bytes import digests

MODEL = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 3}
TIGHT = "160MB"  # less than the activations of 150 x 700 tokens and what a block takes


@pytest.fixture(scope="module", autouse=True)
def gpu(quantmill: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where no GPU is visible, unless QUANTMILL_REQUIRE_GPU demands one."""
    job, _ = make_job(tmp_path_factory.mktemp("probe"), "Llama", 1, [[1, 2, 3]])
    probe = quantmill("plan", job, "--no-measure", code=None)
    if probe.returncode == 0:
        return
    message = f"the program finds no GPU: {probe.stderr.strip()}"
    if os.environ.get("QUANTMILL_REQUIRE_GPU"):
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def make_job(directory: Path, family: str, seed: int, sequences: list[list[int]], **quantization: Any) -> tuple[Path, Path]:
    """A job on the GPU, and its model."""
    model = make_checkpoint(directory / "model", family, seed=seed, **MODEL)
    store = write_store(directory / "calib.h5", sequences, model, vocabulary=256)
    job = write_job(directory / "job.yaml", model, store, directory / "out", {"group_size": 64, **quantization}, max_shard_size="400kB")
    job.write_text(job.read_text().replace("backend: cpu", "backend: cuda\n  communicator: mpi"))
    return job, model


def run(quantmill: Run, job: Path, output: Path, ranks: int, **more: Any) -> dict[str, str]:
    settings = [word for key, value in more.items() for word in ("--set", f"compute.{key}={value}")]
    quantmill("run", job, "--set", f"output.directory={output}", *settings, ranks=ranks)
    return digests(output)


def test_same_bytes(quantmill: Run, tmp_path: Path) -> None:
    seed = int(os.environ.get("QUANTMILL_TEST_SEED", random.randrange(2**32)))
    print(f"QUANTMILL_TEST_SEED={seed}")
    choose = random.Random(seed)
    for family in FAMILIES:
        directory = tmp_path / family
        # More tokens than one micro-batch, so that activations can be streamed.
        sequences = random_sequences(150, 700, seed=choose.randrange(1000), vocabulary=256)
        options = {"bits": choose.choice([2, 3, 4, 8]), "desc_act": choose.choice([True, False]), "true_sequential": choose.choice([True, False])}
        job, _ = make_job(directory, family, choose.randrange(1000), sequences, **options)
        expected = run(quantmill, job, directory / "out", 1)
        spread = [(1, "free", "recompute"), (1, TIGHT, "stream"), (2, "free", "auto"), (4, "free", "auto"), (2, TIGHT, "recompute")]
        for ranks, memory, activations in spread:
            output = directory / f"out-{ranks}-{memory}-{activations}"
            assert run(quantmill, job, output, ranks, device_memory=memory, activations=activations) == expected, (
                f"seed {seed}, {family}, {options}, {ranks} ranks, {memory}, {activations}"
            )


def test_same_bytes_with_error_propagation(quantmill: Run, tmp_path: Path) -> None:
    sequences = random_sequences(150, 700, vocabulary=256)
    for true_sequential in (True, False):
        directory = tmp_path / str(true_sequential)
        job, _ = make_job(directory, "Llama", 11, sequences, bits=3, true_sequential=true_sequential, error_propagation_alpha=0.5)
        expected = run(quantmill, job, directory / "out", 1)
        tight = "260MB"  # both paths pass through slots
        spread = [(1, "free", "recompute"), (1, tight, "stream"), (1, tight, "recompute"), (3, "free", "auto")]
        for ranks, memory, activations in spread:
            output = directory / f"out-{ranks}-{memory}-{activations}"
            got = run(quantmill, job, output, ranks, device_memory=memory, activations=activations)
            assert got == expected, f"{true_sequential=}, {ranks} ranks, {memory}, {activations}"


def test_same_bytes_of_layer_groups(quantmill: Run, tmp_path: Path) -> None:
    sequences = random_sequences(60, 400, vocabulary=256)
    job, _ = make_job(tmp_path, "Llama", 7, sequences, propagate="original")
    expected = run(quantmill, job, tmp_path / "out", 1)
    for ranks, groups in [(1, 1), (2, 1), (2, 2), (4, 2)]:
        assert run(quantmill, job, tmp_path / f"out-{ranks}-{groups}", ranks, layer_groups=groups) == expected, (ranks, groups)
    store = f"{tmp_path / 'hessians'}"
    quantmill("run", job, "--set", f"output.directory={tmp_path / 'saved'}", "--set", f"calibration.save_hessians={store}", ranks=2)
    quantmill("run", job, "--set", f"output.directory={tmp_path / 'loaded'}", "--set", f"calibration.hessians={store}", ranks=1)
    assert digests(tmp_path / "saved") == digests(tmp_path / "loaded") == expected


@pytest.mark.parametrize("propagate", ["quantized", "original"])
def test_activations_that_are_not_finite(quantmill: Run, tmp_path: Path, propagate: str) -> None:
    sequences = random_sequences(20, 200, vocabulary=255)
    sequences[13][-1] = 255
    job, model = make_job(tmp_path, "Llama", 9, sequences, propagate=propagate)
    overflow_at(model, 1, 255)
    done = quantmill("run", job, code=2)
    assert "model.layers.1.self_attn.q_proj: its calibration inputs are not finite in sequence 13 (counted from 0)" in done.stderr


def test_a_budget_holds_and_the_plan_knows(quantmill: Run, tmp_path: Path) -> None:
    job, _ = make_job(tmp_path, "Llama", 3, random_sequences(150, 700, vocabulary=256))
    run(quantmill, job, tmp_path / "roomy", 1)
    run(quantmill, job, tmp_path / "tight", 1, device_memory=TIGHT)
    assert "are streamed" in quantmill("plan", job, "--no-measure", "--set", f"compute.device_memory={TIGHT}").stdout
    peaks = [json.loads((tmp_path / name / "report.json").read_text())["peak_memory"] for name in ("roomy", "tight")]
    assert peaks[1] <= 160e6 < peaks[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_close_to_the_cpu(quantmill: Run, tmp_path: Path, family: str) -> None:
    sequences = random_sequences(40, 200, vocabulary=256)
    job, model = make_job(tmp_path, family, 5, sequences, bits=4)
    run(quantmill, job, tmp_path / "cuda", 1)
    run(quantmill, job, tmp_path / "cpu", 1, backend="cpu")
    losses = []
    for name in ("cuda", "cpu"):
        report = json.loads((tmp_path / name / "report.json").read_text())
        losses.append([linear["loss"] for linear in report["linears"] if linear["block"] == 0])
    assert losses[0] == pytest.approx(losses[1], rel=0.01)

    perplexities = []
    for backend in ("cuda", "cpu"):
        file = tmp_path / f"{backend}.json"
        words = ["--model", tmp_path / "cuda", "--tokens", tmp_path / "calib.h5", "--allow-calibration-tokens", "--backend", backend, "--json", file]
        quantmill("eval", *words)
        perplexities.append(json.loads(file.read_text())["perplexity"])
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.01)
