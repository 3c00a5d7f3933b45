#!/usr/bin/env python3
"""Prints the perplexity of a checkpoint on a token store, computed by transformers in float32, as one line of JSON.

A GPTQ checkpoint is dequantized by gptq_reader.py first, so that no kernel of any tool takes part. The cross entropy is
summed in float64 over every token but the first of each sequence. Started by bench/compare_gptqmodel.py.
"""

import argparse
import json
import math
import re
from pathlib import Path

import h5py
import torch
from gptq_reader import read_weights, round_to_nearest
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BLOCK_LINEAR = re.compile(r"\.layers\.\d+\..*_proj\.weight$")


def load(directory: Path, bits: int | None = None, group_size: int = 128) -> PreTrainedModel:
    """The model in float32; with `bits`, the linears of its blocks rounded to nearest."""
    weights = read_weights(directory)
    if bits:
        weights |= {k: round_to_nearest(w, bits, group_size) for k, w in weights.items() if BLOCK_LINEAR.search(k)}
    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    result = model.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()}, strict=False)
    missing = set(result.missing_keys) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if missing or result.unexpected_keys:
        raise SystemExit(f"{directory}: missing {sorted(missing)}, unexpected {result.unexpected_keys}")
    model.tie_weights()
    return model.eval()


@torch.inference_mode()
def perplexity(model: PreTrainedModel, store: Path, device: str = "cpu") -> float:
    model.to(device)
    total, count = 0.0, 0
    with h5py.File(store) as h5:
        rows = [ids[:n] for ids, n in zip(h5["input_ids"][:], h5["lengths"][:], strict=True)]
    for row in rows:
        ids = torch.from_numpy(row).long().to(device)
        logits = model(ids[None]).logits[0, :-1].double()  # flat [tokens, vocabulary]
        total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
        count += len(row) - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--round-to-nearest", type=int, metavar="BITS")
    parser.add_argument("--group-size", type=int, default=128)
    arguments = parser.parse_args()
    model = load(arguments.model, arguments.round_to_nearest, arguments.group_size)
    print(json.dumps({"perplexity": perplexity(model, arguments.evaluation, arguments.device)}))


if __name__ == "__main__":
    main()
