"""`quantmill eval` of a checkpoint that GPTQModel quantized: the numbers of transformers and GPTQModel."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_in_float32, make_model, random_sequences, write_store
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.config import GPTQConfig
from perplexity import load, perplexity

VOCABULARY = 128  # small, so that the model of random weights is far from uniform


# Mixed bits and groups, and linears that are left alone, as GPTQModel writes them.
DYNAMIC = {
    r"+:.*\.1\.self_attn\.[qkv]_proj": {"bits": 8, "group_size": 64},
    r"+:.*\.down_proj": {"bits": 2, "group_size": 16},
    r"-:.*\.0\.mlp\.(gate|up)_proj": {},
}


def quantize_by_gptqmodel(model: Path, output: Path, desc_act: bool = False, dynamic: dict[str, Any] | None = None) -> None:
    config = GPTQConfig(
        bits=4,
        group_size=32,
        sym=True,
        desc_act=desc_act,
        act_group_aware=False,
        device="cpu",
        offload_to_disk=False,
        dynamic=dynamic,
    )
    loaded = GPTQModel.load(str(model), config, dtype=torch.float16)
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in random_sequences(16, 128, 1, VOCABULARY)]
    loaded.quantize(samples, calibration_data_min_length=0, batch_size=1)
    loaded.save(str(output))


@torch.inference_mode()
def hidden_errors(model: torch.nn.Module, reference: torch.nn.Module, sequences: list[list[int]]) -> list[float]:
    """Relative error after each block, from hooks: the last of transformers' hidden_states is normed."""
    states: list[list[torch.Tensor]] = []
    for module in (model, reference):
        seen: list[torch.Tensor] = []
        states.append(seen)
        for layer in module.model.layers:
            layer.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out))
        for ids in sequences:
            module(torch.tensor([ids]))
    blocks = len(model.model.layers)
    ours, theirs = (
        [torch.cat([state.reshape(-1, state.shape[-1]) for state in seen[b::blocks]]).double() for b in range(blocks)]
        for seen in states
    )
    return [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="natural order"),
        pytest.param({"desc_act": True}, id="desc_act"),
        pytest.param({"dynamic": DYNAMIC}, id="dynamic"),
    ],
)
def test_perplexity_of_a_gptqmodel_checkpoint(quantmill: Callable[..., Any], tmp_path: Path, options: dict[str, Any]) -> None:
    model, output, file = tmp_path / "model", tmp_path / "out", tmp_path / "eval.json"
    make_model(model, "Llama", vocab_size=VOCABULARY)
    quantize_by_gptqmodel(model, output, **options)
    sequences = random_sequences(8, 120, 2, VOCABULARY)
    store = write_store(tmp_path / "tokens.h5", sequences, output, VOCABULARY)
    quantmill("eval", "--model", output, "--reference", model, "--tokens", store, "--json", file, "--allow-tokenizer-mismatch", ranks=2)
    ours = json.loads(file.read_text())

    loaded = GPTQModel.load(str(output), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    theirs = perplexity(loaded.model.to(torch.float32), store)
    print(f"perplexity {ours['perplexity']} here, {theirs} by GPTQModel and transformers")
    assert ours["perplexity"] == pytest.approx(theirs, rel=1e-3)
    dequantized = load(output)
    assert ours["perplexity"] == pytest.approx(perplexity(dequantized, store), rel=1e-5)
    assert math.isfinite(ours["reference"]["kl_divergence"])
    expected = hidden_errors(dequantized, load_in_float32(model), sequences)
    assert ours["reference"]["hidden_error"] == pytest.approx(expected, rel=1e-3)
