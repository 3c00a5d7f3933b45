"""The checkpoint directory that a run leaves: its files, configs and tensors, and what came along from the source."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import make_model, random_sequences, write_job, write_store
from gptq_reader import read_raw, read_weights, unpack
from safetensors import safe_open

BITS, GROUP, BLOCKS = 4, 64, 3
SHARD_LIMIT = 200_000
LINEARS = [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
COPIED = [
    "LICENSE",
    "chat_template.jinja",
    "generation_config.json",
    "modeling_tiny.py",
    "special_tokens_map.json",
    "tokenizer.json",
]
LEFT_BEHIND = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tiny.gguf",
    "old.zip",
    "recipe.yaml",
    "quantization_config.json",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory as hub caches have it: links into a store of blobs, and more files than any loader reads."""
    blobs, directory = tmp_path_factory.mktemp("blobs") / "model", tmp_path_factory.mktemp("snapshot")
    make_model(blobs, "Llama")
    for name in COPIED + LEFT_BEHIND:
        if not (blobs / name).exists():
            (blobs / name).write_text(f"content of {name}\n")
    (blobs / "README.md").write_text("---\nlicense: apache-2.0\n---\nThe original card.\n")
    for file in blobs.iterdir():
        (directory / file.name).symlink_to(file)
    return directory


@pytest.fixture(scope="module")
def checkpoint(quantmill: Callable[..., Any], source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    store = write_store(work / "calib.h5", random_sequences(8, 64), source)
    scheme = {"bits": BITS, "group_size": GROUP}
    job = write_job(work / "job.yaml", source, store, work / "out", scheme, max_shard_size=f"{SHARD_LIMIT // 1000}KB")
    quantmill("run", job, ranks=2)
    return work / "out"


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def test_the_official_package_reads_every_shard(checkpoint: Path) -> None:
    index = read_json(checkpoint / "model.safetensors.index.json")
    files = sorted(file.name for file in checkpoint.glob("*.safetensors"))
    assert len(files) > 1
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    places: dict[str, str] = {}
    total = 0
    for name in files:
        content = (checkpoint / name).read_bytes()
        header = int.from_bytes(content[:8], "little")
        assert header % 8 == 0
        total += len(content) - 8 - header
        with safe_open(checkpoint / name, framework="numpy") as shard:
            assert shard.metadata()["format"] == "pt"
            sizes = [shard.get_tensor(key).nbytes for key in shard.keys()]
            assert sum(sizes) <= SHARD_LIMIT or len(sizes) == 1
            assert not places.keys() & set(shard.keys())
            places |= dict.fromkeys(shard.keys(), name)
    assert index["weight_map"] == places
    assert index["metadata"]["total_size"] == total


def test_tensors_of_the_format(checkpoint: Path, source: Path) -> None:
    tensors = read_raw(checkpoint)
    originals = read_raw(source)
    for block in range(BLOCKS):
        for linear in LINEARS:
            prefix = f"model.layers.{block}.{linear}"
            rows, columns = originals.pop(f"{prefix}.weight").shape
            groups = columns // GROUP
            expected = {
                "qweight": (np.int32, (columns * BITS // 32, rows)),
                "qzeros": (np.int32, (groups, rows * BITS // 32)),
                "scales": (np.float16, (groups, rows)),
                "g_idx": (np.int32, (columns,)),
            }
            for kind, (dtype, shape) in expected.items():
                tensor = tensors.pop(f"{prefix}.{kind}")
                assert (tensor.dtype, tensor.shape) == (dtype, shape), f"{prefix}.{kind}"
                if kind == "g_idx":
                    assert tensor.tolist() == [column // GROUP for column in range(columns)]
                elif kind == "qzeros":
                    assert (tensor.view(np.uint32) == 0x77777777).all()
                elif kind == "scales":
                    assert (tensor < 0).any()
                    assert (tensor > 0).any()
                    assert (np.abs(tensor) >= np.float16(2**-14)).all()
                else:
                    assert len(np.unique(unpack(tensor, BITS))) == 2**BITS
    assert tensors.keys() == originals.keys()  # what is not quantized stays as it was
    for name, values in originals.items():
        np.testing.assert_array_equal(tensors[name], values, err_msg=name)


def test_weights_are_near_the_originals(checkpoint: Path, source: Path) -> None:
    got, expected = read_weights(checkpoint), read_weights(source)
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        error = np.linalg.norm(got[name] - values) / np.linalg.norm(values)
        assert error < 0.2, name
        assert (error > 0) == name.endswith("_proj.weight"), name


def test_configs(checkpoint: Path, source: Path) -> None:
    config, quantize_config = (
        read_json(checkpoint / "config.json"),
        read_json(checkpoint / "quantize_config.json"),
    )
    quantization = config.pop("quantization_config")
    assert quantization == quantize_config
    assert config == read_json(source / "config.json")
    expected = {
        "bits": BITS,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
    }
    assert {key: quantization.get(key) for key in expected} == expected
    assert quantization["meta"]["damp_percent"] == 0.05
    assert any(quantizer.startswith("quantmill:") for quantizer in quantization["meta"]["quantizer"])


def test_other_files_are_copied_by_exclusion(checkpoint: Path, source: Path) -> None:
    for name in COPIED:
        assert not (checkpoint / name).is_symlink()
        assert (checkpoint / name).read_bytes() == (source / name).read_bytes(), name
    assert not [name for name in LEFT_BEHIND if (checkpoint / name).exists()]


def test_model_card(checkpoint: Path, source: Path) -> None:
    _, front_matter, text = (checkpoint / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front_matter)
    assert card["license"] == "apache-2.0"
    assert card["base_model_relation"] == "quantized"
    assert "base_model" in card
    assert "tags" in card
    for private in (str(source.parent), str(checkpoint.parent), "/tmp", "/root"):
        assert private not in front_matter + text
