import torch
import triton
import triton.language as tl

print("Triton version:", triton.__version__)


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n: tl.constexpr):
    offs = tl.arange(0, n)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x + y)


x = torch.randn(128, device="cuda")
y = torch.randn(128, device="cuda")
out = torch.empty(128, device="cuda")
add_kernel[(1,)](x, y, out, 128)
assert torch.allclose(out, x + y, atol=1e-5)
print("Triton JIT compilation + execution on SM 120: PASSED")
