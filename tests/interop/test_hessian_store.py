"""The Hessians of `propagate: original` against those that transformers' own inputs give, in double precision."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import Sequences, load_in_float32, make_model, random_sequences, relative_error, write_job, write_store
from transformers import PreTrainedModel

# The groups of linears with one input, and one linear of each.
GROUPS = {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj", "gate_up": "mlp.gate_proj", "down": "mlp.down_proj"}


@contextmanager
def inputs_of(model: PreTrainedModel) -> Iterator[dict[tuple[int, str], list[np.ndarray]]]:
    """Collects what reaches each group of each block: [tokens, columns] a sequence."""
    inputs: dict[tuple[int, str], list[np.ndarray]] = {}
    handles = []
    for block, layer in enumerate(model.model.layers):
        for group, name in GROUPS.items():
            rows = inputs.setdefault((block, group), [])
            hook = lambda _, arguments, rows=rows: rows.append(arguments[0][0].double().numpy())  # noqa: E731
            handles.append(layer.get_submodule(name).register_forward_pre_hook(hook))
    yield inputs
    for handle in handles:
        handle.remove()


@torch.inference_mode()
def expected_hessians(model: PreTrainedModel, sequences: Sequences) -> dict[tuple[int, str], np.ndarray]:
    with inputs_of(model) as inputs:
        for ids in sequences:
            model(torch.tensor([ids]))
    return {place: sum(x.T @ x for x in rows) for place, rows in inputs.items()}


def stored_hessian(directory: Path, block: int, group: str) -> np.ndarray:
    with h5py.File(directory / f"block-{block:05}.h5") as file:
        exponents, total = file[group]["exponents"][:].astype(np.float64), file[group]["sum"][:].astype(np.float64)
    rows, columns = np.tril_indices(len(exponents))
    hessian = np.zeros((len(exponents), len(exponents)))
    hessian[rows, columns] = hessian[columns, rows] = total * np.exp2(-exponents[rows] - exponents[columns])
    return hessian


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_inputs_of_the_unquantized_model(quantmill: Callable[..., Any], tmp_path: Path, family: str) -> None:
    make_model(tmp_path / "model", family, torch.bfloat16)
    sequences = random_sequences(6, 150)
    store = write_store(tmp_path / "store.h5", sequences, tmp_path / "model")
    # Coarse codes: had they any part in the later blocks' inputs, it would show.
    settings = {"bits": 2, "group_size": 32, "propagate": "original"}
    job = write_job(tmp_path / "job.yaml", tmp_path / "model", store, tmp_path / "out", settings)
    quantmill("run", job, "--set", f"calibration.save_hessians={tmp_path / 'hessians'}", ranks=2)
    for (block, group), expected in expected_hessians(load_in_float32(tmp_path / "model"), sequences).items():
        assert relative_error(stored_hessian(tmp_path / "hessians", block, group), expected) <= 1e-4, (block, group)
