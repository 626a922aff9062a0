"""What an audio file's container says about its length: libsndfile reads what is left of a shortened file unasked."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# programs that write into a pipe cannot know the length, and say about the largest
PIPED_LENGTH = 0x7FFFF000
PIPED_LENGTH_64 = 0x7FFFFFFFFFFFF000
W64_RIFF = b"riff.\x91\xcf\x11\xa5\xd6(\xdb\x04\xc1\x00\x00"
W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0O\x8e\xdb\x8a"
OGG_PAGE = struct.Struct("<4sBBqIIIB")
OGG_BEGINS = 2


@dataclass(frozen=True, slots=True)
class Sound:
    """Where a container's samples begin, and how many bytes of them it promises; None when it does not tell.

    size_at: where that number stands, for RIFF.
    """

    start: int
    promised: int | None
    size_at: int | None = None


def shortcoming(path: Path) -> str | None:
    """Returns what is missing of a file by its container, as a clause; None for a whole one, or one of another kind.

    Knows RIFF, RIFX, RF64, BW64, W64, AIFF, 8SVX, AU, NIST Sphere and Ogg.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) == b"OggS":
            return _shortcoming_of_ogg(file, size)
        sound = find_sound(file)
    if sound is None or sound.promised is None:
        return None
    there = max(size - sound.start, 0)
    if sound.promised > there:
        return f"is cut short: its header promises {sound.promised - there} more bytes of sound; copy it again"
    if sound.promised == 0 and there and sound.size_at is None:
        return (
            f"was never finished: its header promises no sound, but {there} bytes follow; repair the header, for "
            "instance with sox or ffmpeg"
        )
    return None


def unfinished_at(path: Path) -> int | None:
    """Returns where the length stands in a RIFF file whose recorder was killed before it wrote one, else None."""
    with path.open("rb") as file:
        sound = find_sound(file)
    if sound is None or sound.size_at is None or sound.promised != 0:
        return None
    return sound.size_at if path.stat().st_size > sound.start else None


def find_sound(file: IO[bytes]) -> Sound | None:
    """Returns where the samples of a container stand; None when it is of no kind that is known, or damaged."""
    file.seek(0)
    try:
        return _find_sound(file)
    except (struct.error, ValueError, OverflowError):
        return None


def _find_sound(file: IO[bytes]) -> Sound | None:
    head = file.read(40)
    name, form = head[:4], head[8:12]
    if name in (b"RIFF", b"RF64", b"BW64") and form == b"WAVE":
        return _in_wave(file, "<4sI")
    if name == b"RIFX" and form == b"WAVE":
        return _in_wave(file, ">4sI")
    if name == b"FORM" and form in (b"AIFF", b"AIFC", b"8SVX", b"16SV"):
        found = next((chunk for chunk in _chunks(file, 12, ">4sI", 2) if chunk[0] in (b"SSND", b"BODY")), None)
        return None if found is None else Sound(found[1], found[2])
    if head[:16] == W64_RIFF:
        found = next((chunk for chunk in _chunks(file, 40, "<16sQ", 8) if chunk[0] == W64_DATA), None)
        return None if found is None else Sound(found[1], _known(found[2], PIPED_LENGTH_64))
    if name in (b".snd", b"dns."):
        start, promised = struct.unpack(">II" if name == b".snd" else "<II", head[4:12])
        return Sound(start, _known(promised, PIPED_LENGTH))
    if head[:8] == b"NIST_1A\n":
        return _in_nist(file)
    return None


def _in_wave(file: IO[bytes], layout: str) -> Sound | None:
    long_size = None
    for name, start, length in _chunks(file, 12, layout, 2):
        if name == b"ds64":
            file.seek(start + 8)
            long_size = struct.unpack("<Q", file.read(8))[0]
        if name != b"data":
            continue
        if length >= PIPED_LENGTH:
            return Sound(start, None if long_size is None else _known(long_size, PIPED_LENGTH_64))
        return Sound(start, length, start - 4)
    return None


def _chunks(file: IO[bytes], at: int, layout: str, even: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields name, begin and length of each chunk. even: what chunks begin at multiples of."""
    header = struct.Struct(layout)
    while True:
        file.seek(at)
        name, length = header.unpack(file.read(header.size))
        # W64 counts the header
        length -= header.size if header.size == 24 else 0
        if length < 0:
            return
        yield name, at + header.size, length
        at += header.size + length
        at += -at % even


def _in_nist(file: IO[bytes]) -> Sound | None:
    file.seek(0)
    start = int(file.read(16).split()[1])
    file.seek(0)
    fields = {}
    for line in file.read(min(start, 1 << 16)).splitlines():
        words = line.split()
        if len(words) == 3 and words[1] == b"-i":
            fields[words[0]] = int(words[2])
    try:
        frames, channels = fields[b"sample_count"], fields.get(b"channel_count", 1)
        return Sound(start, frames * channels * fields[b"sample_n_bytes"])
    except KeyError:
        return None


def _known(length: int, unknown_from: int) -> int | None:
    return None if length >= unknown_from else length


def _shortcoming_of_ogg(file: IO[bytes], size: int) -> str | None:
    at, begun = 0, False
    while at + OGG_PAGE.size <= size:
        file.seek(at)
        mark, _, kind, *_, count = OGG_PAGE.unpack(file.read(OGG_PAGE.size))
        if mark != b"OggS":
            # what follows the last page is no sound
            return None
        begins = bool(kind & OGG_BEGINS)
        if begins and begun:
            return (
                "holds several Ogg streams one after the other, of which only the first is read; write it as one stream"
            )
        begun = begun or not begins
        at += OGG_PAGE.size + count + sum(file.read(count))
    if at > size:
        return f"is cut short: its last page misses {at - size} bytes; copy it again"
    return None
