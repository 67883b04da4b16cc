"""The Triton kernels of gpt2_from_scratch.py in Triton's interpreter, against plain PyTorch: no GPU is needed.

Skipped where there is no Triton. `pip install triton` beside a PyTorch for CPUs is enough, on Linux.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpt2_from_scratch as gpt2

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported
if IS_INTERPRETED and Version(np.__version__) >= Version("2.4"):
    pytest.skip("Triton's interpreter needs an older NumPy", allow_module_level=True)
pytestmark = pytest.mark.kernels
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="run by test_kernels_in_the_interpreter")


@pytest.mark.skipif(IS_INTERPRETED, reason="that is this process")
def test_kernels_in_the_interpreter():
    environment = dict(os.environ) | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "pytest", __file__], env=environment, capture_output=True, text=True)
    if "1 skipped" in done.stdout and "passed" not in done.stdout:
        pytest.skip("Triton's interpreter needs an older NumPy")
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


@pytest.fixture
def small_blocks(monkeypatch):
    """One way to cut the work of the linear layers: the interpreter cannot try which is fastest."""
    import triton

    sizes = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32}
    monkeypatch.setattr(gpt2.matmul_kernel, "configs", [triton.Config(sizes)])
    monkeypatch.setattr(gpt2.GraphDecoder, "LOGITS", 128)  # and takes long over large ones
    monkeypatch.setattr(gpt2.GraphDecoder, "KEYS", ((32, 4, 1), (32, 4, 1)))


@interpreted
@pytest.mark.parametrize("count", [1, 2])
def test_greedy_tokens_are_those_of_transformers(small_blocks, tmp_path, count):
    """Which reads all tokens anew for each, in float32. A prompt and more tokens than a block of the kernels."""
    from tokenizers import Tokenizer, models
    from transformers import GPT2LMHeadModel

    model = gpt2.GPT(gpt2.GPTConfig(100, block_size=96, layers=2, heads=2, width=32))
    model.initialise(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.empty_like(parameter).normal_(0, 0.15, generator=generator)
        model.wpe.weight.normal_(0, 2, generator=generator)  # so that it does not repeat itself
        model.wte.weight[100:] = 5  # padding, which must never be drawn
    gpt2.save_pretrained(model, gpt2.as_plain_text(Tokenizer(models.BPE({gpt2.END_OF_TEXT: 0}, []))), tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    prompt = [(7 * i) % 100 for i in range(62)]
    how = {"max_new_tokens": 8, "do_sample": False, "use_cache": False, "eos_token_id": None, "pad_token_id": 0,
           "attention_mask": torch.ones(1, 62, dtype=torch.long)}  # fmt: skip
    expected = theirs.generate(torch.tensor([prompt]), **how)[0, 62:].tolist()
    assert len(set(expected)) > 4
    decoder = gpt2.GraphDecoder(model, count, 70, -1, 0.0, 50, 0)
    assert list(decoder.run(prompt)) == [[token] * count for token in expected]
    end = expected[4]  # a row that has reached the end stays there
    first = expected.index(end)
    decoder = gpt2.GraphDecoder(model, count, 70, end, 0.0, 50, 0)
    assert list(decoder.run(prompt)) == [[token] * count for token in expected[: first + 1]]


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(("top_k", "temperature"), [(6, 20.0), (0, 1.3)])
def test_what_is_drawn_has_the_probabilities_of_the_softmax(small_blocks, top_k, temperature):
    model, rows = gpt2.GPT(gpt2.GPTConfig(200, block_size=8, layers=1, heads=1, width=16)), 400
    logits = (torch.randn(256, generator=torch.Generator().manual_seed(0)) * 3).bfloat16().float()
    logits[logits > 7.8] = 0
    logits[:3] = 31.75  # another higher byte than those below 8, and nearly the highest lower one
    largest = (logits[:200] / temperature).topk(top_k or 200)
    expected = torch.zeros(200).scatter(0, largest.indices, largest.values.softmax(0))

    def draw_twice(seed):
        """A second time too: the kernel clears what it has counted."""
        decoder = gpt2.GraphDecoder(model, rows, 4, -1, temperature, top_k, seed)
        decoder.logits.copy_(logits.expand(rows, -1))
        decoder.draw()
        decoder.draw()
        return decoder.sequence[:, 1:3].unbind(1)

    first, second = draw_twice(3)
    for drawn in (first, second):
        assert (expected[drawn] > 0).all() and (not top_k or len(drawn.unique()) == top_k)
        assert (torch.bincount(drawn, minlength=200) / rows - expected).abs().sum() / 2 < 0.25  # total variation
    assert not torch.equal(first, second) and not torch.equal(first, draw_twice(4)[0])
