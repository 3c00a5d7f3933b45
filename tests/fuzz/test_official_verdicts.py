"""The official package must agree with the verdicts of our corpus: the C++ test corpus_test holds our reader
against the same folders."""
from pathlib import Path

import pytest
import safetensors

CORPUS = Path(__file__).parent / "corpus"
CASES = sorted(path for path in CORPUS.glob("*/*"))


def accepts(path):
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            file.keys()
        opened = True
    except (safetensors.SafetensorError, OSError, ValueError):
        opened = False
    try:
        safetensors.deserialize(path.read_bytes())
        parsed = True
    except safetensors.SafetensorError:
        parsed = False
    assert opened == parsed
    return parsed


def test_the_corpus_is_there():
    assert len(CASES) > 100


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_verdict(path):
    # "stricter" holds what only we refuse: duplicate keys and extents beyond int64.
    assert accepts(path) == (path.parent.name != "malformed")
