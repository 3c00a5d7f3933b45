#!/usr/bin/env python3
"""Writes a calibration store: the token sequences that quantmill quantizes a model with, or evaluates it on.

Exactly one source is named. Running text (--text, --jsonl, --dataset --column) is PACKED: the documents are joined by
blank lines and cut into sequences of exactly --sequence-length tokens. Conversations (--chat, --dataset --messages) and
ready-made ids (--tokens) each stay a sequence of their own: longer ones are TRUNCATED, shorter ones kept as they are.
The seed chooses which sequences are taken, and their order (--tokens keeps the order of the file).

--windows cuts running text as published WikiText-2 perplexities do, for `quantmill eval`: documents joined by blank lines
are tokenized as ONE text, with what the tokenizer puts around a text (BOS, once), and cut in order into windows of
exactly --sequence-length tokens without overlap; the rest at the end is dropped. All windows are kept, or the first
--sequences.

Examples:
  tools/calibrate.py --tokenizer models/Llama --text book.txt --sequences 128 --sequence-length 512 --output calib.h5
  tools/calibrate.py --tokenizer models/Llama --chat chats.jsonl --date 2026-01-31 --output calib.h5
  tools/calibrate.py --tokenizer models/Llama --dataset corpus/ --column text --output calib.h5

The store is an HDF5 file: /input_ids (int32 [N, L], padded with -1), /lengths (int32 [N]) and the attributes
vocab_size, tokenizer (SHA-256 of tokenizer.json) and source.
"""

import argparse
import hashlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.dataset
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

Conversation = list[dict[str, Any]]
Ids = list[int]


class BadInput(Exception):
    """Something that the user named cannot be used; the message says what and why."""


# --- reading the sources -------------------------------------------------------------------------------------------


def read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: not UTF-8 at byte {error.start}") from None


def read_json(file: Path) -> Any:
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise BadInput(f"{file}:{error.lineno}: not JSON: {error.msg}") from None


def read_jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, value) for every line that is not blank."""
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            try:
                yield f"{file}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise BadInput(f"{file}:{number}: not JSON: {error.msg}") from None


def field_of(place: str, value: Any, field: str) -> str:
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        raise BadInput(f"{place}: no text in the field '{field}'")
    return value[field]


def conversation_of(place: str, value: Any) -> Conversation:
    """A list of {"role", "content"}, or an object that has one under "messages"."""
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise BadInput(
            f"{place}: no conversation: expected a list of {{role, content}}, or an object with one in 'messages'"
        )
    return messages


def read_column(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    """Yields (place, value) for every row of a column of a Parquet file, or of all Parquet files under a directory."""
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise BadInput(f"{path}: no .parquet file in it")
    for file in files:
        try:
            data = pyarrow.dataset.dataset(file, format="parquet")
            if column not in data.schema.names:
                raise BadInput(f"{file}: no column '{column}'; it has {', '.join(data.schema.names)}")
            rows = (value for batch in data.to_batches(columns=[column]) for value in batch.column(0).to_pylist())
            yield from ((f"{file}, row {number}", value) for number, value in enumerate(rows))
        except pyarrow.ArrowInvalid as error:
            raise BadInput(f"{file}: not Parquet: {error}") from None


# --- tokenizing ----------------------------------------------------------------------------------------------------


class GenerationTag(Extension):
    """{% generation %} of Hugging Face templates marks the assistant's words; here it only passes them on."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ModelTokenizer:
    """tokenizer.json of a checkpoint directory, with its chat template."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise BadInput(f"{file}: no such file (--tokenizer takes the directory of a Hugging Face checkpoint)")
        content = file.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self.tokenizer = Tokenizer.from_buffer(content)
        except ValueError as error:
            raise BadInput(f"{file}: {error}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.prefix = self.leading_special_tokens()

    def encode(self, text: str) -> Ids:
        """The ids of the text alone, without a beginning-of-text token of the tokenizer's own."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def leading_special_tokens(self) -> Ids:
        """What the tokenizer puts before every text: [BOS] or nothing."""
        whole = self.tokenizer.encode("a").ids
        bare = self.encode("a")
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[:start]

    def chat_renderer(self, today: date) -> Callable[[Conversation], str]:
        """The model's chat template as a function; dated templates print `today`."""
        config_file = self.directory / "tokenizer_config.json"
        config = read_json(config_file) if config_file.is_file() else {}
        template_file = self.directory / "chat_template.jinja"
        template = read_text(template_file) if template_file.is_file() else config.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not isinstance(template, str):
            raise BadInput(f"{self.directory}: the tokenizer has no chat template")

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals |= {"raise_exception": raise_exception, "strftime_now": today.strftime}
        compiled = environment.from_string(template)
        special = {
            key: token["content"] if isinstance(token, dict) else token
            for key, token in config.items()
            if key.endswith("_token")
        }
        return lambda messages: compiled.render(messages=messages, add_generation_prompt=False, **special)


def shuffled(items: Iterable[Any], seed: int) -> list[Any]:
    result = list(items)
    random.Random(seed).shuffle(result)
    return result


def pack(texts: list[str], tokenizer: ModelTokenizer, count: int, length: int, seed: int) -> list[Ids]:
    """`count` sequences of `length` tokens cut from the texts; each begins with BOS once if the tokenizer adds one."""
    body = length - len(tokenizer.prefix)
    if body < 1:
        raise BadInput(f"--sequence-length {length} leaves no room for text")
    separator = tokenizer.encode("\n\n")
    stream: Ids = []
    for text in shuffled(texts, seed):
        ids = tokenizer.encode(text)
        if ids[: len(tokenizer.prefix)] == tokenizer.prefix:
            ids = ids[len(tokenizer.prefix) :]  # the text spells BOS itself
        stream += separator + ids if stream else ids
        if len(stream) >= 4 * count * body:  # plenty to choose from; leave the rest of a large corpus unread
            break
    starts = shuffled(range(0, len(stream) - body + 1, body), seed)
    if len(starts) < count:
        raise BadInput(f"the text gives {len(starts)} sequences of {length} tokens, fewer than --sequences {count}")
    return [tokenizer.prefix + stream[start : start + body] for start in starts[:count]]


def windows(texts: list[str], tokenizer: ModelTokenizer, count: int | None, length: int) -> list[Ids]:
    """The first `count` windows, or all, of one concatenated text."""
    stream = tokenizer.tokenizer.encode("\n\n".join(texts)).ids
    result = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    if len(result) < (count or 1):
        raise BadInput(
            f"the text has {len(stream)} tokens: {len(result)} windows of {length}, fewer than the {count or 1} needed"
        )
    return result[:count]


def take(sequences: list[Ids], count: int, length: int) -> tuple[list[Ids], int]:
    """The first `count` sequences cut to `length`, and how many were longer."""
    if len(sequences) < count:
        raise BadInput(f"the source has {len(sequences)} sequences, fewer than --sequences {count}")
    chosen = sequences[:count]
    return [ids[:length] for ids in chosen], sum(len(ids) > length for ids in chosen)


def encode_chats(
    chats: Iterable[tuple[str, Conversation]], tokenizer: ModelTokenizer, today: date, count: int, seed: int
) -> list[Ids]:
    """Tokenizes `count` conversations chosen by the seed; templates write BOS themselves, so none is added."""
    render = tokenizer.chat_renderer(today)
    sequences = []
    for place, messages in shuffled(chats, seed)[:count]:
        try:
            sequences.append(tokenizer.encode(render(messages)))
        except (TemplateError, TypeError) as error:
            raise BadInput(f"{place}: the chat template refuses this conversation: {error}") from None
    return sequences


def read_ids(file: Path, vocab_size: int) -> list[Ids]:
    """A JSON list of lists of token ids."""
    value = read_json(file)
    if not isinstance(value, list) or not all(isinstance(ids, list) for ids in value):
        raise BadInput(f"{file}: expected a list of lists of token ids")
    for number, ids in enumerate(value):
        if not ids:
            raise BadInput(f"{file}: sequence {number} is empty")
        for token in ids:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise BadInput(f"{file}: sequence {number} has {token!r}, which is no token id (0 to {vocab_size - 1})")
    return value


# --- the store -----------------------------------------------------------------------------------------------------


@dataclass
class Store:
    sequences: list[Ids]
    source: str


def write_store(file: Path, store: Store, tokenizer: ModelTokenizer) -> None:
    """Writes under a temporary name and renames, so that a store is always whole."""
    lengths = np.array([len(ids) for ids in store.sequences], dtype=np.int32)
    if not lengths.all():
        raise BadInput(f"sequence {int(np.argmin(lengths))} is empty")
    padded = np.full((len(lengths), lengths.max()), -1, dtype=np.int32)
    for row, ids in zip(padded, store.sequences, strict=True):
        row[: len(ids)] = ids
    partial = file.with_name(file.name + ".partial")
    with h5py.File(partial, "w") as h5:
        h5.create_dataset("input_ids", data=padded)
        h5.create_dataset("lengths", data=lengths)
        h5.attrs["vocab_size"] = tokenizer.vocab_size
        h5.attrs["tokenizer"] = tokenizer.sha256
        h5.attrs["source"] = store.source
    os.replace(partial, file)


def make_store(arguments: argparse.Namespace, tokenizer: ModelTokenizer) -> Store:
    """Reads the one source that was named and makes the sequences of it."""
    count, length, seed = arguments.sequences or 128, arguments.sequence_length, arguments.seed
    texts: list[str] | None = None
    chats: Iterable[tuple[str, Any]] | None = None
    if arguments.text:
        name = "text " + ", ".join(file.name for file in arguments.text)
        texts = [read_text(file) for file in arguments.text]
    elif arguments.jsonl:
        name = f"jsonl {arguments.jsonl.name}, field {arguments.field}"
        texts = [field_of(place, value, arguments.field) for place, value in read_jsonl(arguments.jsonl)]
    elif arguments.chat:
        name = f"chat {arguments.chat.name}"
        chats = read_jsonl(arguments.chat)
    elif arguments.dataset and arguments.messages:
        name = f"dataset {arguments.dataset.name}, messages {arguments.messages}"
        chats = read_column(arguments.dataset, arguments.messages)
    elif arguments.dataset:
        name = f"dataset {arguments.dataset.name}, column {arguments.column}"
        rows = read_column(arguments.dataset, arguments.column)
        texts = [field_of(place, {arguments.column: value}, arguments.column) for place, value in rows]
    else:
        name = f"tokens {arguments.tokens.name}"

    if arguments.windows:
        if texts is None:
            raise BadInput("--windows cuts running text: --text, --jsonl or --dataset with --column")
        return Store(windows(texts, tokenizer, arguments.sequences, length), f"{name}; windows of {length} tokens")
    if texts is not None:
        sequences = pack([text for text in texts if text.strip()], tokenizer, count, length, seed)
        how = "packed"
    else:
        if chats is not None:
            parsed = ((place, conversation_of(place, value)) for place, value in chats)
            sequences = encode_chats(parsed, tokenizer, arguments.date, count, seed)
        else:
            sequences = read_ids(arguments.tokens, tokenizer.vocab_size)
        sequences, cut = take(sequences, count, length)
        how = f"{cut} of {count} truncated to {length} tokens, the others kept as they are"
    return Store(sequences, f"{name}; {how}; seed {seed}")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no positive number")
    return int(text)


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="DIR",
        help="checkpoint directory with tokenizer.json",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="plain text, a document a file")
    source.add_argument("--jsonl", type=Path, metavar="FILE", help="JSON objects, one a line, with text in --field")
    source.add_argument(
        "--chat", type=Path, metavar="FILE", help='JSON lines: {"messages": [{"role", "content"}, ...]}'
    )
    source.add_argument("--dataset", type=Path, metavar="DIR_OR_PARQUET", help="Parquet, with --column or --messages")
    source.add_argument("--tokens", type=Path, metavar="FILE", help="JSON list of lists of token ids")
    parser.add_argument("--field", default="text", help="field of --jsonl (default: %(default)s)")
    column = parser.add_mutually_exclusive_group()
    column.add_argument("--column", default="text", help="text column of --dataset (default: %(default)s)")
    column.add_argument("--messages", metavar="COLUMN", help="column of --dataset that holds conversations")
    parser.add_argument("--windows", action="store_true", help="cut one text in order, for evaluation (see above)")
    parser.add_argument(
        "--sequences", type=positive, metavar="N", help="default: 128; with --windows as many as there are"
    )
    parser.add_argument("--sequence-length", type=positive, default=2048, metavar="L", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument(
        "--date",
        type=date.fromisoformat,
        default=date.today(),
        metavar="YYYY-MM-DD",
        help="for chat templates that print it (default: today)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.h5")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    try:
        tokenizer = ModelTokenizer(arguments.tokenizer)
        store = make_store(arguments, tokenizer)
        write_store(arguments.output, store, tokenizer)
    except (BadInput, OSError) as error:
        sys.exit(f"calibrate: {error}")
    tokens = sum(map(len, store.sequences))
    print(f"Wrote {arguments.output}: {len(store.sequences)} sequences, {tokens} tokens ({store.source})")


if __name__ == "__main__":
    main()
