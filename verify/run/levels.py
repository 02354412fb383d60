"""The levels of a run, named as those of ``dcgmi diag``: how much is checked, from under a minute to everything."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from verify.checks import PHASES

#: The checks of level 1, and of ``verify gate``: that the tools mean one GPU, one build and launch of a plain kernel
#: and one of the scoring kernel, one scoring problem against the oracle, and one compaction of a cache. ``-m gate``
#: selects them. All of them are must-pass checks of every GPU, and none loads a model.
GATE = frozenset(
    (
        *("p1.driver.version", "p1.torch.sees_gpu", "p1.identity.nvml_torch_triton", "p1.triton.add_kernel"),
        *("p3.scoring.bfloat16-half-mean", "p4.triton_oracle.n1024", "p4.compressor.bfloat16"),
    )
)

#: Phases 1 to 5: everything that loads no model.
_WITHOUT_A_MODEL = tuple(phase for phase in PHASES if phase <= 5)

#: The options of ``verify run`` that each level stands for. Without a GPU a run leaves out slow checks unless its
#: marker expression says otherwise, so level 4 has one that selects all.
LEVELS: MappingProxyType[int, dict[str, Any]] = MappingProxyType(
    {
        1: {"expression": "gate"},
        2: {"phases": _WITHOUT_A_MODEL, "expression": "hard"},
        3: {"expression": "not slow"},
        4: {"expression": "slow or not slow", "sanitize": True},
    }
)
