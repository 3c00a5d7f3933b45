"""The programs in tools/ as modules, and a small tokenizer directory that they can work with."""

import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

WORDS = ["<unk>", "<bos>", "<eos>", *(f"w{i}" for i in range(100)), "user", "assistant", "2026-01-31"]
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %} {{ eos_token }}"


@pytest.fixture
def tokenizer_directory(tmp_path: Path) -> Path:
    """One word, one token: w7 has the id 10. It adds no BOS by itself."""
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<bos>", "<eos>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
