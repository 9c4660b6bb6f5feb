"""The kernel of the losses' terms computes what is written in PyTorch."""

import pytest
import torch

from distill_pl.losses import _terms, _terms_by

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [50, 8193, 49152])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "taught"])
def test_kernel_is_plain(dtype, vocabulary, temperature, alone):
    generator = torch.Generator().manual_seed(0)
    logits, expected = (3 * torch.randn(37, vocabulary, generator=generator).to("cuda", dtype) for _ in range(2))
    labels = torch.randint(-1, vocabulary, (37,), generator=generator)
    labels[::5], labels[1] = -1, vocabulary - 1
    arguments = None if alone else expected, labels.cuda(), 0.7, temperature
    terms, gradient = _terms(logits, *arguments, True)
    only, none = _terms_by(logits.device)(logits.clone(), *arguments, False)
    found, found_gradient = _terms_by(logits.device)(logits.clone(), *arguments, True)
    assert none is None
    torch.testing.assert_close(only, found, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, terms, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)
