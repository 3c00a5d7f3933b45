#!/usr/bin/env python3
"""What quantizing one group of linears does to a model: the error of its block's outputs, which quantization.target_bits
goes by, beside the divergence of the whole model's predictions. Needs tools/python_env.sh --interop; two minutes for the
demo model. `checkpoint`: a GPTQ checkpoint of `model`; one group at a time is taken from it.

  bench/peers/block_errors.py --model build/demo/SmolLM2-135M-Instruct --checkpoint /tmp/w3 --tokens build/demo/eval.h5
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from gptq_reader import read_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
Weights = dict[str, torch.Tensor]


def weights_of(checkpoint: Path) -> Weights:
    return {name: torch.from_numpy(weight).float() for name, weight in read_weights(checkpoint).items()}


class Blocks:
    """The blocks of a model on one sequence: what enters each, and what it makes of it."""

    def __init__(self, model: PreTrainedModel, ids: list[int]) -> None:
        self.layers = model.model.layers
        self.calls: list[tuple[Any, Any]] = []
        hooks = [
            layer.register_forward_pre_hook(lambda _, words, named: self.calls.append((words, named)), with_kwargs=True)
            for layer in self.layers
        ]
        model(torch.tensor([ids]), use_cache=False)
        for hook in hooks:
            hook.remove()

    def output(self, block: int, hidden: torch.Tensor | None = None) -> torch.Tensor:
        words, named = self.calls[block]
        return self.layers[block](*(words if hidden is None else (hidden, *words[1:])), **named)

    @contextmanager
    def quantized(self, block: int, group: str, weights: Weights) -> Iterator[None]:
        modules = {name: self.layers[block].get_submodule(name) for name in GROUPS[group]}
        originals = {name: module.weight.data for name, module in modules.items()}
        for name, module in modules.items():
            module.weight.data = weights[f"model.layers.{block}.{name}.weight"]
        yield
        for name, module in modules.items():
            module.weight.data = originals[name]


def token_errors(moved: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """|h' - h|^2 / |h|^2 of each token."""
    return ((moved - expected).square().sum(-1) / expected.square().sum(-1)).flatten()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "checkpoint", "tokens"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--output", type=Path, metavar="JSON")
    arguments = parser.parse_args()
    with h5py.File(arguments.tokens) as store:
        ids = store["input_ids"][0, : store["lengths"][0]].tolist()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    weights, blocks = weights_of(arguments.checkpoint), Blocks(model, ids)

    def predictions(hidden: torch.Tensor, first: int) -> torch.Tensor:
        for block in range(first, len(blocks.layers)):
            hidden = blocks.output(block, hidden)
        return model.lm_head(model.model.norm(hidden)).log_softmax(-1)

    found = []
    for block in range(len(blocks.layers)):
        expected = blocks.output(block)
        original = predictions(expected, block + 1)
        for group in GROUPS:
            with blocks.quantized(block, group, weights):
                moved = blocks.output(block)
            divergence = (original.exp() * (original - predictions(moved, block + 1))).sum(-1).mean().item()
            error = token_errors(moved, expected).mean().item()
            found.append({"block": block, "group": group, "error": error, "divergence": divergence})
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")

    print("| | error of block outputs | KL divergence | ratio |\n|---|---|---|---|")
    for group in [*GROUPS, "all"]:
        error, divergence = (sum(f[key] for f in found if group in (f["group"], "all")) for key in ("error", "divergence"))
        print(f"| {group} | {error:.4f} | {divergence:.4f} | {divergence / error:.2f} |")
    logs = np.log([[f["error"], f["divergence"]] for f in found])
    print(f"correlation of their logarithms over {len(found)} groups: {np.corrcoef(logs.T)[0, 1]:.3f}")


if __name__ == "__main__":
    main()
