"""What a run says: log lines with host and rank, a line a block in a log file, one live line on a terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

import pytest
from conftest import INDEX, make_checkpoint
from program import ROOT, Run, random_sequences, write_job, write_store

LINE = re.compile(r"\d\d:\d\d:\d\d \[(?P<host>\S+):(?P<rank>\d+)\] (?P<level>\w+) (?P<text>.*)")
BLOCKS = 3
STAGES = ["qkv", "o", "gate_up", "down"]
WIDTH = 60


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of which each rank has something to warn of: the index gives a wrong size."""
    work = tmp_path_factory.mktemp("messages")
    model = make_checkpoint(work / "model", "Llama", files=2, num_hidden_layers=BLOCKS)
    index = model / INDEX
    index.write_text(re.sub(r'"total_size": \d+', '"total_size": 7', index.read_text()))
    store = write_store(work / "calib.h5", random_sequences(5, 40, vocabulary=256), model, 256)
    return write_job(work / "job.yaml", model, store, work / "out", {"bits": 4, "group_size": 32})


def messages(text: str) -> list[tuple[int, str, str]]:
    """(rank, level, text) of each line; a line without its host and rank is an error."""
    found = [LINE.fullmatch(line) for line in text.splitlines()]
    assert found and all(found), text
    assert {match["host"] for match in found if match} == {os.uname().nodename}
    return [(int(match["rank"]), match["level"], match["text"]) for match in found if match]


def test_log(quantmill: Run, job: Path) -> None:
    said = messages(quantmill("run", job, "--overwrite", ranks=3).stderr)
    assert {rank for rank, level, _ in said if level == "info"} == {0}
    assert {rank for rank, level, text in said if level == "warning" and "total_size" in text} == {0, 1, 2}
    blocks = [text for _, _, text in said if text.startswith("block ")]
    assert len(blocks) == BLOCKS
    for number, text in enumerate(blocks, 1):
        assert re.fullmatch(rf"block {number}/{BLOCKS}  loss \S+  \S+ \w+ elapsed  about \S+ \w+ left", text)


def test_log_level(quantmill: Run, job: Path) -> None:
    quiet = {"QUANTMILL_LOG": "warn"}
    said = messages(quantmill("run", job, "--overwrite", environment=quiet).stderr)
    assert {level for _, level, _ in said} == {"warning"}
    said = messages(quantmill("run", job, "--overwrite", "--log-level", "debug", ranks=2, environment=quiet).stderr)
    assert {rank for rank, level, _ in said if level == "debug"} == {0, 1}


def on_terminal(command: list[str | Path]) -> str:
    """What the command writes to a terminal of WIDTH columns."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        text = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # what Linux gives when the other side is closed
                break
            text += piece
    os.close(ours)
    assert process.returncode == 0, text
    return text.decode()


def test_live_line(job: Path) -> None:
    binary = os.environ.get("QUANTMILL_BINARY", ROOT / "build" / "cpu" / "quantmill")
    text = on_terminal([binary, "run", job, "--overwrite"])
    live = re.findall(rf"\r\x1b\[K(block (\d)/{BLOCKS}  (\w+) +[^\r\n]* elapsed[^\r\n]*)(?=\r\x1b\[K)", text)
    assert [(block, stage) for _, block, stage in live] == [(str(1 + i), stage) for i in range(BLOCKS) for stage in STAGES]
    assert all(len(line) < WIDTH for line, _, _ in live)
    # Nothing of it is left when the table comes, and there is no line a block beside it.
    kept = [line.rpartition("\r\x1b[K")[2].rstrip("\r") for line in text.split("\n")]
    assert not any(line.startswith("block ") or " info\x1b[m block" in line for line in kept)
    assert any(line.startswith("linear ") for line in kept)


def test_blas_kernels_fit_the_processor(quantmill: Run, job: Path) -> None:
    """An OpenBLAS that does not know the processor chooses kernels without AVX2; the program chooses better ones, but not the user's."""

    def kernels(**environment: str) -> str:
        plan = quantmill("plan", job, "--no-measure", "--overwrite", environment=environment).stdout
        found = re.search(r"\((\w+) kernels\)", plan)
        assert found, plan
        return found[1]

    assert kernels(OPENBLAS_CORETYPE="Nehalem") == "Nehalem"
    if {"avx2", "fma"} <= set(Path("/proc/cpuinfo").read_text().split()):
        assert kernels() not in {"Prescott", "Nehalem", "Sandybridge"}
