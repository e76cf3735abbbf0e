"""SASS, the machine code of NVIDIA GPUs, from the text of `nvdisasm -hex`."""

import re
from dataclasses import dataclass, field

_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[0-9T]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/"
)
_SECOND = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/\s*$")
_LABEL = re.compile(r"^(?:\s*)([.$\w]+):\s*$")
_SECTION = re.compile(r"^\s*\.section\s+\.(text|nv\.constant(\d+))\.(\w+)")
_OTHER = re.compile(r"^\s*\.section\s")
_BYTES = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+\.byte\s+(.*)")
_TARGET = re.compile(r"`\((.+)\)")


@dataclass
class Instruction:
    """One instruction. The last four are its scheduling bits, by which the hardware issues it.

    stall: cycles until this warp may issue its next one.
    sets: the scoreboards (of 6) that are busy until its result is there, or until it has read its registers.
    waits: the scoreboards that must be free before it is issued.
    """

    address: int
    guard: str  # "" always, or P0, !P0, UP0, ...
    opcode: str
    operands: list[str]
    stall: int = 1
    sets: int | None = None
    sets_when_read: int | None = None
    waits: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]


@dataclass
class Kernel:
    """instructions in the order of their addresses; labels: where in that list each stands; constants: by the bank's
    number what ptxas has put there (not bank 0, which the launch fills)."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    constants: dict[int, bytes] = field(default_factory=dict)


def parse(text: str) -> dict[str, Kernel]:
    """Mangled name -> kernel.

    Raises:
        ValueError: this is no output of nvdisasm -hex.
    """
    kernels: dict[str, Kernel] = {}
    now, bank = None, None
    for line in text.splitlines():
        if section := _SECTION.match(line):
            now, bank = kernels.setdefault(section[3], Kernel(section[3])), section[2]
        elif now is None or _OTHER.match(line):
            now = None
        elif bank is not None:
            if found := _BYTES.match(line):
                data = bytes(int(x, 16) for x in found[1].split(","))
                now.constants[int(bank)] = now.constants.get(int(bank), b"") + data
        elif found := _LINE.match(line):
            address, guard, opcode, operands = found.groups()
            now.instructions.append(Instruction(int(address, 16), guard or "", opcode, _split(operands)))
        elif second := _SECOND.match(line):
            _schedule(now.instructions[-1], int(second[1], 16))
        elif label := _LABEL.match(line):
            now.labels[label[1]] = len(now.instructions)
    if not any(k.instructions for k in kernels.values()):
        raise ValueError("sass: must be text of nvdisasm -hex, got no instruction")
    return kernels


def target(operand: str) -> str | None:
    """The label that a branch operand names."""
    found = _TARGET.search(operand)
    return found[1] if found else None


def _schedule(instruction: Instruction, high: int) -> None:
    """The bits from 105 on of the encoding, the same from sm_70 to sm_90."""
    bits = high >> 41
    instruction.stall = bits & 15
    instruction.sets = bits >> 5 & 7
    instruction.sets_when_read = bits >> 8 & 7
    if instruction.sets == 7:
        instruction.sets = None
    if instruction.sets_when_read == 7:
        instruction.sets_when_read = None
    instruction.waits = [i for i in range(6) if bits >> 11 + i & 1]


def _split(operands: str) -> list[str]:
    """At the commas that are not inside brackets, without nvdisasm's remarks."""
    operands = re.sub(r"\s*\(\*.*?\*\)", "", operands)
    parts, depth = [""], 0
    for c in operands:
        depth += (c in "[(") - (c in "])")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [p.strip().replace(".reuse", "") for p in parts if p.strip()]
