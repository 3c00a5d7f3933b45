"""`quantmill eval` and `compare`: every number recomputed from the logits of both models, on any number of ranks."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import decode, make_checkpoint, read_tensors
from program import Run, random_sequences, write_job, write_store
from tokenizers import Tokenizer, models, pre_tokenizers, processors

VOCABULARY = 256
LENGTH = 24


@dataclass
class Models:
    original: Path
    quantized: dict[int, Path]  # by bits
    calibration: Path
    held_out: Path
    sequences: list[list[int]]


@pytest.fixture(scope="module")
def tiny(quantmill: Run, tmp_path_factory: pytest.TempPathFactory) -> Models:
    work = tmp_path_factory.mktemp("evaluation")
    original = make_checkpoint(work / "model", "Llama", dtype="F16")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("w1 $A", "w1 $A $B", [("w1", 1)])
    tokenizer.save(str(original / "tokenizer.json"))
    calibration = write_store(work / "calib.h5", random_sequences(12, 40, 1, VOCABULARY), original, VOCABULARY)
    sequences = [*random_sequences(9, 50, 2, VOCABULARY), [7]]  # the last one predicts nothing
    held_out = write_store(work / "held.h5", sequences, original, VOCABULARY)
    quantized = {}
    for bits in (4, 2):
        quantized[bits] = work / f"w{bits}"
        scheme = {"bits": bits, "group_size": 32, "desc_act": bits == 2}
        quantmill("run", write_job(work / "job.yaml", original, calibration, quantized[bits], scheme))
    return Models(original, quantized, calibration, held_out, sequences)


def evaluate(quantmill: Run, file: Path, *words: object, ranks: int | None = None) -> dict[str, Any]:
    quantmill("eval", *words, "--json", file, ranks=ranks)
    return json.loads(file.read_text())


def logits_of(quantmill: Run, model: Path, store: Path, file: Path) -> list[np.ndarray]:
    """float64 [T, V] of each sequence."""
    quantmill("eval", "--model", model, "--tokens", store, "--logits", file)
    rows = decode(read_tensors(file)["logits"]).astype(np.float64)
    with h5py.File(store) as h5:
        return np.split(rows, np.cumsum(h5["lengths"][:])[:-1])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def test_numbers_are_those_of_the_logits(quantmill: Run, tiny: Models, tmp_path: Path) -> None:
    file = tmp_path / "logits.safetensors"
    reference = logits_of(quantmill, tiny.original, tiny.held_out, file)
    for model in tiny.quantized.values():
        got = evaluate(quantmill, tmp_path / "eval.json", "--model", model, "--tokens", tiny.held_out, "--reference", tiny.original)
        loss, expected, divergence, same = [], [], [], []
        for ids, theirs, ours in zip(tiny.sequences, reference, logits_of(quantmill, model, tiny.held_out, file), strict=True):
            p, q = log_softmax(theirs[:-1]), log_softmax(ours[:-1])
            loss.append(-q[np.arange(len(ids) - 1), ids[1:]].sum())
            expected.append(-p[np.arange(len(ids) - 1), ids[1:]].sum())
            divergence.append((np.exp(p) * (p - q)).sum())
            same.append((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        tokens = [len(ids) - 1 for ids in tiny.sequences]
        lists = got["per_sequence"]
        assert lists["tokens"] == tokens
        np.testing.assert_allclose(lists["negative_log_likelihood"], loss, rtol=1e-12)
        np.testing.assert_allclose(lists["reference_negative_log_likelihood"], expected, rtol=1e-12)
        np.testing.assert_allclose(lists["kl_divergence"], divergence, rtol=1e-9, atol=1e-12)
        assert lists["top1_agreement"] == same
        count = sum(tokens)
        assert got["tokens"] == count
        assert got["perplexity"] == pytest.approx(np.exp(sum(loss) / count), rel=1e-12)
        assert got["reference"]["perplexity"] == pytest.approx(np.exp(sum(expected) / count), rel=1e-12)
        assert got["reference"]["kl_divergence"] == pytest.approx(sum(divergence) / count, rel=1e-9)
        assert got["reference"]["top1_agreement"] == pytest.approx(sum(same) / count, rel=1e-12)
        low, high = got["perplexity_interval"]
        assert low < got["perplexity"] < high
        assert len(got["reference"]["hidden_error"]) == 2
        assert all(0 < error < 2 for error in got["reference"]["hidden_error"])


def test_a_model_is_its_own_reference(quantmill: Run, tiny: Models, tmp_path: Path) -> None:
    words = ["--model", tiny.original, "--reference", tiny.original, "--tokens", tiny.held_out]
    got = evaluate(quantmill, tmp_path / "eval.json", *words)["reference"]
    assert got["kl_divergence"] == pytest.approx(0, abs=1e-12)
    assert got["top1_agreement"] == 1
    assert got["hidden_error"] == [0, 0]


def test_any_number_of_ranks_gives_the_same_numbers(quantmill: Run, tiny: Models, tmp_path: Path) -> None:
    words = ["--model", tiny.quantized[2], "--reference", tiny.original, "--tokens", tiny.held_out]
    found = [evaluate(quantmill, tmp_path / "eval.json", *words, ranks=ranks) for ranks in (1, 3)]
    for result in found:
        del result["seconds"], result["backend"]
    assert found[0] == found[1]


def test_one_sequence_has_no_interval(quantmill: Run, tiny: Models, tmp_path: Path) -> None:
    words = ["--model", tiny.original, "--tokens", tiny.held_out, "--sequences", 1]
    assert evaluate(quantmill, tmp_path / "eval.json", *words)["perplexity_interval"] is None


def test_calibration_tokens_are_refused(quantmill: Run, tiny: Models, tmp_path: Path) -> None:
    """Also when they are one sequence among others."""
    with h5py.File(tiny.calibration) as h5:
        known = h5["input_ids"][5, : h5["lengths"][5]].tolist()
    mixed = write_store(tmp_path / "mixed.h5", [*tiny.sequences, known], tiny.original, VOCABULARY)
    for store, message in ((tiny.calibration, "12 of the 12 sequences, the first of them number 0"), (mixed, "1 of the 11 sequences")):
        words = ["eval", "--model", tiny.quantized[4], "--tokens", store]
        assert message in quantmill(*words, code=2).stderr
        quantmill(*words, "--allow-calibration-tokens")
        quantmill("eval", "--model", tiny.original, "--tokens", store)


def test_another_reference_is_refused(quantmill: Run, tiny: Models, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", "Llama", num_hidden_layers=1)
    words = ["--model", tiny.original, "--tokens", tiny.held_out]
    assert "is not the model" in quantmill("eval", *words, "--reference", other, code=2).stderr


# --- text ---


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "some text.txt"
    file.write_text(" ".join(f"w{i}" for i in np.random.default_rng(3).integers(2, VOCABULARY, 200)))
    return file


@pytest.mark.parametrize("ranks", [None, 2])
def test_text_is_cut_into_windows(quantmill: Run, tiny: Models, text: Path, tmp_path: Path, ranks: int | None) -> None:
    whole = Tokenizer.from_file(str(tiny.original / "tokenizer.json")).encode(text.read_text()).ids
    assert len(whole) == 201 and whole[0] == 1  # BOS once
    windows = [whole[i : i + LENGTH] for i in range(0, 201 // LENGTH * LENGTH, LENGTH)]
    store = write_store(tmp_path / "windows.h5", windows, tiny.original, VOCABULARY)
    expected = evaluate(quantmill, tmp_path / "a.json", "--model", tiny.quantized[4], "--tokens", store)
    words = ["--model", tiny.quantized[4], "--text", text, "--sequence-length", LENGTH]
    got = evaluate(quantmill, tmp_path / "b.json", *words, ranks=ranks)
    assert got["per_sequence"] == expected["per_sequence"]
    assert got["tokens"] == len(windows) * (LENGTH - 1)
    assert "windows of 24 tokens" in got["source"]


@pytest.mark.parametrize("ranks", [None, 2])
def test_text_without_python_names_the_remedy(quantmill: Run, tiny: Models, text: Path, ranks: int | None) -> None:
    words = ["eval", "--model", tiny.original, "--text", text, "--sequence-length", LENGTH]
    for python in ("/nowhere/python", shutil.which("false")):
        done = quantmill(*words, code=2, ranks=ranks, environment={"QUANTMILL_PYTHON": str(python)})
        for part in ("QUANTMILL_PYTHON", "tools/python_env.sh", "--windows --sequence-length 24", "--tokens tokens.h5"):
            assert part in done.stderr


def test_text_needs_a_window(quantmill: Run, tiny: Models, text: Path) -> None:
    done = quantmill("eval", "--model", tiny.original, "--text", text, code=2)  # 256 positions
    assert "201 tokens: 0 windows of 256" in done.stderr


# --- compare ---


def test_compare(quantmill: Run, tiny: Models, tmp_path: Path) -> None:
    files = {}
    for bits, model in tiny.quantized.items():
        files[bits] = tmp_path / f"{bits}.json"
        words = ["--model", model, "--tokens", tiny.held_out, "--reference", tiny.original]
        evaluate(quantmill, files[bits], *words)
    file = tmp_path / "both.json"
    printed = quantmill("compare", files[4], files[2], "--json", file).stdout
    both = json.loads(file.read_text())
    assert both["perplexity_difference"] == pytest.approx(both["b"]["perplexity"] - both["a"]["perplexity"])
    low, high = both["perplexity_difference_interval"]
    assert low < both["perplexity_difference"] < high
    for line in ("perplexity", "KL divergence", "top-1 agreement", "bits per weight", "size", "block"):
        assert f"\n{line} " in printed or f"\n{line}" in printed
    directories = [tiny.quantized[4], tiny.quantized[2], "--tokens", tiny.held_out, "--reference", tiny.original]
    again = quantmill("compare", *directories, "--json", tmp_path / "again.json", ranks=2).stdout
    assert again == printed
    itself = tmp_path / "itself.json"
    quantmill("compare", files[4], files[4], "--json", itself)
    assert json.loads(itself.read_text())["perplexity_difference_interval"] == [0, 0]


def test_compare_refuses_what_does_not_fit(quantmill: Run, tiny: Models, tmp_path: Path) -> None:
    words = ["--model", tiny.original, "--tokens", tiny.held_out]
    whole, part, other = (tmp_path / f"{name}.json" for name in ("whole", "part", "other"))
    evaluate(quantmill, whole, *words)
    evaluate(quantmill, part, *words, "--sequences", 3)
    other.write_text('{"perplexity": 3}')
    assert "different sequences" in quantmill("compare", whole, part, code=2).stderr
    assert "is no result of" in quantmill("compare", whole, other, code=2).stderr
    assert "--tokens STORE.h5 or --text FILE" in quantmill("compare", whole, tiny.original, code=2).stderr
