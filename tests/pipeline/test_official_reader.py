"""Everything our writer writes must be read by the official package, byte for byte."""
import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import safetensors

WRITER = Path(os.environ["QUANTMILL_BINARY"]).parent / "tests/pipeline/write_random_checkpoint"
SEEDS = [0, 1] + [random.randrange(2**31) for _ in range(20)]


@pytest.mark.parametrize("seed", SEEDS)
def test_reads_what_we_write(seed, tmp_path):
    subprocess.run([WRITER, tmp_path, str(seed)], check=True)
    expected = json.loads((tmp_path / "expected.json").read_text())
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map == {entry["name"]: entry["file"] for entry in expected}

    read = {}
    for path in tmp_path.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
        for name, tensor in safetensors.deserialize(path.read_bytes()):
            read[name] = (path.name, tensor)
    assert read.keys() == weight_map.keys()
    for number, entry in enumerate(expected):
        file, tensor = read[entry["name"]]
        assert file == entry["file"]
        assert tensor["dtype"] == entry["dtype"]
        assert tensor["shape"] == entry["shape"]
        assert bytes(tensor["data"]) == (tmp_path / "expected" / str(number)).read_bytes()
