"""A functional simulator of the PTX that Triton compiles, and a Triton driver on top of it.

``ptx`` reads the text, ``opcodes`` knows what an opcode computes, and ``effects``, ``atomics``, ``asynchronous`` and
``tensor_cores`` what else one does. ``machine`` runs blocks, ``launch`` a grid, and ``driver`` takes the place of a GPU
under Triton.
"""

#: What undefined registers hold: a launch whose results depend on which word it is, is wrong. They differ in every bit.
POISONS = (0xDEADBEEF, 0x21524110)
#: The seed of the order in which warps run one after another.
ORDER_SEED = 1
#: What a simulation does not execute, in words.
NOT_EXECUTED = ("ptxas's machine code", "the card", "an autotuner's timings")
