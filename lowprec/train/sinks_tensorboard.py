"""TensorBoard: scalars, the heat map of each probe and texts, as event files in the run folder's `tensorboard/`.

The files are written here and need no package; `pip install tensorboard` and `tensorboard --logdir runs` show them. An
event file is a sequence of records, each an Event of TensorFlow's protobuf format::

    record   length uint64 · masked CRC-32C of the length · bytes · masked CRC-32C of the bytes
    Event    1 wall_time double · 2 step int64 · 3 file_version string · 5 summary · 7 session_log
    value    1 tag string · 2 simple_value float · 4 image · 8 tensor · 9 metadata        (a summary's, repeated)

Every start writes a file of its own. One that goes on after step n begins with a session log START at n + 1, by which
TensorBoard drops what an earlier start has logged from there on; so does going back to a checkpoint.
"""

import math
import socket
import struct
import time
from pathlib import Path
from typing import Any

from lowprec.train.metrics import Record
from lowprec.train.sinks import flat, grouped


class TensorBoard:
    """The sink. step: steps done before this start."""

    name = "TensorBoard"

    def __init__(self, folder: Path, step: int, texts: dict[str, str]) -> None:
        place = folder / "tensorboard"
        place.mkdir(exist_ok=True)
        stamp, host = int(time.time()), "".join(c for c in socket.gethostname() if c.isalnum() or c in "-.")
        earlier = len(list(place.glob("events.out.tfevents.*")))
        self._file = (place / f"events.out.tfevents.{stamp}.{host or 'host'}.{earlier}").open("xb")
        self.step = step
        self._write(_field(3, b"brain.Event:2"))
        if step or earlier:
            self.rewind(step)
        self._summary(step, [_text(f"about/{name}", text) for name, text in texts.items()])

    def log(self, record: Record) -> None:
        self.step = record["step"]
        numbers = {key: value for key, value in flat(grouped(record)).items() if _is_number(value)}
        self._summary(self.step, [_field(1, key.encode()) + _float(2, value) for key, value in numbers.items()])

    def probe(self, line: Record) -> None:
        from lowprec.train.sinks_heat import overview_png

        png = overview_png(line)
        image = _varint_field(1, _size(png)[1]) + _varint_field(2, _size(png)[0]) + _varint_field(3, 4) + _field(4, png)
        self._summary(line["step"], [_field(1, b"probe/heat_map") + _field(4, image)])

    def alert(self, title: str, text: str) -> None:
        self._summary(self.step, [_text("events/" + title, text)])

    def rewind(self, step: int) -> None:
        self.step = step
        self._write(_varint_field(2, step + 1) + _field(7, _varint_field(1, 1)))

    def saved(self) -> None: ...

    def cancelled(self) -> bool:
        return False

    def finish(self, exit_code: int) -> None:
        self._file.close()

    def _summary(self, step: int, values: list[bytes]) -> None:
        self._write(_varint_field(2, step) + _field(5, b"".join(_field(1, value) for value in values)))

    def _write(self, event: bytes) -> None:
        self._file.write(record_of(struct.pack("<Bd", 1 << 3 | 1, time.time()) + event))
        self._file.flush()


def record_of(data: bytes) -> bytes:
    """A record of an event file."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(crc32c(length))) + data + struct.pack("<I", masked(crc32c(data)))


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _table()


def crc32c(data: bytes) -> int:
    """CRC-32 with the polynomial of Castagnoli (RFC 3720), bit-reflected 0x82F63B78."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """The CRC as it is stored: rotated right by 15 bits, plus a constant."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ---- protobuf: a field is (number << 3 | wire type), then a varint (0), 8 bytes (1), length and bytes (2), 4 bytes (5)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _float(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", min(max(value, -3.4e38), 3.4e38))


def _text(tag: str, text: str) -> bytes:
    """A summary value for the plugin "text": a tensor of strings (dtype 7) with one element, shown as Markdown."""
    lines = "\n".join("    " + line for line in text.splitlines())
    tensor = _varint_field(1, 7) + _field(2, _field(2, _varint_field(1, 1))) + _field(8, lines.encode())
    metadata = _field(1, _field(1, b"text"))
    return _field(1, tag.encode()) + _field(8, tensor) + _field(9, metadata)


def _size(png: bytes) -> tuple[int, int]:
    """(width, height) of a PNG."""
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
