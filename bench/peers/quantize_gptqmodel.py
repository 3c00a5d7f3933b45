#!/usr/bin/env python3
"""Quantizes one model with GPTQModel, by default as quantmill's preset `plain` would, and prints one line of JSON about it.

Started by bench/compare_gptqmodel.py and bench/quality.py in a process of its own. It fails if the model did not see exactly the sequences
of the store, in their order.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with two cores or fewer it does not start otherwise
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"

import h5py
import torch
from gptqmodel import GPTQModel
from gptqmodel.quantization.config import GPTAQConfig, GPTQConfig

DAMP_PERCENT, DAMP_AUTO_INCREMENT = 0.05, 0.01


def read_store(file: Path) -> list[list[int]]:
    with h5py.File(file) as store:
        return [ids[:n].tolist() for ids, n in zip(store["input_ids"][:], store["lengths"][:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--act-group-aware", action="store_true")
    parser.add_argument("--mse", type=float, default=0.0)
    parser.add_argument("--gptaq", action="store_true", help="with its default alpha")
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()

    sequences = read_store(arguments.calibration)
    config = GPTQConfig(
        bits=arguments.bits,
        group_size=arguments.group_size,
        sym=True,
        desc_act=False,
        act_group_aware=arguments.act_group_aware,
        mse=arguments.mse,
        gptaq=GPTAQConfig() if arguments.gptaq else None,
        damp_percent=DAMP_PERCENT,
        damp_auto_increment=DAMP_AUTO_INCREMENT,
        true_sequential=True,
        device=arguments.device,
        offload_to_disk=False,
    )
    begin = time.perf_counter()
    model = GPTQModel.load(
        arguments.model, config, dtype=torch.float16
    )  # by itself it turns weights to bfloat16 on a CPU
    loaded = time.perf_counter()

    seen: list[list[int]] = []

    def remember(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.extend(inputs[0].tolist())

    hook = model.model.get_input_embeddings().register_forward_pre_hook(remember)
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sequences]
    model.quantize(samples, calibration_sort=None, calibration_data_min_length=0, batch_size=1)
    hook.remove()
    # GPTAQ sends them through the unquantized model as well.
    passes = 2 if arguments.gptaq else 1
    if seen not in (sequences * passes, [ids for ids in sequences for _ in range(passes)]):
        raise SystemExit(f"GPTQModel saw {len(seen)} sequences, which are not the {len(sequences)} of the store")
    quantized = time.perf_counter()
    model.save(arguments.output)
    saved = time.perf_counter()
    seconds = {
        "load": loaded - begin,
        "quantize": quantized - loaded,
        "save": saved - quantized,
        "total": saved - begin,
    }
    print(json.dumps({"seconds": {k: round(v, 2) for k, v in seconds.items()}, "tokens": sum(map(len, seen))}))


if __name__ == "__main__":
    main()
