"""tools/calibrate.py: every kind of source comes back as it went in, and bad input is refused by name."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import h5py
import pyarrow
import pyarrow.parquet
import pytest
from calibrate import main
from conftest import CHAT_TEMPLATE, WORDS
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

BOS, EOS, USER, ASSISTANT = (WORDS.index(word) for word in ("<bos>", "<eos>", "user", "assistant"))
FIRST = WORDS.index("w0")
Run = Callable[..., list[list[int]]]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "store.h5"


@pytest.fixture
def run(tokenizer_directory: Path, output: Path) -> Run:
    """Writes a store and returns its sequences."""

    def call(*words: object) -> list[list[int]]:
        main(["--tokenizer", str(tokenizer_directory), "--output", str(output), *map(str, words)])
        with h5py.File(output) as h5:
            assert h5["input_ids"].dtype == h5["lengths"].dtype == "int32"
            assert h5.attrs["vocab_size"] == len(WORDS)
            assert (
                h5.attrs["tokenizer"]
                == hashlib.sha256((tokenizer_directory / "tokenizer.json").read_bytes()).hexdigest()
            )
            rows, lengths = h5["input_ids"][:], h5["lengths"][:]
        for row, length in zip(rows, lengths, strict=True):
            assert (row[:length] >= 0).all()
            assert (row[length:] == -1).all()
        return [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]

    return call


def words(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def ids(*numbers: int) -> list[int]:
    return [FIRST + n for n in numbers]


def add_bos(directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [("<bos>", BOS)])
    tokenizer.save(str(directory / "tokenizer.json"))


def text_file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def chat_line(*contents: str) -> str:
    roles = ("user", "assistant")
    return json.dumps({"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]})


def parquet(path: Path, column: str, values: list[object]) -> Path:
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({column: values}), path)
    return path


def test_text_is_packed_into_windows(run: Run, tmp_path: Path) -> None:
    file = text_file(tmp_path / "a.txt", words(*range(23)))
    got = run("--text", file, "--sequences", 5, "--sequence-length", 4)
    assert sorted(got) == [ids(*range(i, i + 4)) for i in range(0, 20, 4)]


def test_seed_decides_the_order_and_the_bytes(run: Run, tmp_path: Path, output: Path) -> None:
    file = text_file(tmp_path / "a.txt", words(*range(80)))
    options = ("--text", file, "--sequences", 10, "--sequence-length", 4)
    first, content = run(*options), output.read_bytes()
    assert run(*options) == first
    assert output.read_bytes() == content
    assert run(*options, "--seed", 1) != first


def test_several_files_are_all_read(run: Run, tmp_path: Path) -> None:
    files = [text_file(tmp_path / f"{n}.txt", words(n, n, n)) for n in (1, 2)]
    assert sorted(run("--text", *files, "--sequences", 2, "--sequence-length", 3)) == [
        ids(1, 1, 1),
        ids(2, 2, 2),
    ]


@pytest.mark.parametrize("beginning", ["", "<bos> "])
def test_packed_sequences_begin_with_one_bos(
    run: Run, tmp_path: Path, tokenizer_directory: Path, beginning: str
) -> None:
    add_bos(tokenizer_directory)
    file = text_file(tmp_path / "a.txt", beginning + words(*range(9)))
    got = run("--text", file, "--sequences", 3, "--sequence-length", 4)
    assert sorted(got) == [[BOS, *ids(i, i + 1, i + 2)] for i in (0, 3, 6)]


@pytest.mark.parametrize("with_post_processor", [False, True])
def test_chat_has_the_bos_of_its_template_only(
    run: Run, tmp_path: Path, tokenizer_directory: Path, with_post_processor: bool
) -> None:
    if with_post_processor:
        add_bos(tokenizer_directory)
    file = text_file(tmp_path / "c.jsonl", chat_line("w1", "w2") + "\n")
    assert run("--chat", file, "--sequences", 1) == [[BOS, USER, *ids(1), ASSISTANT, *ids(2), EOS]]


def test_long_chats_are_cut_and_short_ones_kept(run: Run, tmp_path: Path, output: Path) -> None:
    file = text_file(tmp_path / "c.jsonl", chat_line(words(*range(9))) + "\n" + chat_line("w1"))
    assert sorted(map(len, run("--chat", file, "--sequences", 2, "--sequence-length", 6))) == [4, 6]
    with h5py.File(output) as h5:
        assert h5.attrs["source"].startswith("chat c.jsonl; 1 of 2 truncated to 6 tokens")


def test_date_of_dated_templates(run: Run, tmp_path: Path, tokenizer_directory: Path) -> None:
    text_file(tokenizer_directory / "chat_template.jinja", "{{ strftime_now('%Y-%m-%d') }}")
    file = text_file(tmp_path / "c.jsonl", chat_line("w1"))
    assert run("--chat", file, "--sequences", 1, "--date", "2026-01-31") == [[WORDS.index("2026-01-31")]]


def test_templates_with_generation_marks_and_loop_controls(run: Run, tmp_path: Path, tokenizer_directory: Path) -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }} {% endgeneration %}{% break %}{% endfor %}"
    text_file(tokenizer_directory / "chat_template.jinja", template)
    file = text_file(tmp_path / "c.jsonl", chat_line("w1", "w2"))
    assert run("--chat", file, "--sequences", 1) == [ids(1)]


def test_jsonl_field(run: Run, tmp_path: Path) -> None:
    file = text_file(
        tmp_path / "a.jsonl", json.dumps({"body": words(1, 2)}) + "\n\n" + json.dumps({"body": words(3, 4)})
    )
    assert sorted(run("--jsonl", file, "--field", "body", "--sequences", 2, "--sequence-length", 2)) == [
        ids(1, 2),
        ids(3, 4),
    ]


def test_dataset_text_of_a_directory(run: Run, tmp_path: Path) -> None:
    for n in (1, 2):
        parquet(tmp_path / "data" / f"{n}.parquet", "content", [words(n, n)])
    got = run("--dataset", tmp_path / "data", "--column", "content", "--sequences", 2, "--sequence-length", 2)
    assert sorted(got) == [ids(1, 1), ids(2, 2)]


def test_dataset_messages(run: Run, tmp_path: Path) -> None:
    file = parquet(tmp_path / "d.parquet", "talk", [[{"role": "user", "content": "w5"}]])
    assert run("--dataset", file, "--messages", "talk", "--sequences", 1) == [[BOS, USER, *ids(5), EOS]]


def test_tokens_come_back_in_their_order(run: Run, tmp_path: Path) -> None:
    file = text_file(tmp_path / "ids.json", "[[1, 2, 3], [4], [5, 6]]")
    assert run("--tokens", file, "--sequences", 2, "--sequence-length", 2) == [[1, 2], [4]]


REFUSED = {
    "too little text": (
        ["--text", "a.txt", "--sequences", 9],
        "gives 0 sequences of 2048 tokens, fewer than --sequences 9",
    ),
    "no file": (["--text", "none.txt"], "none.txt"),
    "not UTF-8": (["--text", "latin.txt"], "latin.txt: not UTF-8 at byte 1"),
    "no field": (["--jsonl", "chat.jsonl"], "chat.jsonl:1: no text in the field 'text'"),
    "not JSON": (["--jsonl", "a.txt"], "a.txt:1: not JSON"),
    "no conversation": (["--chat", "text.jsonl"], "text.jsonl:1: no conversation"),
    "too few chats": (
        ["--chat", "chat.jsonl", "--sequences", 2],
        "has 1 sequences, fewer than --sequences 2",
    ),
    "no column": (["--dataset", "d.parquet", "--column", "body"], "no column 'body'; it has text"),
    "not Parquet": (["--dataset", "a.txt"], "a.txt: not Parquet"),
    "no Parquet": (["--dataset", "empty"], "empty: no .parquet file in it"),
    "empty cell": (["--dataset", "d.parquet"], "row 0: no text"),
    "id too high": (
        ["--tokens", "high.json"],
        f"sequence 1 has {len(WORDS)}, which is no token id (0 to {len(WORDS) - 1})",
    ),
    "negative id": (["--tokens", "negative.json"], "sequence 0 has -1"),
    "empty sequence": (["--tokens", "hole.json"], "sequence 1 is empty"),
    "no lists": (["--tokens", "flat.json"], "expected a list of lists"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(run: Run, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("w1 w2")
    Path("latin.txt").write_bytes(b"w\xff")
    Path("chat.jsonl").write_text(chat_line("w1"))
    Path("text.jsonl").write_text('{"text": "w1"}')
    Path("empty").mkdir()
    parquet(Path("d.parquet"), "text", [None, "w1"])
    Path("high.json").write_text(f"[[1], [{len(WORDS)}]]")
    Path("negative.json").write_text("[[-1]]")
    Path("hole.json").write_text("[[1], []]")
    Path("flat.json").write_text("[1, 2]")
    output.write_text("an older store")
    options, message = REFUSED[case]
    with pytest.raises(SystemExit) as stop:
        run("--sequences", 1, *options)
    assert message in str(stop.value)
    assert output.read_text() == "an older store"


def test_failing_write_leaves_the_older_store(
    run: Run, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("calibrate.os.replace", fail)
    output.write_text("an older store")
    with pytest.raises(SystemExit, match="no space left"):
        run("--tokens", text_file(tmp_path / "ids.json", "[[1]]"), "--sequences", 1)
    assert output.read_text() == "an older store"


def test_refuses_a_conversation_that_renders_to_nothing(run: Run, tmp_path: Path, tokenizer_directory: Path) -> None:
    text_file(tokenizer_directory / "chat_template.jinja", "{# nothing #}")
    with pytest.raises(SystemExit, match="sequence 0 is empty"):
        run("--chat", text_file(tmp_path / "c.jsonl", chat_line("w1")), "--sequences", 1)


def test_refuses_a_conversation_that_the_template_refuses(run: Run, tmp_path: Path, tokenizer_directory: Path) -> None:
    text_file(tokenizer_directory / "chat_template.jinja", "{{ raise_exception('no system role') }}" + CHAT_TEMPLATE)
    file = text_file(tmp_path / "c.jsonl", chat_line("w1"))
    with pytest.raises(SystemExit, match=r"c\.jsonl:1: .*no system role"):
        run("--chat", file, "--sequences", 1)


def test_refuses_a_tokenizer_without_template(run: Run, tmp_path: Path, tokenizer_directory: Path) -> None:
    (tokenizer_directory / "tokenizer_config.json").unlink()
    file = text_file(tmp_path / "c.jsonl", chat_line("w1"))
    with pytest.raises(SystemExit, match="no chat template"):
        run("--chat", file, "--sequences", 1)


def test_refuses_a_directory_without_tokenizer(run: Run, tmp_path: Path, tokenizer_directory: Path) -> None:
    (tokenizer_directory / "tokenizer.json").unlink()
    with pytest.raises(SystemExit, match=r"tokenizer\.json: no such file"):
        run("--text", text_file(tmp_path / "a.txt", "w1"))


# --- windows: the protocol of published perplexities ---


def test_windows_cut_one_text_in_order(run: Run, tokenizer_directory: Path, tmp_path: Path) -> None:
    """BOS once, at the beginning of the text; no overlap, no shuffling; the tail dropped."""
    add_bos(tokenizer_directory)
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text(words(*range(7)))
    second.write_text(words(7, 8, 9))
    got = run("--text", first, second, "--windows", "--sequence-length", 4)
    whole = Tokenizer.from_file(str(tokenizer_directory / "tokenizer.json")).encode(f"{words(*range(7))}\n\n{words(7, 8, 9)}").ids
    assert whole[0] == BOS and whole.count(BOS) == 1
    assert got == [whole[i : i + 4] for i in range(0, len(whole) // 4 * 4, 4)]
    assert run("--text", first, second, "--windows", "--sequence-length", 4, "--sequences", 1) == got[:1]


def test_windows_need_enough_running_text(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(words(1, 2, 3))
    with pytest.raises(SystemExit, match="3 tokens: 0 windows of 4"):
        run("--text", text, "--windows", "--sequence-length", 4)
    ids_file = tmp_path / "ids.json"
    ids_file.write_text("[[1]]")
    with pytest.raises(SystemExit, match="--windows cuts running text"):
        run("--tokens", ids_file, "--windows", "--sequences", 1)
