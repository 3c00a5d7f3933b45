"""What the interop tests share beside ../program.py: tiny random models made by transformers, the demo model."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before the imports of the tests: GPTQModel reads these when it is imported.
os.environ |= {"GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1", "GPTQMODEL_DISABLE_PACK_EXT": "1"}

TESTS = Path(__file__).resolve().parents[1]
# tests/program.py, and the independent reader of GPTQ checkpoints.
sys.path[:0] = [str(TESTS), str(TESTS.parent / "bench" / "peers")]

import numpy as np
import pytest
import torch
import transformers
from program import DEMO, ROOT, VOCABULARY, Sequences, quantmill, random_sequences, write_job, write_store  # noqa: F401
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo's model directory, made by the tools if it is not there."""
    directory = DEMO / "SmolLM2-135M-Instruct"
    subprocess.run([sys.executable, ROOT / "tools" / "fetch_demo_model.py", directory], check=True)
    return directory


FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "tie_word_embeddings": False,
    },
    "Mistral": {"sliding_window": None, "head_dim": 32},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 64, "tie_word_embeddings": True},
}


def make_model(directory: Path, family: str, dtype: torch.dtype = torch.float16, **settings: Any) -> None:
    """Saves a tiny model with random weights, large enough that attention, biases and norms all matter."""
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        | FAMILIES[family]
        | settings
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = name.endswith("norm.weight")
            parameter.normal_(
                1.0 if norm else 0.0, 0.2 if norm or name.endswith("bias") else parameter.shape[-1] ** -0.5
            )
    model.to(dtype).save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def our_logits(quantmill: Callable[..., Any], model: Path, store: Path, file: Path) -> np.ndarray:
    """[tokens of all sequences, vocabulary], computed by our program."""
    quantmill("eval", "--model", model, "--tokens", store, "--logits", file)
    return load_file(file)["logits"]


def load_in_float32(directory: Path) -> PreTrainedModel:
    """Loads anew: a model that was converted after its making has rounded rotary frequencies too."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.inference_mode()
def their_logits(model: torch.nn.Module, sequences: Sequences) -> np.ndarray:
    """The same from a transformers model."""
    return np.concatenate([model(torch.tensor([ids])).logits[0].float().numpy() for ids in sequences])


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    error = float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))
    print(f"relative error {error:.2e}")
    return error
