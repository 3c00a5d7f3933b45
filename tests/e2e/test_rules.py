"""Linears by rules of their own, and lm_head: what the checkpoint holds and says, alike for any number of ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import decode, make_checkpoint, read_tensors
from program import Run, random_sequences, write_job, write_store
from test_run_output import dequantized
from test_same_bytes import digests

VOCABULARY = 256
RULES = [
    {"match": "model.layers.1.self_attn.[qkv]_proj", "bits": 8, "group_size": 16},
    {"match": r"re:.*\.0\.mlp\.(gate|up)_proj", "skip": True},
    {"match": "*.down_proj", "bits": 3, "desc_act": True},
]
QUANTIZATION = {"bits": 4, "group_size": 32, "lm_head": {"bits": 8, "group_size": -1}, "overrides": RULES}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A job on a model of three blocks whose qkv linears have biases."""
    model = make_checkpoint(tmp_path / "model", "Qwen2", num_hidden_layers=3, tie_word_embeddings=request.param)
    store = write_store(tmp_path / "calib.h5", random_sequences(9, 70, vocabulary=VOCABULARY), model, VOCABULARY)
    return write_job(tmp_path / "job.yaml", model, store, tmp_path / "out", QUANTIZATION, max_shard_size="40kB")


def bits_of(tensors: dict[str, Any], module: str) -> int:
    return tensors[module + ".qweight"][1].shape[0] * 32 // tensors[module + ".g_idx"][1].size


@pytest.mark.parametrize("changes", [{}, {"propagate": "original"}, {"true_sequential": "false"}], ids=str)
def test_every_linear_has_its_own(quantmill: Run, job: Path, changes: dict[str, str]) -> None:
    words = [word for key, value in changes.items() for word in ("--set", f"quantization.{key}={value}")]
    output, source = job.parent / "out", read_tensors(job.parent / "model")
    quantmill("run", job, *words)
    tensors = read_tensors(output)
    for block in range(3):
        prefix = f"model.layers.{block}."
        for name in ("self_attn.q_proj", "self_attn.v_proj"):
            assert bits_of(tensors, prefix + name) == (8 if block == 1 else 4)
            assert tensors[prefix + name + ".scales"][1].shape[0] == (4 if block == 1 else 2)
        assert bits_of(tensors, prefix + "self_attn.o_proj") == 4
        assert bits_of(tensors, prefix + "mlp.down_proj") == 3
        assert not np.all(np.diff(tensors[prefix + "mlp.down_proj.g_idx"][1]) >= 0)
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            if block == 0:
                assert tensors[prefix + name + ".weight"][1].tobytes() == source[prefix + name + ".weight"][1].tobytes()
                assert prefix + name + ".qweight" not in tensors
            else:
                assert bits_of(tensors, prefix + name) == 4
    assert bits_of(tensors, "lm_head") == 8
    assert tensors["lm_head.scales"][1].shape == (1, VOCABULARY)
    assert "lm_head.weight" not in tensors
    embedding = "model.embed_tokens.weight"
    assert tensors[embedding][1].tobytes() == source[embedding][1].tobytes()

    config = json.loads((output / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    quantization = config["quantization_config"]
    assert (quantization["bits"], quantization["lm_head"]) == (4, True)
    assert set(quantization["dynamic"]) == {
        r"^model\.layers\.(?:1)\.self_attn\.(?:q|k|v|qkv)_proj$",
        r"-:^model\.layers\.(?:0)\.mlp\.(?:gate|up|gate_up)_proj$",
        r"^model\.layers\.\d+\.mlp\.down_proj$",
        "^lm_head$",
    }
    assert ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"] in quantization["modules_in_block_to_quantize"]
    report = json.loads((output / "report.json").read_text())
    assert [linear["module"] for linear in report["linears"]][-1] == "lm_head"
    assert len(report["linears"]) == 3 * 7 - 2 + 1
    assert "3 bits" in quantmill("inspect", output).stdout

    expected = digests(output)
    for ranks in (2, 3):
        quantmill("run", job, *words, "--set", f"output.directory={job.parent / str(ranks)}", ranks=ranks)
        assert digests(job.parent / str(ranks)) == expected


def test_eval_computes_with_the_head_of_the_file(quantmill: Run, job: Path, tmp_path: Path) -> None:
    """8 bits everywhere are near the original; a head of 2 bits is not, and eval must see it."""
    found = {}
    for name, bits in (("fine", 8), ("coarse", 2)):
        words = ["--set", "quantization.overrides=none", "--set", "quantization.bits=8"]
        words += ["--set", f"quantization.lm_head.bits={bits}", "--set", f"output.directory={tmp_path / name}"]
        quantmill("run", job, *words)
        found[name] = evaluate(quantmill, tmp_path / name, tmp_path)
    original = evaluate(quantmill, tmp_path / "model", tmp_path)
    assert found["fine"] == pytest.approx(original, rel=0.01)
    assert found["coarse"] != pytest.approx(original, rel=0.01)


def evaluate(quantmill: Run, model: Path, work: Path) -> float:
    words = ["--tokens", work / "calib.h5", "--allow-calibration-tokens", "--json", work / "eval.json"]
    quantmill("eval", "--model", model, *words)
    return json.loads((work / "eval.json").read_text())["perplexity"]


def test_plan_and_errors_name_what_rules_do(quantmill: Run, job: Path) -> None:
    plan = quantmill("plan", job)
    assert "6 of 21 linears by other rules" in plan.stdout
    assert "2 linears left as they are; lm_head 8 bits, group_size -1" in plan.stdout
    job.write_text(job.read_text().replace("[qkv]_proj", "q_proj"))
    done = quantmill("run", job, code=2)
    assert "fuse qkv into one linear" in done.stderr
    assert "job.yaml:" in done.stderr


def head_inputs(quantmill: Run, model: Path, head: np.ndarray, work: Path) -> np.ndarray:
    """float64 [tokens, columns]: what reaches lm_head, from the logits, which are more than its columns."""
    words = ["--tokens", work / "calib.h5", "--allow-calibration-tokens", "--logits", work / "logits.safetensors"]
    quantmill("eval", "--model", model, *words)
    logits = decode(read_tensors(work / "logits.safetensors")["logits"]).astype(np.float64)
    return np.linalg.lstsq(head, logits.T, rcond=None)[0].T


@pytest.mark.parametrize("true_sequential", [True, False])
def test_error_propagation_passes_skipped_linears_and_reaches_lm_head(quantmill: Run, tmp_path: Path, true_sequential: bool) -> None:
    """What lm_head is solved for, W + alpha W (X - X~)^T X~ H^-1, from the activations of both models in double precision."""
    alpha = 0.5
    model = make_checkpoint(tmp_path / "model", "Llama", num_hidden_layers=3, seed=4)
    store = write_store(tmp_path / "calib.h5", random_sequences(9, 70, vocabulary=VOCABULARY), model, VOCABULARY)
    rules = [{"match": r"re:.*\.1\.mlp\.(gate|up)_proj", "skip": True}, {"match": "model.layers.0.self_attn.o_proj", "skip": True}]
    options = {"preset": "plain", "bits": 3, "group_size": 32, "overrides": rules, "true_sequential": true_sequential}
    job = write_job(tmp_path / "job.yaml", model, store, tmp_path / "out", options | {"error_propagation_alpha": alpha})

    def run(name: str, *words: str, ranks: int = 1) -> Path:
        quantmill("run", job, "--set", f"output.directory={tmp_path / name}", *words, ranks=ranks)
        return tmp_path / name

    head = ("--set", "quantization.lm_head.bits=4")
    body, whole = run("body"), run("whole", *head)
    for ranks, activations in [(2, "stream"), (3, "recompute")]:
        spread = run(f"spread{ranks}", *head, "--set", f"compute.activations={activations}", ranks=ranks)
        assert digests(spread) == digests(whole)
    source, got = read_tensors(model), read_tensors(whole)
    for name in ("0.self_attn.o_proj", "1.mlp.gate_proj", "1.mlp.up_proj"):
        assert got[f"model.layers.{name}.weight"][1].tobytes() == source[f"model.layers.{name}.weight"][1].tobytes()
    for name, (_, values) in read_tensors(body).items():
        assert name.startswith("lm_head") or values.tobytes() == got[name][1].tobytes()

    weight = decode(source["lm_head.weight"]).astype(np.float64)
    original, x = (head_inputs(quantmill, directory, weight, tmp_path) for directory in (model, body))
    hessian = 2 / len(x) * x.T @ x
    hessian += 0.05 * np.diag(hessian).mean() * np.eye(len(hessian))
    target = weight + alpha * weight @ (2 / len(x) * (original - x).T @ x) @ np.linalg.inv(hessian)
    report = json.loads((whole / "report.json").read_text())["linears"][-1]
    assert (report["module"], report["error_propagation_alpha"]) == ("lm_head", alpha)
    error = target - dequantized(got, "lm_head", 4, "gptq")
    assert report["loss"] == pytest.approx(np.trace(error @ hessian @ error.T), rel=1e-3)
    # The correction counts: without it the loss would be another.
    other = weight - dequantized(got, "lm_head", 4, "gptq")
    assert report["loss"] != pytest.approx(np.trace(other @ hessian @ other.T), rel=0.05)


@pytest.mark.parametrize("propagate", ["quantized", "original"])
def test_a_budget_of_bits(quantmill: Run, tmp_path: Path, propagate: str) -> None:
    model = make_checkpoint(tmp_path / "model", "Llama", num_hidden_layers=3, hidden_size=96, intermediate_size=192)
    store = write_store(tmp_path / "calib.h5", random_sequences(9, 70, vocabulary=VOCABULARY), model, VOCABULARY)
    ruled = {"model.layers.0.self_attn.o_proj": 8, "model.layers.1.self_attn.o_proj": 4}  # 4: as if nothing had been said
    rules = [{"match": match, "bits": bits} for match, bits in ruled.items()]
    job = write_job(tmp_path / "job.yaml", model, store, tmp_path / "out", {"group_size": 32, "propagate": propagate, "overrides": rules})
    predicted = []
    for target in (4, 5, 7):
        output = tmp_path / str(target)
        words = ["--set", f"quantization.target_bits={target}", "--set", f"output.directory={output}"]
        assert f"{target} bits a weight on average" in quantmill("plan", job, *words).stdout
        shown = quantmill("run", job, *words).stdout
        report = json.loads((output / "report.json").read_text())
        budget = report["bit_budget"]
        assert f"target_bits {target}" in shown
        assert target - 0.5 < report["bits_per_weight"] <= target
        assert budget["achieved"] == pytest.approx(report["bits_per_weight"])
        chosen = {(choice["block"], choice["group"]): choice["bits"] for choice in budget["groups"]}
        for linear in report["linears"]:
            assert linear["bits"] == (ruled.get(linear["module"]) or chosen[linear["block"], linear["group"]])
        assert len(chosen) == 3 * 4 - len(ruled)
        for choice in budget["groups"]:
            losses = [choice["losses"][str(bits)] for bits in (2, 3, 4, 8)]
            assert losses == sorted(losses, reverse=True)
            assert 0 < losses[-1] < 0.001 < losses[0] < 1
        uniform = [budget["uniform_loss"][str(bits)] for bits in (2, 3, 4, 8)]
        assert uniform[0] > budget["predicted_loss"] > uniform[3]
        predicted.append(budget["predicted_loss"])
        assert budget["predicted_perplexity_ratio"] == pytest.approx(np.exp(2 * predicted[-1]))
        quantmill("inspect", output)
    quantmill("run", job, *words[:-1], f"output.directory={tmp_path / 'three-ranks'}", ranks=3)
    assert digests(tmp_path / "three-ranks") == digests(output)
    assert predicted == sorted(predicted, reverse=True)
    held_out = write_store(tmp_path / "held_out.h5", random_sequences(9, 70, seed=1, vocabulary=VOCABULARY), model, VOCABULARY)
    words = ["--model", output, "--tokens", held_out, "--reference", model, "--json", tmp_path / "eval.json"]
    assert "was predicted" in quantmill("eval", *words).stdout
    reference = json.loads((tmp_path / "eval.json").read_text())["reference"]
    assert reference["predicted_perplexity"] == pytest.approx(budget["predicted_perplexity_ratio"] * reference["perplexity"])
    few = ["--set", "quantization.target_bits=6", "--set", "quantization.target_choices=4,8", "--set", f"output.directory={tmp_path / 'few'}"]
    quantmill("run", job, *few)
    budget = json.loads((tmp_path / "few" / "report.json").read_text())["bit_budget"]
    assert {choice["bits"] for choice in budget["groups"]} == {4, 8}
    assert "the fewest bits" in quantmill("run", job, *few, "--overwrite", "--set", "quantization.target_bits=5", code=2).stderr
    done = quantmill("run", job, "--set", "quantization.target_bits=2", code=2)
    assert "the fewest bits that this job can store take" in done.stderr


def test_too_few_tokens_are_a_fallback(quantmill: Run, tmp_path: Path) -> None:
    """Two tokens for widths of 64 and 96: their correlations are chance."""
    model = make_checkpoint(tmp_path / "model", "Llama")
    store = write_store(tmp_path / "calib.h5", [[1, 2, 3]], model, VOCABULARY)
    job = write_job(tmp_path / "job.yaml", model, store, tmp_path / "out", {"group_size": 32})
    assert "only the diagonal of the Hessian counted" in quantmill("run", job).stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {linear["fallback"] for linear in report["linears"]} == {"diagonal Hessian"}
    assert report["fallbacks"]["few_tokens"] == 14
    done = quantmill("run", job, "--set", "quantization.on_fallback=error", "--overwrite", code=2)
    assert "model.layers.0.self_attn.q_proj: diagonal Hessian where GPTQ was asked for" in done.stderr
