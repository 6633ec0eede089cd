"""Ways to damage a file: bytes of any file, and the values in those whose form is known."""

from __future__ import annotations

import copy
import gzip
import io
import json
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import torch

from fuzzing.samples import Canary, canary_pickle

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**50, 2**63 - 1, 2**63, 2**64 - 1)
DEEP, DIGITS, INFINITE = "@deep@", "@digits@", "@infinite@"  # stand for text that json.dumps cannot write
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**63, 2**64, -(2**63), 10**40, 0.5, -0.5, 1e-300, 1e308, -1e308),
    *(float("nan"), float("inf"), float("-inf"), "", "a", "\0", "\ud800", "x" * 100_000, "é\n\x1b[31m", "../..", "1"),
    *([], [[]], {}, {"": {}}, [None], [1, 2, 3], [float("nan")] * 3, [-1.0] * 3, [1e308] * 3, ["a"] * 3, [0] * 100),
    *(DEEP, DIGITS, INFINITE),
)


# --- bytes ----------------------------------------------------------------------------------------------------------


def damage_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Damage as disks, networks and editors do it. Returns the bytes and what was done."""
    how = rng.choice(("flip", "flip", "flip", "truncate", "append", "splice", "delete", "zero", "extreme", "extreme"))
    new, size = bytearray(data), max(len(data), 1)
    at = rng.choice((rng.randrange(size), rng.randrange(min(size, 512)), size - 1 - rng.randrange(min(size, 512))))
    length = rng.choice((1, 4, 16, 64, 512, 4096))
    if how == "flip":
        for _ in range(rng.choice((1, 1, 2, 8))):
            place = at if rng.random() < 0.5 else rng.randrange(size)
            new[place] ^= 1 << rng.randrange(8)
    elif how == "truncate":
        del new[at:]
    elif how == "append":
        new += rng.choice((b"\0", b"\n", rng.randbytes(100), data[:1000], b"PK\x05\x06", bytes(5000)))
    elif how == "splice":
        other = rng.randrange(size)
        new[at : at + length] = data[other : other + length]
    elif how == "delete":
        del new[at : at + length]
    elif how == "zero":
        new[at : at + length] = bytes(len(new[at : at + length]))
    else:
        width = rng.choice((1, 2, 4, 8))
        value = rng.choice(EXTREMES) % (1 << 8 * width)
        new[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
    return bytes(new), how


# --- values in JSON, TOML and Python objects --------------------------------------------------------------------------


def _inside(value: Any) -> list[Any]:
    """The keys or places of what a dictionary or a list holds."""
    return list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to each value inside ``value``."""
    return [where for key in _inside(value) for where in ((*above, key), *places(value[key], (*above, key)))]


def replace_value(value: Any, rng: random.Random, candidates: tuple[Any, ...] = VALUES) -> Any:
    """A copy with one value inside it replaced, removed or moved to another key."""
    value = copy.deepcopy(value)
    if not _inside(value):
        return rng.choice(candidates)
    # Down from the top, so that a list of many has no more of it than a number beside it.
    inside, last = value, rng.choice(_inside(value))
    while _inside(inside[last]) and rng.random() < 0.8:
        inside = inside[last]
        last = rng.choice(_inside(inside))
    how = rng.random()
    if how < 0.1:
        del inside[last]
    elif how < 0.15 and isinstance(inside, dict):
        inside[f"{last}x"] = inside.pop(last)
    elif how < 0.25 and type(inside[last]) in (int, float):
        inside[last] = rng.choice((-1, 2, 10, 1000)) * inside[last] + rng.choice((0, 1, 0.5))
    else:
        inside[last] = rng.choice(candidates)
    return value


def damage_json(data: bytes, rng: random.Random) -> bytes:
    """Replace a value."""
    return _json(replace_value(json.loads(data), rng))


def _json(value: Any) -> bytes:
    text = json.dumps(value).replace(json.dumps(INFINITE), "1e999").replace(json.dumps(DIGITS), "9" * 5000)
    return text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000).encode()


def damage_lines(data: bytes, rng: random.Random) -> bytes:
    """Replace a value in a line of JSON; or lose, double or exchange lines."""
    lines = data.splitlines(keepends=True)
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    how = rng.random()
    if how < 0.1:
        del lines[at]
    elif how < 0.2:
        lines.insert(at, lines[other])
    elif how < 0.3:
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines[at] = damage_json(lines[at], rng) + b"\n"
    return b"".join(lines)


TOML_VALUES = (
    *("-1", "0", "1", "2", "1_000_000", "99999999999999999999", "9" * 5000, "1e308", "-1e308", "1e999", "inf", "-inf"),
    *("nan", "0x7fffffffffffffff", "0.0", "1e-300", "true", "false", '""', '"a"', '"\\u0000"', '"é"', "[]", "[1]"),
    *("[1, 2, 3, 4, 5, 6, 7, 8]", "[0]", "[-1]", "[1000]", "[1.5]", '["a"]', "[99999999999999999999]", "[[]]", "{}"),
    *("{a = 1}", "1979-05-27", "07:32:00", "[" * 5000 + "]" * 5000, "{a=" * 5000 + "1" + "}" * 5000, "[1000, 1000]"),
    *("", "=", "'''", '"' + "x" * 100_000 + '"', f"[{'1,' * 100_000}]", "4096", "100000", "100", "16", "0.5", "'muon'"),
)


def damage_toml(data: bytes, rng: random.Random) -> bytes:
    """Replace a value, or a whole line."""
    lines = data.decode().splitlines()
    at = rng.choice([i for i, line in enumerate(lines) if line])
    key, equals, _ = lines[at].partition(" = ")
    if not equals or rng.random() < 0.1:
        lines[at] = rng.choice(("", "[", "[model]", "[[model]]", "extends = 'paper'", "extends = 7", "x = 1", "[x.y]"))
    else:
        old = lines[at].partition(" = ")[2]
        near = f"{rng.choice(('2', '0', '10', '-'))}{old}" if old[0].isdigit() else old
        value = rng.choice((near, rng.choice(TOML_VALUES), rng.choice(TOML_VALUES)))
        lines[at] = f"{key} = {value}"
        if rng.random() < 0.05:
            lines.append(lines[at])
    encoding = rng.choice(("utf-8",) * 12 + ("utf-16", "utf-8-sig", "utf-16-be"))
    return "\n".join(lines).encode(encoding)


# --- files of this project ------------------------------------------------------------------------------------------


def _tensors(rng: random.Random) -> tuple[Any, ...]:
    return (
        *(torch.zeros(()), torch.zeros(0), torch.full((8, 3, 3, 3), float("nan")), torch.ones(3, dtype=torch.bfloat16)),
        *(
            torch.arange(4),
            torch.tensor(-1),
            torch.tensor(2**62),
            torch.zeros(1).expand(2**40),
            torch.eye(3).to_sparse(),
        ),
        *(
            torch.tensor([True]),
            torch.tensor(1j),
            torch.zeros(5056, dtype=torch.uint8),
            torch.full((5056,), 255).byte(),
        ),
        *(torch.zeros(2, requires_grad=True), rng.randbytes(10), (), ((1,),), {1: 2}, {None: None}),
    )


def damage_checkpoint(data: bytes, rng: random.Random) -> bytes:
    """Replace a value and keep the sums right; or put another pickle in the place of the checkpoint's."""
    how = rng.random()
    buffer = io.BytesIO()
    if how < 0.75:
        state = torch.load(io.BytesIO(data), weights_only=True)
        state = replace_tensor(state, rng) if how < 0.25 else replace_value(state, rng, (*VALUES, *_tensors(rng)))
        torch.save(state, buffer)
        return buffer.getvalue()
    if how < 0.85:
        state = torch.load(io.BytesIO(data), weights_only=True)
        state[rng.choice([*state, "more"])] = Canary()
        torch.save(state, buffer)
        return buffer.getvalue()
    pickles = (
        *(b"", b".", b"\x80\x02.", canary_pickle(), b"cos\nmkdir\n(S'canary'\ntR.", b"ccollections\nOrderedDict\n)R."),
        *(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", b"\x80\x02X\xff\xff\xff\x7f.", b"\x80\x02K\x01K\x02s."),
        *(b"\x80\x02}q\x00h\x01.", b"\x80\x02U\x04aQ.", b"ctorch._utils\n_rebuild_tensor_v2\n)R.", b"\x80\x02)\x81."),
        b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00(K\x02tK\x01NNtR.",
    )
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = rng.choice(pickles) if rng.random() < 0.6 else damage_bytes(content, rng)[0]
            if name.endswith(("version", "byteorder")) and rng.random() < 0.2:
                content = damage_bytes(content, rng)[0]
            new.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def replace_tensor(value: Any, rng: random.Random) -> Any:
    """A copy with one tensor of another shape, type or content."""
    where = rng.choice([place for place in places(value) if isinstance(_at(value, place), torch.Tensor)])
    *path, last = where
    value = copy.deepcopy(value)
    inside, tensor = _at(value, tuple(path)), _at(value, where)
    changes: tuple[Callable[[], Any], ...] = (
        lambda: tensor.double(),
        lambda: tensor.bfloat16(),
        lambda: tensor.long(),
        lambda: tensor[None],
        lambda: tensor.flatten()[:-1],
        lambda: tensor.float() * float("nan"),
        lambda: tensor.float() + float("inf"),
        lambda: tensor * -1,
        lambda: tensor.tolist(),
        lambda: tensor.float() * 1e38,
    )
    inside[last] = rng.choice(changes)()
    return value


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def damage_weights(data: bytes, rng: random.Random) -> bytes:
    """Replace a value in the header, or in the metadata; or tensors by others."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    how, body = rng.random(), data[8 + size :]
    if rng.random() < 0.7:
        del header["__metadata__"]["sha256"]  # as an older version wrote it: what is behind the checksum is tried too
    if how < 0.35:
        key = rng.choice(sorted(header["__metadata__"]))
        text = header["__metadata__"][key]
        if key == "recipe":
            text = damage_toml(text.encode(), rng).decode("utf-8", "replace")
        elif key in ("format", "sha256"):
            text = rng.choice(("", "rsengine-weights-2", "0" * 64))
        else:
            text = _json(replace_value(json.loads(text), rng)).decode()
        header["__metadata__"][key] = text
    elif how < 0.5:
        header["__metadata__"] = replace_value(header["__metadata__"], rng, ("", "a", "[]", "null", "\0", "1e999"))
    elif how < 0.75:
        header = replace_value(header, rng)
    else:
        from safetensors.torch import load, save

        state = load(data)
        name = rng.choice(sorted(state))
        if rng.random() < 0.2:
            state[name + "x"] = state.pop(name)
        else:
            state[name] = replace_tensor({name: state[name]}, rng)[name]
        if not isinstance(state[name] if name in state else state[name + "x"], torch.Tensor):
            del state[name]
        return save({key: tensor.contiguous() for key, tensor in state.items()}, header["__metadata__"])
    text = _json(header)
    return len(text).to_bytes(8, "little") + text + body


def damage_beton(data: bytes, rng: random.Random) -> bytes:
    """Set a number in the header, in the record of a sample or in the allocation table to an extreme; swap labels."""
    new = bytearray(data)
    samples, table = struct.unpack_from("<QQ", data, 8)
    start = 24 + 2 * 1041
    record, entry = start + 24 * rng.randrange(samples), table + 24 * rng.randrange(samples)
    other = start + 24 * rng.randrange(samples)
    fields = [(0, "<H"), (2, "<H"), (4, "<I"), (8, "<Q"), (16, "<Q"), (24, "<B"), (record, "<B"), (record + 1, "<H")]
    fields += [(record + 3, "<H"), (record + 5, "<Q"), (record + 16, "<q"), (entry, "<Q"), (entry + 8, "<Q")]
    fields += [(entry + 16, "<Q")]
    how = rng.random()
    if how < 0.15:
        new[record + 16 : record + 24], new[other + 16 : other + 24] = (
            data[other + 16 : other + 24],
            data[record + 16 : record + 24],
        )
    elif how < 0.3:
        new[record : record + 13], new[other : other + 13] = data[other : other + 13], data[record : record + 13]
    else:
        at, form = rng.choice(fields)
        width = struct.calcsize(form)
        old = int.from_bytes(data[at : at + width], "little")
        value = rng.choice((*EXTREMES, old + 1, old - 1, old + 24, 2 * old))
        new[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(new)


# --- archives -------------------------------------------------------------------------------------------------------

TAR_FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "uid": (108, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "type": (156, 1),
}
TAR_NUMBERS = (
    *(b"\x80" + (2**50).to_bytes(11, "big"), b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"-0000000001\0"),
    *(b"            ", b"0000000000x\0", b"\0" * 12, b"00000000001\0"),
)
TAR_NAMES = (b"../x.png", b"/etc/x.png", b"train/cat/" + b"a" * 90, b"\xff\xfe", b"", b".", b"train", b"a\\b", b"C:/x")


def damage_tar(data: bytes, rng: random.Random) -> bytes:
    """Set a field of a header and its sum; or put a header of another kind before one."""
    headers = _tar_headers(data)
    at = rng.choice(headers)
    header = bytearray(data[at : at + 512])
    if rng.random() < 0.3:
        return data[:at] + _tar_extension(rng) + data[at:]
    name = rng.choice(("name", "size", "size", "size", "mode", "uid", "mtime", "type"))
    offset, width = TAR_FIELDS[name]
    value = rng.choice(TAR_NAMES) if name == "name" else rng.choice(TAR_NUMBERS)
    if name == "type":
        value = rng.choice(b"0 1 2 3 4 5 6 7 g x L K S D A \xff".split()) or b"\0"
    header[offset : offset + width] = value[:width].ljust(width, b"\0")
    return data[:at] + _tar_summed(header) + data[at + 512 :]


def _tar_headers(data: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [member.offset for member in archive.getmembers()]


def _tar_summed(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _tar_extension(rng: random.Random) -> bytes:
    """Headers that say something about the member behind them."""
    records = (
        *(b"size=1125899906842624", b"size=-1", b"size=x", b"path=../x.png", b"path=\xff", b"GNU.sparse.major=1"),
        *(b"GNU.sparse.map=0,1", b"GNU.sparse.size=9", b"hdrcharset=BINARY", b"mtime=nan", b"uid=inf", b"linkpath=x"),
    )
    record = rng.choice(records)
    body = rng.choice(
        (
            *(b"%d %s\n" % (len(record) + 4, record), b"9" * 20 + b" a=b\n", b"0 a=b\n", b"", b"x\n", b"5 a\n"),
            *(bytes(512), b"\xff" * 512, b"a" * 2000),
        )
    )
    kind, count = rng.choice((b"x", b"x", b"x", b"g", b"L", b"K", b"S")), rng.choice((1, 1, 1, 3000))
    header = bytearray(tarfile.TarInfo("pax").tobuf(tarfile.USTAR_FORMAT))
    header[124:136], header[156:157] = b"%011o\0" % len(body), kind
    return (_tar_summed(header) + body + bytes(-len(body) % 512)) * count


def damage_tar_gz(data: bytes, rng: random.Random) -> bytes:
    """The same inside a whole gzip file."""
    return gzip.compress(damage_tar(gzip.decompress(data), rng), mtime=0)


def damage_zip(data: bytes, rng: random.Random) -> bytes:
    """Set a number in the directory or in a local header to an extreme, or a name to another of its length."""
    new = bytearray(data)
    marks = {
        b"PK\x01\x02": (46, (4, 6, 8, 10, 16, 20, 24, 28, 30, 32, 34, 38, 42)),
        b"PK\x05\x06": (22, (4, 8, 12, 16, 20)),
    }
    marks[b"PK\x03\x04"] = 30, (4, 6, 8, 14, 18, 22, 26, 28)
    mark = rng.choice(sorted(marks))
    spots = [i for i in range(len(data)) if data.startswith(mark, i)]
    at, (size, offsets) = rng.choice(spots), marks[mark]
    if rng.random() < 0.2 and mark != b"PK\x05\x06":
        name = rng.choice((b"../", b"/ab", b"\xff\xff\xff", b"a\0b", b"..\\"))
        new[at + size : at + size + len(name)] = name
    else:
        offset, width = rng.choice(offsets), rng.choice((2, 4))
        new[at + offset : at + offset + width] = (rng.choice(EXTREMES) % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(new)


def damage_batch(data: bytes, rng: random.Random) -> bytes:
    """Replace a value in the pickle of an official batch, or the pickle by one that would run something."""
    if rng.random() < 0.2:
        return rng.choice((canary_pickle(), pickle.dumps([Canary()]), b"cos\nmkdir\n(S'canary'\ntR."))
    content = pickle.loads(data)  # a sample of our own
    text = {key.decode(): value for key, value in content.items()}
    return pickle.dumps(replace_value(text, rng, (*VALUES, b"", b"x" * 3072)), protocol=rng.choice((2, 4)))


def damage_parquet(data: bytes, rng: random.Random) -> bytes:
    """Write the table anew with another column or other words about the classes."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(io.BytesIO(data))
    count, how = table.num_rows, rng.random()
    if how < 0.6:
        words = json.loads(table.schema.metadata[b"huggingface"])
        table = table.replace_schema_metadata({"huggingface": _json(replace_value(words, rng))})
    else:
        name = rng.choice(("img", "label"))
        columns = (
            *(
                ["a"] * count,
                [None] * count,
                [1.5] * count,
                [-1] * count,
                [2**62] * count,
                [[1]] * count,
                [b"x"] * count,
            ),
            *(
                [{"bytes": None}] * count,
                [{"path": "x"}] * count,
                [True] * count,
                [float("nan")] * count,
                [300] * count,
            ),
            [{"bytes": b"\x89PNG\r\n\x1a\n"}] * count,
        )
        table = table.set_column(table.schema.get_field_index(name), name, [rng.choice(columns)])
    if rng.random() < 0.1:
        table = table.slice(0, rng.choice((0, 1, 2)))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


# --- pictures -------------------------------------------------------------------------------------------------------


def damage_picture(data: bytes, rng: random.Random) -> bytes:
    """Add EXIF of odd types and counts; or set a number in a PNG and its sums."""
    exif = _exif(rng)
    if data.startswith(b"\xff\xd8"):
        segment = b"Exif\0\0" + exif
        return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]
    if not data.startswith(b"\x89PNG"):
        return damage_bytes(data, rng)[0]
    if rng.random() < 0.5:
        return data[:33] + _chunk(b"eXIf", exif) + data[33:]
    header = bytearray(data[16:29])
    at = rng.choice((0, 4, 8, 9, 10, 11, 12))
    width = 4 if at < 8 else 1
    header[at : at + width] = (rng.choice(EXTREMES) % (1 << 8 * width)).to_bytes(width, "big")
    more = rng.choice((b"", _chunk(b"tRNS", rng.randbytes(3)), _chunk(b"acTL", bytes(8)), _chunk(b"iCCP", b"x\0\0x")))
    more = rng.choice((more, _chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(10**7))), _chunk(b"PLTE", b"ab")))
    return data[:8] + _chunk(b"IHDR", bytes(header)) + more + data[33:]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _exif(rng: random.Random) -> bytes:
    """A directory of TIFF whose entries may have any type and count."""
    order = rng.choice("<>")
    entries = b""
    count = rng.choice((1, 2, 3))
    for _ in range(count):
        tag = rng.choice((0x0112, 0x0112, 0x0112, 0x8769, 0x8825, 0x010F, 0x0100, 0x0111, 0x927C, 0x014A))
        kind, number = rng.randrange(0, 20), rng.choice((0, 1, 1, 1, 2, 1000, 2**31, 2**32 - 1))
        entries += struct.pack(
            order + "HHI4s", tag, kind, number, rng.choice((rng.randbytes(4), b"\0\6\0\6", b"\6\0\0\0"))
        )
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, rng.choice((8, 8, 8, 8, 0, 2**31)))
    return head + struct.pack(order + "H", rng.choice((count, count, count, 65535))) + entries + rng.randbytes(8)


STRUCTURAL: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "beton": damage_beton,
    "dataset.json": damage_json,
    "checkpoint": damage_checkpoint,
    "metrics": damage_lines,
    "recipe": damage_toml,
    "weights": damage_weights,
    "tar": damage_tar,
    "tar.gz": damage_tar_gz,
    "zip": damage_zip,
    "cifar": damage_batch,
    "parquet": damage_parquet,
    "picture": damage_picture,
}
