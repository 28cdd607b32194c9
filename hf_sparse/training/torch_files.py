"""Checks files that `torch.save` wrote, without unpickling them."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path


_LOCAL_HEADER = b"PK\x03\x04"
_END = struct.Struct("<4s4H2LH")  # the end record of a zip archive, without a comment
_ENTRY_SIZE = 46  # of an entry of the directory, without name, extra field and comment
_LENGTHS = struct.Struct("<3H")  # of those, from byte 28 of the entry
_END_MARKS = (b"PK\x05\x06", b"PK\x06\x06")  # also of large archives
# Larger members are the values of large tensors: reading them would take as long as loading the file.
_MAX_CHECKED = 2**20


def is_damaged_archive(path: Path) -> bool:
    """Whether a file is no zip archive as `torch.save` writes it: uncompressed, in one piece, with a pickle of the
    structure. Of members up to 1 MiB, the pickle among them, the checksums are compared too."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LOCAL_HEADER))
            file.seek(-_END.size, 2)
            _, disk, first_disk, on_disk, total, *_, comment_length = _END.unpack(file.read())
        if start != _LOCAL_HEADER or disk or first_disk or on_disk != total or comment_length:
            return True
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            for member in members:
                with archive.open(member) as opened:
                    # A checksum of 0 means that torch.serialization.set_crc32_options(False) is in force.
                    if member.file_size <= _MAX_CHECKED and member.CRC:
                        opened.read()
            odd = [
                member
                for member in members
                if member.compress_type or member.volume or member.comment or member.compress_size != member.file_size
            ]
            if odd or not _is_whole_directory(path, archive.start_dir, len(members)):
                return True
            return not any(member.filename.endswith("/data.pkl") for member in members)
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, struct.error):
        return True


def _is_whole_directory(path: Path, start: int, count: int) -> bool:
    """Whether the end record follows right after `count` entries: zipfile cuts lengths that reach beyond it."""
    with path.open("rb") as file:
        file.seek(start)
        directory = file.read()
    position = 0
    for _ in range(count):
        position += _ENTRY_SIZE + sum(_LENGTHS.unpack_from(directory, position + 28))
    return directory[position : position + 4] in _END_MARKS
