"""Our safetensors reader (`quantmill inspect`) and the official package give the same verdict on the same bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model
from safetensors import SafetensorError, safe_open

Header = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    make_model(directory, "Llama")
    return directory


def split(content: bytes) -> tuple[Header, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: Header | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def added(extra: Header, more_data: bytes = b"") -> Callable[[bytes], bytes]:
    """The file with one more tensor "extra"; its offsets are given relative to the end of the others."""

    def change(content: bytes) -> bytes:
        header, data = split(content)
        begin, end = extra["data_offsets"]
        return join(
            header | {"extra": extra | {"data_offsets": [len(data) + begin, len(data) + end]}},
            data + more_data,
        )

    return change


def changed(change: Callable[[Header, Header], object]) -> Callable[[bytes], bytes]:
    """The file after a change to (whole header, its last tensor's entry)."""

    def apply(content: bytes) -> bytes:
        header, data = split(content)
        last = max(
            (value for key, value in header.items() if key != "__metadata__"),
            key=lambda value: value["data_offsets"],
        )
        change(header, last)
        return join(header, data)

    return apply


def raw(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """The file after a change to the header's bytes."""

    def apply(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        return join(change(content[8 : 8 + length]), content[8 + length :])

    return apply


ACCEPTED: dict[str, Callable[[bytes], bytes]] = {
    "unchanged": lambda content: content,
    "spaces after the header": raw(lambda header: header + b"  "),
    "header not a multiple of eight": raw(lambda header: header.rstrip() + b" " * ((6 - len(header.rstrip())) % 8 + 1)),
    "tensor without elements": added(entry("F32", [0, 7], 0, 0)),
    "tensor of rank 0": added(entry("F32", [], 0, 4), bytes(4)),
    "no metadata": changed(lambda header, _: header.pop("__metadata__", None)),
}

REJECTED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "seven bytes": lambda content: content[:7],
    "length only": lambda content: content[:8],
    "length over 100 MB": lambda content: (100_000_001).to_bytes(8, "little") + content[8:],
    "length of 2^64 - 1": lambda content: b"\xff" * 8 + content[8:],
    "length beyond the file": lambda content: (len(content)).to_bytes(8, "little") + content[8:],
    "4 MiB claimed, one byte there": lambda _: (4 << 20).to_bytes(8, "little") + b"{",
    "header cut in half": lambda content: content[: 8 + int.from_bytes(content[:8], "little") // 2],
    "header length cut in half": lambda content: (
        (int.from_bytes(content[:8], "little") // 2).to_bytes(8, "little") + content[8:]
    ),
    "header length 0": lambda content: bytes(8) + content[8:],
    "not UTF-8": raw(lambda header: header.replace(b"embed", b"emb\xffd", 1)),
    "not JSON": raw(lambda header: header.replace(b":", b";", 1)),
    "an array": raw(lambda header: b"[" + header.strip() + b"]"),
    "bytes after the JSON": raw(lambda header: header + b"x"),
    "byte after the last tensor": lambda content: content + b"\0",
    "missing last byte": lambda content: content[:-1],
    "no data": lambda content: content[: 8 + int.from_bytes(content[:8], "little")],
    "hole": added(entry("F32", [1], 4, 8), bytes(8)),
    "overlap": added(entry("F32", [1], -4, 0)),
    "end before begin": changed(lambda _, last: last["data_offsets"].reverse()),
    "negative offset": changed(lambda _, last: last.update(data_offsets=[-1, last["data_offsets"][1]])),
    "fractional offset": changed(lambda _, last: last.update(data_offsets=[0.5, last["data_offsets"][1]])),
    "three offsets": changed(lambda _, last: last["data_offsets"].append(0)),
    "offset of 2^64": changed(lambda _, last: last.update(data_offsets=[last["data_offsets"][0], 2**64])),
    "shape larger than extent": changed(lambda _, last: last["shape"].append(2)),
    "shape product overflows": changed(lambda _, last: last.update(shape=[2**32, 2**32, 4])),
    "shape times size overflows": changed(lambda _, last: last.update(shape=[2**62, 2])),
    "overflow to the right size": added(entry("F32", [2**62], 0, 0)),
    "negative dimension": changed(lambda _, last: last.update(shape=[-1])),
    "dimension as text": changed(lambda _, last: last.update(shape=["1"])),
    "unknown dtype": changed(lambda _, last: last.update(dtype="F31")),
    "no dtype": changed(lambda _, last: last.pop("dtype")),
    "no shape": changed(lambda _, last: last.pop("shape")),
    "no offsets": changed(lambda _, last: last.pop("data_offsets")),
    "four-bit values that fill no byte": added(entry("F4", [3], 0, 2), bytes(2)),
    "metadata with a number": changed(lambda header, _: header.update(__metadata__={"format": 1})),
    "metadata no object": changed(lambda header, _: header.update(__metadata__="pt")),
    "many entries over one range": changed(lambda header, last: header.update({f"x{i}": last for i in range(200_000)})),
}


def official_accepts(file: Path) -> bool:
    try:
        with safe_open(file, framework="numpy"):
            return True
    except SafetensorError:
        return False


@pytest.mark.parametrize("name", [*ACCEPTED, *REJECTED])
def test_same_verdict(quantmill: Callable[..., Any], model: Path, tmp_path: Path, name: str) -> None:
    content = (model / "model.safetensors").read_bytes()
    for file in model.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).symlink_to(file)
    file = tmp_path / "model.safetensors"
    file.write_bytes((ACCEPTED | REJECTED)[name](content))
    accepts = name in ACCEPTED
    assert official_accepts(file) == accepts
    done = quantmill("inspect", tmp_path, code=0 if accepts else 2)
    if not accepts:
        assert "model.safetensors" in done.stdout + done.stderr


def test_duplicate_keys_are_refused_by_us_alone(quantmill: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    for file in model.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).symlink_to(file)
    header, data = split(content)
    name = next(key for key in header if key != "__metadata__")
    again = json.dumps({name: header[name]})[1:-1]
    (tmp_path / "model.safetensors").write_bytes(
        join(json.dumps(header)[:-1].encode() + b"," + again.encode() + b"}", data)
    )
    assert official_accepts(tmp_path / "model.safetensors")
    quantmill("inspect", tmp_path, code=2)
