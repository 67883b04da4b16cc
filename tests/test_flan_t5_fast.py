"""The fast path of flan-t5_samsum.py on the CPU: without graphs and compiler, against transformers and PEFT.

Its kernels run in Triton's interpreter where Triton is installed; elsewhere attention is computed by
a reference, and LoRA's branch by the plain operations of the script.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import types

import numpy as np
import pytest
from accelerate.utils import send_to_device

torch = pytest.importorskip("torch")
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

no_triton = pytest.mark.skipif(not importlib.util.find_spec("triton") or torch.cuda.is_available(),
                               reason="needs Triton, and no GPU")


def needs_triton(test):
    return pytest.mark.kernels(no_triton(test))


def rows_of(lengths, extra=0):
    """[rows, 2] of packed rows, `extra` empty ones at the end."""
    ends = torch.tensor([0, *lengths, *[0] * extra]).cumsum(0)
    return torch.stack((ends[:-1], ends[1:]), 1).to(torch.int32)


def reference_attention(q, kv, bias, mask, q_rows, k_rows, heads, longest_q, longest_k, causal):
    """Row by row, in plain operations that autograd knows; without dropout, whatever the mask."""
    inner = q.shape[1] // 3 if kv is None else q.shape[1]
    beside = q if kv is None else kv
    parts = q[:, :inner], beside[:, -2 * inner : -inner], beside[:, -inner:]
    out = []
    for of_q, of_k in zip(q_rows.tolist(), (q_rows if k_rows is None else k_rows).tolist(), strict=True):
        qh, kh, vh = (part[slice(*of)].unflatten(1, (heads, -1)).transpose(0, 1)
                      for part, of in zip(parts, (of_q, of_k, of_k), strict=True))
        distance = torch.arange(kh.shape[1])[None] - torch.arange(qh.shape[1])[:, None] - kh.shape[1] + qh.shape[1]
        scores = qh @ kh.transpose(1, 2)
        if bias is not None:
            limit = bias.shape[1] // 2
            scores = scores + bias[:, distance.clamp(-limit, limit) + limit]
        if causal:
            scores = scores.masked_fill(distance > 0, -math.inf)
        out.append((scores.softmax(-1) @ vh).transpose(0, 1).flatten(1))
    whole = torch.cat(out)
    return torch.cat((whole, whole.new_zeros(len(q) - len(whole), inner)))


class PlainAttention:
    apply = staticmethod(reference_attention)


@pytest.fixture
def plain(flan, monkeypatch):
    """The fast path with the reference in place of the kernels."""
    monkeypatch.setattr(flan, "Attention", PlainAttention)
    monkeypatch.setattr(flan, "attention", lambda *args: (reference_attention(*args), None))


@pytest.fixture
def lora_kernels(flan, monkeypatch):
    """LoRA's kernels in training, though this is no GPU."""
    monkeypatch.setattr(flan, "has_lora_kernels", lambda x, a, mask: mask is not None)


def make_model(flan, dropout=0.0, quantization=None, model_folder=None, device="cpu", dtype=torch.float32,
               lora_dropout=None):
    """A small T5 with an adapter that is not zero, and settings for it."""
    lora_dropout = dropout if lora_dropout is None else lora_dropout
    settings = flan.parse_settings(["--lora-dropout", str(lora_dropout), "--micro-batch-size", "4", "--batch-size", "8",
                                    *([f"--{quantization}"] if quantization else []),
                                    "--max-source-length", "64", "--max-target-length", "64", "--max-new-tokens", "20"])
    flan.transformers.set_seed(0)
    if model_folder:
        model = flan.load_base(model_folder, torch.device(device), dtype, quantization)
        model.config.dropout_rate = dropout
    else:
        config = flan.transformers.T5Config(
            vocab_size=200, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_decoder_layers=3, num_heads=4,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, dropout_rate=dropout)
        model = flan.transformers.T5ForConditionalGeneration(config)
        model.lm_head.weight = torch.nn.Parameter(torch.randn(200, 64))
        model.lm_head.weight.data[1] *= 9  # the end token comes now and then
        model.set_input_embeddings(model.shared)
        model.to(device, dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    flan.transformers.set_seed(1)
    model = flan.add_lora(model, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.05)
    return model.train() if dropout else model.eval(), settings


ROWS = [([5, 6, 7, 8, 1] * k, [9, 10, 11, 1] * j) for k, j in ((3, 2), (12, 5), (1, 1), (7, 9))]


def padded(rows):
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(source) for source, _ in rows], batch_first=True)
    labels = pad([torch.tensor(target) for _, target in rows], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def as_rows(rows):
    return [{"input_ids": source, "labels": target} for source, target in rows]


def summed_loss(model, rows):
    batch = padded(rows)
    return model(**batch, use_cache=False).loss * (batch["labels"] >= 0).sum()


# ---------- Attention -------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize(("q_lengths", "k_lengths", "kind"), [
    ([70, 3, 140, 1], None, "encoder"), ([70, 3, 33, 1], None, "decoder"), ([5, 3, 70, 4], [70, 3, 140, 0], "cross"),
    ([1, 1, 1], [70, 3, 0], "one token"),
])
@pytest.mark.parametrize("width", [16, 48])
def test_kernels_against_the_reference(flan, q_lengths, k_lengths, kind, width):
    torch.manual_seed(0)
    heads = 3
    q_rows = rows_of(q_lengths, extra=1)
    k_rows = q_rows if k_lengths is None else rows_of(k_lengths, extra=1)
    q = torch.randn(int(q_rows[-1, 1]), (3 if k_lengths is None else 1) * heads * width, requires_grad=True)
    kv = None if k_lengths is None else torch.randn(int(k_rows[-1, 1]), 2 * heads * width, requires_grad=True)
    bias = None if kind == "cross" else torch.randn(heads, 2 * 20 + 1)
    rest = (q_rows, k_rows, heads, max(q_lengths), max(k_lengths or q_lengths), kind == "decoder")
    leaves = [q] if kv is None else [q, kv]
    dout, results = torch.randn(len(q), heads * width), []
    for function in (flan.Attention.apply, reference_attention):
        out = function(q, kv, bias, None, *rest)
        has_keys = (k_rows[:, 1] > k_rows[:, 0]).repeat_interleave((q_rows[:, 1] - q_rows[:, 0]).long())
        out = torch.where(has_keys[:, None], out, 0)
        results.append([out, *torch.autograd.grad(out, leaves, dout)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected.nan_to_num(), rtol=1e-4, atol=1e-4)


@needs_triton
def test_kernels_drop_in_backward_what_they_dropped_in_forward(flan):
    """The gradient under dropout, by finite differences of the kernel itself; and kept places are as many as promised,
    and others under another seed."""
    torch.manual_seed(0)
    rows, heads = rows_of([5, 3]), 2
    bias, mask = torch.randn(heads, 9), mask_of(flan, 5, 0.3)
    run = lambda q: flan.Attention.apply(q, None, bias, mask, rows, rows, heads, 5, 5, False)
    q = torch.randn(8, 3 * heads * 16, requires_grad=True)
    out = run(q)
    dout, direction = torch.randn_like(out), torch.randn_like(q)
    (gradient,) = torch.autograd.grad(out, q, dout)
    with torch.no_grad():
        slope = ((run(q + 1e-3 * direction) - run(q - 1e-3 * direction)) * dout).sum() / 2e-3
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-3, atol=1e-3)
        # With v = 1 an output is the sum of the kept probabilities.
        rows, v_is_one = rows_of([64]), torch.cat((torch.zeros(64, 2 * heads * 16), torch.ones(64, heads * 16)), 1)
        sums = [flan.Attention.apply(v_is_one, None, None, mask_of(flan, seed, 0.3), rows, rows, heads, 64, 64, False)
                for seed in (5, 987654321)]
        two = torch.cat((v_is_one, v_is_one)), rows_of([64, 64])
        rows_of_a_batch = flan.Attention.apply(two[0], None, None, mask_of(flan, 5, 0.3), two[1], two[1], heads, 64, 64,
                                               False).chunk(2)
    assert abs(float(sums[0].mean()) - 1) < 0.05
    assert not torch.equal(*sums) and not torch.equal(*rows_of_a_batch)


# ---------- Dropout ---------------------------------------------------------------------------------------------------


def mask_of(flan, seed, rate):
    return flan.make_masks(*(torch.tensor(n, dtype=torch.int32) for n in (seed, int((rate - 0.5) * 2**32))))


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5])
def test_dropout_keeps_its_share_and_the_mean(flan, rate):
    x = torch.ones(1000, 500)
    dropped = flan.dropped(x, mask_of(flan, 77, rate))
    assert abs(float((dropped == 0).float().mean()) - rate) < 0.003
    assert abs(float(dropped.mean()) - 1) < 0.01
    if not rate:
        assert torch.equal(dropped, x)
    columns, rows = (dropped == 0).float().mean(0), (dropped == 0).float().mean(1)
    assert columns.std() < 0.02 + rate * 0.02 and rows.std() < 0.03  # no stripes


def test_dropout_of_backward_is_that_of_forward(flan):
    x, mask = torch.ones(64, 64, requires_grad=True), mask_of(flan, 3, 0.3)
    out = flan.dropout(x, mask)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, out)


def test_seeds_of_one_key_are_none_of_the_next(flan, plain):
    """Or the sites of a step would repeat what others have dropped in the step before."""
    model, settings = make_model(flan, 0.3)
    fast, seen = flan.FastT5(model, settings), []
    fast.loss = lambda batch, masks: (seen.append(set(masks[..., 0].flatten().tolist())), fast.flat.sum())[1]
    fast.leaves = [fast.flat]
    for key in (7, 8, 9):
        fast.key.fill_(key)
        fast.forward_backward({})
    assert not seen[0] & seen[1] and not seen[1] & seen[2] and not seen[0] & seen[2]


def test_masks_differ_by_step_rank_micro_batch_and_site(flan, plain):
    """As the script seeds it: torch's generator by seed, step and rank; every site of every layer has its own seed."""
    model, settings = make_model(flan, 0.3)
    fast = flan.FastT5(model, settings)
    batch, seen = fast.pack(as_rows(ROWS)), []
    loss_of = fast.loss
    fast.loss = lambda batch, masks: (seen.append(masks.clone()), loss_of(batch, masks))[1]
    for seed in (1, 2, 1):  # two steps or ranks, and the first again
        torch.manual_seed(seed)
        fast.training_step(batch, torch.tensor(10), True, False)
        fast.training_step(batch, torch.tensor(10), False, True)
    assert [torch.equal(seen[0], other) for other in seen] == [True, False, False, False, True, False]
    assert torch.equal(seen[1], seen[5])
    assert len(seen[0][..., 0].unique()) == seen[0][..., 0].numel()
    assert torch.equal(seen[0][..., 1].unique(), torch.tensor([int((0.3 - 0.5) * 2**32)], dtype=torch.int32))


def test_every_place_has_a_mask_of_its_own_with_the_right_rate(flan, monkeypatch):
    """Where transformers and PEFT drop: six sites in an encoder layer, eleven in a decoder layer, four outside. LoRA's
    are given a tensor with a dimension for modules."""
    model, settings = make_model(flan, 0.1, lora_dropout=0.3)
    seen, dropped = [], flan.dropped

    def note(kind, mask, seed_at=0):
        kept = round(float(1 / mask[2].view(torch.float32)), 6)
        assert kept == round(0.5 - int(mask[1]) / 2**32, 6)
        seen.append((kind, kept, int(mask[seed_at]), seed_at))

    def noted_dropped(x, mask, seed_at=0):
        note(f"A of {len(x)}" if x.dim() == 3 else f"width {x.shape[1]}", mask, seed_at)
        return dropped(x, mask, seed_at)

    class NotedAttention:
        @staticmethod
        def apply(*args):
            note("softmax", args[3])
            return reference_attention(*args)

    monkeypatch.setattr(flan, "dropped", noted_dropped)
    monkeypatch.setattr(flan, "Attention", NotedAttention)
    fast = flan.FastT5(model, settings)
    fast.training_step(fast.pack(as_rows(ROWS)), torch.tensor(10), True, True)
    forward = [(kind, kept) for kind, kept, _, seed_at in seen if seed_at == 0]
    # Of three layers each: q, k and v; k and v of the encoder's output; q there, o, o and o. Softmaxes of 3 x 3. d_ff
    # is 128. What is added to x, in 3 x 2 and 3 x 3 places, both embeddings and both outputs have d_model, 64.
    assert collections.Counter(forward) == {
        ("A of 3", 0.7): 6, ("A of 2", 0.7): 3, ("A of 1", 0.7): 12, ("softmax", 0.9): 9, ("width 128", 0.9): 6,
        ("width 64", 0.9): 19}
    seeds, again = ({seed for *_, seed, seed_at in seen if seed_at == at} for at in (0, 3))
    assert len(seeds) == len(forward) == 3 * 6 + 3 * 11 + 4
    assert len(again) == len(seeds) - 9 - 2 and again < seeds  # backward's, but for softmaxes and embeddings


def test_a_fast_training_drops_what_the_settings_say(flan, command, data, model_folder, tmp_path, on_the_cpu,
                                                     monkeypatch):
    """In each of its steps, though the comparison before the first one is without dropout."""
    steps, training_step = [], flan.FastT5.training_step

    def noted(self, *args):
        steps.append((0.5 + self.thresholds.double() / 2**32).round(decimals=6))
        return training_step(self, *args)

    monkeypatch.setattr(flan.FastT5, "training_step", noted)
    done = command("--model", model_folder, "--dataset", data, *FLAGS, "--lora-dropout", 0.3, "--max-steps", 2,
                   "--output-dir", tmp_path / "run", cwd=tmp_path)
    assert done.code == 0 and flan.read_metrics(tmp_path / "run")["fast_step"] and len(steps) == 4, done
    config = json.loads((model_folder / "config.json").read_text())
    layers = config["num_layers"] + config["num_decoder_layers"]
    lora = [flan.A_QKV, flan.A_O, flan.A_Q, flan.A_KV, flan.A_CROSS_O]
    expected = torch.full((layers + 1, 11), config["dropout_rate"], dtype=torch.float64)
    expected[:layers, lora] = 0.3
    assert config["dropout_rate"] == 0.1 and all(torch.equal(rates, expected) for rates in steps)


# ---------- LoRA's branch ---------------------------------------------------------------------------------------------


def kept_places(shape, seed, rate):
    """murmur3's finaliser of place ^ seed, in NumPy; the hash, with its sign, must reach (rate - 1/2) x 2^32."""
    x = np.arange(math.prod(shape), dtype=np.uint32) ^ np.uint32(seed)
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return torch.tensor((x ^ (x >> 16)).view(np.int32) >= int((rate - 0.5) * 2**32)).view(shape)


def check_lora_kernels(flan, tokens, modules, rank, width, rate, dtype, tolerance, device="cpu"):
    """Both kernels against plain operations in double precision, with autograd's gradients."""
    torch.manual_seed(0)
    s, seed, used = 1.7, 123456789, width + modules * rank
    full = width + -(-modules * rank // 64) * 64
    x, a = torch.randn(tokens, width).to(dtype), (torch.randn(modules, rank, width) / width**0.5).to(dtype)
    dwide = torch.randn(tokens, full).to(dtype)
    wide_x, wide_a = (tensor.double().requires_grad_() for tensor in (x, a))
    kept = kept_places((modules, tokens, width), seed, rate)
    u = torch.cat([(wide_x * of_module / (1 - rate)) @ one.t() for of_module, one in zip(kept, wide_a, strict=True)], 1)
    expected = torch.cat((wide_x, s * u, torch.zeros(tokens, full - used)), 1)
    gradients = torch.autograd.grad(expected, (wide_x, wide_a), dwide.double())
    dwide[:, used:] = math.nan  # belongs to no module

    mask = mask_of(flan, seed, rate).to(device)
    x, a, dwide = (tensor.to(device) for tensor in (x, a, dwide))
    found, found_u = flan.lora(x, a, mask, s, full)
    dx, parts = flan.lora_backward(x, dwide, a, mask, s)
    assert {t.dtype for t in (found, found_u, dx)} == {dtype} and parts.dtype == torch.float32
    assert torch.equal(found[:, :width], x) and not found[:, used:].any()
    assert torch.equal(found[:, width:used], found_u)
    for ours, right in ((found, expected), (dx, gradients[0]), (parts.sum(0), gradients[1])):
        right = right.detach()
        torch.testing.assert_close(ours.cpu().double(), right, rtol=tolerance, atol=tolerance * float(right.std()))


@pytest.fixture
def nan_in_new_tensors():
    """What a kernel forgets to write is then not zero by chance."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


LORA_SHAPES = [  # tokens, modules, rank, width, rate
    (70, 3, 16, 96, 0.3), (33, 2, 8, 128, 0.05), (40, 1, 64, 80, 0.3), (17, 3, 40, 64, 0.0), (600, 2, 16, 192, 0.3),
    (5, 3, 64, 48, 0.1),
]


@needs_triton
@pytest.mark.parametrize("shape", LORA_SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float16, 2e-3)], ids=["fp32", "fp16"])
def test_lora_kernels_against_the_reference(flan, nan_in_new_tensors, shape, dtype, tolerance):
    """Tokens that do not fill the last block, or more than one span; ranks that are no power of two; odd widths. (The
    interpreter multiplies the bits of bf16 as integers: that is tested on a GPU.)"""
    check_lora_kernels(flan, *shape, dtype, tolerance)


@needs_triton
def test_lora_kernels_drop_what_dropped_drops(flan):
    """Place by place: forward shows a column of each module's mask for each of A's rows, backward a whole mask."""
    tokens, modules, rank, width = 37, 3, 16, 48
    mask = mask_of(flan, -77, 0.4)
    expected = flan.dropped(torch.ones(modules, tokens, width), mask) != 0
    assert torch.equal(expected, kept_places(expected.shape, -77 % 2**32, 0.4)) and 0.5 < expected.float().mean() < 0.7
    for first in range(0, width, rank):
        a = torch.eye(width)[first : first + rank].expand(modules, -1, -1).contiguous()
        u = flan.lora(torch.ones(tokens, width), a, mask, 1.0, width + 64)[1].unflatten(1, (modules, rank))
        assert torch.equal(u.transpose(0, 1) != 0, expected[:, :, first : first + rank])
    for i in range(modules):
        dwide = torch.zeros(tokens, width + 64)
        dwide[:, width + i * rank] = 1
        dx, _ = flan.lora_backward(torch.ones(tokens, width), dwide, torch.ones(modules, rank, width), mask, 1.0)
        assert torch.equal(dx != 0, expected[i])


@needs_triton
def test_a_step_with_dropout_is_the_same_with_and_without_lora_kernels(flan, plain, monkeypatch):
    losses, found = [], []
    for has_kernels in (False, True):
        monkeypatch.setattr(flan, "has_lora_kernels", lambda x, a, mask, chosen=has_kernels: chosen)
        model, settings = make_model(flan, 0.2)
        torch.manual_seed(3)
        loss, gradients_of = gradients(flan, model, settings, ROWS)
        losses.append(loss)
        found.append(gradients_of)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-4)
    assert_same_gradients(found[1], found[0])


def test_where_lora_kernels_apply(flan):
    gpu, cpu, mask = types.SimpleNamespace(is_cuda=True), torch.ones(1), torch.zeros(4)
    a = lambda rank, width: torch.empty(3, rank, width, device="meta")
    cases = [(gpu, a(16, 2048), mask), (gpu, a(64, 768), mask), (gpu, a(16, 48), mask),
             (gpu, a(16, 2048), None), (cpu, a(16, 2048), mask), (gpu, a(65, 2048), mask), (gpu, a(16, 72), mask)]
    assert [flan.has_lora_kernels(*case) for case in cases] == [True] * 3 + [False] * 4


# ---------- Loss and gradients ----------------------------------------------------------------------------------------


def gradients(flan, model, settings, rows, split=None):
    """Loss and gradients of the fast path, by name."""
    fast = flan.FastT5(model, settings)
    tokens = torch.tensor(sum(len(target) for _, target in rows))
    parts = [rows] if split is None else [rows[:split], rows[split:]]
    loss = sum(fast.training_step(fast.pack(as_rows(part)), tokens, i == 0, i == len(parts) - 1)
               for i, part in enumerate(parts))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return loss * tokens, {names[id(p)]: part * tokens
                           for p, part in zip(fast.adapter, fast.split(fast.flat.grad), strict=True)}


def assert_same_gradients(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < tolerance, (name, float(error))


def expected_gradients(model, rows):
    loss = summed_loss(model, rows)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize("split", [None, 1], ids=["one batch", "two micro-batches"])
def test_loss_and_gradients_are_those_of_transformers(flan, plain, split):
    model, settings = make_model(flan)
    loss, expected = expected_gradients(model, ROWS)
    found_loss, found = gradients(flan, model, settings, ROWS, split)
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=1e-4)
    assert_same_gradients(found, expected)
    torch.testing.assert_close(summed_loss(model, ROWS), loss, rtol=1e-5, atol=1e-4)  # the model goes on working


@needs_triton
@pytest.mark.parametrize("rows", [ROWS, [([5, 6, 7, 1] * 4, [9] * 9)] * 4], ids=["", "filled up without sources"])
def test_loss_and_gradients_with_the_kernels(flan, lora_kernels, rows):
    """Also where the sources fill a size and the targets do not, so that what fills these up has nothing to look at."""
    model, settings = make_model(flan)
    loss, expected = expected_gradients(model, rows)
    found_loss, found = gradients(flan, model, settings, rows)
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=1e-4)
    assert_same_gradients(found, expected)


def test_gradient_under_dropout_is_the_slope_of_the_loss(flan, plain):
    """Masks of forward and backward are the same everywhere: by finite differences, in one direction."""
    model, settings = make_model(flan, 0.2)
    fast = flan.FastT5(model, settings)
    batch = fast.pack(as_rows(ROWS))
    fast.key.fill_(1234)
    fast.forward_backward(batch)
    direction, losses = torch.randn_like(fast.flat) / fast.flat.numel() ** 0.5, []
    slope = float((fast.flat.grad * direction).sum())
    for step in (0.02, -0.02):
        fast.flat.data.add_(direction, alpha=step)
        losses.append(float(fast.forward_backward(batch)))
        fast.flat.data.sub_(direction, alpha=step)
    assert (losses[0] - losses[1]) / 0.04 == pytest.approx(slope, rel=0.02)


def test_a_batch_for_which_code_is_compiled_runs_without_a_graph(flan, plain, monkeypatch):
    """The others are recorded when their size first comes. Graphs are a pretence here, that the compiler refuses to
    compile while one is recorded is not; on a GPU, see tests/test_gpu_flan_t5.py."""
    model, settings = make_model(flan)
    fast, plainly = (flan.FastT5(model, settings) for _ in range(2))
    fast.embed = torch.compile(flan.embed, backend="eager", dynamic=None)
    fast.uses_graphs, fast.stream = True, types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: fast.stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def record(work):  # nothing is computed while a graph is recorded, all of it when it is replayed
        before = fast.flat.grad.clone()
        loss = work()
        fast.flat.grad.copy_(before)
        return types.SimpleNamespace(replay=lambda: loss.copy_(work())), loss

    monkeypatch.setattr(fast, "record", record)
    graphs, others = [], [([t + 50 for t in source], [t + 60 for t in target]) for source, target in ROWS]
    for rows in (ROWS, ROWS, others, [(source * 2, target) for source, target in ROWS[2:]], ROWS):
        found = []
        for path in (fast, plainly):
            path.flat.grad = torch.zeros_like(path.flat)
            found.append((float(path.by_graph(path.pack(as_rows(rows)))), path.flat.grad))
        assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
        graphs.append(len(fast.graphs))
    assert graphs == [0, 1, 1, 2, 2]
    monkeypatch.setattr(fast, "record", lambda work: torch.zeros(2) @ torch.zeros(3))  # another error
    with pytest.raises(RuntimeError, match="size"):
        fast.by_graph(fast.pack(as_rows(ROWS[:1])))


def test_checkpointing_changes_no_gradient(flan, plain):
    found = []
    for flags in ({}, {"gradient_checkpointing": True}):
        model, settings = make_model(flan, 0.2)
        fast = flan.FastT5(model, dataclasses.replace(settings, **flags))
        fast.key.fill_(7)
        fast.forward_backward(fast.pack(as_rows(ROWS)))
        found.append(fast.flat.grad)
    torch.testing.assert_close(*found)


@needs_triton
def test_checkpointing_through_the_kernels(flan, lora_kernels):
    """Tensors that checkpointing brings back may be asked for once only."""
    test_checkpointing_changes_no_gradient(flan, None)


@needs_triton
@pytest.mark.slow
def test_traced_by_the_compiler_the_gradients_stay(flan, lora_kernels):
    """What torch.compile sees; a version of it once lost gradients on the way."""
    model, settings = make_model(flan)
    _, expected = expected_gradients(model, ROWS)
    fast = flan.FastT5(model, settings)
    for name in ("embed", "encoder_block", "decoder_block", "stack_output", "summed_loss"):
        setattr(fast, name, torch.compile(getattr(flan, name), backend="aot_eager", fullgraph=True))
    for rows in (ROWS[:2], ROWS):  # another size, without compiling again for each
        fast.flat.grad.zero_()
        fast.scale.fill_(1)
        fast.forward_backward(fast.pack(as_rows(rows)))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: part for p, part in zip(fast.adapter, fast.split(fast.flat.grad), strict=True)}
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_weights_give_the_gradients_of_their_values(flan, plain, model_folder, quantization):
    """Against a model whose plain weights are what bitsandbytes says that the quantised ones are. So every product is
    nearer to the unquantised one than that of bitsandbytes' INT8, which rounds activations as well."""
    quantised, settings = make_model(flan, 0.0, quantization, model_folder)
    plain_model, _ = make_model(flan, 0.0, None, model_folder)
    modules = dict(quantised.named_modules())
    for name, module in plain_model.named_modules():
        of = modules.get(name)
        if isinstance(of, flan.bitsandbytes.nn.Linear8bitLt):
            states = torch.randn(100, of.in_features, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                unquantised = module(states)
                module.weight.data = of.weight.data.float() * of.weight.SCB[:, None] / 127
                assert (module(states) - unquantised).norm() < 0.9 * (of(states) - unquantised).norm()
        elif isinstance(of, flan.bitsandbytes.nn.Linear4bit):
            module.weight.data = flan.bitsandbytes.functional.dequantize_4bit(of.weight.data, of.weight.quant_state)
    loss, expected = expected_gradients(plain_model, ROWS)
    before = expected_gradients(quantised, ROWS)[0]
    fast = flan.FastT5(quantised, settings)
    if quantization == "int4":  # an eighth of the weights' memory, which is not to be there twice
        scales = {w.scale.untyped_storage().data_ptr() for layer in (*fast.encoder, *fast.decoder) for w in layer
                  if isinstance(w, flan.Weight) and w.scale is not None}
        own = {p.quant_state.absmax.untyped_storage().data_ptr() for p in quantised.parameters() if hasattr(
            p, "quant_state")}
        assert own and own <= scales
    else:
        merged = {w.matrix.untyped_storage().data_ptr() for layer in (*fast.encoder, *fast.decoder) for w in layer
                  if isinstance(w, flan.Weight)}
        of_modules = [m for m in quantised.modules() if isinstance(m, flan.bitsandbytes.nn.Linear8bitLt)]
        own = {matrix.untyped_storage().data_ptr() for module in of_modules for matrix in (
            module.weight.data, module.weight.CB, module.state.CB) if matrix is not None}
        assert own and own <= merged
    found_loss, found = gradients(flan, quantised, settings, ROWS)
    torch.testing.assert_close(found_loss, loss, rtol=1e-4, atol=1e-3)
    assert_same_gradients(found, expected, 1e-3)
    torch.testing.assert_close(summed_loss(quantised, ROWS).detach(), before)  # bitsandbytes goes on, on shared weights


# ---------- Packing ---------------------------------------------------------------------------------------------------


def test_sizes_are_few_and_hardly_larger(flan):
    sizes = [flan.size_class(n) for n in range(1, 5000)]
    assert all(n <= size <= max(n + 63, n * 1.126) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 50


def test_the_whole_batch_is_brought_to_the_gpu(flan):
    """As accelerate's loader does it; the device "meta" stands for a GPU."""
    model, settings = make_model(flan)
    collate = flan.Collator(flan.AutoTokenizer.from_pretrained(flan.MODELS["tiny"]), model=model, pad_to_multiple_of=8)
    collate.pack = flan.FastT5(model, settings).pack
    batch = send_to_device(collate(as_rows(ROWS)), torch.device("meta"), non_blocking=True)
    tensors = [batch["input_ids"], batch["labels"], *batch["packed"].values()]
    assert len(tensors) == 7 and all(tensor.is_meta for tensor in tensors)


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (3, 8), (64, 64)])
def test_packed_rows_are_the_rows(flan, count, rows):
    rng = flan.np.random.default_rng(0)
    sources, targets = ([rng.integers(2, 99, rng.integers(1, most)).tolist() for _ in range(count)]
                        for most in (513, 129))
    batch = flan.pack(sources, targets, rows, (512, 128), 0)
    for name, lists, most in (("source", sources, 512), ("labels", targets, 128)):
        places = batch["source_rows" if name == "source" else "target_rows"].tolist()
        assert [batch[name][slice(*place)].tolist() for place in places[:count]] == lists
        assert places[0][0] == 0 and places[-1][1] == len(batch[name]) == flan.size_class(sum(map(len, lists)))
        assert all(a[1] == b[0] and 0 <= b[1] - b[0] <= most for a, b in itertools.pairwise(places))
        assert len(places) == rows + 1 + rows // 8
    starts = batch["target_rows"].tolist()
    assert [batch["target"][slice(*place)].tolist() for place in starts[:count]] == [[0, *t[:-1]] for t in targets]
    assert (batch["labels"][starts[count - 1][1] :] == -100).all()


# ---------- Optimiser -------------------------------------------------------------------------------------------------


def test_the_optimiser_is_adamw_and_its_state_goes_back_and_forth(flan, plain, tmp_path):
    """Three steps of the usual AdamW and three over one vector, with the state saved and loaded in between."""
    torch.manual_seed(0)
    models = [make_model(flan) for _ in range(2)]
    options = {"lr": 1e-2, "fused": True, **flan.ADAMW}
    trained = [[p for p in model.parameters() if p.requires_grad] for model, _ in models]
    usual, saved = torch.optim.AdamW(trained[0], **options), None
    noise = [[torch.randn_like(p) for p in trained[0]] for _ in range(6)]

    def new_fast(state):
        optimizer = flan.FlatAdamW(trained[1], **options)
        if state:
            optimizer.load_state_dict(state)
        fast = flan.FastT5(*models[1])
        optimizer.flatten(fast)
        return fast, optimizer

    fast, flat = new_fast(None)
    for step, gradients in enumerate(noise):
        places = {id(p): i for i, p in enumerate(trained[1])}
        for p, gradient in zip(trained[0], gradients, strict=True):
            p.grad = gradient
        for p, part in zip(fast.adapter, fast.split(fast.flat.grad), strict=True):
            part.copy_(gradients[places[id(p)]])
        usual.found_inf = flat.found_inf = torch.tensor(float(step == 4))  # which skips the step
        usual.step()
        flat.step()
        if step in (1, 3):  # as a checkpoint has it
            torch.save(flat.state_dict(), tmp_path / "optimizer.pt")
            saved = torch.load(tmp_path / "optimizer.pt")
            fast, flat = new_fast(saved)
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b)
    expected, found = usual.state_dict(), flat.state_dict()
    assert found["state"].keys() == expected["state"].keys()
    assert found["param_groups"][0]["params"] == expected["param_groups"][0]["params"]
    for i, state in expected["state"].items():
        for name, tensor in state.items():
            torch.testing.assert_close(found["state"][i][name], tensor)
    again = torch.optim.AdamW(trained[0], **options)  # who takes the usual step from there
    again.load_state_dict(found)
    again.step()
    assert {float(state["step"]) for state in again.state.values()} == {float(expected["state"][0]["step"]) + 1}


# ---------- Generation ------------------------------------------------------------------------------------------------


def by_transformers(model, sources, new_tokens):
    batch = padded([(source, [1]) for source in sources])
    output = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False,
                            max_new_tokens=new_tokens, num_beams=1, pad_token_id=0, eos_token_id=1)[:, 1:].tolist()
    return [row[: row.index(1) + 1] if 1 in row else row for row in output]


def sources_of(flan, count):
    rng = flan.np.random.default_rng(1)
    return [[*rng.integers(2, 190, rng.integers(1, 60)).tolist(), 1] for _ in range(count)]


def test_generated_tokens_are_those_of_transformers(flan, plain):
    model, settings = make_model(flan)
    model.eval()
    sources = sorted(sources_of(flan, 70), key=len, reverse=True)
    expected = by_transformers(model, sources, 20)
    assert len({len(row) for row in expected}) > 5  # they end here and there
    fast = flan.FastT5(model, settings)
    config = flan.GenerationConfig(max_new_tokens=20, num_beams=1)
    stop = flan.StopSignal()
    assert fast.generate(sources[:3], config, stop) is None  # too few to compile for
    assert fast.generate(sources[:40], flan.GenerationConfig(max_new_tokens=20, num_beams=3), stop) is None
    found = fast.generate(sources[:40], config, stop)
    assert min(fast.decoding.graphs) < fast.decoding.rows == 64  # it went on with fewer rows as others ended
    assert [*found, *fast.generate(sources[40:], config, stop)] == expected
    assert fast.is_proved["generation"] is True
    # After a step of training, which lets go of the memory of generation, the adapter is another; and a batch may be
    # longer than those before it.
    fast.training_step(fast.pack(as_rows(ROWS)), torch.tensor(10), True, True)
    assert fast.decoding is None
    fast.flat.data.add_(torch.randn_like(fast.flat), alpha=0.05)
    longer = [source[:-1] * 2 + [1] for source in sources[:40]]
    for some in (sources[30:70], longer):
        assert fast.generate(some, config, stop) == by_transformers(model, some, 20)


@needs_triton
def test_generation_with_the_kernels(flan):
    model, settings = make_model(flan)
    model.eval()
    sources = sources_of(flan, 3)
    expected = by_transformers(model, sources, 3)
    fast = flan.FastT5(model, settings)
    fast.refresh()
    decoding = flan.Decoding(fast, 3, flan.size_class(sum(map(len, sources))), 3)
    assert decoding(sources, flan.StopSignal()) == expected


@pytest.mark.parametrize("fault", ["all of them", "every third token"])
def test_wrong_summaries_are_noticed(flan, plain, monkeypatch, capsys, fault):
    model, settings = make_model(flan)
    model.eval()
    fast, right = flan.FastT5(model, settings), flan.Decoding.__call__

    def wrong(self, sources, stop):
        if fault == "all of them":
            return [[7, 8, 1] for _ in sources]
        return [[7 if i % 3 == 2 else token for i, token in enumerate(row)] for row in right(self, sources, stop)]

    monkeypatch.setattr(flan.Decoding, "__call__", wrong)
    sources, config = sources_of(flan, 40), flan.GenerationConfig(max_new_tokens=20, num_beams=1)
    assert fast.generate(sources, config, flan.StopSignal()) is None
    assert "plain generate() is used, not the fast one: its tokens" in capsys.readouterr().err
    assert fast.generate(sources, config, flan.StopSignal()) is None


def test_a_signal_ends_a_batch_within_eight_tokens(flan, plain, monkeypatch, capsys):
    """All rows are one batch, of a model that would go on for a thousand tokens; what is cut off is not compared."""
    model, settings = make_model(flan)
    model.eval()
    settings = dataclasses.replace(settings, max_new_tokens=1000)
    model.base_model.model.lm_head.weight.data[1] = 0  # the end token never has the largest logit
    summarizer = flan.Summarizer(model, None, settings, *flan.get_device(), flan.FastT5(model, settings))
    monkeypatch.setattr(summarizer, "tokenizer", collections.namedtuple("Tokenizer", "batch_decode")(
        lambda rows, **_: [str(row) for row in rows]))
    tokens, one_token = [], flan.Decoding.one_token

    def told(decoding, n):
        tokens.append(n)
        if len(tokens) == 5:
            summarizer.stop.receive(15, None)
        one_token(decoding, n)

    monkeypatch.setattr(flan.Decoding, "one_token", told)
    with pytest.raises(flan.Interrupted):
        summarizer(sources_of(flan, 40))
    assert len(tokens) == 8 and "plain generate()" not in capsys.readouterr().err
    assert summarizer.fast.is_proved["generation"] is False  # what was not compared proves nothing


# ---------- The compiler ----------------------------------------------------------------------------------------------


def test_what_the_compiled_blocks_keep_is_what_the_plan_counts(flan, monkeypatch):
    """Traced by Dynamo without a break (PyTorch 2.11 gave up the whole block for an index of type bool), and cut into
    forward and backward as for a GPU: every tensor that forward hands to autograd, but for the weights, in bytes. None
    of them is a mask of dropout. The kernels do not run."""
    config = flan.transformers.T5Config(
        vocab_size=512, d_model=96, num_heads=3, d_kv=32, d_ff=224, num_layers=2, num_decoder_layers=3,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
    settings = flan.parse_settings(["--model", "base"])
    model = flan.add_lora(flan.transformers.T5ForConditionalGeneration(config).to(torch.bfloat16), settings)
    monkeypatch.setattr(flan, "launch", lambda *_: None)
    monkeypatch.setattr(flan, "has_lora_kernels", lambda x, a, mask: True)
    monkeypatch.setattr(flan, "triton", types.SimpleNamespace(next_power_of_2=lambda n: n))  # it may be missing
    for name in ("lora_kernel", "lora_backward_kernel"):
        monkeypatch.setattr(flan, name, collections.defaultdict(lambda: lambda *_, **__: None))
    fast = flan.FastT5(model, settings)
    for name in ("embed", "encoder_block", "decoder_block", "stack_output", "summed_loss"):
        torch._dynamo.reset()
        setattr(fast, name, torch.compile(getattr(flan, name), backend="aot_eager_decomp_partition", fullgraph=True))
    matrices = [t for layer in (*fast.encoder, *fast.decoder) for w in layer if isinstance(w, flan.Weight) for t in w]
    weights = {t.untyped_storage().data_ptr() for t in [*matrices, *model.parameters(), fast.working] if t is not None}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address is used twice
        return tensor

    masks = flan.make_masks(fast.thresholds, fast.thresholds)
    fast.refresh()
    for source, target in ((32, 8), (24, 40)):
        kept, batch = {}, fast.pack([{"input_ids": [5] * source, "labels": [6] * target}] * 8)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = fast.loss(batch, masks)
        assert len(kept) > 50 and not [t.shape for _, t in kept.values() if t.dtype == torch.bool]
        predicted = flan.fast_activation_bytes(config, 16, len(batch["source"]), len(batch["target"]))
        predicted -= 6 * 512 * len(batch["target"])  # of the loss only the logits are kept; the rest is backward's
        assert predicted == pytest.approx(sum(size for size, _ in kept.values()), rel=0.01)
        assert all(gradient is not None for gradient in torch.autograd.grad(loss, fast.leaves))


# ---------- A training ------------------------------------------------------------------------------------------------


FLAGS = ("--lr", "1e-2", "--batch-size", "4", "--micro-batch-size", "2", "--max-new-tokens", "8", "--epochs", "2")


@pytest.fixture
def on_the_cpu(flan, plain, monkeypatch):
    """The fast path without a GPU."""
    monkeypatch.setattr(flan, "why_not_here", lambda *_: None)
    monkeypatch.setattr(flan, "why_not_fast", lambda model, settings, *_: "off" if settings.fast is False else None)


def losses(flan, folder):
    return [(e["step"], e["loss"], e["grad_norm"]) for e in flan.read_metrics(folder)["curve"]]


def test_a_training_without_dropout_equals_the_usual_one(flan, command, data, model_folder, tmp_path, on_the_cpu):
    for name, flags in (("fast", ()), ("usual", ("--no-fast",))):
        done = command("--model", no_dropout(model_folder, tmp_path), "--dataset", data, *FLAGS, "--lora-dropout", 0,
                       "--output-dir", tmp_path / name, *flags, cwd=tmp_path)
        assert done.code == 0, done
        assert "is not used" not in done.out
        assert flan.read_metrics(tmp_path / name)["fast_step"] is (name == "fast")
    for found, expected in zip(*(losses(flan, tmp_path / name) for name in ("fast", "usual")), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    files = [{str(p.relative_to(tmp_path / name)) for p in (tmp_path / name).rglob("*") if "tfevents" not in p.name}
             for name in ("fast", "usual")]
    assert files[0] == files[1]
    last = [tmp_path / name / "checkpoints" / "step-00000012" for name in ("fast", "usual")]
    weights = [flan.load_file(folder / "weights.safetensors") for folder in last]
    moments = [torch.load(folder / "optimizer.pt") for folder in last]
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, rtol=1e-2, atol=1e-3)
    assert moments[0]["state"].keys() == moments[1]["state"].keys()
    assert moments[0]["param_groups"] == moments[1]["param_groups"]


def no_dropout(model_folder, tmp_path):
    folder = tmp_path / model_folder.name
    if not folder.exists():
        shutil.copytree(model_folder, folder)
        config = json.loads((folder / "config.json").read_text()) | {"dropout_rate": 0.0}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_resumed_training_equals_an_uninterrupted_one(flan, command, data, model_folder, tmp_path, on_the_cpu):
    words = ("--model", model_folder, "--dataset", data, *FLAGS)
    assert command(*words, "--output-dir", tmp_path / "whole", cwd=tmp_path).code == 0
    with stopped_after(flan, 4):
        assert command(*words, "--output-dir", tmp_path / "halves", cwd=tmp_path).code == 128 + 15
    assert command("--resume", "--output-dir", tmp_path / "halves", cwd=tmp_path).code == 0
    assert_same_end(flan, tmp_path / "whole", tmp_path / "halves", 12)


def test_a_resumed_training_may_take_the_other_path(flan, command, data, model_folder, tmp_path, on_the_cpu):
    words = ("--model", no_dropout(model_folder, tmp_path), "--dataset", data, *FLAGS, "--lora-dropout", 0)
    assert command(*words, "--no-fast", "--output-dir", tmp_path / "usual", cwd=tmp_path).code == 0
    for first, second in (("--fast", "--no-fast"), ("--no-fast", "--fast")):
        run = tmp_path / second
        with stopped_after(flan, 4):
            assert command(*words, first, "--output-dir", run, cwd=tmp_path).code == 128 + 15
        done = command("--resume", "--output-dir", run, second, cwd=tmp_path)
        assert done.code == 0 and flan.read_metrics(run)["fast_step"] is (second == "--fast"), done
        for found, expected in zip(losses(flan, run), losses(flan, tmp_path / "usual"), strict=True):
            assert found == pytest.approx(expected, rel=1e-3)


@contextlib.contextmanager
def stopped_after(flan, step):
    """A SIGTERM comes in that step of a training."""
    usual = flan.Run.on_step_end

    def on_step_end(self, args, state, control, **more):
        if state.global_step == step:
            self.stop.receive(signal.SIGTERM, None)
        return usual(self, args, state, control, **more)

    flan.Run.on_step_end = on_step_end
    try:
        yield
    finally:
        flan.Run.on_step_end = usual


def assert_same_end(flan, *runs_and_step):
    """Weights and moments of two runs are the same bits."""
    *runs, step = runs_and_step
    last = [run / "checkpoints" / f"step-{step:08d}" for run in runs]
    a, b = (flan.load_file(folder / "weights.safetensors") for folder in last)
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    a, b = (torch.load(folder / "optimizer.pt")["state"] for folder in last)
    assert all(torch.equal(tensor, b[i][name]) for i, state in a.items() for name, tensor in state.items())


@pytest.mark.parametrize("flag", ["--int8", "--int4"])
def test_quantised_weights_pass_the_comparison(command, data, model_folder, tmp_path, on_the_cpu, flag):
    done = command("--model", model_folder, "--dataset", data, *FLAGS, flag, "--max-steps", 2, "--output-dir",
                   tmp_path / "run", cwd=tmp_path)
    assert done.code == 0
    assert "is not used" not in done.out


def test_the_tiny_model_passes_the_comparison_in_bf16(flan, command, tmp_path, on_the_cpu, monkeypatch):
    """Its attention is so sharp that rounding alone changes gradients by more than their norm."""
    monkeypatch.setattr(flan, "get_device", lambda: (torch.device("cpu"), torch.bfloat16))
    done = command("--limit", 4, "--batch-size", 2, "--max-steps", 2, "--max-new-tokens", 2, "--fast", "--output-dir",
                   tmp_path / "run", cwd=tmp_path)
    assert done.code == 0 and "is not used" not in done.out and flan.read_metrics(tmp_path / "run")["fast_step"], done


def test_a_calmed_model_is_itself_again(flan):
    model, settings = make_model(flan)
    fast, before = flan.FastT5(model, settings), {name: p.clone() for name, p in model.named_parameters()}
    with flan.calmed(fast):
        changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) == 3 * 2 + 3 * 3 and all("layer_norm" in name and "final" not in name for name in changed)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("flags", [("--fast",), ("--no-fast",), ()])
def test_evaluate_takes_the_path_of_the_run(flan, command, data, model_folder, tmp_path, on_the_cpu, monkeypatch,
                                            flags):
    """Which the length of the training may have chosen. Batches of a few rows are large enough here to be fast."""
    generate = flan.FastT5.generate
    paths = []

    def noted(fast, sources, *rest):
        output = generate(fast, sources * 8, *rest)
        paths.append(output is not None)
        return output and output[: len(sources)]

    monkeypatch.setattr(flan.FastT5, "generate", noted)
    short = lambda model, settings, steps=None: "off" if settings.fast is False or (
        settings.fast is None and steps is not None) else None
    monkeypatch.setattr(flan, "why_not_fast", short)
    done = command("--model", model_folder, "--dataset", data, *FLAGS, "--max-steps", 2, *flags, "--output-dir", "run",
                   cwd=tmp_path)
    is_fast = flags == ("--fast",)
    (best,) = [entry for entry in flan.read_metrics(tmp_path / "run")["epochs"] if entry["best"]]
    assert done.code == 0 and best["fast"] is is_fast and bool(paths) is is_fast and all(paths), done
    for words, expected in (((), is_fast), (("--fast",), True), (("--no-fast",), False)):
        paths.clear()
        done = command("--evaluate", "--adapter", "run", *words, cwd=tmp_path)
        assert done.code == 0 and bool(paths) is expected, (words, done)


def test_a_range_test_can_be_fast(command, data, model_folder, tmp_path, on_the_cpu):
    done = command("--model", model_folder, "--dataset", data, *FLAGS, "--lr-find", cwd=tmp_path)
    assert done.code == 0 and "is not used" not in done.out, done


@pytest.mark.parametrize("fault", ["gradients", "gradients of q and k", "loss", "error"])
def test_a_step_that_is_wrong_is_not_used(flan, command, data, model_folder, tmp_path, on_the_cpu, monkeypatch, fault):
    """Self-attention of one stack loses its gradient, as a compiler once lost it, or a part; or an error comes."""
    if fault == "loss":
        forward_backward = flan.FastT5.forward_backward
        monkeypatch.setattr(flan.FastT5, "forward_backward", lambda *args: 1.1 * forward_backward(*args))
    elif fault != "error":
        right, part = reference_attention, {"gradients": 3, "gradients of q and k": 2}[fault]

        def lost(q, kv, *rest):
            end = q.shape[1] // 3 * part
            q = torch.cat((q[:, :end].detach() + 0 * q[:, :end], q[:, end:]), 1) if kv is None and rest[-1] else q
            return right(q, kv, *rest)

        monkeypatch.setattr(PlainAttention, "apply", staticmethod(lost))
    else:
        monkeypatch.setattr(flan, "gated_gelu", lambda both: 1 / 0)
    command("--model", model_folder, "--dataset", data, *FLAGS, "--no-fast", "--output-dir", tmp_path / "usual",
            "--max-steps", 3, cwd=tmp_path)
    packed, pack = [], flan.FastT5.pack
    monkeypatch.setattr(flan.FastT5, "pack", lambda self, rows: packed.append(len(rows)) or pack(self, rows))
    done = command("--model", model_folder, "--dataset", data, *FLAGS, "--output-dir", tmp_path / "fast",
                   "--max-steps", 3, cwd=tmp_path)
    assert done.code == 0 and len(packed) <= 4  # the first batch, the one behind it, and the comparison's
    assert "the fast step is not used: " + ("ZeroDivisionError" if fault == "error" else "it differs") in done.out
    assert losses(flan, tmp_path / "fast") == losses(flan, tmp_path / "usual")


@pytest.mark.parametrize(("flags", "reason"), [
    (("--no-fast",), "--no-fast"), (("--lora-targets", "q", "v"), "q, k, v and o"), (("--full",), "q, k, v and o"),
])
def test_why_it_does_not_apply(flan, flags, reason):
    settings = flan.parse_settings([*flags, "--model", "base"])
    model = flan.without_weights(flan.geometry(settings))
    model = model if settings.full else flan.add_lora(model, settings)
    assert reason in flan.why_not_fast(model, settings)


def test_it_does_not_apply_to_other_models_and_adapters(flan, monkeypatch):
    config = flan.geometry(flan.parse_settings(["--model", "base"]))
    relu = flan.transformers.T5Config(**config.to_dict() | {"feed_forward_proj": "relu"})
    settings = flan.parse_settings([])
    assert "Flan-T5's kind" in flan.why_not_fast(flan.add_lora(flan.without_weights(relu), settings), settings)
    model = flan.add_lora(flan.without_weights(config), settings)
    assert flan.why_not_fast(model, settings) is None
    for change in ({"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"q": 8}}, {"alpha_pattern": {"q": 8}}):
        other = flan.add_lora(flan.without_weights(config), settings)
        vars(other.peft_config["default"]).update(change)
        assert "q, k, v and o" in flan.why_not_fast(other, settings), change
    tied = flan.transformers.T5Config(**config.to_dict() | {"scale_decoder_outputs": True})
    assert "Flan-T5's kind" in flan.why_not_fast(flan.add_lora(flan.without_weights(tied), settings), settings)
    monkeypatch.setattr(flan, "is_sharded", lambda: True)
    assert "sharded" in flan.why_not_fast(model, settings)


def begin(flan, model, settings):
    """What a training does before its first step, for one that is not there; the FastT5, or None if it is not used."""
    optimizer = types.SimpleNamespace(optimizer=types.SimpleNamespace(flatten=lambda fast: None))
    trainer = types.SimpleNamespace(fast=flan.FastT5(model, settings), settings=settings, optimizer=optimizer,
                                    data_collator=types.SimpleNamespace(), run=types.SimpleNamespace(description={}))
    flan.begin_fast(trainer)
    assert trainer.fast is None or trainer.data_collator.is_padding is False  # which nobody would read
    return trainer.fast


@pytest.mark.parametrize(("is_int8", "lost"), [(False, 0.5), (True, 0.7)])
def test_half_a_gradient_is_noticed(flan, plain, monkeypatch, capsys, is_int8, lost):
    """Of the decoder's attention to the dialogue, in float32."""
    model, settings = make_model(flan)

    def scaled(q, kv, *rest):
        return reference_attention(q if kv is None else lost * q.detach() + (1 - lost) * q, kv, *rest)

    settings = dataclasses.replace(settings, int8=is_int8)
    assert begin(flan, model, settings) is not None
    monkeypatch.setattr(PlainAttention, "apply", staticmethod(scaled))
    assert begin(flan, model, settings) is None
    assert "loss by 0.00%, gradients by up to" in capsys.readouterr().out


def test_where_one_process_finds_a_difference_all_take_the_usual_step(flan, plain, monkeypatch, capsys):
    model, settings = make_model(flan)
    monkeypatch.setattr(flan, "agree", lambda device, differs: [differs or True])
    assert begin(flan, model, settings) is None
    assert "it differs in another process" in capsys.readouterr().out


def test_a_fault_behind_the_first_64_tokens_is_noticed(flan, plain, monkeypatch, capsys):
    """As much as attention reads at once."""
    model, settings = make_model(flan)
    settings = dataclasses.replace(settings, max_source_length=128, max_target_length=128)

    def lost(q, kv, bias, mask, q_rows, *rest):
        out = reference_attention(q, kv, bias, mask, q_rows, *rest)
        places = torch.cat([torch.arange(end - start) for start, end in q_rows.tolist()])
        return out * torch.nn.functional.pad((places < 64).float(), (0, len(out) - len(places)))[:, None]

    monkeypatch.setattr(PlainAttention, "apply", staticmethod(lost))
    assert begin(flan, model, settings) is None
    assert "the fast step is not used: it differs" in capsys.readouterr().out


def test_out_of_memory_is_not_taken_for_a_fault_of_the_fast_path(flan, plain, monkeypatch):
    """The batch is halved then, or the run ends with advice; later ones are as fast as ever."""
    model, settings = make_model(flan)

    def no_room(*_):
        raise torch.OutOfMemoryError

    fast, config = flan.FastT5(model.eval(), settings), flan.GenerationConfig(max_new_tokens=4, num_beams=1)
    with monkeypatch.context() as patch:
        patch.setattr(flan.Decoding, "__call__", no_room)
        with pytest.raises(torch.OutOfMemoryError):
            fast.generate(sources_of(flan, 40), config, flan.StopSignal())
    assert fast.decoding is None and fast.generate(sources_of(flan, 40), config, flan.StopSignal())
    monkeypatch.setattr(flan.FastT5, "by_graph", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        begin(flan, model, settings)


def test_where_it_does_not_run(flan, monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(flan, "triton", "here")
    assert "CUDA" in flan.why_not_here(cpu, torch.bfloat16) and "bf16" in flan.why_not_here(gpu, torch.float32)
    assert flan.why_not_here(gpu, torch.bfloat16) is None
    monkeypatch.setattr(flan, "triton", None)
    assert "Triton" in flan.why_not_here(gpu, torch.bfloat16)


def test_who_insists_is_told_why_not(flan, capsys):
    for flags, is_told in (([], False), (["--fast"], True)):
        assert flan.make_fast(make_model(flan)[0], flan.parse_settings(flags)) is None
        assert ("it is made for CUDA GPUs" in capsys.readouterr().err) is is_told


def test_a_short_training_is_not_compiled(flan):
    """A usual step takes about 10 ms for each layer, compiling 40 s or more."""
    model = make_model(flan)[0]  # of six layers
    cases = ([], 999, True), ([], 1000, False), (["--fast"], 9, False), ([], None, False)
    for flags, micro_steps, is_refused in cases:
        reason = flan.why_not_fast(model, flan.parse_settings(flags), micro_steps)
        assert ("so short" in (reason or "")) is is_refused, (flags, micro_steps, reason)
    for name, module in list(model.named_modules()):  # an adapter on the decoder alone
        if name.endswith("SelfAttention") and "encoder" in name:
            module.q = module.q.base_layer
    assert "q, k, v and o" in flan.why_not_fast(model, flan.parse_settings([]))
