"""Any number of ranks and threads, and any placement, writes the same bytes."""

import csv
import hashlib
import io
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FAMILIES, INDEX, encode, make_checkpoint, read_tensors, write_weights
from program import DEMO, Run, need, random_sequences, write_job, write_store

SECONDS = 30  # for random models
PLACEMENTS = [(ranks, threads) for ranks in (1, 2, 3, 4, 7) for threads in (1, 2)]


def digests(output: Path) -> dict[str, str]:
    """What must not depend on the placement: weights, index, configs, card, and all of the log but its times."""
    wanted = [*output.glob("*.safetensors"), *(output / name for name in (INDEX, "config.json", "quantize_config.json", "README.md"))]
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in wanted}
    assert any(name.endswith(".safetensors") for name in found)
    for line in csv.DictReader(io.StringIO((output / "quantize_log.csv").read_text())):
        found[line["module"]] = str({key: value for key, value in line.items() if not key.endswith("_seconds")})
    return found


def quantize(quantmill: Run, job: Path, output: Path, ranks: int, threads: int, *words: str, **options: Any) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(threads), "QUANTMILL_TIMEOUT": "1000"}
    quantmill("run", job, "--set", f"output.directory={output}", *words, ranks=ranks, environment=environment, **options)
    return digests(output)


def test_demo_model(quantmill: Run, tmp_path: Path) -> None:
    model, store = DEMO / "SmolLM2-135M-Instruct", DEMO / "calib.h5"
    need(store)
    job = write_job(tmp_path / "job.yaml", model, store, tmp_path / "out", {"bits": 4, "group_size": 64}, max_shard_size="30MB")
    # 256 tokens already pass attention's blocks of 128 keys, and all Hessians have full rank; 512 cost twice the time.
    sequences = ("--set", "calibration.sequences=16", "--set", "calibration.sequence_length=256")
    expected: dict[str, str] = {}
    for ranks, threads in PLACEMENTS:
        output = tmp_path / f"out-{ranks}-{threads}"
        got = quantize(quantmill, job, output, ranks, threads, *sequences, timeout=1500)
        expected = expected or got
        assert got == expected, f"{ranks} ranks, {threads} threads"
        for file in output.glob("*.safetensors"):
            file.unlink()


def random_job(choose: random.Random, family: str, directory: Path) -> tuple[Path, dict[str, Any]]:
    """A small model of the family, a store and a job, all by chance; and what was chosen, for the message."""
    model: dict[str, Any] = {
        "seed": choose.randrange(1000),
        "dtype": choose.choice(["BF16", "F16", "F32"]),
        "files": choose.choice([1, 3]),
        "hidden_size": choose.choice([32, 64, 96, 160]),
        "intermediate_size": choose.choice([32, 96, 192]),
        "num_hidden_layers": choose.choice([1, 2, 3]),
        "num_attention_heads": 4,
        "num_key_value_heads": choose.choice([1, 2, 4]),
        "tie_word_embeddings": choose.choice([True, False]),
    }
    if family in {"Llama", "Qwen3"}:
        model["attention_bias"] = choose.choice([True, False])
    if family == "Llama":
        model["mlp_bias"] = choose.choice([True, False])
    sym = choose.choice([True, False])
    order = choose.choice(["natural", "desc_act", "act_group_aware"])
    quantization = {
        "bits": choose.choice([2, 3, 4, 8]),
        "group_size": choose.choice([-1, 16, 32, 64, 128]),
        "sym": sym,
        "desc_act": order == "desc_act",
        "act_group_aware": order == "act_group_aware",
        "static_groups": choose.choice([True, False]),
        "scale_search": choose.choice(["minmax", "mse", "hessian"]),
        "signed_scales": sym and choose.choice([True, False]),
        "scale_rounding": choose.choice(["auto", "fp16", "bf16"]),
        "true_sequential": choose.choice([True, False]),
        "refit": choose.choice([True, False]),
        "sweeps": choose.choice([0, 2]),
        "error_propagation_alpha": choose.choice([0, 0.5, 1]),
    }
    output = {
        "format": choose.choice(["gptq", "gptq_v2"]) if sym else "gptq_v2",
        "max_shard_size": choose.choice(["8kB", "40kB", "5GB"]),
        "allow_unservable": True,  # groups need not divide the width
    }
    sequences = random_sequences(choose.randint(1, 21), choose.choice([17, 64, 150]), seed=model["seed"], vocabulary=256)
    checkpoint = make_checkpoint(directory / "model", family, **model)
    store = write_store(directory / "calib.h5", sequences, checkpoint, vocabulary=256)
    job = write_job(directory / "job.yaml", checkpoint, store, directory / "out", quantization, **output)
    return job, {"family": family, **model, **quantization, **output, "sequences": len(sequences)}


def test_random_models(quantmill: Run, tmp_path: Path) -> None:
    seed = int(os.environ.get("QUANTMILL_TEST_SEED", random.randrange(2**32)))
    print(f"QUANTMILL_TEST_SEED={seed}")
    choose = random.Random(seed)
    begin = time.monotonic()
    for case in range(100):
        if case >= len(FAMILIES) and time.monotonic() - begin > SECONDS:
            break
        directory = tmp_path / str(case)
        job, choices = random_job(choose, list(FAMILIES)[case % len(FAMILIES)], directory)
        ranks, threads = choose.randint(2, 7), choose.choice([1, 2])
        activations = choose.choice(["stream", "recompute"])
        message = f"seed {seed}, case {case}: {ranks} ranks, {threads} threads, {activations}, {choices}"
        print(message)
        expected = quantize(quantmill, job, directory / "alone", 1, 1)
        assert quantize(quantmill, job, directory / "spread", ranks, threads, "--set", f"compute.activations={activations}") == expected, message
    print(f"{case} random models")


def test_error_propagation(quantmill: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "Llama", seed=5, num_hidden_layers=2)
    store = write_store(tmp_path / "calib.h5", random_sequences(13, 90, seed=5, vocabulary=256), model, vocabulary=256)
    for options in ({}, {"desc_act": True}, {"true_sequential": False}):
        quantization = {"preset": "plain", "bits": 3, "group_size": 32, **options}
        job = write_job(tmp_path / "job.yaml", model, store, tmp_path / "out", quantization, allow_unservable=True)
        alpha = ("--set", "quantization.error_propagation_alpha=0.5")
        off = quantize(quantmill, job, tmp_path / "off", 1, 1, "--overwrite")
        zero = ("--set", "quantization.error_propagation_alpha=0", "--overwrite")
        assert quantize(quantmill, job, tmp_path / "off", 1, 1, *zero) == off
        expected = quantize(quantmill, job, tmp_path / "on", 1, 1, *alpha, "--overwrite")
        # Every linear behind a quantized one takes part, and no other.
        before, after = read_tensors(tmp_path / "off"), read_tensors(tmp_path / "on")
        codes = [name for name in before if name.endswith(".qweight")]
        changed = {name for name in codes if not np.array_equal(before[name][1], after[name][1])}
        whole_block = options == {"true_sequential": False}
        first = [name for name in codes if ".layers.0." in name and (whole_block or ".self_attn.o_proj" not in name and "self_attn" in name)]
        assert changed == set(codes) - set(first), f"{options}: {sorted(changed)}"
        for ranks, threads, activations in [(1, 2, "recompute"), (2, 1, "stream"), (3, 2, "recompute"), (4, 1, "auto")]:
            words = (*alpha, "--overwrite", "--set", f"compute.activations={activations}")
            got = quantize(quantmill, job, tmp_path / "spread", ranks, threads, *words)
            assert got == expected, f"{options}, {ranks} ranks, {threads} threads, {activations}"
        log = list(csv.DictReader(io.StringIO((tmp_path / "on" / "quantize_log.csv").read_text())))
        assert {line["error_propagation_alpha"] for line in log} == {"0.5"}
        config = json.loads((tmp_path / "on" / "quantize_config.json").read_text())
        assert config["meta"]["error_propagation_alpha"] == 0.5
        assert "error_propagation_alpha" in (tmp_path / "on" / "README.md").read_text()
        assert "error_propagation_alpha" not in (tmp_path / "off" / "quantize_config.json").read_text()


def test_no_error_propagates_nothing(quantmill: Run, tmp_path: Path) -> None:
    """Weights on the grid lose nothing, so both paths must hold the same activations at every stage."""
    model = make_checkpoint(tmp_path / "model", "Llama", seed=6, num_hidden_layers=3)
    tensors = read_tensors(model)
    rng = np.random.default_rng(6)
    for name, (dtype, values) in tensors.items():
        if name.endswith("_proj.weight"):
            codes = rng.integers(-8, 8, values.shape)
            codes[:, ::32], codes[:, 1::32] = -8, 7  # each group has the whole range
            tensors[name] = encode(codes * 2.0**-6, dtype)
    write_weights(model, tensors, 1)
    store = write_store(tmp_path / "calib.h5", random_sequences(9, 90, seed=6, vocabulary=256), model, vocabulary=256)
    for true_sequential, activations in [(True, "stream"), (True, "recompute"), (False, "auto")]:
        quantization = {"preset": "plain", "bits": 4, "group_size": 32, "sym": False, "true_sequential": true_sequential}
        job = write_job(tmp_path / "job.yaml", model, store, tmp_path / "out", quantization, format="gptq_v2")
        words = ("--overwrite", "--set", f"compute.activations={activations}", "--set")
        weights = []
        for alpha in (0, 1):
            output = tmp_path / str(alpha)
            quantize(quantmill, job, output, 1, 1, *words, f"quantization.error_propagation_alpha={alpha}")
            weights.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(output.glob("*.safetensors"))])
        assert weights[0] == weights[1], f"{true_sequential=}, {activations}"
