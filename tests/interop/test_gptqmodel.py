"""Checkpoints that we write, loaded by GPTQModel and by transformers: the same model as ours."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    make_model,
    our_logits,
    random_sequences,
    relative_error,
    their_logits,
    write_job,
    write_store,
)
from gptqmodel import BACKEND, GPTQModel
from perplexity import load
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

SCHEMES = [(bits, format, True) for bits in (2, 3, 4, 8) for format in ("gptq", "gptq_v2")]
SCHEMES += [(bits, "gptq_v2", False) for bits in (2, 3, 4, 8)]
Quantize = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    make_model(directory, "Llama")
    return directory


@pytest.fixture
def quantize(quantmill: Callable[..., Any], model: Path, tmp_path: Path) -> Quantize:
    """Quantizes the tiny model in groups of 64 and returns the checkpoint directory."""

    def run(bits: int, format: str, sym: bool = True, **options: Any) -> Path:
        output = tmp_path / "out"
        store = write_store(tmp_path / "calib.h5", random_sequences(16, 128, seed=1), model)
        scheme = {"bits": bits, "group_size": 64, "sym": sym} | options
        quantmill("run", write_job(tmp_path / "job.yaml", model, store, output, scheme, format=format), ranks=1)
        return output

    return run


def has_negative_scales(directory: Path) -> bool:
    tensors = [load_file(file) for file in directory.glob("*.safetensors")]
    return any((tensor < 0).any() for file in tensors for name, tensor in file.items() if name.endswith(".scales"))


def loaded_by_gptqmodel(directory: Path) -> torch.nn.Module:
    """Its torch kernel in float32: it insists on loading in half precision."""
    loaded = GPTQModel.load(str(directory), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    return loaded.model.to(torch.float32)


@pytest.mark.parametrize(("bits", "format", "sym"), SCHEMES)
def test_gptqmodel_computes_what_we_compute(
    quantmill: Callable[..., Any], quantize: Quantize, tmp_path: Path, bits: int, format: str, sym: bool
) -> None:
    output = quantize(bits, format, sym)
    sequences = random_sequences(3, 100, seed=2)
    store = write_store(tmp_path / "tokens.h5", sequences, output)
    ours = our_logits(quantmill, output, store, tmp_path / "logits.safetensors")
    assert relative_error(their_logits(loaded_by_gptqmodel(output), sequences), ours) <= 1e-2
    assert relative_error(their_logits(load(output), sequences), ours) <= 1e-4  # the independent reader


SIGNED = {"scale_search": "hessian", "signed_scales": True}
OPTIONS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "desc_act": (4, "gptq", {"desc_act": True}),
    "desc_act with static groups": (4, "gptq", {"desc_act": True, "static_groups": True}),
    "group-aware": (4, "gptq", {"act_group_aware": True}),
    "group-aware, asymmetric, mse": (2, "gptq_v2", {"act_group_aware": True, "sym": False, "scale_search": "mse"}),
    "signed scales, 4 bits": (4, "gptq", SIGNED | {"scale_rounding": "bf16"}),
    "signed scales, 3 bits": (3, "gptq", SIGNED | {"act_group_aware": True}),
    "signed scales, 2 bits": (2, "gptq_v2", SIGNED | {"desc_act": True}),
    "signed scales, 8 bits": (8, "gptq", SIGNED | {"static_groups": True}),
    "preset best, 3 bits": (3, "gptq", {"preset": "best", "signed_scales": True}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_gptqmodel_takes_every_order_and_negative_scales(
    quantmill: Callable[..., Any], quantize: Quantize, tmp_path: Path, case: str
) -> None:
    bits, format, options = OPTIONS[case]
    output = quantize(bits, format, **{"preset": "plain"} | options)
    config = json.loads((output / "quantize_config.json").read_text())
    assert config["desc_act"] == (options.get("desc_act", False) and not options.get("static_groups", False))
    assert has_negative_scales(output) == options.get("signed_scales", False)
    sequences = random_sequences(3, 100, seed=2)
    store = write_store(tmp_path / "tokens.h5", sequences, output)
    ours = our_logits(quantmill, output, store, tmp_path / "logits.safetensors")
    assert relative_error(their_logits(loaded_by_gptqmodel(output), sequences), ours) <= 1e-2
    assert relative_error(their_logits(load(output), sequences), ours) <= 1e-4  # the independent reader


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_gptqmodel_computes_what_a_gpu_s_checkpoint_holds(quantmill: Callable[..., Any], tmp_path: Path, bits: int) -> None:
    """Checkpoints that a GPU made, here or on another machine (make_cuda_job.py)."""
    made = os.environ.get("QUANTMILL_CUDA_CHECKPOINTS")
    if not made:
        pytest.skip("no checkpoints made on a GPU: make_cuda_job.py says how (QUANTMILL_CUDA_CHECKPOINTS)")
    output = Path(made) / f"W{bits}"
    report = json.loads((output / "report.json").read_text())
    assert report["backend"] == "cuda", report["devices"]
    sequences = random_sequences(3, 100, seed=2)
    store = write_store(tmp_path / "tokens.h5", sequences, output)
    ours = our_logits(quantmill, output, store, tmp_path / "logits.safetensors")
    assert relative_error(their_logits(loaded_by_gptqmodel(output), sequences), ours) <= 1e-2
    assert relative_error(their_logits(load(output), sequences), ours) <= 1e-4


LOADED_BY_TRANSFORMERS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "4 bits": (4, "gptq", {}),
    "4 bits, v2": (4, "gptq_v2", {}),
    "8 bits": (8, "gptq", {}),
    "3 bits": (3, "gptq", {}),
    "2 bits": (2, "gptq", {}),
    "asymmetric": (4, "gptq_v2", {"sym": False}),
    "desc_act": (4, "gptq", {"desc_act": True}),
    "desc_act with static groups": (4, "gptq", {"desc_act": True, "static_groups": True}),
}


@pytest.mark.parametrize("case", LOADED_BY_TRANSFORMERS)
def test_transformers_loads_the_checkpoint(quantize: Quantize, case: str) -> None:
    """Its kernel for CPUs is not exact, so compare how well it predicts what the exact model holds most likely."""
    bits, format, options = LOADED_BY_TRANSFORMERS[case]
    output = quantize(bits, format, **options)
    assert has_negative_scales(output) == options.get("sym", True)
    sequences = random_sequences(3, 100, seed=2)
    exact = their_logits(load(output), sequences)
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float16, device_map="cpu")
    got = their_logits(loaded, sequences)
    likeliest = exact.argmax(axis=1)
    assert perplexity(got, likeliest) == pytest.approx(perplexity(exact, likeliest), rel=0.02)


def perplexity(logits: np.ndarray, labels: np.ndarray) -> float:
    values = torch.from_numpy(logits).double()
    return torch.nn.functional.cross_entropy(values, torch.from_numpy(labels)).exp().item()


RULES = [
    {"match": "model.layers.1.self_attn.[qkv]_proj", "bits": 8, "group_size": 32},
    {"match": r"re:.*\.0\.mlp\.(gate|up)_proj", "skip": True},
    {"match": "*.down_proj", "bits": 2, "group_size": 16, "desc_act": True},
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param({"overrides": RULES}, id="overrides"),
        pytest.param({"target_bits": 4.5}, id="target_bits"),
        pytest.param({"lm_head": {"bits": 8, "group_size": 32}}, id="lm_head of its own"),
        pytest.param({"lm_head": {"bits": 4}}, id="lm_head alike"),
    ],
)
def test_gptqmodel_loads_mixed_linears_and_lm_head(
    quantmill: Callable[..., Any], tmp_path: Path, scheme: dict[str, Any], tied: bool
) -> None:
    model, output = tmp_path / "model", tmp_path / "out"
    make_model(model, "Llama", tie_word_embeddings=tied, attention_bias=True)
    store = write_store(tmp_path / "calib.h5", random_sequences(16, 128, seed=1), model)
    quantmill("run", write_job(tmp_path / "job.yaml", model, store, output, {"group_size": 64} | scheme), ranks=1)
    sequences = random_sequences(3, 100, seed=2)
    ours = our_logits(quantmill, output, write_store(tmp_path / "tokens.h5", sequences, output), tmp_path / "logits")
    assert relative_error(their_logits(loaded_by_gptqmodel(output), sequences), ours) <= 1e-2


def test_transformers_leaves_skipped_linears_alone(quantmill: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    """Of one block's gate and up linears: names of whole modules, since its list is of a block otherwise."""
    output = tmp_path / "out"
    store = write_store(tmp_path / "calib.h5", random_sequences(16, 128, seed=1), model)
    scheme = {"group_size": 64, "overrides": [RULES[1]]}
    quantmill("run", write_job(tmp_path / "job.yaml", model, store, output, scheme), ranks=1)
    sequences = random_sequences(3, 100, seed=2)
    exact = their_logits(load(output), sequences)
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float16, device_map="cpu")
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert type(loaded.model.layers[1].mlp.up_proj) is not torch.nn.Linear
    got = their_logits(loaded, sequences)
    likeliest = exact.argmax(axis=1)
    assert perplexity(got, likeliest) == pytest.approx(perplexity(exact, likeliest), rel=0.02)
