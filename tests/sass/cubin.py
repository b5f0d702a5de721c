"""What an object of nvcc holds for one architecture, as the text that emulator.cpp reads."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

REGISTERS, ARGUMENT, FRAME = 0x2F, 0x17, 0x11  # attributes of .nv.info
SOURCE = re.compile(r'^\s*//## File "(?P<file>[^"]+)", line (?P<line>\d+)')
PLACE = re.compile(r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/")
LINE = re.compile(r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<text>[^;]+?)\s*;\s+/\* 0x(?P<word>[0-9a-f]{16}) \*/")


class Section(NamedTuple):
    data: bytes
    size: int  # of what the loader reserves
    info: int


def disassembler() -> str | None:
    """cuobjdump of CUDA's or, since not every installation brings it, of Triton's; nvdisasm lies beside it."""
    if (found := shutil.which("cuobjdump")) and shutil.which("nvdisasm"):
        return found
    spec = find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(bundled) if bundled and bundled.exists() else None


def listing(compiled: Path) -> Iterator[str]:
    """The lines of all kernels of an object file, or of a cubin.

    `kernel NAME REGISTERS SHARED FRAME`, the sizes in bytes, shared memory with the kilobyte that the system takes, and
    offset and bytes of each argument; `constant BANK HEX`, without bank 0; and `ADDRESS WORD FILE:LINE TEXT` for each
    instruction, where WORD is the upper half of its first eight bytes: the bits of an immediate operand.
    """
    tool = disassembler()
    assert tool is not None
    with tempfile.TemporaryDirectory() as folder:
        if compiled.suffix == ".cubin":
            cubins = [compiled]
        else:
            subprocess.run([tool, "-xelf", "all", compiled.resolve()], cwd=folder, check=True, capture_output=True)
            cubins = sorted(Path(folder).glob("*.cubin"))
        for cubin in cubins:
            text, lines = (
                subprocess.run([*command, cubin], check=True, capture_output=True, text=True).stdout
                for command in ([tool, "-sass"], [Path(tool).with_name("nvdisasm"), "-g", "-gi", "-c"])
            )
            yield from _kernels(_sections(cubin.read_bytes()), text, _sources(lines))


def _sources(text: str) -> dict[tuple[str, str], str]:
    """File and line of each instruction, by kernel and address; of CUDA's own functions, where they are called."""
    result = {}
    for part in text.split("\n//--------------------- .text.")[1:]:
        name, source, settled = part.partition(" ")[0], "-", False
        for line in part.splitlines():
            if found := SOURCE.match(line):  # the innermost first; the lines that follow say where it is inlined
                if not settled:
                    source, settled = f"{Path(found['file']).name}:{found['line']}", "/include/" not in found["file"]
            elif found := PLACE.match(line):
                result[name, found["address"]], settled = source, False
    return result


def _kernels(sections: dict[str, Section], text: str, sources: dict[tuple[str, str], str]) -> Iterator[str]:
    registers, frames = (_of_functions(sections, attribute) for attribute in (REGISTERS, FRAME))
    for part in text.split("\t\tFunction : ")[1:]:
        name = part.partition("\n")[0].strip()
        shared = sections.get(f".nv.shared.{name}")
        arguments = " ".join(f"{at} {size}" for at, size in _arguments(sections[f".nv.info.{name}"].data))
        yield f"kernel {name} {registers[name]} {shared.size if shared else 1024} {frames[name]} {arguments}".rstrip()
        for bank in range(1, 8):
            for section in (f".nv.constant{bank}", f".nv.constant{bank}.{name}"):
                if section in sections:
                    yield f"constant {bank} {sections[section].data.hex()}"
        for found in filter(None, map(LINE.match, part.splitlines())):
            source = sources.get((name, found["address"]), "-").replace(" ", "_")
            yield f"{found['address']} {found['word'][:8]} {source} {found['text'].replace('.reuse', '')}"


def _sections(elf: bytes) -> dict[str, Section]:
    at, size, count, names = struct.unpack_from("<Q10xHHH", elf, 40)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, at + size * i) for i in range(count)]
    text = headers[names][4]

    def section(header: tuple[int, ...]) -> Section:
        _, kind, _, _, offset, size, _, info, *_ = header
        return Section(b"" if kind == 8 else elf[offset : offset + size], size, info)  # 8: nothing in the file

    return {_string(elf, text + header[0]): section(header) for header in headers}


def _string(elf: bytes, at: int) -> str:
    return elf[at : elf.index(b"\0", at)].decode()


def _attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == 4:  # else `size` is the value
            yield attribute, info[at : at + size]
            at += size


def _of_functions(sections: dict[str, Section], attribute: int) -> dict[str, int]:
    symbols, strings = sections[".symtab"].data, sections[".strtab"].data
    values = (struct.unpack("<II", data) for kind, data in _attributes(sections[".nv.info"].data) if kind == attribute)
    return {_string(strings, struct.unpack_from("<I", symbols, 24 * symbol)[0]): value for symbol, value in values}


def _arguments(info: bytes) -> list[tuple[int, int]]:
    found = (struct.unpack("<IHHI", data) for kind, data in _attributes(info) if kind == ARGUMENT)
    return [(offset, size >> 18) for _, _, offset, size in sorted(found, key=lambda each: each[1])]


if __name__ == "__main__":
    *objects, _, output = sys.argv[1:]  # OBJECT ... -o FILE
    Path(output).write_text("".join(f"{line}\n" for path in objects for line in listing(Path(path))))
