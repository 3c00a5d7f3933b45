#!/usr/bin/env python3
"""Turns a GGUF file of the llama architecture into a plain Hugging Face checkpoint directory, without torch.

Quantized tensors are expanded to ordinary floating-point weights; the rows of the query and key projections, which GGUF
stores in another order, are put back. The directory gets model.safetensors (or shards and an index), config.json,
generation_config.json, tokenizer.json and tokenizer_config.json with the chat template.

Example: tools/gguf_to_hf.py SmolLM2-135M-Instruct.Q4_1.gguf models/SmolLM2-135M-Instruct
"""

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from safetensors import TensorSpec, serialize_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}

GLOBAL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# How tokenizer.ggml.pre splits text before the byte-level merges.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
SPECIAL_TOKENS = {
    "bos": "bos",
    "eos": "eos",
    "pad": "padding",
    "unk": "unknown",
}  # name here -> name in GGUF keys
CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


class Unsupported(Exception):
    """The file is none that this program can convert faithfully."""


class Metadata:
    """The key-value pairs of a GGUF file, with errors that name the missing key."""

    def __init__(self, reader: GGUFReader) -> None:
        self.values = {key: field.contents() for key, field in reader.fields.items()}

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise Unsupported(f"the file has no metadata key '{key}'")
        return self.values[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)


def check(meta: Metadata, names: set[str]) -> None:
    """Refuses what would change the mathematics and cannot be expressed faithfully."""
    architecture = meta["general.architecture"]
    if architecture != "llama":
        raise Unsupported(f"architecture '{architecture}' (only 'llama' is supported)")
    if meta.get("llama.expert_count", 0):
        raise Unsupported("mixture-of-experts models")
    if meta.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in names:
        raise Unsupported(
            "scaled rotary embeddings, whose parameters a GGUF file does not keep: take the original checkpoint"
        )


def number(value: float) -> float:
    """A float32 of the file as the short decimal that was meant (9.99999975e-06 is 1e-05)."""
    return float(f"{value:.7g}")


def model_config(meta: Metadata, dtype: str, names: set[str]) -> dict[str, Any]:
    heads, hidden = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    special = {
        f"{kind}_token_id": meta.get(f"tokenizer.ggml.{key}_token_id")
        for kind, key in SPECIAL_TOKENS.items()
        if kind != "unk"
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": meta.get("llama.attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": number(meta["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": number(meta.get("llama.rope.freq_base", 10000.0)),
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        "tie_word_embeddings": "output.weight" not in names,
        "torch_dtype": dtype,
        **{key: value for key, value in special.items() if value is not None},
    }


def hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    if name in GLOBAL_TENSORS:
        return GLOBAL_TENSORS[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if not match or match[2] not in BLOCK_TENSORS:
        raise Unsupported(f"tensor '{name}'")
    return f"model.layers.{match[1]}.{BLOCK_TENSORS[match[2]]}.{match[3]}"


def natural_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's order of a head's rows (0, h, 1, h+1, ... with h half the head) back to 0, 1, ..., h, h+1, ..."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounds float32 values to the nearest of dtype; bfloat16, which numpy lacks, as its 16 bits, ties to even."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(dtype)


def convert(tensor: ReaderTensor, config: dict[str, Any], dtype: str) -> np.ndarray:
    """The weights of one tensor in the order and type of the checkpoint."""
    values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    values = values.reshape([int(n) for n in reversed(tensor.shape)])
    if re.search(r"\.attn_q\.", tensor.name):
        values = natural_rows(values, config["num_attention_heads"])
    elif re.search(r"\.attn_k\.", tensor.name):
        values = natural_rows(values, config["num_key_value_heads"])
    largest = np.abs(values).max(initial=0.0)
    if not np.isfinite(largest) or (dtype == "float16" and largest > np.finfo(np.float16).max):
        raise Unsupported(f"tensor '{tensor.name}' reaches {largest:g}, which {dtype} cannot hold (try --dtype)")
    return rounded(np.ascontiguousarray(values), dtype)


def write_shard(file: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    specs = {
        k: TensorSpec(dtype=dtype, shape=v.shape, data_ptr=v.ctypes.data, data_len=v.nbytes) for k, v in tensors.items()
    }
    serialize_file(specs, file, {"format": "pt"})
    file.chmod(0o644)  # the package leaves it readable by its owner only


def write_weights(tensors: list[ReaderTensor], config: dict[str, Any], dtype: str, limit: int, directory: Path) -> None:
    """Writes the shards, each at most `limit` bytes (or one tensor), and the index if there are several."""
    shards: list[list[ReaderTensor]] = [[]]
    room = limit
    for tensor in sorted(tensors, key=lambda t: hf_name(t.name)):
        size = int(tensor.n_elements) * BYTES[dtype]
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= size
    single = len(shards) == 1
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if single else f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_shard(directory / file, {hf_name(t.name): convert(t, config, dtype) for t in shard}, dtype)
        weight_map |= {hf_name(t.name): file for t in shard}
    if not single:
        total = sum(int(t.n_elements) for t in tensors) * BYTES[dtype]
        write_json(
            directory / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )


def write_tokenizer(meta: Metadata, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json (byte-level BPE vocabularies only)."""
    kind, pre = meta["tokenizer.ggml.model"], meta.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise Unsupported(
            f"tokenizer '{kind}' with pre-tokenizer '{pre}' (only 'gpt2' with {', '.join(PRE_TOKENIZERS)})"
        )
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=pre == "llama-bpe")
    )
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True):
        if token_type in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=token_type == CONTROL, normalized=False)])
    special = {name: meta.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL_TOKENS.items()}
    config: dict[str, Any] = {f"{name}_token": tokens[i] for name, i in special.items() if i is not None}
    if meta.get("tokenizer.ggml.add_bos_token", False):
        bos = config["bos_token"]
        tokenizer.post_processor = TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, special["bos"])])
    if template := meta.get("tokenizer.chat_template"):
        config["chat_template"] = template
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", config)


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def gguf_to_hf(gguf: Path, output: Path, dtype: str = "float16", max_shard_size: int = 5 * 10**9) -> None:
    """Converts into a temporary directory beside `output` and renames it, so that `output` is always whole."""
    if output.exists() and any(output.iterdir()):
        raise Unsupported(f"output directory '{output}' is not empty")
    reader = GGUFReader(gguf)
    meta = Metadata(reader)
    names = {tensor.name for tensor in reader.tensors}
    check(meta, names)
    config = model_config(meta, dtype, names)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tokenizer(meta, partial)
    write_weights(reader.tensors, config, dtype, max_shard_size, partial)
    write_json(partial / "config.json", config)
    write_json(partial / "generation_config.json", {k: v for k, v in config.items() if k.endswith("_token_id")})
    if license_id := meta.get("general.license"):
        name = meta.get("general.name", gguf.stem)
        (partial / "README.md").write_text(
            f"---\nlicense: {license_id}\n---\n{name}, converted from {gguf.name}.\n", "utf-8"
        )
    os.replace(partial, output)


def byte_count(text: str) -> int:
    """5GB -> 5000000000"""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", text, re.IGNORECASE)
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no size such as 500MB or 5GB")
    return int(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, metavar="GGUF_FILE")
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR", help="new or empty directory")
    parser.add_argument("--dtype", choices=BYTES, default="float16", help="type of the weights (default: %(default)s)")
    parser.add_argument(
        "--max-shard-size", type=byte_count, default="5GB", help="split larger models (default: %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        gguf_to_hf(arguments.gguf, arguments.output, arguments.dtype, arguments.max_shard_size)
    except (Unsupported, OSError, ValueError) as error:
        sys.exit(f"gguf_to_hf: {arguments.gguf}: {error}")
    print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    main()
