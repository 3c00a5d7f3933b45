"""Whatever is wrong with the input, the program ends with code 2, says what, and leaves no half of a result."""

import fcntl
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from conftest import INDEX, Stored, contents, make_checkpoint, overflow_at, read_tensors, write_tensors
from program import Run, random_sequences, write_job, write_store

VOCABULARY = 256
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
BIAS = "model.layers.0.mlp.up_proj.bias"
LINEAR = "model.layers.1.mlp.down_proj.weight"


class Inputs:
    """A good model in two shards, a good store and a good job, for a test to damage."""

    def __init__(self, directory: Path) -> None:
        self.model = make_checkpoint(directory / "model", "Llama", files=2, mlp_bias=True)
        self.store = write_store(directory / "calib.h5", random_sequences(5, 40, vocabulary=VOCABULARY), self.model, VOCABULARY)
        self.output = directory / "out"
        self.job = write_job(directory / "job.yaml", self.model, self.store, self.output, {"bits": 4, "group_size": 32})

    def config(self, **fields: Any) -> None:
        file = self.model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    def shard_of(self, tensor: str) -> Path:
        return self.model / json.loads((self.model / INDEX).read_text())["weight_map"][tensor]

    def tensor(self, name: str, change: Callable[[Stored], Stored | None]) -> None:
        """Replaces a tensor, or takes it out of its shard."""
        file = self.shard_of(name)
        tensors = read_tensors(file)
        tensors[name] = change(tensors[name])
        write_tensors(file, {key: value for key, value in tensors.items() if value is not None})

    def index(self, change: Callable[[dict[str, str]], object]) -> None:
        index = json.loads((self.model / INDEX).read_text())
        change(index["weight_map"])
        (self.model / INDEX).write_text(json.dumps(index))

    def header(self, change: Callable[[bytes], bytes]) -> None:
        file = self.model / SHARDS[1]
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        text = change(content[8:end])
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    def truncate(self, name: str, bytes_kept: int) -> None:
        os.truncate(self.model / name, bytes_kept)

    def hdf5(self, change: Callable[[h5py.File], object]) -> None:
        with h5py.File(self.store, "r+") as file:
            change(file)

    def spec(self, section: str, **keys: Any) -> None:
        spec = yaml.safe_load(self.job.read_text())
        spec[section] |= keys
        self.job.write_text(yaml.safe_dump(spec))


def not_a_number(tensor: Stored) -> Stored:
    dtype, values = tensor
    values = values.copy()
    values.flat[values.size // 2] = {"BF16": 0x7FC0}[dtype]
    return dtype, values


def beyond_half(tensor: Stored) -> Stored:
    dtype, values = tensor
    values = values.copy()
    values.flat[5] = {"BF16": 0xC7C3}[dtype]  # -99840
    return dtype, values


def with_dtype(dtype: str) -> Callable[[Stored], Stored]:
    return lambda tensor: (dtype, np.zeros(tensor[1].shape, {"F8_E4M3": np.uint8, "I8": np.int8, "F64": np.float64}[dtype]))


def without(name: str) -> Callable[[Inputs], None]:
    """The tensor is neither in its shard nor in the index."""

    def damage(inputs: Inputs) -> None:
        inputs.tensor(name, lambda _: None)
        inputs.index(lambda places: places.pop(name))

    return damage


def set_ids(row: int, column: int, value: int) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file["input_ids"][row, column] = value

    return change


# What is found before anything is written: (damage, parts of the message).
EARLY: dict[str, tuple[Callable[[Inputs], object], list[str]]] = {
    "truncated shard": (lambda i: i.truncate(SHARDS[1], (i.model / SHARDS[1]).stat().st_size - 10), [SHARDS[1]]),
    "empty shard": (lambda i: i.truncate(SHARDS[0], 0), [SHARDS[0], "header"]),
    "header cut": (lambda i: i.truncate(SHARDS[0], 100), [SHARDS[0], "truncated"]),
    "header not JSON": (lambda i: i.header(lambda text: text.replace(b":", b";", 1)), [SHARDS[1]]),
    "overlapping tensors": (lambda i: i.header(lambda text: text.replace(b'"data_offsets": [', b'"data_offsets": [ 0', 2)), [SHARDS[1]]),
    "missing shard": (lambda i: (i.model / SHARDS[1]).unlink(), [INDEX, SHARDS[1], "not there"]),
    "missing index": (lambda i: (i.model / INDEX).unlink(), ["model", INDEX]),
    "missing index entry": (lambda i: i.index(lambda places: places.pop(LINEAR)), [LINEAR, INDEX]),
    "index names another file": (lambda i: i.index(lambda places: places.update({"x": SHARDS[0]})), ["'x'", SHARDS[0], INDEX]),
    "missing tensor": (without(LINEAR), [LINEAR, "config.json"]),
    "missing norm": (without("model.norm.weight"), ["model.norm.weight"]),
    "missing lm_head": (without("lm_head.weight"), ["lm_head.weight"]),
    "wrong shape": (lambda i: i.tensor(LINEAR, lambda t: (t[0], t[1].T.copy())), [LINEAR, "[96, 64]", "[64, 96]"]),
    "float8 weights": (lambda i: i.tensor(LINEAR, with_dtype("F8_E4M3")), [LINEAR, "F8_E4M3", "BF16, F16, F32"]),
    "int8 weights": (lambda i: i.tensor(LINEAR, with_dtype("I8")), [LINEAR, "I8", "BF16, F16, F32"]),
    "float64 norm": (lambda i: i.tensor("model.norm.weight", with_dtype("F64")), ["model.norm.weight", "F64"]),
    "bias that config.json denies": (lambda i: i.config(mlp_bias=False), ["mlp.gate_proj.bias", "config.json"]),
    "bias beyond float16": (lambda i: i.tensor(BIAS, beyond_half), [SHARDS[0], BIAS, "-99840", "index 5", "float16"]),
    "missing config": (lambda i: (i.model / "config.json").unlink(), ["model", "config.json"]),
    "config not JSON": (lambda i: (i.model / "config.json").write_text("{"), ["config.json", "JSON"]),
    "unsupported architecture": (
        lambda i: i.config(architectures=["GemmaForCausalLM"]),
        ["config.json", "GemmaForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"],
    ),
    "other activation": (lambda i: i.config(hidden_act="gelu"), ["config.json", "hidden_act", "gelu", "silu"]),
    "soft cap": (lambda i: i.config(attn_logit_softcapping=50.0), ["config.json", "attn_logit_softcapping", "50"]),
    "multiplier": (lambda i: i.config(embedding_multiplier=12.0), ["config.json", "embedding_multiplier", "12"]),
    "experts": (lambda i: i.config(num_local_experts=8), ["config.json", "num_local_experts"]),
    "unknown field": (lambda i: i.config(attention_sink=True), ["config.json", "attention_sink", "true", "take it out"]),
    "code of its own": (lambda i: i.config(auto_map={"AutoModel": "x.Y"}), ["config.json", "auto_map", "x.Y"]),
    "other model type": (lambda i: i.config(model_type="mistral"), ["config.json", "model_type", "mistral", "LlamaForCausalLM"]),
    "rope scaling": (lambda i: i.config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), ["config.json", "yarn", "llama3"]),
    "config field missing": (lambda i: i.config(hidden_size=None), ["config.json", "hidden_size"]),
    "already quantized": (lambda i: i.config(quantization_config={"quant_method": "gptq"}), ["model", "quantized already"]),
    "no such model": (lambda i: shutil.rmtree(i.model), ["model", "is no directory"]),
    "no such store": (lambda i: i.store.unlink(), ["calib.h5"]),
    "store not HDF5": (lambda i: i.store.write_text("{}"), ["calib.h5", "HDF5", "tools/calibrate.py"]),
    "store without ids": (lambda i: i.hdf5(lambda file: file.pop("input_ids")), ["calib.h5", "/input_ids"]),
    "id out of range": (lambda i: i.hdf5(set_ids(2, 3, VOCABULARY)), ["calib.h5", "sequence 2", "position 3", "256"]),
    "negative id": (lambda i: i.hdf5(set_ids(0, 0, -1)), ["calib.h5", "sequence 0", "position 0", "-1"]),
    "larger vocabulary": (lambda i: i.hdf5(lambda file: file.attrs.modify("vocab_size", 257)), ["calib.h5", "257", "256"]),
    "empty sequence": (lambda i: i.hdf5(lambda file: file["lengths"].write_direct(np.int32([0] * 5))), ["calib.h5", "sequence 0", "length 0"]),
    "no sequences": (lambda i: write_store(i.store, [], i.model, VOCABULARY), ["calib.h5", "no sequences"]),
    "too few sequences": (lambda i: i.spec("calibration", sequences=6), ["calib.h5", "5 sequences", "6"]),
    "zero sequences": (lambda i: i.spec("calibration", sequences=0), ["job.yaml:", "calibration.sequences", "0", ">= 1"]),
    "another tokenizer": (lambda i: (i.model / "tokenizer.json").write_text("{}"), ["calib.h5", "tokenizer.json", "allow_tokenizer_mismatch"]),
    "misspelt key": (lambda i: i.spec("quantization", bitz=4), ["job.yaml:", "quantization.bitz", "quantization.bits"]),
    "foreign key": (lambda i: i.spec("quantization", dampening_frac=0.01), ["job.yaml:", "dampening_frac", "damp_percent"]),
    "value out of range": (lambda i: i.spec("quantization", bits=5), ["job.yaml:", "quantization.bits", "5", "2 | 3 | 4 | 8"]),
    "width not divided": (lambda i: i.spec("quantization", group_size=64), ["mlp.down_proj", "96", "group_size", "vLLM", "allow_unservable"]),
    "asymmetric v1": (lambda i: i.spec("quantization", sym=False), ["gptq_v2"]),
    "output below a file": (lambda i: i.spec("output", directory=str(i.store / "out")), ["output directory", "calib.h5 is no directory"]),
    "output is the model": (lambda i: i.spec("output", directory=str(i.model)), ["output directory", "model directory"]),
    "output in the model": (lambda i: i.spec("output", directory=str(i.model / "out")), ["output directory", "model directory"]),
}


def check(done: subprocess.CompletedProcess[str], parts: list[str]) -> None:
    said = done.stdout + done.stderr  # plan lists problems in its text
    for part in parts:
        assert part in said, f"'{part}' is not in: {said}"


def assert_unfinished(output: Path) -> None:
    """No index, so no loader takes it for a checkpoint, and nothing half written."""
    assert not (output / INDEX).exists()
    assert not list(output.rglob("*.partial"))


@pytest.fixture(scope="module")
def finished(quantmill: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run on the good inputs leaves."""
    inputs = Inputs(tmp_path_factory.mktemp("good"))
    quantmill("run", inputs.job)
    return contents(inputs.output)


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(tmp_path)


def put_finished(output: Path, finished: dict[str, bytes]) -> None:
    for name, content in finished.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(content)


@pytest.mark.parametrize("name", EARLY)
def test_found_before_anything_is_written(quantmill: Run, inputs: Inputs, finished: dict[str, bytes], name: str) -> None:
    damage, parts = EARLY[name]
    put_finished(inputs.output, finished)
    damage(inputs)
    check(quantmill("run", inputs.job, "--overwrite", code=2), parts)
    assert contents(inputs.output) == finished  # --overwrite or not: a good result goes only when a run can start
    check(quantmill("plan", inputs.job, "--no-measure", "--overwrite", code=2), parts)


# Values are read during the run, each by one rank.
NAN_TENSORS = [LINEAR, "model.layers.0.input_layernorm.weight", "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize("name", NAN_TENSORS)
def test_nan_weights(quantmill: Run, inputs: Inputs, name: str) -> None:
    inputs.tensor(name, not_a_number)
    check(quantmill("run", inputs.job, code=2), [str(inputs.shard_of(name)), name, "nan at"])
    assert_unfinished(inputs.output)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_throws_ends_all(quantmill: Run, inputs: Inputs, finished: dict[str, bytes], ranks: int) -> None:
    names = sorted(read_tensors(inputs.model))
    name = next(n for i, n in enumerate(names) if i % ranks == 1 and n.endswith("_proj.weight") and "layers.1" in n)
    good = inputs.shard_of(name).read_bytes()
    inputs.tensor(name, not_a_number)
    done = quantmill("run", inputs.job, code=2, ranks=ranks, timeout=60)
    check(done, [":1] error", name, "nan at"])
    assert not (inputs.output / INDEX).exists()

    # What the other ranks had begun when they were ended is swept away by the next run.
    inputs.shard_of(name).write_bytes(good)
    quantmill("run", inputs.job, ranks=ranks)
    assert contents(inputs.output).keys() == finished.keys()
    assert not list(inputs.output.rglob("*.partial"))


@pytest.mark.parametrize("sequence", [0, 4])  # alone in its micro-batch, and behind another one
@pytest.mark.parametrize(("ranks", "settings"), [(1, {}), (2, {"true_sequential": False}), (2, {"propagate": "original"}), (1, {"error_propagation_alpha": 1})])
def test_activations_that_are_not_finite(quantmill: Run, tmp_path: Path, sequence: int, ranks: int, settings: dict[str, Any]) -> None:
    model = make_checkpoint(tmp_path / "model", "Llama", mlp_bias=True)
    overflow_at(model, 1, VOCABULARY - 1)
    sequences = random_sequences(5, 40, vocabulary=VOCABULARY - 1)
    store = tmp_path / "calib.h5"
    job = write_job(tmp_path / "job.yaml", model, store, tmp_path / "out", {"bits": 4, "group_size": 32, **settings})
    write_store(store, sequences, model, VOCABULARY)
    quantmill("run", job)
    sequences[sequence][7] = VOCABULARY - 1
    write_store(store, sequences, model, VOCABULARY)
    done = quantmill("run", job, "--overwrite", code=2, ranks=ranks, timeout=60)
    check(done, [f"model.layers.1.self_attn.q_proj: its calibration inputs are not finite in sequence {sequence} (counted from 0)"])


def test_early_errors_are_said_once(quantmill: Run, inputs: Inputs) -> None:
    inputs.config(hidden_act="gelu")
    done = quantmill("run", inputs.job, code=2, ranks=3, timeout=60)
    assert done.stderr.count("hidden_act") == 1


def test_output_that_is_not_ours(quantmill: Run, inputs: Inputs, finished: dict[str, bytes]) -> None:
    inputs.output.mkdir()
    (inputs.output / "thesis.tex").write_text("years of work")
    check(quantmill("run", inputs.job, code=2), [str(inputs.output), "--overwrite"])
    assert contents(inputs.output) == {"thesis.tex": b"years of work"}
    quantmill("run", inputs.job, "--overwrite")
    assert contents(inputs.output).keys() == finished.keys() | {"thesis.tex"}


def test_output_that_holds_another_model(quantmill: Run, inputs: Inputs) -> None:
    shutil.copytree(inputs.model, inputs.output)
    before = contents(inputs.output)
    for words in ([], ["--overwrite"]):
        check(quantmill("run", inputs.job, *words, code=2), [str(inputs.output), "did not write", "config.json"])
    assert contents(inputs.output) == before


def test_output_that_is_finished(quantmill: Run, inputs: Inputs, finished: dict[str, bytes]) -> None:
    put_finished(inputs.output, finished)
    for command in (["run"], ["plan", "--no-measure"]):
        check(quantmill(*command, inputs.job, "--set", "quantization.bits=8", code=2), [str(inputs.output), "--overwrite"])
    quantmill("plan", "--no-measure", inputs.job, "--overwrite")
    assert contents(inputs.output) == finished
    quantmill("run", inputs.job, "--set", "quantization.bits=8", "--overwrite")
    assert json.loads((inputs.output / "config.json").read_text())["quantization_config"]["bits"] == 8


def test_two_runs_into_one_directory(quantmill: Run, inputs: Inputs, finished: dict[str, bytes]) -> None:
    """The lock of a run that goes on holds others off; that of one that died does not."""
    lock = inputs.output / ".quantmill" / "lock"
    lock.parent.mkdir(parents=True)
    (inputs.output / SHARDS[0]).write_text("of the other run")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 17 on node3")
        file.flush()
        before = contents(inputs.output)
        for words in ([], ["--overwrite"]):
            check(quantmill("run", inputs.job, *words, code=2), [str(inputs.output), "process 17 on node3"])
        assert contents(inputs.output) == before
    quantmill("run", inputs.job, ranks=2)
    assert contents(inputs.output).keys() == finished.keys()


def test_overwrite_leaves_nothing_of_the_result_before(quantmill: Run, inputs: Inputs) -> None:
    (inputs.model / "more").mkdir()
    companions = ["chat_template.jinja", "generation_config.json", "more/notes.txt"]
    for name in companions:
        (inputs.model / name).write_text("of the model before")
    quantmill("run", inputs.job, "--set", "output.max_shard_size=50kB")
    recorded = set(json.loads((inputs.output / ".quantmill" / "files.json").read_text()))
    assert recorded | {".quantmill/files.json", ".quantmill/lock"} == contents(inputs.output).keys()
    assert recorded > {*companions, "README.md", "report.json", INDEX}
    (inputs.output / "thesis.tex").write_text("years of work")
    for name in companions:
        (inputs.model / name).unlink()
    quantmill("run", inputs.job, "--overwrite")
    left = contents(inputs.output).keys()
    assert not left & set(companions)
    assert "thesis.tex" in left
    assert len(list(inputs.output.glob("*.safetensors"))) == 1
    assert not (inputs.output / "more").exists()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with the given options; skips where that is not allowed."""
    directory = tmp_path / "mounted"
    mounted = []

    def mount_tmpfs(options: str) -> Path:
        directory.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(directory)
        return directory

    yield mount_tmpfs
    for path in mounted:
        subprocess.run(["umount", path], check=True)


def test_unwritable_directory(quantmill: Run, inputs: Inputs, mount: Callable[[str], Path]) -> None:
    output = mount("ro") / "out"
    check(quantmill("run", inputs.job, "--set", f"output.directory={output}", code=2), [str(output)])


def test_directory_without_permission(quantmill: Run, inputs: Inputs) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    inputs.output.mkdir(mode=0o555)
    check(quantmill("run", inputs.job, code=2), [str(inputs.output), "writable"])


def test_disk_too_small(quantmill: Run, inputs: Inputs, mount: Callable[[str], Path]) -> None:
    output = mount("size=64k") / "out"
    for command in (["run"], ["plan", "--no-measure"]):
        done = quantmill(*command, inputs.job, "--set", f"output.directory={output}", code=2)
        assert re.search(r"needs [\d.]+ kB of disk, 65.5 kB are free: free at least [\d.]+ kB", done.stdout + done.stderr)
    assert not output.exists()


def test_disk_too_small_for_companions(quantmill: Run, inputs: Inputs, mount: Callable[[str], Path]) -> None:
    (inputs.model / "appendix.pdf").write_bytes(bytes(2_000_000))
    output = mount("size=1500k") / "out"
    for command in (["run"], ["plan", "--no-measure"]):
        done = quantmill(*command, inputs.job, "--set", f"output.directory={output}", code=2)
        check(done, ["of disk", "1.54 MB are free"])
    assert not output.exists()


def test_disk_that_only_holds_one_result(quantmill: Run, inputs: Inputs, mount: Callable[[str], Path]) -> None:
    """What the run will remove counts as free."""
    output = mount("size=220k") / "out"
    settings = ["--set", f"output.directory={output}"]
    quantmill("run", inputs.job, *settings)
    room = os.statvfs(output)
    assert room.f_bavail * room.f_bsize < sum(file.stat().st_size for file in output.glob("*.safetensors"))
    assert "of an earlier run are removed" in quantmill("plan", "--no-measure", inputs.job, *settings, "--overwrite").stdout
    quantmill("run", inputs.job, *settings, "--overwrite")


def test_disk_that_fills_up(quantmill: Run, inputs: Inputs, mount: Callable[[str], Path]) -> None:
    """The bytes fit, but not as many files as come along: found before the first block."""
    (inputs.model / "more").mkdir()
    for page in range(20):
        (inputs.model / "more" / f"{page}.txt").write_text("page")
    output = mount("size=10m,nr_inodes=12") / "out"
    done = quantmill("run", inputs.job, "--set", f"output.directory={output}", code=75)
    check(done, [str(output / "more"), "No space left", "bytes were wanted"])
    assert_unfinished(output)
    assert not list(output.glob("*.safetensors"))


def test_lone_processes(quantmill: Run, inputs: Inputs) -> None:
    for command in (["run", inputs.job], ["eval", "--model", inputs.model, "--tokens", inputs.store]):
        check(quantmill(*command, code=2, environment={"SLURM_NTASKS": "4"}), ["SLURM_NTASKS=4", "--mpi=pmix"])
        step = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}
        check(quantmill(*command, code=2, environment=step), ["SLURM_STEP_NUM_TASKS=4", "--mpi=pmix"])
    assert not inputs.output.exists()


def test_eval_refuses_what_run_refuses(quantmill: Run, inputs: Inputs) -> None:
    evaluate = ["eval", "--model", inputs.model, "--tokens", inputs.store]
    quantmill(*evaluate)
    inputs.tensor(LINEAR, not_a_number)
    check(quantmill(*evaluate, code=2), [LINEAR, "nan at"])
    inputs.tensor(LINEAR, with_dtype("I8"))
    check(quantmill(*evaluate, code=2), [LINEAR, "I8"])
    inputs.config(hidden_act="gelu")
    check(quantmill(*evaluate, code=2), ["hidden_act"])
    inputs.store.write_text("no store")
    inputs.config(hidden_act="silu")
    check(quantmill(*evaluate, code=2), ["calib.h5", "HDF5"])
