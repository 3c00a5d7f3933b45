"""What quantization.target_bits measures: the errors of blocks' outputs, against transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from block_errors import Blocks, token_errors, weights_of
from conftest import load_in_float32, make_model, random_sequences, write_job, write_store


@pytest.mark.parametrize(("family", "ranks"), [("Llama", 1), ("Qwen3", 3)])
@torch.inference_mode()
def test_losses_are_errors_of_block_outputs(quantmill: Callable[..., Any], tmp_path: Path, family: str, ranks: int) -> None:
    model, output = tmp_path / "model", tmp_path / "out"
    make_model(model, family)
    sequences = random_sequences(32, 150, seed=1)
    store = write_store(tmp_path / "calib.h5", sequences, model)
    # With the original model's Hessians and nothing to refine, the checkpoint holds what was measured.
    scheme = {"group_size": 64, "target_bits": 4.5, "propagate": "original"}
    quantmill("run", write_job(tmp_path / "job.yaml", model, store, output, scheme), ranks=ranks)
    budget = json.loads((output / "report.json").read_text())["bit_budget"]
    assert len({choice["bits"] for choice in budget["groups"]}) > 1

    original, weights = load_in_float32(model), weights_of(output)
    probes = [Blocks(original, ids) for ids in sequences[:2]]  # those of the first of 16 shards
    for choice in budget["groups"]:
        errors = []
        for probe in probes:
            expected = probe.output(choice["block"])
            with probe.quantized(choice["block"], choice["group"], weights):
                errors.append(token_errors(probe.output(choice["block"]), expected))
        assert choice["losses"][str(choice["bits"])] == pytest.approx(torch.cat(errors).mean().item(), rel=1e-3), choice
