"""What the simulator says about a kernel: it does something that no kernel may do, or something unknown here."""

from __future__ import annotations

from typing import Protocol

from verify.errors import ConfigurationError, Wrong


class Located(Protocol):
    """An instruction: where it is, and its text."""

    @property
    def place(self) -> str: ...

    @property
    def text(self) -> str: ...


class NotAvailable(ConfigurationError):
    """This machine's toolchain cannot build for a GPU, so that it cannot be simulated."""


class Unsupported(Exception):
    """The kernel uses something that the simulator does not execute; ``what`` names it, an opcode where there is one.

    It is raised before the kernel's first instruction runs, so that nothing is half simulated.
    """

    def __init__(self, what: str, line: int = 0) -> None:
        self.what = what
        super().__init__(f"the simulator does not execute {what}" + (f" (PTX line {line})" if line else ""))


class Fault(Wrong):
    """The kernel did something that no kernel may do, such as an access outside its tensors.

    ``kind`` is one of ``KINDS``, ``instruction`` the one that did it, ``thread`` its block and thread.
    """

    def __init__(
        self,
        kind: str,
        told: str,
        instruction: Located | None = None,
        thread: tuple[tuple[int, int, int], int] | None = None,
    ) -> None:
        self.kind, self.told, self.instruction, self.thread = kind, told, instruction, thread
        parts = [f"{KINDS[kind]}: {told}"]
        if thread is not None:
            parts.append(f"block {thread[0]}, thread {thread[1]}")
        if instruction is not None:
            parts += [instruction.place, f"`{instruction.text}`"]
        super().__init__(", ".join(filter(None, parts)), KINDS[kind])


#: What a kernel may not do, by the name of the finding.
KINDS = {
    "bounds": "an access outside the tensors of the launch",
    "elements": "an access between the elements of a view",
    "misaligned": "a misaligned access",
    "conflict": "two threads store different values to one address",
    "read_only": "a store into constant memory",
    "uninitialised": "a read of memory that nobody wrote",
    "race": "two threads access one place in memory with no barrier between",
    "barrier": "a barrier that not all threads reach",
    "shuffle": "an exchange with threads that are not there",
    "undefined": "a result that depends on an undefined register",
    "endless": "a loop without an end",
    "order": "a result that depends on the order of the warps",
}
