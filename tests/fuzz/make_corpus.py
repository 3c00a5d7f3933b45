#!/usr/bin/env python3
"""Writes the seed corpus of the safetensors parser: one small file a case, by the verdict it must get.

corpus/valid      accepted by us and by the official package
corpus/malformed  refused by both
corpus/stricter   refused by us only (docs/safetensors.md says why)

Standard library only. Run it after adding a case and commit what it writes.
"""
import json
import shutil
import struct
from pathlib import Path

ROOT = Path(__file__).parent / "corpus"
TYPES = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
         "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
         "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64}


def blob(header, data=b"\1\2\3\4", length=None):
    """A file: the header's length (or a false one), the header, the data."""
    header = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4), extra=""):
    text = f'"dtype":{json.dumps(dtype)},"shape":{json.dumps(list(shape))}'
    return "{" + text + f',"data_offsets":{json.dumps(list(offsets))}{extra}' + "}"


def one(*args, **kwargs):
    return '{"a":' + entry(*args, **kwargs) + "}"


def every_type():
    parts, offset = [], 0
    for name, bits in TYPES.items():
        parts.append(f'"{name}":' + entry(name, (8,), (offset, offset + bits)))
        offset += bits
    return blob("{" + ",".join(parts) + "}", bytes(offset))


def nested(depth):
    return one(extra=',"x":' + "[" * depth + "]" * depth)


GOOD = one()
MAX64 = 2**64 - 1

VALID = {
    "one_tensor": blob(GOOD),
    "no_tensor": blob("{}", b""),
    "padded": blob(GOOD + " " * 6),
    "white_space_around": blob(" \t\r\n" + GOOD + "\n \t\r"),
    "white_space_within": blob(GOOD.replace(":", " :\n").replace(",", "\t, ")),
    "metadata": blob('{"__metadata__":{"format":"pt","":""},"a":' + entry() + "}"),
    "metadata_last": blob('{"a":' + entry() + ',"__metadata__":{}}'),
    "metadata_null": blob('{"__metadata__":null,"a":' + entry() + "}"),
    "rank_0": blob(one("F32", ())),
    "rank_9": blob(one("F32", (1,) * 9)),
    "zero_size": blob(one("F32", (0, 3), (0, 0)), b""),
    "zero_size_between": blob('{"b":' + entry("U8", (2,), (2, 4)) + ',"z":' + entry("F64", (5, 0), (2, 2)) +
                              ',"a":' + entry("U8", (2,), (0, 2)) + "}"),
    "zero_sizes_at_end": blob('{"a":' + entry() + ',"y":' + entry("I8", (0,), (4, 4)) + ',"z":' +
                              entry("F4", (0,), (4, 4)) + "}"),
    "zero_size_large_shape": blob(one("U8", (2**61, 4, 0), (0, 0)), b""),
    "other_order": blob('{"b":' + entry("U8", (3,), (1, 4)) + ',"a":' + entry("U8", (1,), (0, 1)) + "}"),
    "every_type": every_type(),
    "f4_fills_bytes": blob(one("F4", (8,), (0, 4))),
    "f6_fills_bytes": blob(one("F6_E3M2", (4,), (0, 3)), b"\1\2\3"),
    "unknown_keys": blob(one(extra=',"x":{"a":[1,-2,3.5,null,true,"s",{}]},"y":123456789012345678901234567890')),
    "nested_125": blob(nested(125)),
    "name_empty": blob('{"":' + entry() + "}"),
    "name_unicode": blob('{"modèle.層.🦙":' + entry() + "}"),
    "name_escaped": blob(r'{"a\"\\\/\u00e9\ud83e\udd99\u0000\n":' + entry() + "}"),
    "name_with_braces": blob('{"{\\"a\\":[":' + entry() + "}"),
    "keys_escaped": blob(r'{"a":{"\u0064type":"\u00463\u0032","shape":[1],"data_offsets":[0,4]}}'),
    "keys_in_any_order": blob('{"a":{"data_offsets":[0,4],"shape":[1],"dtype":"F32"}}'),
    "entry_as_list": blob('{"a":["F32",[1],[0,4]]}'),
    "dtype_as_variant": blob('{"a":{"dtype":{"F32":null},"shape":[1],"data_offsets":[0,4]}}'),
    "dtype_as_variant_in_list": blob('{"a":[{"F32":null},[1],[0,4]]}'),
    "not_aligned": blob('{"a":' + entry("U8", (1,), (0, 1)) + ',"b":' + entry("F32", (1,), (1, 5)) + "}", bytes(5)),
}

MALFORMED = {
    # the length
    "empty_file": b"",
    "seven_bytes": b"\2\0\0\0\0\0\0",
    "length_only": struct.pack("<Q", 2),
    "length_0": blob("", b""),
    "length_over_limit": blob(GOOD, length=100_000_001),
    "length_at_limit": blob(GOOD, length=100_000_000),
    "length_2_63": blob(GOOD, length=2**63),
    "length_max": blob(GOOD, length=MAX64),
    "length_max_minus_8": blob(GOOD, length=MAX64 - 7),
    "length_beyond_file": blob(GOOD, b"", length=len(GOOD) + 1),
    "length_one_short": blob(GOOD, length=len(GOOD) - 1),
    "length_half": blob(GOOD, length=len(GOOD) // 2),
    "length_big_endian": struct.pack(">Q", len(GOOD)) + GOOD.encode() + bytes(4),
    "claims_4_mib_with_1_byte": blob("{", b"", length=4 << 20),
    # the text
    "not_utf8": blob(b'{"\xff":' + entry().encode() + b"}"),
    "utf8_overlong": blob(b'{"\xc0\xaf":' + entry().encode() + b"}"),
    "utf8_surrogate": blob(b'{"\xed\xa0\x80":' + entry().encode() + b"}"),
    "utf8_cut": blob(b'{"\xf0\x9f\xa6":' + entry().encode() + b"}"),
    "utf8_beyond_unicode": blob(b'{"\xf4\x90\x80\x80":' + entry().encode() + b"}"),
    "not_utf8_after_json": blob(GOOD.encode() + b"\xff"),
    "byte_order_mark": blob(b"\xef\xbb\xbf" + GOOD.encode()),
    "utf16": blob(GOOD.encode("utf-16-le")),
    "lone_surrogate": blob(r'{"\ud800":' + entry() + "}"),
    "zero_byte_after_json": blob(GOOD + "\0"),
    "zero_byte_before_json": blob("\0" + GOOD),
    "zero_byte_in_name": blob('{"a\0":' + entry() + "}"),
    "control_character_in_name": blob('{"a\n":' + entry() + "}"),
    "not_json": blob("pickle"),
    "cut_json": blob(GOOD[: len(GOOD) // 2]),
    "unclosed": blob(GOOD[:-1]),
    "trailing_comma": blob('{"a":' + entry() + ",}"),
    "two_documents": blob(GOOD + GOOD),
    "comment": blob("/* */" + GOOD),
    "single_quotes": blob(GOOD.replace('"', "'")),
    "nan": blob(one(extra=',"x":NaN')),
    "number_out_of_range": blob(one(extra=',"x":1e999')),
    "leading_zero": blob(one(extra=',"x":01')),
    "bad_escape": blob(one(extra=r',"x":"\x"')),
    "nested_126": blob(nested(126)),
    "nested_10000": blob(nested(10000)),
    # the document
    "list": blob("[]", b""),
    "null": blob("null", b""),
    "string": blob('"a"', b""),
    "entry_null": blob('{"a":null}', b""),
    "entry_number": blob('{"a":1}', b""),
    "entry_string": blob('{"a":"F32"}', b""),
    "entry_empty": blob('{"a":{}}', b""),
    "entry_list_too_long": blob('{"a":["F32",[1],[0,4],0]}'),
    "entry_list_too_short": blob('{"a":["F32",[1]]}'),
    "entry_list_other_order": blob('{"a":[[1],"F32",[0,4]]}'),
    "metadata_list": blob('{"__metadata__":[],"a":' + entry() + "}"),
    "metadata_number": blob('{"__metadata__":{"n":1},"a":' + entry() + "}"),
    "metadata_null_value": blob('{"__metadata__":{"n":null},"a":' + entry() + "}"),
    "metadata_nested": blob('{"__metadata__":{"n":{}},"a":' + entry() + "}"),
    "metadata_is_a_tensor": blob('{"__metadata__":' + entry() + "}"),
    "metadata_twice": blob('{"__metadata__":{},"__metadata__":{},"a":' + entry() + "}"),
    # dtype
    "dtype_missing": blob('{"a":{"shape":[1],"data_offsets":[0,4]}}'),
    "dtype_unknown": blob(one("F31")),
    "dtype_lower_case": blob(one("f32")),
    "dtype_empty": blob(one("")),
    "dtype_number": blob(GOOD.replace('"F32"', "17")),
    "dtype_null": blob(GOOD.replace('"F32"', "null")),
    "dtype_twice": blob(one(extra=',"dtype":"F32"')),
    "dtype_variant_empty": blob(GOOD.replace('"F32"', "{}")),
    "dtype_variant_value": blob(GOOD.replace('"F32"', '{"F32":1}')),
    "dtype_variant_two": blob(GOOD.replace('"F32"', '{"F32":null,"I32":null}')),
    # shape
    "shape_missing": blob('{"a":{"dtype":"F32","data_offsets":[0,4]}}'),
    "shape_number": blob(GOOD.replace("[1]", "1")),
    "shape_null": blob(GOOD.replace("[1]", "null")),
    "shape_string": blob(GOOD.replace("[1]", '["1"]')),
    "shape_nested": blob(GOOD.replace("[1]", "[[1]]")),
    "shape_negative": blob(one(shape=(-1,))),
    "shape_minus_zero": blob(GOOD.replace("[1]", "[-0]")),
    "shape_float": blob(GOOD.replace("[1]", "[1.0]")),
    "shape_exponent": blob(GOOD.replace("[1]", "[1e0]")),
    "shape_over_64_bits": blob(one(shape=(2**64,))),
    "shape_overflows": blob(one(shape=(2**33, 2**33))),
    "shape_overflows_to_1": blob(one(shape=(2**63 - 1, 2**63 - 1), dtype="U8", offsets=(0, 1)), b"\0"),
    "shape_overflows_before_0": blob(one(shape=(2**62, 4, 0), offsets=(0, 0)), b""),
    "shape_times_size_overflows": blob(one("F64", (2**61,), (0, 0)), b""),
    "shape_times_bits_overflows": blob(one("U8", (2**61,), (0, 0)), b""),
    "shape_too_large": blob(one(shape=(2,))),
    "shape_too_small": blob(one(shape=(0,))),
    "size_of_other_dtype": blob(one("F16")),
    "f4_half_a_byte": blob(one("F4", (7,), (0, 4))),
    "f4_one": blob(one("F4", (1,), (0, 1)), b"\0"),
    "f4_rank_0": blob(one("F4", (), (0, 0)), b""),
    "f6_part_of_a_byte": blob(one("F6_E2M3", (5,), (0, 4))),
    # offsets
    "offsets_missing": blob('{"a":{"dtype":"F32","shape":[1]}}'),
    "offsets_one": blob(one(offsets=(0,))),
    "offsets_three": blob(one(offsets=(0, 4, 4))),
    "offsets_empty": blob(one(offsets=())),
    "offsets_object": blob(GOOD.replace("[0, 4]", '{"0":0,"1":4}')),
    "offsets_string": blob(GOOD.replace("[0, 4]", '["0","4"]')),
    "offsets_null": blob(GOOD.replace("[0, 4]", "[null,4]")),
    "offsets_negative": blob(one(offsets=(-4, 0))),
    "offsets_minus_zero": blob(GOOD.replace("[0, 4]", "[-0,4]")),
    "offsets_float": blob(GOOD.replace("[0, 4]", "[0.0,4.0]")),
    "offsets_over_63_bits": blob(one(offsets=(2**63, 2**63 + 4))),
    "offsets_over_64_bits": blob(one(offsets=(2**64, 2**64 + 4))),
    "offsets_wrap": blob(one(offsets=(MAX64 - 3, MAX64))),
    "end_before_begin": blob(one(offsets=(4, 0))),
    "begin_not_0": blob(one(offsets=(1, 5)), bytes(5)),
    "missing_bytes": blob(GOOD, bytes(3)),
    "no_data": blob(GOOD, b""),
    "bytes_after_last_tensor": blob(GOOD, bytes(5)),
    "data_without_tensors": blob("{}", bytes(4)),
    "hole": blob('{"a":' + entry() + ',"b":' + entry(offsets=(5, 9)) + "}", bytes(9)),
    "overlap": blob('{"a":' + entry() + ',"b":' + entry(offsets=(3, 7)) + "}", bytes(7)),
    "overlap_with_room": blob('{"a":' + entry() + ',"b":' + entry(offsets=(3, 7)) + "}", bytes(8)),
    "same_range": blob('{"a":' + entry() + ',"b":' + entry() + "}"),
    "same_range_and_hole": blob('{"a":' + entry() + ',"b":' + entry() + "}", bytes(8)),
    "zero_size_inside": blob('{"a":' + entry() + ',"z":' + entry("F32", (0,), (2, 2)) + "}"),
    "zero_size_beyond": blob('{"a":' + entry() + ',"z":' + entry("F32", (0,), (5, 5)) + "}"),
    "many_over_one_range": blob("{" + ",".join(f'"t{i}":' + entry() for i in range(1000)) + "}", bytes(4000)),
}

STRICTER = {
    "tensor_twice": blob('{"a":' + entry() + ',"a":' + entry() + "}"),
    "tensor_twice_escaped": blob('{"a":' + entry() + r',"\u0061":' + entry() + "}"),
    "metadata_key_twice": blob('{"__metadata__":{"k":"1","k":"2"},"a":' + entry() + "}"),
    "unknown_key_twice": blob(one(extra=',"x":1,"x":1')),
    "nested_key_twice": blob(one(extra=',"x":[{"y":1,"y":2}]')),
    "zero_size_beyond_int64": blob(one("U8", (0, 2**63), (0, 0)), b""),
}

if __name__ == "__main__":
    for folder, cases in (("valid", VALID), ("malformed", MALFORMED), ("stricter", STRICTER)):
        shutil.rmtree(ROOT / folder, ignore_errors=True)
        (ROOT / folder).mkdir(parents=True)
        for name, content in cases.items():
            (ROOT / folder / name).write_bytes(content)
