"""A kernel of the published design, written from its description: cosine and sine of every offset inside the kernel.

``python -m verify.tests.simulator.published_design SM`` runs it on a simulated GPU, at a position where the phases are
small and at one where the cosine takes its slow path, and prints one line of JSON for each: the error in units of the
bound below, and the opcodes that the kernel has.

S[n] = max_o sum_f w_f (Re c_f cos((t + o) omega_f) - Im c_f sin((t + o) omega_f)), with c = m conj(k). Each term has
two roundings of products, one of a sum, a cosine within 2 ulp, and one more product; a sum of 64 terms has at most 8
further roundings: less than 16 units of 2^-24 sum_f w_f (|Re c_f| + |Im c_f|).
"""

from __future__ import annotations

import json
import sys

from verify.simulator.driver import install

#: Positions at which no phase, and at which most phases, are beyond the quick path of the cosine (105,615 radians).
POSITIONS = (64, 3_000_000)
_UNIT = 2.0**-24


def main(sm: int) -> None:
    gpu = install(sm)
    import numpy as np
    import torch

    from verify.tests.simulator.published_kernel import published_kernel

    draw = torch.Generator().manual_seed(1)
    heads, keys, count = 2, 65, 64
    offsets = torch.tensor([float(2**power) for power in range(17)])
    omega = torch.logspace(0, -4, count)
    k = torch.randn(heads, keys, 2 * count, generator=draw).to(torch.bfloat16)
    mean = torch.randn(heads, 2, count, generator=draw)
    weight = torch.rand(heads, count, generator=draw)
    for position in POSITIONS:
        out = torch.full((heads, keys), torch.nan)
        published_kernel[(-(-keys // 32), heads)](
            k, mean, weight, omega, offsets, out, float(position), keys, len(offsets), F=count, BLOCK_N=32
        )
        # the phases are rounded to float32 as in the kernel
        phase = ((np.float32(position) + offsets.numpy())[:, None] * omega.numpy()).astype(np.float64)
        re, im = (part.double().numpy() for part in (k[..., :count], k[..., count:]))
        m, w = mean.double().numpy(), weight.double().numpy()
        c_re = m[:, None, 0] * re + m[:, None, 1] * im
        c_im = m[:, None, 1] * re - m[:, None, 0] * im
        terms = c_re[:, :, None] * np.cos(phase) - c_im[:, :, None] * np.sin(phase)
        wanted = (w[:, None, None] * terms).sum(-1).max(-1)
        bound = 16 * _UNIT * (w[:, None] * (abs(c_re) + abs(c_im))).sum(-1)
        error = float((abs(out.double().numpy() - wanted) / bound).max())
        opcodes = sorted({one.opcode for program in gpu.programs() for one in program.kernel.instructions})
        print(json.dumps({"position": position, "error": error, "launches": gpu.launches, "opcodes": opcodes}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
