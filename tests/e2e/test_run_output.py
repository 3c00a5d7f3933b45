"""What a run leaves behind fits together: weights, configs, card, log and report; `plan`, `inspect` and `eval` agree with it."""

import csv
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import INDEX, Stored, contents, decode, make_checkpoint, read_tensors, write_tensors
from program import Run, random_sequences, write_job, write_store

VOCABULARY = 256
LINEARS = [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
COPIED = ["LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json", "more/notes.txt"]
LEFT_BEHIND = ["pytorch_model.bin", "old.gguf", "all.zip", "recipe.yaml", "model.fp32.index.json", "quantization_config.json"]
CARD = "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\nlanguage: [en, fr]\n---\nThe original card.\n"
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "llama": ("Llama", {"dtype": "BF16"}, {"bits": 4, "group_size": 32}, "gptq"),
    "mistral": (
        "Mistral",
        {"dtype": "F16", "files": 2},
        {"preset": "plain", "bits": 2, "group_size": 16, "damp_percent": 0.1},
        "gptq",
    ),
    "qwen2": ("Qwen2", {"dtype": "F32"}, {"bits": 3, "group_size": -1, "sym": False, "desc_act": True}, "gptq_v2"),
    "qwen3": (
        "Qwen3",
        {"dtype": "BF16"},
        {"bits": 8, "group_size": 32, "true_sequential": False, "desc_act": True, "static_groups": True, "signed_scales": False},
        "gptq_v2",
    ),
}


@dataclass
class Result:
    model: Path
    store: Path
    job: Path
    output: Path
    printed: str
    format: str
    quantization: dict[str, Any]

    def json(self, name: str) -> dict[str, Any]:
        return json.loads((self.output / name).read_text())


@pytest.fixture(scope="module", params=CASES)
def result(quantmill: Run, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Result:
    family, model_settings, quantization, name = CASES[request.param]
    work = tmp_path_factory.mktemp(request.param)
    model = make_checkpoint(work / "hub" / "models--tiny-org--Tiny-1M" / "snapshots" / "0123abc", family, **model_settings)
    (model / "more").mkdir()
    for file in [*COPIED, *LEFT_BEHIND]:
        if file != "tokenizer.json":
            (model / file).write_text(f"content of {file}\n")
    (model / "README.md").write_text(CARD)
    store = write_store(work / "calib.h5", random_sequences(11, 50, vocabulary=VOCABULARY), model, VOCABULARY)
    job = write_job(work / "job.yaml", model, store, work / "out", quantization, format=name, max_shard_size="50kB")
    done = quantmill("run", job, ranks=2)
    return Result(model, store, job, work / "out", done.stdout, name, quantization)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [n, columns] -> codes [n * 32 / bits, columns]: each column is one stream of bits, the lowest first."""
    stream = np.ascontiguousarray(words.T).view(np.uint8)
    return (np.unpackbits(stream, axis=1, bitorder="little").reshape(words.shape[1], -1, bits) @ (1 << np.arange(bits))).T


def dequantized(tensors: dict[str, Stored], module: str, bits: int, version: str) -> np.ndarray:
    """float64 [rows, columns]."""
    qweight, qzeros, scales, groups = (tensors[f"{module}.{kind}"][1] for kind in ("qweight", "qzeros", "scales", "g_idx"))
    zeros = (unpack(qzeros.T, bits).T + (version == "gptq")) % 2**bits
    return (scales.astype(np.float64)[groups] * (unpack(qweight, bits) - zeros[groups])).T


def any_order(result: Result) -> bool:
    return result.quantization.get("desc_act", False) and not result.quantization.get("static_groups", False)


def asked(result: Result) -> dict[str, Any]:
    """What the case sets, and what its preset decides beside that: balanced gives way to desc_act and sym."""
    usual = {"sym": True, "desc_act": False} | result.quantization
    own = usual.get("preset") != "plain"
    decided = {"act_group_aware": own and not usual["desc_act"], "static_groups": False, "signed_scales": own and usual["sym"]}
    return decided | {"scale_search": "hessian" if own else "minmax"} | usual


def linears_of(result: Result) -> list[str]:
    blocks = json.loads((result.model / "config.json").read_text())["num_hidden_layers"]
    return [f"model.layers.{block}.{linear}" for block in range(blocks) for linear in LINEARS]


def test_tensors(result: Result) -> None:
    source, got = read_tensors(result.model), read_tensors(result.output)
    bits, group_size = result.quantization["bits"], result.quantization["group_size"]
    for module in linears_of(result):
        rows, columns = source.pop(f"{module}.weight")[1].shape
        groups = 1 if group_size < 0 else -(-columns // group_size)
        shapes = {"qweight": (columns * bits // 32, rows), "qzeros": (groups, rows * bits // 32), "scales": (groups, rows), "g_idx": (columns,)}
        for kind, shape in shapes.items():
            dtype, values = got.pop(f"{module}.{kind}")
            assert (dtype, values.shape) == ("F16" if kind == "scales" else "I32", shape), f"{module}.{kind}"
            if kind == "g_idx" and not any_order(result):
                assert values.tolist() == [column * groups // columns for column in range(columns)]
            elif kind == "g_idx":
                assert sorted(values) == sorted(column * groups // columns for column in range(columns))
            elif kind == "scales":
                assert (np.abs(values) >= np.float16(2**-14)).all()
                assert (values < 0).any() == asked(result)["signed_scales"]
            elif kind == "qzeros" and result.quantization.get("sym", True):
                assert (unpack(values.T, bits) == 2 ** (bits - 1) - (result.format == "gptq")).all()
        if f"{module}.bias" in source:
            expected = decode(source.pop(f"{module}.bias")).astype(np.float16)
            dtype, bias = got.pop(f"{module}.bias")
            assert dtype == "F16"
            np.testing.assert_array_equal(bias, expected)
    assert got.keys() == source.keys()  # the rest is carried over untouched
    for name, (dtype, values) in source.items():
        assert got[name][0] == dtype
        np.testing.assert_array_equal(got[name][1], values, err_msg=name)


def test_shards_and_index(result: Result) -> None:
    index = result.json(INDEX)
    files = sorted(result.output.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 1
    found = {name: file.name for file in files for name in read_tensors(file)}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(values.nbytes for _, values in read_tensors(result.output).values())
    for file in files:
        assert file.stat().st_size <= 50_000 or len(read_tensors(file)) == 1


def test_configs(result: Result) -> None:
    config = result.json("config.json")
    quantization = config.pop("quantization_config")
    assert list(config) == list(json.loads((result.model / "config.json").read_text()))  # in the source's order
    assert config == json.loads((result.model / "config.json").read_text())
    assert quantization == result.json("quantize_config.json")
    wanted = asked(result)
    expected = {key: wanted[key] for key in ("bits", "group_size", "sym")} | {
        "desc_act": any_order(result),
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": result.format,
        "format": result.format,
        "pack_dtype": "int32",
    }
    assert {key: quantization.get(key) for key in expected} == expected
    assert quantization["meta"]["damp_percent"] == wanted.get("damp_percent", 0.05)
    assert quantization["meta"]["true_sequential"] == wanted.get("true_sequential", True)
    for key in ("act_group_aware", "static_groups", "signed_scales", "scale_search"):
        assert quantization["meta"][key] == wanted[key]
    assert re.fullmatch(r"quantmill:\d+\.\d+\.\d+\S*", quantization["meta"]["quantizer"][0])


def test_report_and_log_say_what_the_files_hold(result: Result) -> None:
    report = result.json("report.json")
    source, got = read_tensors(result.model), read_tensors(result.output)
    bits = result.quantization["bits"]
    assert sorted(linear["module"] for linear in report["linears"]) == sorted(linears_of(result))
    packed_bits = weights = 0
    for linear in report["linears"]:
        module = linear["module"]
        original = decode(source[f"{module}.weight"]).astype(np.float64)
        error = np.mean((dequantized(got, module, bits, result.format) - original) ** 2)
        assert linear["mean_squared_error"] == pytest.approx(error, rel=1e-4), module
        assert (linear["rows"], linear["columns"]) == original.shape
        assert linear["loss"] > 0
        assert linear["bits"] == bits
        packed_bits += 8 * sum(got[f"{module}.{kind}"][1].nbytes for kind in ("qweight", "qzeros", "scales", "g_idx"))
        weights += original.size
    assert report["bits_per_weight"] == pytest.approx(packed_bits / weights, rel=1e-9)
    assert report["output_bytes"] == sum(file.stat().st_size for file in result.output.glob("*.safetensors"))
    assert report["source_bytes"] == sum(values.nbytes for _, values in source.values())
    assert report["parameters"] == sum(values.size for _, values in source.values())
    sequences = random_sequences(11, 50, vocabulary=VOCABULARY)
    assert (report["sequences"], report["tokens"]) == (11, sum(map(len, sequences)))
    assert (report["model"], report["world_size"]) == ("tiny-org/Tiny-1M", 2)
    assert report["fallbacks"]["rounded_to_nearest"] == 0

    rows = list(csv.DictReader((result.output / "quantize_log.csv").read_text().splitlines()))
    assert len(rows) == len(report["linears"])
    for row, linear in zip(rows, report["linears"], strict=True):
        assert row.keys() == linear.keys()
        for key, value in linear.items():
            assert row[key] == value if isinstance(value, str) else float(row[key]) == pytest.approx(value, rel=1e-12)
    assert f"checkpoint: {result.output}" in result.printed
    for linear in LINEARS:
        assert linear.rpartition(".")[2] in result.printed


def test_loss_of_the_first_group(result: Result) -> None:
    """tr((W - Q) H (W - Q)^T), from the embedding and the first norm alone, in double precision."""
    tensors = {name: decode(tensor).astype(np.float64) for name, tensor in read_tensors(result.model).items()}
    got = read_tensors(result.output)
    tokens = np.concatenate(random_sequences(11, 50, vocabulary=VOCABULARY))
    hidden = tensors["model.embed_tokens.weight"][tokens]
    x = hidden / np.sqrt((hidden**2).mean(axis=1, keepdims=True) + 1e-5) * tensors["model.layers.0.input_layernorm.weight"]
    hessian = 2 / len(tokens) * x.T @ x
    hessian += result.quantization.get("damp_percent", 0.05) * np.diag(hessian).mean() * np.eye(len(hessian))
    for linear in result.json("report.json")["linears"]:
        module = linear["module"]
        if re.fullmatch(r"model\.layers\.0\.self_attn\.[qkv]_proj", module):
            error = tensors[f"{module}.weight"] - dequantized(got, module, result.quantization["bits"], result.format)
            assert linear["loss"] == pytest.approx(np.trace(error @ hessian @ error.T), rel=1e-3), module


def test_model_card(result: Result) -> None:
    text = (result.output / "README.md").read_text()
    _, front_matter, body = text.split("---\n", 2)
    card = yaml.safe_load(front_matter)
    expected = {
        "license": "other",
        "license_name": "tiny",
        "license_link": "LICENSE",
        "language": ["en", "fr"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "tiny-org/Tiny-1M",
        "base_model_relation": "quantized",
        "quantized_by": "quantmill",
    }
    assert {key: card.get(key) for key in expected} == expected
    assert "gptq" in card["tags"]
    assert f"| bits | {result.quantization['bits']} |" in body
    assert "| sequences | 11 |" in body
    assert "| sequence_length, longest | 50 |" in body
    assert "| damp_auto_increment | 0.01 |" in body
    for private in (str(result.model.parents[3]), "/tmp", "/root", "0123abc", "calib.h5", "OMPI_", "PATH"):
        assert private not in text


def test_companion_files(result: Result) -> None:
    got = contents(result.output)
    for name in COPIED:
        assert got[name] == (result.model / name).read_bytes(), name
    assert not got.keys() & set(LEFT_BEHIND)
    assert not [name for name in got if name.endswith(".partial")]


def shown_bytes(text: str) -> float:
    number, unit = text.split(" ")
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_plan_foretells_the_files(quantmill: Run, result: Result) -> None:
    text = quantmill("plan", result.job, "--overwrite", ranks=2).stdout
    listed = re.findall(r"^  (model-\S+\.safetensors) +(\S+ \S?B) +rank (\d+)$", text, re.MULTILINE)
    files = sorted(result.output.glob("*.safetensors"))
    assert [name for name, _, _ in listed] == [file.name for file in files]
    for (_, size, _), file in zip(listed, files, strict=True):
        assert shown_bytes(size) == pytest.approx(file.stat().st_size, rel=6e-3)
    assert {int(rank) for _, _, rank in listed} == {0, 1}
    needed = re.search(r"disk: (\S+ \S+) needed", text)
    assert needed
    written = [*files, *(result.model / file for file in COPIED)]
    assert shown_bytes(needed[1]) == pytest.approx(sum(file.stat().st_size for file in written), rel=6e-3)
    for word in ("tiny-org/Tiny-1M: ", "2 ranks", "Memory of rank", "GFLOP/s", f"{len(linears_of(result))} linears", "Nothing stands in the way"):
        assert word in text


def test_eval_is_the_same_on_any_ranks(quantmill: Run, result: Result, tmp_path: Path) -> None:
    found = {}
    for model in (result.model, result.output):
        for ranks in (1, 3):
            file = tmp_path / "eval.json"
            quantmill("eval", "--model", model, "--tokens", result.store, "--allow-calibration-tokens", "--json", file, ranks=ranks)
            found[model.name, ranks] = json.loads(file.read_text())["mean_negative_log_likelihood"]
    for model in (result.model, result.output):
        assert math.isfinite(found[model.name, 1])
        assert found[model.name, 1] == found[model.name, 3]
    assert found[result.model.name, 1] != found[result.output.name, 1]


def test_inspect(quantmill: Run, result: Result) -> None:
    text = quantmill("inspect", result.output).stdout
    group_size = result.quantization["group_size"]
    for linear in LINEARS:
        row = next(line for line in text.splitlines() if f"*.{linear} " in line)
        assert f"{result.format} {result.quantization['bits']} bits" in row
        assert group_size < 0 or f"g{group_size}" in row
    assert "verified" in text
    assert "embed_tokens" in quantmill("inspect", result.model).stdout


def test_set_overrides_the_job_file(quantmill: Run, result: Result, tmp_path: Path) -> None:
    quantmill("run", result.job, "--set", "quantization.bits=8", "--set", "calibration.sequences=3", "--set", f"output.directory={tmp_path}/a b")
    config = json.loads((tmp_path / "a b" / "quantize_config.json").read_text())
    assert config == result.json("quantize_config.json") | {"bits": 8}
    report = json.loads((tmp_path / "a b" / "report.json").read_text())
    assert report["sequences"] == 3
    assert yaml.safe_load(report["job"])["quantization"]["bits"] == 8


# --- What `inspect` and `eval` say to a damaged result: (tensor, change to its values, part of the message). ---


def change_tensor(output: Path, suffix: str, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    module = "model.layers.1.self_attn.o_proj"
    file = output / json.loads((output / INDEX).read_text())["weight_map"][module + suffix]
    tensors = read_tensors(file)
    dtype, values = tensors[module + suffix]
    changed = change(values.copy())
    tensors[module + suffix] = (dtype, changed)
    write_tensors(file, {name: tensor for name, tensor in tensors.items() if tensor[1] is not None})


def put(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values.flat[3] = value
        return values

    return change


DAMAGE: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray | None], list[str]]] = {
    "scale not a number": (".scales", put(math.nan), ["scales", "nan"]),
    "scale infinite": (".scales", put(math.inf), ["scales", "inf"]),
    "group out of range": (".g_idx", put(3), ["g_idx", "3", "out of range"]),
    "group negative": (".g_idx", put(-1), ["g_idx", "-1", "out of range"]),
    "zeros missing": (".qzeros", lambda _: None, ["qzeros"]),
    "too few scales": (".scales", lambda values: values[:-1].copy(), ["scales", "[2, 64]", "[3, 64]"]),
    "codes cut": (".qweight", lambda values: values[:, :-32].copy(), ["o_proj"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_result(quantmill: Run, tmp_path: Path, damaged_source: Result, name: str) -> None:
    suffix, change, parts = DAMAGE[name]
    for file, content in contents(damaged_source.output).items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    quantmill("inspect", tmp_path)
    change_tensor(tmp_path, suffix, change)
    for command in (["inspect", tmp_path], ["eval", "--model", tmp_path, "--tokens", damaged_source.store, "--allow-calibration-tokens"]):
        done = quantmill(*command, code=2)
        for part in parts:
            assert part in done.stderr, f"{command[0]}: '{part}' is not in {done.stderr}"


FOUND_BY_INSPECT: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray | None], list[str]]] = {
    "codes missing": (".qweight", lambda _: None, ["o_proj", "qweight"]),
    "scale zero": (".scales", put(0), ["scales", "holds 0"]),
    "scale negative": (".scales", put(-1), ["scales", "-1"]),
    "scale subnormal": (".scales", put(2.0**-20), ["scales", "subnormal"]),
    "zeros of another format": (".qzeros", lambda values: np.full_like(values, 0x08080808), ["qzeros", "sym"]),
    "one group": (".g_idx", lambda values: values * 0, ["g_idx", "group 0"]),
}


@pytest.mark.parametrize("name", FOUND_BY_INSPECT)
def test_inspect_finds_what_loads(quantmill: Run, tmp_path: Path, damaged_source: Result, name: str) -> None:
    suffix, change, parts = FOUND_BY_INSPECT[name]
    for file, content in contents(damaged_source.output).items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    change_tensor(tmp_path, suffix, change)
    if name == "codes missing":
        places = json.loads((tmp_path / INDEX).read_text())
        places["weight_map"].pop("model.layers.1.self_attn.o_proj.qweight")
        (tmp_path / INDEX).write_text(json.dumps(places))
    said = quantmill("inspect", tmp_path, code=2).stderr
    for part in parts:
        assert part in said


@pytest.fixture(scope="module")
def damaged_source(quantmill: Run, tmp_path_factory: pytest.TempPathFactory) -> Result:
    work = tmp_path_factory.mktemp("sound")
    model = make_checkpoint(work / "model", "Llama")
    store = write_store(work / "calib.h5", random_sequences(3, 30, vocabulary=VOCABULARY), model, VOCABULARY)
    job = write_job(work / "job.yaml", model, store, work / "out", {"preset": "plain", "bits": 4, "group_size": 32})
    quantmill("run", job)
    return Result(model, store, job, work / "out", "", "gptq", {})


def test_truncated_result(quantmill: Run, tmp_path: Path, damaged_source: Result) -> None:
    for file, content in contents(damaged_source.output).items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content[:-1] if file.endswith(".safetensors") else content)
    assert "model-00001-of-00001.safetensors" in quantmill("inspect", tmp_path, code=2).stderr
    (tmp_path / INDEX).unlink()
    assert "unfinished" in quantmill("inspect", tmp_path, code=2).stderr


def test_version(quantmill: Run) -> None:
    text = quantmill("--version").stdout
    assert re.match(r"quantmill \d+\.\d+\.\d+", text)
    assert "cpu" in text
