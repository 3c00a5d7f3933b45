"""tools/gguf_to_hf.py against transformers' own GGUF loading, on the demo's GGUF file."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = [
    "The quick brown fox, aged 1234, didn't jump.\n\n  Über   naïve 漢字 🙂\t",
    "<|im_start|>user\nHello<|im_end|>\n<|endoftext|>",
    "def f(x):\n    return x**2 # 3.14159",
]


def test_weights_are_transformers_own_rounded_to_half(demo_model: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(demo_model.parent, gguf_file=GGUF, dtype=torch.float32).state_dict()
    got = load_file(demo_model / "model.safetensors")
    assert got.keys() == expected.keys() - {"lm_head.weight"}  # tied
    for name, values in got.items():
        np.testing.assert_array_equal(values.numpy(), expected[name].half().numpy(), err_msg=name)


def test_config_means_the_same(demo_model: Path) -> None:
    expected, got = (
        AutoConfig.from_pretrained(demo_model.parent, gguf_file=GGUF),
        AutoConfig.from_pretrained(demo_model),
    )
    for key in (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
    ):
        assert getattr(got, key) == getattr(expected, key), key
    np.testing.assert_allclose(got.rms_norm_eps, expected.rms_norm_eps, rtol=1e-6)
    np.testing.assert_allclose(got.rope_parameters["rope_theta"], expected.rope_parameters["rope_theta"], rtol=1e-6)
    assert got.tie_word_embeddings


def test_tokenizer_gives_the_same_ids(demo_model: Path) -> None:
    expected = AutoTokenizer.from_pretrained(demo_model.parent, gguf_file=GGUF)
    got = AutoTokenizer.from_pretrained(demo_model)
    for text in TEXTS:
        assert got(text).input_ids == expected(text).input_ids
        assert got.decode(got(text).input_ids) == text
    assert got.chat_template == expected.chat_template
