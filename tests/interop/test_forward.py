"""Our forward pass against transformers in float32: tiny random models of every family, and the demo model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    load_in_float32,
    make_model,
    our_logits,
    random_sequences,
    relative_error,
    their_logits,
    write_store,
)
from transformers import AutoTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CASES = [
    ("Llama", "bfloat16", {}),
    ("Llama", "float32", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    (
        "Llama",
        "float16",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "num_key_value_heads": 1},
    ),
    ("Mistral", "bfloat16", {}),
    ("Mistral", "float16", {"sliding_window": 48}),  # most of the sequences are longer
    ("Qwen2", "bfloat16", {}),
    ("Qwen3", "bfloat16", {}),
    ("Qwen3", "float16", {"tie_word_embeddings": False}),
]


@pytest.mark.parametrize(
    ("family", "dtype", "settings"), CASES, ids=lambda value: value if isinstance(value, str) else None
)
def test_tiny_models(
    quantmill: Callable[..., Any], tmp_path: Path, family: str, dtype: str, settings: dict[str, Any]
) -> None:
    make_model(tmp_path / "model", family, DTYPES[dtype], **settings)
    sequences = random_sequences(5, 200)
    store = write_store(tmp_path / "store.h5", sequences, tmp_path / "model")
    got = our_logits(quantmill, tmp_path / "model", store, tmp_path / "logits.safetensors")
    assert relative_error(got, their_logits(load_in_float32(tmp_path / "model"), sequences)) <= 1e-4


def test_demo_model(quantmill: Callable[..., Any], tmp_path: Path, demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    texts = [
        "The capital of France is Paris, and that of Italy is Rome." * 8,
        "int main() { return 0; }",
        "Once upon a time",
    ]
    sequences = [tokenizer(text).input_ids for text in texts]
    store = write_store(tmp_path / "store.h5", sequences, demo_model, len(tokenizer))
    got = our_logits(quantmill, demo_model, store, tmp_path / "logits.safetensors")
    assert relative_error(got, their_logits(load_in_float32(demo_model), sequences)) <= 1e-3
