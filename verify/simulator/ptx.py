"""The parser of the PTX text that Triton writes: one kernel, its registers, memory and instructions.

PTX ISA 8.x, chapters 4 to 7 and 11. Only what LLVM's NVPTX back end writes for one entry is read; anything else is
Unsupported by name.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from math import prod

from verify.simulator.errors import Unsupported


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: ``@guard opcode operands``.

    ``opcode`` includes its modifiers. ``line`` is the line of PTX, ``source`` where in the kernel's source it comes
    from, as ``kernels.py:81``, empty without line information.
    """

    opcode: str
    operands: tuple[str, ...]
    guard: str
    negated: bool
    line: int
    text: str
    source: str = ""

    @property
    def place(self) -> str:
        return f"PTX line {self.line}" + (f" ({self.source})" if self.source else "")

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.opcode.replace("::", "__").split(".")[1:])


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable in memory: its alignment and size in bytes, and its content if the text gives one.

    ``size`` is 0 for shared memory whose size the launch sets.
    """

    alignment: int
    size: int
    content: bytes | None = None


@dataclass(slots=True)
class Kernel:
    """One entry. ``parameters`` are (name, type) in order, ``threads`` the threads of a block, ``registers`` the type
    of each register or of each prefix before a number.
    """

    name: str
    target: str
    version: str
    threads: int
    parameters: list[tuple[str, str]] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    constants: dict[str, Variable] = field(default_factory=dict)
    shared: dict[str, Variable] = field(default_factory=dict)
    local: dict[str, Variable] = field(default_factory=dict)

    @property
    def code_sha256(self) -> str:
        """The digest of what it computes: everything but its target, its lines and its comments."""
        code = [(one.opcode, one.operands, one.guard, one.negated) for one in self.instructions]
        memory = [sorted(one.items()) for one in (self.constants, self.shared, self.local)]
        what = (self.threads, self.parameters, sorted(self.registers.items()), self.labels, memory, code)
        return hashlib.sha256(repr(what).encode()).hexdigest()


_COMMENT = re.compile(r"//.*")
_SPACE = re.compile(r"\s+")
_NAME = re.compile(r"[%\w$]+")
_STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_LABEL = re.compile(r"([\w$%]+):(?!:)\s*")
_ENTRY = re.compile(r"^(?:\.visible )?\.entry\s+(\w+)\s*\((.*?)\)\s*(.*?)\{", re.M | re.S)
_PARAMETER = re.compile(r"\.param\s+\.([a-z]+\d+)(?:\s+\.ptr(?:\s+\.\w+)*?(?:\s+\.align\s+\d+)?)?\s+(\w+)(\[\d+\])?$")
_VARIABLE = re.compile(
    r"^(?:\.visible |\.extern )?\.(global|const|shared)\s+(?:\.align\s+(\d+)\s+)?\.([bsuf]\d+)\s+"
    r"([\w$]+)(?:\[(\d*)\])?(?:\s*=\s*\{(.*?)\})?;",
    re.M | re.S,
)
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"(?:.*?/)?([^"/]+)"(?:\s+"(?:.*?/)?([^"/]+)")?', re.M)
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*?inlined_at\s+(\d+)\s+(\d+))?")
#: The comment behind one that was inlined: where it was called from, the kernel last.
_CALLED = re.compile(r"\.loc\s.*//.*@\[ (?:[^\s\]]*/)?([^/:\s]+):(\d+)(?::\d+)?(?: \])+\s*$")
#: Directives inside a kernel that change nothing that is computed.
_IDLE = (".loc", ".pragma", ".file", ".section")


def parse(text: str) -> Kernel:
    """The kernel in ``text``. Raises Unsupported, naming the construct, for what is not read here."""
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1:
        raise Unsupported(f"a module with {len(entries)} entries")
    head = entries[0]
    if re.search(r"^\s*(?:\.\w+\s+)*\.func\b", _COMMENT.sub("", text), re.M):
        raise Unsupported("a function beside the kernel")
    kernel = Kernel(head[1], _directive(text, "target"), _directive(text, "version"), _threads(head[3]))
    kernel.parameters = [_parameter(one) for one in head[2].split(",") if one.strip()]
    for space, alignment, kind, name, count, content in _VARIABLE.findall(text):
        width = int(kind[1:]) // 8
        variable = Variable(int(alignment or width), width * int(count or (content and 1) or 0), None)
        if space == "shared":
            kernel.shared[name] = variable
        else:
            try:
                values = [int(value, 0) for value in content.split(",")] if content else []
            except ValueError as error:
                raise Unsupported(f"the content of {name}") from error
            data = b"".join((value % (1 << 8 * width)).to_bytes(width, "little") for value in values)
            kernel.constants[name] = Variable(variable.alignment, variable.size, data.ljust(variable.size, b"\0"))
    _read_body(kernel, text, head.end())
    for one in kernel.instructions:
        if one.base == "bra" and (len(one.operands) != 1 or one.operands[0] not in kernel.labels):
            raise Unsupported(f"{one.text} (a branch to no label)", one.line)
    return kernel


def _directive(text: str, name: str) -> str:
    found = re.search(rf"^\.{name}\s+([\w.]+)", text, re.M)
    if found is None:
        raise Unsupported(f"a module without .{name}")
    return found[1]


def _threads(performance: str) -> int:
    """The threads of a block, from the directives after the parameters."""
    if cluster := re.search(r"\.(?:reqnctapercluster|explicitcluster)\b[^\n]*", performance):
        sizes = [int(n) for n in re.findall(r"\d+", cluster[0])]
        if not sizes or prod(sizes) > 1:
            raise Unsupported("a cluster of blocks")
    found = re.search(r"\.(?:reqntid|maxntid)\s+([\d, ]+)", performance)
    if found is None:
        raise Unsupported("a kernel without .reqntid")
    return prod(int(one) for one in found[1].split(","))


def _parameter(text: str) -> tuple[str, str]:
    found = _PARAMETER.search(_SPACE.sub(" ", text.strip()))
    if found is None or found[3]:
        raise Unsupported(f"the parameter {_SPACE.sub(' ', text.strip())}")
    return found[2], found[1]


def _read_body(kernel: Kernel, text: str, start: int) -> None:
    """Read registers, labels and instructions from ``start`` up to the brace that closes the kernel."""
    files = {number: name or path for number, path, name in _FILE.findall(text)}
    scopes: list[dict[str, str]] = [{}]
    source, pending, begun = "", "", 0
    for number, raw in enumerate(text[start:].split("\n"), text[:start].count("\n") + 1):
        rest = _COMMENT.sub("", raw).strip()
        if rest.partition(" ")[0].partition("\t")[0] in _IDLE:  # they end with the line, without a semicolon
            if called := _CALLED.search(raw):
                source = f"{called[1]}:{called[2]}"
            elif found := _LOC.match(rest):
                source = f"{files.get(found[3] or found[1], '?')}:{found[4] or found[2]}"
            continue
        while rest:
            if not pending and (found := _LABEL.match(rest)):
                if found[1] in kernel.labels:
                    raise Unsupported(f"the label {found[1]} in two places", number)
                kernel.labels[found[1]] = len(kernel.instructions)
                rest = rest[found.end() :]
            elif not pending and rest[0] in "{}":
                if rest[0] == "{":
                    scopes.append({**scopes[-1]})
                elif not scopes[1:]:
                    return
                else:
                    scopes.pop()
                rest = rest[1:].strip()
            else:
                begun = begun if pending else number
                part, end, rest = rest.partition(";")
                pending, rest = f"{pending} {part}".strip(), rest.strip()
                if end:
                    _read_statement(kernel, _SPACE.sub(" ", pending), begun, source, scopes)
                    pending = ""
    raise Unsupported("a kernel whose closing brace is missing")


def _read_statement(kernel: Kernel, text: str, line: int, source: str, scopes: list[dict[str, str]]) -> None:
    """Read one statement. ``scopes`` has, for each open brace, the registers declared in it and their unique names."""
    if found := re.fullmatch(r"\.reg \.(\w+) ([%\w$<>, ]+)", text):
        for declared in found[2].split(","):
            name = declared.partition("<")[0].strip()
            if scopes[1:]:
                scopes[-1][name] = name = f"{name}${len(kernel.registers)}"
            if kernel.registers.setdefault(name, found[1]) != found[1]:
                raise Unsupported(f"the register {name} of two types", line)
    elif found := re.match(r"\.local \.align (\d+) \.b8 ([\w$]+)\[(\d+)\]", text):
        kernel.local[found[2]] = Variable(int(found[1]), int(found[3]))
    elif text.startswith(".param"):
        raise Unsupported("a call of a function", line)
    elif text.startswith("."):
        raise Unsupported(f"the directive {text.split()[0]}", line)
    else:
        found = _STATEMENT.match(text)
        if found is None:
            raise Unsupported(f"the statement {text!r}", line)
        own = scopes[-1]
        operands = _operands(_NAME.sub(lambda name: own.get(name[0], name[0]), found[4]) if own else found[4])
        guard = own.get(found[2], found[2] or "")
        kernel.instructions.append(Instruction(found[3], operands, guard, found[1] == "!", line, text, source))


def _operands(text: str) -> tuple[str, ...]:
    """The operands of an instruction; commas inside braces or brackets do not separate."""
    found, depth, begun = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and not depth:
            found.append(text[begun:place].strip())
            begun = place + 1
    return tuple(one for one in (*found, text[begun:].strip()) if one)
