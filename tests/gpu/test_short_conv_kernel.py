"""fla's convolution kernels compute what ShortConv does in PyTorch."""

import pytest
import torch

from distill_pl.mixers.short_conv import ShortConv, convolve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(48, 512, 15, 64), (3, 131, 5, 80), (1, 2, 1, 100)], ids=str)
def test_kernel_is_plain(dtype, shape):
    pytest.importorskip("fla")  # without which all is PyTorch
    generator = torch.Generator().manual_seed(0)
    inputs, dy = ([torch.randn(shape, generator=generator).to(dtype) for _ in range(3)] for _ in range(2))
    convs = {name: ShortConv(shape[2] * shape[3]) for name in "qkv"}
    for conv in convs.values():
        torch.nn.init.normal_(conv.weight, generator=generator)

    def outputs_and_gradients(backend, dtype):
        xs = [x.to("cuda", dtype).requires_grad_(True) for x in inputs]
        weights = [conv.to("cuda", torch.promote_types(dtype, torch.float32)).weight for conv in convs.values()]
        ys = convolve(convs, xs, None, None, backend, (True, True, False))
        return [*ys, *torch.autograd.grad(ys, xs + weights, [d.to("cuda", dtype) for d in dy])]

    pairs = zip(outputs_and_gradients("fla", dtype), outputs_and_gradients("torch", torch.float64), strict=True)
    assert max((x.double() - y).norm() / y.norm() for x, y in pairs) < (3e-3 if dtype == torch.bfloat16 else 1e-5)
