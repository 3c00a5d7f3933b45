"""Groups of ranks: bytes through the command line, ranks that die or stall, stores of Hessians, several checkpoints."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import INDEX, make_checkpoint, read_tensors
from program import ROOT, Run, random_sequences, write_job, write_store
from test_same_bytes import digests

VOCABULARY = 256
ORIGINAL = {"bits": 4, "group_size": 32, "propagate": "original"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of four blocks, tokens of unequal lengths and a job."""
    work = tmp_path_factory.mktemp("small")
    model = make_checkpoint(work / "model", "Llama", num_hidden_layers=4, hidden_size=64)
    store = write_store(work / "calib.h5", random_sequences(9, 70, vocabulary=VOCABULARY), model, VOCABULARY)
    write_job(work / "job.yaml", model, store, work / "out", ORIGINAL, max_shard_size="40kB")
    return work


def run(quantmill: Run, work: Path, output: Path, *words: object, ranks: int = 1) -> dict[str, str]:
    quantmill("run", work / "job.yaml", "--set", f"output.directory={output}", *words, ranks=ranks)
    return digests(output)


@pytest.mark.parametrize("propagate", ["original", "quantized"])
def test_groups_chosen_by_the_job(quantmill: Run, small: Path, tmp_path: Path, propagate: str) -> None:
    words = ["--set", f"quantization.propagate={propagate}"]
    expected = run(quantmill, small, tmp_path / "alone", *words)
    # Three groups hold blocks of which one has two; two groups have ranks of which one has two.
    for ranks, groups in [(1, "1"), (2, "2"), (2, "1"), (3, "3"), (3, "2"), (4, "4"), (4, "2"), (4, "auto")]:
        output = tmp_path / f"{ranks}-{groups}"
        assert run(quantmill, small, output, *words, "--set", f"compute.layer_groups={groups}", ranks=ranks) == expected


def test_both_propagations_agree_on_the_first_block(quantmill: Run, small: Path, tmp_path: Path) -> None:
    """Nothing before it is quantized; with true_sequential: false nothing in it is, either. Later blocks must differ."""
    found = {}
    for propagate in ("original", "quantized"):
        words = ["--set", f"quantization.propagate={propagate}", "--set", "quantization.true_sequential=false"]
        run(quantmill, small, tmp_path / propagate, *words, ranks=2)
        found[propagate] = {name: values.tobytes() for name, (_, values) in read_tensors(tmp_path / propagate).items()}
    blocks = {block: [name for name in found["original"] if name.startswith(f"model.layers.{block}.")] for block in (0, 2)}
    assert all(found["original"][name] == found["quantized"][name] for name in blocks[0])
    assert any(found["original"][name] != found["quantized"][name] for name in blocks[2] if name.endswith("qweight"))


def test_one_sequence(quantmill: Run, small: Path, tmp_path: Path) -> None:
    words = ["--set", "calibration.sequences=1"]
    expected = run(quantmill, small, tmp_path / "alone", *words)
    assert run(quantmill, small, tmp_path / "spread", *words, "--set", "compute.layer_groups=2", ranks=4) == expected


def test_more_groups_than_blocks(quantmill: Run, small: Path, tmp_path: Path) -> None:
    words = ["run", small / "job.yaml", "--set", f"output.directory={tmp_path / 'out'}", "--set", "compute.layer_groups=5"]
    done = quantmill(*words, ranks=5, code=2)
    assert "compute.layer_groups: 5 groups are more than the 4 blocks" in done.stderr
    assert "choose at most 4, or auto" in done.stderr
    assert not (tmp_path / "out").exists()


def test_plan_shows_groups_and_imagined_worlds(quantmill: Run, small: Path) -> None:
    plan = quantmill("plan", small / "job.yaml", "--set", "compute.layer_groups=2", ranks=2).stdout
    assert "2 groups of ranks hold ranges of blocks" in plan
    assert re.search(r"times as fast as one rank", plan)
    assert "Timeline" in plan
    plan = quantmill("plan", small / "job.yaml", "--world-size", 6, "--gpus-per-node", 2, "--set", "compute.layer_groups=3").stdout
    assert "3 groups of ranks" in plan
    assert "host2" in plan
    quantized = quantmill("plan", small / "job.yaml", "--world-size", 6, "--set", "quantization.propagate=quantized").stdout
    assert "all ranks work on the same block" in quantized
    assert "factors that one rank computes" in quantized


def test_three_checkpoints_are_those_of_three_jobs(quantmill: Run, small: Path, tmp_path: Path) -> None:
    changes = [{"bits": 4, "group_size": 32}, {"bits": 3, "group_size": 32}, {"bits": 8, "group_size": -1, "desc_act": True}]
    job = yaml.safe_load((small / "job.yaml").read_text())
    common = job.pop("output")
    for i, change in enumerate(changes):
        alone = job | {"output": common | {"directory": str(tmp_path / f"alone{i}")}}
        alone["quantization"] = job["quantization"] | change
        (tmp_path / f"alone{i}.yaml").write_text(yaml.safe_dump(alone))
        quantmill("run", tmp_path / f"alone{i}.yaml")
    job["outputs"] = [common | {"directory": str(tmp_path / f"out{i}"), "quantization": c} for i, c in enumerate(changes)]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    plan = quantmill("plan", tmp_path / "job.yaml").stdout
    assert re.search(r"out1 \(gptq\): 3 bits, group_size 32.*\n.*out2 \(gptq\): 8 bits, group_size -1, symmetric, desc_act, hessian search of scales, signed scales;", plan), plan
    quantmill("run", tmp_path / "job.yaml", ranks=3)
    for i in range(3):
        assert digests(tmp_path / f"out{i}") == digests(tmp_path / f"alone{i}"), changes[i]


def test_store_of_hessians(quantmill: Run, small: Path, tmp_path: Path) -> None:
    store = tmp_path / "hessians"
    save = ["--set", f"calibration.save_hessians={store}"]
    load = ["--set", f"calibration.hessians={store}"]
    assert re.search(r"Hessians are kept in .*hessians: [\d.]+ [kM]B of disk", quantmill("plan", small / "job.yaml", *save).stdout)
    assert not store.exists()
    expected = run(quantmill, small, tmp_path / "saved", *save, ranks=2)
    assert re.search(r"Hessians come from .*hessians: the model is not run", quantmill("plan", small / "job.yaml", *load).stdout)
    for ranks in (1, 2, 4):
        assert run(quantmill, small, tmp_path / f"loaded{ranks}", *load, ranks=ranks) == expected
    three_bits = ["--set", "quantization.bits=3"]
    assert run(quantmill, small, tmp_path / "w3", *load, *three_bits) == run(quantmill, small, tmp_path / "w3run", *three_bits)

    def refused(job: Path, *words: str, planned: bool = True) -> str:
        output = f"output.directory={tmp_path / 'refused'}"
        plan = quantmill("plan", job, *load, "--set", output, *words, code=2 if planned else 0).stdout
        assert (str(store) in plan.partition("This job cannot run")[2]) == planned
        return quantmill("run", job, *load, "--set", output, *words, code=2, ranks=2).stderr

    saving = quantmill("run", small / "job.yaml", *save, "--set", "calibration.sequences=8", code=2).stderr
    assert re.search(r"block-00000.h5: .*of other calibration tokens: 9 sequences", saving)
    fewer = refused(small / "job.yaml", "--set", "calibration.sequences=8")
    assert re.search(r"of other calibration tokens: 9 sequences with \d+ tokens .* the job's are 8 with", fewer)
    other = shutil.copytree(small / "model", tmp_path / "model")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-40] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert "it is of another model" in refused(small / "job.yaml", "--set", f"model={other}")

    block = store / "block-00001.h5"
    whole = block.read_bytes()
    block.write_bytes(whole[: len(whole) // 2])
    assert "block-00001.h5" in refused(small / "job.yaml")
    flipped = bytearray(whole)
    flipped[len(whole) * 3 // 4] ^= 0x10
    block.write_bytes(flipped)
    # Plan reads no Hessian.
    assert re.search(r"block-00001.h5: .* cannot be read .* make it again", refused(small / "job.yaml", planned=False))
    block.unlink()
    assert "1 of 4 blocks are missing, block-00001.h5 first" in refused(small / "job.yaml")
    assert not (tmp_path / "refused" / INDEX).exists()


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that streams and solves for seconds."""
    work = tmp_path_factory.mktemp("slow")
    model = make_checkpoint(
        work / "model", "Llama", num_hidden_layers=4, hidden_size=384, intermediate_size=2048, num_attention_heads=12, num_key_value_heads=4
    )
    store = write_store(work / "calib.h5", random_sequences(64, 256, vocabulary=VOCABULARY), model, VOCABULARY)
    write_job(work / "job.yaml", model, store, work / "out", ORIGINAL)
    return work


class Job:
    """A run under the launcher that can be watched; what its ranks do is in its log."""

    def __init__(self, work: Path, output: Path, ranks: int, *words: str) -> None:
        binary = os.environ.get("QUANTMILL_BINARY", str(ROOT / "build" / "cpu" / "quantmill"))
        launcher = shlex.split(os.environ.get("QUANTMILL_MPIEXEC", "mpirun --bind-to none --oversubscribe -n"))
        settings = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
        # MPICH's launcher kills the other ranks at once, so that they say nothing; it names the lost process itself.
        version = subprocess.run([launcher[0], "--version"], capture_output=True, text=True, check=True).stdout
        self.ended_by_hydra = "HYDRA" in version
        command = [*launcher, str(ranks), binary, "run", str(work / "job.yaml"), "--log-level", "debug"]
        command += ["--set", f"output.directory={output}", *words]
        self.log = ""
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | settings)

    def lines(self) -> Iterator[str]:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line
            yield line

    def wait_until(self, rank: int, doing: str) -> None:
        if not any(re.search(rf":{rank}\] debug .*{doing}", line) for line in self.lines()):
            pytest.fail(f"rank {rank} never did: {doing}\n{self.log}", pytrace=False)

    def pids(self) -> dict[int, int]:
        """Processes by rank."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            if self.process.pid not in (parent, self.grandparent(parent)):
                continue
            variables = dict(word.split(b"=", 1) for word in environment if b"=" in word)
            rank = variables.get(b"OMPI_COMM_WORLD_RANK", variables.get(b"PMI_RANK"))
            if rank is not None:
                found[int(rank)] = int(entry.name)
        return found

    @staticmethod
    def grandparent(pid: int) -> int:
        try:
            return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return 0

    def end(self, seconds: float) -> int:
        """Its exit code; fails when it or any of its ranks takes longer."""
        ranks = self.pids().values()
        begin = time.monotonic()
        for _ in self.lines():
            pass
        code = self.process.wait(timeout=seconds + 60)
        while any(is_alive(pid) for pid in ranks) and time.monotonic() - begin < seconds:
            time.sleep(0.1)
        assert time.monotonic() - begin < seconds, f"ended after {time.monotonic() - begin:.1f} s\n{self.log}"
        return code


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


STALL = 6  # seconds; on a busy machine one micro-batch takes two
PHASES = {"stream": "streaming, micro-batch 3/", "solve": "block .*: solving rows"}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", PHASES)
def test_killed_rank_ends_the_job(slow: Path, tmp_path: Path, phase: str, rank: int) -> None:
    job = Job(slow, tmp_path / "out", 3, "--set", "compute.layer_groups=3")
    job.wait_until(rank, PHASES[phase])
    os.kill(job.pids()[rank], signal.SIGKILL)
    assert job.end(10) != 0
    if not job.ended_by_hydra:
        assert re.search(rf"rank {rank} on \S+ was lost: .* Last seen: (streaming|block)", job.log), job.log
    assert not (tmp_path / "out" / INDEX).exists()


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_stalled_rank_ends_the_job(slow: Path, tmp_path: Path, phase: str, rank: int) -> None:
    job = Job(slow, tmp_path / "out", 3, "--set", "compute.layer_groups=3", "--set", f"compute.stall_timeout={STALL}s")
    job.wait_until(rank, PHASES[phase])
    pid = job.pids()[rank]
    os.kill(pid, signal.SIGSTOP)
    try:
        code = job.end(STALL + 10)
    finally:
        if is_alive(pid):
            os.kill(pid, signal.SIGCONT)
    assert code == 75, job.log
    assert re.search(rf"rank {rank} on \S+ has stalled: no sign of life for .* Last seen: (streaming|block)", job.log), job.log
