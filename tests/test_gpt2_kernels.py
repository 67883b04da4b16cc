"""The Triton kernels of gpt2_from_scratch.py in Triton's interpreter, against plain PyTorch: no GPU is needed.

Skipped where there is no Triton. `pip install triton` beside a PyTorch for CPUs is enough, on Linux.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpt2_from_scratch as gpt2

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="run by test_kernels_in_the_interpreter")


@pytest.mark.skipif(IS_INTERPRETED, reason="that is this process")
def test_kernels_in_the_interpreter():
    environment = dict(os.environ) | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "pytest", __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@interpreted
@pytest.mark.parametrize(("size", "rows", "dtype", "rtol"), [
    (300, 7, torch.float32, 1e-5), (9000, 3, torch.float32, 1e-5), (300, 7, torch.bfloat16, 2e-2)])  # fmt: skip
def test_the_fused_loss_is_cross_entropy_with_its_gradients(size, rows, dtype, rtol):
    """In double precision; one target does not count; more logits than a block of the kernel, and large ones."""
    generator, stride = torch.Generator().manual_seed(0), -(-size // 128) * 128
    x = torch.randn(rows, 16, generator=generator) * (4 if dtype is torch.float32 else 0.5)  # bf16 rounds logits too
    weight = torch.randn(stride, 16, generator=generator)
    weight[size:] = 0
    targets = torch.randint(size, (rows,), generator=generator)
    targets[1] = -1
    x, weight = (tensor.to(dtype).requires_grad_() for tensor in (x, weight))
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = F.cross_entropy((wide[0] @ wide[1].t())[:, :size], targets, ignore_index=-1, reduction="sum")
    loss = gpt2.FusedLoss.apply(x, weight, targets, size)
    (loss * 0.25).backward()
    (expected * 0.25).backward()
    assert loss.dtype is torch.float32 and loss.item() == pytest.approx(expected.item(), rel=rtol)
    for ours, theirs in zip((x, weight), wide, strict=True):
        assert ours.grad.dtype is dtype
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=rtol, atol=rtol * theirs.grad.abs().max())
    assert weight.grad[size:].eq(0).all() and x.grad[1].eq(0).all()


@interpreted
def test_a_model_gives_the_same_loss_and_gradients_with_the_fused_loss():
    config = gpt2.GPTConfig(300, block_size=16, layers=2, heads=2, width=16)
    one, two = gpt2.GPT(config), gpt2.GPT(config)
    for model in (one, two):
        model.initialise(1)
    two.is_loss_fused = True
    tokens = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))
    losses = [model(tokens[:, :-1], tokens[:, 1:]) for model in (one, two)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)
