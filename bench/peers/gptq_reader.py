"""An independent reader of GPTQ checkpoints: plain numpy after the format's description, sharing no code with ours."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [n, columns] -> codes [n * 32 / bits, columns]: each column is one LSB-first bit stream."""
    stream = np.ascontiguousarray(words.astype("<u4").T).view(np.uint8)
    ones = np.unpackbits(stream, axis=1, bitorder="little").reshape(words.shape[1], -1, bits)
    return (ones @ (1 << np.arange(bits))).astype(np.int32).T


def dequantize(tensors: dict[str, np.ndarray], prefix: str, bits: int, version: str) -> np.ndarray:
    """The float32 weight [rows, columns] of one linear from its qweight, qzeros, scales and g_idx."""
    codes = unpack(tensors[f"{prefix}.qweight"], bits)  # [columns, rows]
    zeros = unpack(tensors[f"{prefix}.qzeros"].T, bits).T + (version == "gptq")  # [groups, rows]
    groups = tensors[f"{prefix}.g_idx"]
    scales = tensors[f"{prefix}.scales"].astype(np.float32)
    return np.ascontiguousarray((scales[groups] * (codes - zeros[groups])).T)


def read_raw(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint; bfloat16, which numpy lacks, as float32."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            tensors[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return tensors


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    """The float32 weights of a checkpoint, quantized by GPTQ or not, under the names of the unquantized model."""
    tensors = read_raw(directory)
    config = json.loads((directory / "config.json").read_text()).get("quantization_config", {})
    version = config.get("checkpoint_format") or config.get("format")
    weights = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".")
        if kind == "qweight":
            bits = tensor.shape[0] * 32 // tensors[f"{prefix}.g_idx"].size  # linears may differ (`dynamic`)
            weights[f"{prefix}.weight"] = dequantize(tensors, prefix, bits, version)
        elif kind not in {"qzeros", "scales", "g_idx"}:
            weights[name] = tensor.astype(np.float32)
    return weights


def round_to_nearest(weight: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """Plain rounding on the symmetric grid that both quantizers use: scale 2 absmax / (2^bits - 1) in fp16."""
    rows, columns = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -columns % group_size))).reshape(rows, -1, group_size)
    scale = (2 * np.abs(padded).max(axis=2, keepdims=True) / (2**bits - 1)).astype(np.float16).astype(np.float32)
    scale[scale == 0] = np.finfo(np.float16).smallest_normal
    half = 2 ** (bits - 1)
    return (scale * np.clip(np.rint(padded / scale), -half, half - 1)).reshape(rows, -1)[:, :columns].astype(np.float32)
