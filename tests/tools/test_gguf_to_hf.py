"""tools/gguf_to_hf.py on tiny files written with the gguf package."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_to_hf import Unsupported, byte_count, gguf_to_hf
from safetensors.numpy import load_file
from tokenizers import Tokenizer

HIDDEN, INNER, HEADS, KV_HEADS, BLOCKS = 64, 96, 4, 2, 2
TOKENS = ["<|end|>", "a", "b", "ab", "1"]


def as_gguf_stores(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows that llama.cpp's converter writes: first and second half of a head interleaved."""
    head = len(rows) // heads
    order = [h * head + half * head // 2 + i for h in range(heads) for i in range(head // 2) for half in (0, 1)]
    return rows[order]


def weights() -> dict[str, np.ndarray]:
    """The weights under their Hugging Face names."""
    rng = np.random.default_rng(0)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"model.embed_tokens.weight": (len(TOKENS), HIDDEN), "model.norm.weight": (HIDDEN,)}
    for block in range(BLOCKS):
        prefix = f"model.layers.{block}."
        shapes |= {
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
        }
        for name, rows in {"q": HIDDEN, "k": kv, "v": kv, "o": HIDDEN}.items():
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, HIDDEN)
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[prefix + "mlp.down_proj.weight"] = (HIDDEN, INNER)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def stored_name(name: str) -> str:
    """model.layers.0.self_attn.q_proj.weight -> blk.0.attn_q.weight"""
    for hf, stored in {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers.": "blk.",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.": "ffn_",
        "_proj": "",
        "lm_head": "output",
    }.items():
        name = name.replace(hf, stored)
    return name


def write_gguf(
    file: Path,
    tensors: dict[str, np.ndarray],
    architecture: str = "llama",
    pre: str = "smollm",
    experts: int = 0,
    quantized: gguf.GGMLQuantizationType | None = None,
) -> Path:
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(BLOCKS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if experts:
        writer.add_expert_count(experts)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(TOKENS) - 1))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages }}")
    for name, values in tensors.items():
        stored = values
        if ".q_proj" in name:
            stored = as_gguf_stores(values, HEADS)
        elif ".k_proj" in name:
            stored = as_gguf_stores(values, KV_HEADS)
        if quantized is not None and values.ndim == 2:
            writer.add_tensor(stored_name(name), gguf.quantize(stored, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(stored_name(name), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def config_of(directory: Path) -> dict[str, object]:
    return json.loads((directory / "config.json").read_text())


def test_float32_weights_come_back_exactly(tmp_path: Path) -> None:
    expected = weights()
    gguf_to_hf(write_gguf(tmp_path / "m.gguf", expected), tmp_path / "hf", "float32")
    got = load_file(tmp_path / "hf" / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)


def test_quantized_weights_come_back_within_their_step(tmp_path: Path) -> None:
    expected = weights()
    gguf_to_hf(write_gguf(tmp_path / "m.gguf", expected, quantized=gguf.GGMLQuantizationType.Q8_0), tmp_path / "hf")
    got = load_file(tmp_path / "hf" / "model.safetensors")
    for name, values in expected.items():
        assert got[name].dtype == np.float16
        np.testing.assert_allclose(got[name], values, atol=np.abs(values).max() / 127, err_msg=name)


def test_config(tmp_path: Path) -> None:
    gguf_to_hf(write_gguf(tmp_path / "m.gguf", weights()), tmp_path / "hf")
    config = config_of(tmp_path / "hf")
    expected = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": BLOCKS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": len(TOKENS),
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    assert {key: config[key] for key in expected} == expected


def test_untied_head_is_kept(tmp_path: Path) -> None:
    tensors = weights() | {"lm_head.weight": np.ones((len(TOKENS), HIDDEN), np.float32)}
    gguf_to_hf(write_gguf(tmp_path / "m.gguf", tensors), tmp_path / "hf")
    assert config_of(tmp_path / "hf")["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(tmp_path / "hf" / "model.safetensors")


def test_tokenizer(tmp_path: Path) -> None:
    gguf_to_hf(write_gguf(tmp_path / "m.gguf", weights()), tmp_path / "hf")
    tokenizer = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert tokenizer.encode("aba11<|end|>").ids == [3, 1, 4, 4, 0]
    assert tokenizer.decode([3, 0, 1], skip_special_tokens=True) == "aba"
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["chat_template"]) == ("<|end|>", "{{ messages }}")


def test_shards_and_index(tmp_path: Path) -> None:
    expected = weights()
    gguf_to_hf(write_gguf(tmp_path / "m.gguf", expected), tmp_path / "hf", "float32", max_shard_size=60_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in expected.values())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    sizes = []
    for file in files:
        shard = load_file(tmp_path / "hf" / file)
        sizes.append(sum(values.nbytes for values in shard.values()))
        assert set(shard) == {name for name, place in index["weight_map"].items() if place == file}
        for name, values in shard.items():
            np.testing.assert_array_equal(values, expected[name])
    assert max(sizes) <= 60_000
    assert len(files) <= 2 * sum(sizes) / 60_000 + 1  # two neighbours never fit into one


def test_bfloat16_rounds_to_nearest_even(tmp_path: Path) -> None:
    tensors = weights()
    values = np.array([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-8 + 2**-20, -1.0 - 2**-7], np.float32)
    tensors["model.norm.weight"][:5] = values
    gguf_to_hf(write_gguf(tmp_path / "m.gguf", tensors), tmp_path / "hf", "bfloat16")
    content = (tmp_path / "hf" / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    entry = json.loads(content[8 : 8 + length])["model.norm.weight"]
    assert entry["dtype"] == "BF16"
    begin = 8 + length + entry["data_offsets"][0]
    bits = np.frombuffer(content[begin : begin + 10], np.uint16).astype(np.uint32) << 16
    assert bits.view(np.float32).tolist() == [1.0, 1.0, 1.0 + 2**-6, 1.0 + 2**-7, -1.0 - 2**-7]


@pytest.mark.parametrize(
    ("options", "extra", "message"),
    [
        ({"architecture": "gemma"}, {}, "architecture 'gemma'"),
        ({"experts": 8}, {}, "mixture-of-experts"),
        ({"pre": "deepseek-llm"}, {}, "pre-tokenizer 'deepseek-llm'"),
        ({}, {"rope_freqs.weight": np.ones(8, np.float32)}, "scaled rotary"),
        (
            {},
            {"model.layers.0.self_attn.sinks.weight": np.ones(8, np.float32)},
            "tensor 'blk.0.attn_sinks.weight'",
        ),
        (
            {},
            {"model.norm.weight": np.full(HIDDEN, 70000.0, np.float32)},
            "reaches 70000, which float16 cannot hold",
        ),
        ({}, {"model.norm.weight": np.full(HIDDEN, np.nan, np.float32)}, "reaches nan"),
    ],
)
def test_refused(tmp_path: Path, options: dict[str, object], extra: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        gguf_to_hf(write_gguf(tmp_path / "m.gguf", weights() | extra, **options), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_refuses_a_directory_in_use(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", weights())
    with pytest.raises(Unsupported, match="is not empty"):
        gguf_to_hf(file, tmp_path)


def test_byte_count() -> None:
    assert [byte_count(text) for text in ("7", "2KB", "500MB", "5GB", "1 T")] == [
        7,
        2000,
        500 * 10**6,
        5 * 10**9,
        10**12,
    ]
