"""flan-t5_samsum.py: --plan, --lr-find, --plot and --compare."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
from types import SimpleNamespace

import fake_hub
import numpy as np
import pytest
from conftest import RECIPE, ROWS, write_jsonl

# ----------------------------------------------------------------------------------------------------------------------
# --plan
# ----------------------------------------------------------------------------------------------------------------------

# Parameters of google/flan-t5-*, as their model cards and Chung et al. 2022 round them: 80M, 250M, 780M, 3B, 11B.
PUBLISHED = {"small": 80e6, "base": 250e6, "large": 780e6, "xl": 3e9, "xxl": 11e9}


def numbers(text):
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", text)]


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_geometry_of_the_presets_needs_no_network(flan, command, tmp_path, size):
    done = command("--model", size, "--plan", cwd=tmp_path)
    assert done.code == 0 and not list(tmp_path.iterdir()), done
    model = flan.without_weights(flan.geometry(flan.parse_settings(["--model", size])))
    assert all(p.is_meta for p in model.parameters())
    assert model.num_parameters() == pytest.approx(PUBLISHED[size], rel=0.06)
    assert f"{model.num_parameters():,} parameters" in done.out
    assert "not counted" in done.out and "Hub" in done.out  # the data, and why


def test_the_small_preset_is_the_published_configuration(flan):
    """Its geometry makes the same shapes as the config.json of flan-t5-small, whose sizes stand in T5 1.1's paper."""
    published = fake_hub.FLAN_T5_CONFIG | {"d_ff": 1024, "d_kv": 64, "d_model": 512, "num_decoder_layers": 8,
                                           "num_heads": 6, "num_layers": 8, "vocab_size": 32128}  # fmt: skip
    with flan.torch.device("meta"):
        expected = flan.transformers.T5ForConditionalGeneration(flan.transformers.T5Config(**published))
    found = flan.without_weights(flan.geometry(flan.parse_settings(["--model", "small"])))
    shapes = [{name: p.shape for name, p in model.state_dict().items()} for model in (expected, found)]
    assert shapes[0] == shapes[1]
    # The head is a matrix of its own: 512 x 32128 more than transformers' own count of an unloaded model.
    assert found.num_parameters() == expected.num_parameters() + 512 * 32128


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_weights_are_what_loading_really_takes(flan, model_folder, precision):
    """All bytes of the loaded model: its parameters, INT8's scales per row, NF4's scales per 64 weights."""
    torch = flan.torch
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    quantization = precision if precision in ("int8", "int4") else None
    model = flan.load_base(model_folder, torch.device("cpu"), dtype, quantization)
    expected = sum(p.nbytes for p in model.parameters())
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if precision == "int8" and hasattr(weight, "SCB"):
            expected += weight.SCB.nbytes
        if precision == "int4" and hasattr(weight, "quant_state"):
            expected += weight.quant_state.absmax.nbytes
    config = flan.load_tokenizer_and_config(model_folder)[1]
    assert flan.weight_bytes(flan.without_weights(config), precision) == expected


# As PEFT and transformers load them, measured once with real sizes on the meta device and with bitsandbytes:
# bf16 and INT8 of base, XL and XXL in GiB.
@pytest.mark.parametrize("size, bf16, int8", [("base", 0.46, 0.31), ("xl", 5.31, 3.25), ("xxl", 20.7, 12.5)])
def test_weights_of_the_real_sizes(flan, size, bf16, int8):
    model = flan.without_weights(flan.geometry(flan.parse_settings(["--model", size])))
    found = [flan.weight_bytes(model, precision) / 2**30 for precision in ("bf16", "int8")]
    assert found == pytest.approx([bf16, int8], abs=0.006 * bf16 + 0.005)


class KeptByTheFusedKernel:
    """What CUDA's attention and dropout kernels keep for backward, in place of the CPU's, which keep more."""

    def __init__(self, torch):
        class Attention(torch.autograd.Function):
            @staticmethod
            def forward(ctx, q, k, v, mask):
                out, log_sum_exp = torch.zeros_like(q), torch.zeros(q.shape[:3], dtype=torch.float32)
                ctx.save_for_backward(q, k, v, mask, out, log_sum_exp)
                return out.transpose(1, 2).contiguous().transpose(1, 2)

        class Dropout(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(torch.ones(x.shape, dtype=torch.bool))
                return x.clone()

        self.attention = lambda q, k, v, attn_mask=None, **rest: Attention.apply(q, k, v, attn_mask)
        self.dropout = lambda x, p=0.5, training=True, inplace=False: Dropout.apply(x) if training and p else x


@pytest.mark.parametrize("geometry", [(96, 3, 32, 224, 2, 2), (128, 4, 64, 320, 3, 2), (64, 8, 16, 96, 2, 3)])
@pytest.mark.parametrize("batch, source, target", [(2, 96, 32), (3, 40, 72), (2, 256, 64)])
@pytest.mark.parametrize("checkpointing, feed_forward", [(False, "gated-gelu"), (True, "gated-gelu"), (False, "relu")])
def test_activations_are_what_autograd_keeps(
    flan, monkeypatch, geometry, batch, source, target, checkpointing, feed_forward
):
    """Every tensor that a real forward pass of transformers and PEFT under bf16 autocast hands to autograd, in bytes.

    With checkpointing, what the layers keep while they are computed for the first time is not handed on.

    Where CUDA differs from a CPU its behaviour is put in place: fused attention, boolean dropout masks, pow in fp32.
    """
    torch, functional = flan.torch, flan.torch.nn.functional
    width, heads, d_kv, d_ff, layers, decoder_layers = geometry
    config = flan.transformers.T5Config(
        vocab_size=512, d_model=width, num_heads=heads, d_kv=d_kv, d_ff=d_ff, num_layers=layers,
        num_decoder_layers=decoder_layers, feed_forward_proj=feed_forward, tie_word_embeddings=False,
        decoder_start_token_id=0)  # fmt: skip
    kept = KeptByTheFusedKernel(torch)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", kept.attention)
    monkeypatch.setattr(functional, "dropout", kept.dropout)
    gelu = flan.transformers.activations.NewGELUActivation
    cube = lambda x: torch.pow(x.float(), 3.0)
    root = (2 / np.pi) ** 0.5
    monkeypatch.setattr(gelu, "forward", lambda self, x: 0.5 * x * (1 + torch.tanh(root * (x + 0.044715 * cube(x)))))
    model = flan.transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    args = flan.parse_settings(["--model", "base"])
    model = flan.add_lora(model.to(torch.bfloat16), args).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    tokens = torch.randint(3, 500, (batch, source + target))
    mask = torch.ones(batch, source, dtype=torch.long)
    mask[0, -1] = 0
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=tokens[:, :source], attention_mask=mask, decoder_input_ids=tokens[:, source:],
                       use_cache=False)  # fmt: skip
        flan.token_mean_loss(output, tokens[:, source:], batch * target)
    found = sum(size for size, _ in storages.values())
    copies = 2 * sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)  # autocast's, of the adapter
    if checkpointing:
        # Outside the layers, and little where there are many: after them a norm (6 bytes a number) and two dropout
        # masks, the encoder's output (2 bytes), the boolean masks of attention, and the softmax of the loss.
        found -= batch * (source + target) * width * 8 + batch * source * width * 2
        found -= batch * source * (source + target) + batch * target * 512 * 4
        # With so large a vocabulary the loss, 14 bytes a logit, is what the plan adds to the layers' inputs and biases.
        config.vocab_size = 10**6
        predicted = flan.activation_bytes(config, args.lora_r, batch, source, target, checkpointing=True)
        assert predicted - 14 * batch * target * 10**6 == pytest.approx(found, rel=0.03)
        return
    # Of the loss only its softmax (4 bytes a logit) is kept; the plan also counts logits and gradients, 14 in all.
    predicted = flan.activation_bytes(config, args.lora_r, batch, source, target) - 10 * batch * target * 512
    assert predicted == pytest.approx(found - copies, rel=0.02 if feed_forward == "gated-gelu" else 0.03)


def test_the_plan_counts_the_data(command, data, model_folder, tmp_path, flan):
    """Rows, tokens, truncated share, steps and the longest batch, counted once more by hand."""
    tokenizer = flan.load_tokenizer_and_config(model_folder)[0]
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text("utf-8").splitlines()]
    sources = tokenizer(["summarize: " + row["dialogue"].replace("\r\n", "\n") for row in rows]).input_ids
    targets = tokenizer([row["summary"] for row in rows]).input_ids
    limit = int(np.median([len(ids) for ids in sources]))
    done = command("--model", model_folder, "--dataset", data, "--plan", "--epochs", "3", "--batch-size", "5",
                   "--max-source-length", limit, cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done
    lines = done.out.splitlines()
    (line,) = [line for line in lines if line.startswith("data:")]
    tokens = sum(min(len(ids), limit) for ids in sources) + sum(map(len, targets))
    share = 100 * np.mean([len(ids) > limit for ids in sources])
    assert numbers(line) == [ROWS["train"], tokens, pytest.approx(share, abs=0.05), limit]
    (line,) = [line for line in lines if line.startswith("steps:")]
    assert numbers(line)[:2] == [15, 5]  # 24 rows are 5 batches of 5; three epochs of them
    longest = 5 * 64 * -(-limit // 64), 5 * 64 * -(-max(map(len, targets)) // 64)
    assert f"5 rows, {longest[0]:,} + {longest[1]:,} tokens" in done.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("kind", "total", "changes"), [
    ("t5", 60_506_624, {"d_ff": 2048, "num_layers": 6, "num_heads": 8, "feed_forward_proj": "relu",
                        "is_gated_act": False, "dense_act_fn": "relu"}),  # its head is the embedding
    ("mt5", 300_176_768, {"d_ff": 1024, "num_layers": 8, "num_heads": 6, "vocab_size": 250_112}),
])  # fmt: skip
def test_the_plan_of_t5_small_and_of_mt5_small(command, data, model_folder, tmp_path, kind, total, changes):
    """From their config.json: as many numbers as the published weights have."""
    model = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": 32_128, "feed_forward_proj": "gated-gelu"}
    config |= {"model_type": kind, "d_model": 512, "d_kv": 64, "tie_word_embeddings": kind == "t5"} | changes
    config["num_decoder_layers"] = config["num_layers"]
    (model / "config.json").write_text(json.dumps(config))
    done = command("--model", model, "--dataset", data, "--plan", cwd=tmp_path)
    assert done.code == 0 and f"model: {total:,} parameters" in done.out, done
    assert f"weights: fp32 {4 * total / 2**30:.2f} GiB, bf16 {2 * total / 2**30:.2f} GiB" in done.out
    assert re.search(r"\|\s+8 \|\s+no \|\s+[\d.]+", done.out)


def test_the_plan_says_what_it_does_not_know(command, data, model_folder, tmp_path):
    model = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"feed_forward_proj": "gated-silu"}
    (model / "config.json").write_text(json.dumps(config))
    done = command("--model", model, "--dataset", data, "--plan", cwd=tmp_path)
    assert done.code == 0 and "not known for gated-silu" in done.out and "peak memory in GiB" not in done.out, done


def test_a_trained_number_costs_16_bytes(flan):
    """Itself, its gradient and AdamW's two moments, in fp32: the difference between two plans."""
    settings = flan.parse_settings(["--model", "small"])
    config = flan.geometry(settings)
    weights = dict.fromkeys(flan.PRECISION_NAMES, 0)
    few, many = (flan.plan_memory(settings, config, weights, n, [64] * 8, [64] * 8, False)[0][2]["bf16"]
                 for n in (0, 10**9))
    assert (many - few) * 2**30 == pytest.approx(16e9)
    few, many = (flan.fast_bytes(config, 16, "bf16", 0, n, 4096, 1024, False) for n in (0, 10**6))
    assert many - few == 18e6  # compiled, it is there in bf16 too


# Peaks of training on an H200 (PyTorch 2.11, 2026-11-29), by tests/benchmark_flan_t5.py, with the tokens of its longest
# micro-batch. That of XXL in INT8 is of the day before, that of XXL in NF4 of the day after.
@pytest.mark.parametrize(("size", "precision", "checkpointing", "source", "target", "measured"), [
    ("base", "bf16", False, 3840, 448, 1.80), ("xl", "bf16", False, 3584, 384, 10.80),
    ("xl", "bf16", False, 18432, 2816, 33.71), ("xl", "int8", False, 3328, 384, 8.43),
    ("xl", "int4", False, 3328, 384, 7.56), ("xxl", "int8", True, 320, 128, 13.70),
    ("xxl", "int4", True, 1536, 320, 10.43)])
def test_the_plan_of_the_compiled_step_is_what_a_gpu_took(
    flan, size, precision, checkpointing, source, target, measured
):
    """Or up to 4% more."""
    flags = [] if precision == "bf16" else [f"--{precision}"]
    settings = flan.parse_settings(["--model", size, *flags])
    config = flan.geometry(settings)
    model = flan.without_weights(config)
    weights = flan.weight_bytes(model, precision)
    trained = flan.add_lora(model, settings).get_nb_trainable_parameters()[0]
    step = weights + 18 * trained + flan.fast_extra_bytes(config, 16, precision)
    step += flan.fast_activation_bytes(config, 16, source, target, checkpointing)
    assert 0.99 * measured < step / 2**30 < 1.04 * measured


def test_what_the_plan_of_the_compiled_step_counts(flan):
    """The longest rows of a micro-batch, in whole size classes; or what comes before the first step: q, k and v of all
    layers as one tensor beside themselves, or the comparison with the usual step."""
    sources, targets = [400, 300, 200, 100, 60, 50, 40, 30], [90, 80, 9, 8, 7, 6, 5, 4]
    assert flan.longest_batch(sources, targets, 2, True) == (704, 192)  # 700 and 170
    assert flan.longest_batch(sources, targets, 8, True) == (1280, 256)  # 1180 and 209
    assert flan.longest_batch(sources, targets, 2, False) == (2 * 448, 2 * 128)
    settings = flan.parse_settings(["--model", "xxl"])
    config = flan.geometry(settings)
    inner = width = 4096
    count = lambda precision, *rest: flan.fast_bytes(config, 16, precision, 10**9, 10**6, *rest)
    activations = flan.fast_activation_bytes(config, 16, 4096, 1024)
    extra = flan.fast_extra_bytes(config, 16, "bf16")
    assert count("bf16", 4096, 1024, False) == 10**9 + 18 * 10**6 + extra + activations
    few = count("bf16", 64, 64, True)
    assert few == 10**9 + 10 * 10**6 + 2 * 24 * 3 * inner * width
    extra = flan.fast_extra_bytes(config, 16, "int8")
    usual = flan.activation_bytes(config, 16, 1, 16, 80)  # more than 80 and 16
    assert count("int8", 64, 64, True) == 10**9 + 26 * 10**6 + extra + usual
    # With checkpointing an input for each layer, and one layer at a time.
    long, short = (flan.fast_activation_bytes(config, 16, *tokens, True) for tokens in ((4096, 1024), (64, 64)))
    inputs = 2 * width * 24 * (4032 + 960)
    assert inputs < long - short < 0.1 * activations + inputs


def test_the_plan_is_that_of_the_step_that_will_run(command, data, model_folder, tmp_path, monkeypatch, flan):
    """Compiled, but for --no-fast, cards without bf16, and trainings too short for it."""
    cases = [(("--model", "xl"), True), (("--model", "xl", "--no-fast"), False),
             (("--model", model_folder, "--dataset", data), False)]
    peaks = {}
    for flags, is_fast in cases:
        done = command(*flags, "--plan", cwd=tmp_path)
        assert ("with the fast step" in done.out) is is_fast, done
        assert ("--no-fast" in done.out) is (is_fast or "--no-fast" in flags)
        peaks[flags] = float(re.search(r"\|\s+8 \|\s+no \|\s+([\d.]+)", done.out)[1])
    assert peaks[cases[0][0]] < 0.65 * peaks[cases[1][0]]
    monkeypatch.setattr(flan.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flan, "get_device", lambda: (flan.torch.device("cpu"), flan.torch.float32))  # a T4, say
    properties = SimpleNamespace(total_memory=15 * 2**30)
    monkeypatch.setattr(flan.torch.cuda, "get_device_properties", lambda _: properties)
    in_one_line = lambda: " ".join(command("--model", "xl", "--plan", cwd=tmp_path).out.split())
    assert "usual step (it is made for CUDA GPUs with bf16)" in in_one_line()
    monkeypatch.setattr(flan, "get_device", lambda: (flan.torch.device("cuda"), flan.torch.bfloat16))
    monkeypatch.setattr(flan, "triton", None)
    monkeypatch.setattr(flan, "device_name", lambda _: "a GPU")
    assert "usual step (Triton is not installed)" in in_one_line()


def test_the_plan_advises_what_the_table_says(command, tmp_path, monkeypatch, flan):
    """Each advice is the row of the table with these flags, and fits; INT8 is advised against only where useless."""
    monkeypatch.setattr(flan.torch.cuda, "is_available", lambda: False)
    for size in ("base", "xl", "xxl"):
        done = command("--model", size, "--plan", "--batch-size", "16", cwd=tmp_path)
        table = {}
        for line in done.out.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) == 5 and cells[0].isdigit():
                sizes = zip(("bf16", "int8", "int4"), map(float, cells[2:]), strict=True)
                table[int(cells[0]), cells[1] == "yes"] = dict(sizes)
        assert len(table) == 10, done
        fits = {}
        for memory, flags in re.findall(r"on a GPU of (\d+) GiB: (.*)", done.out):
            memory, free = int(memory), int(memory) - flan.GPU_RESERVE
            if flags == "does not fit":
                assert all(need > free for row in table.values() for need in row.values())
                continue
            precision = next((name for name in ("int8", "int4") if f"--{name}" in flags), "bf16")
            micro_batch = int(re.search(r"--micro-batch-size (\d+)|$", flags)[1] or 16)
            assert table[micro_batch, "--gradient-checkpointing" in flags][precision] <= free + 0.01
            if "--gradient-checkpointing" in flags:  # it costs time: only where no micro-batch fits without
                assert all(table[size, False][precision] > free - 0.01 for size in (1, 2, 4, 8, 16))
            for better in {"int8": ["bf16"], "int4": ["bf16", "int8"]}.get(precision, []):
                assert all(row[better] > free - 0.01 for row in table.values())
            fits[memory] = precision
        assert ("INT8 does not help" in done.out) == ("int8" not in fits.values()), (size, done.out)


def test_the_advice_is_about_the_flags_that_were_given(flan):
    rows = [(8, False, {"bf16": 30, "int8": 20, "int4": 9}), (8, True, {"bf16": 12, "int8": 9, "int4": 5})]
    lines = lambda words: flan.where_it_fits(rows, flan.parse_settings(list(words)))
    advised = lambda *words: dict(line.split(": ") for line in lines(words) if line.startswith("on "))
    assert advised()["on a GPU of 16 GiB"] == "--gradient-checkpointing"
    assert advised("--int4")["on a GPU of 12 GiB"] == "fits as it is"
    assert advised("--int8")["on a GPU of 8 GiB"] == "does not fit"
    assert advised("--gradient-checkpointing")["on a GPU of 16 GiB"] == "fits as it is"
    assert advised("--int4", "--gradient-checkpointing") == {"on a GPU of 8 GiB": "fits as it is"}


@pytest.mark.parametrize("memory", [2, 24, 141])
@pytest.mark.parametrize("bf16, int8, helps", [(20, 12, True), (15, 14.6, False)])
def test_whether_int8_helps_does_not_depend_on_this_gpu(flan, monkeypatch, memory, bf16, int8, helps):
    """INT8 helps where a smaller one of the usual cards suffices: for 20 and 12 GiB, not for 15 and 14.6."""
    properties = type("Properties", (), {"total_memory": memory * 2**30})
    monkeypatch.setattr(flan.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flan.torch.cuda, "get_device_properties", lambda device: properties)
    settings = flan.parse_settings([])
    lines = flan.where_it_fits([(8, True, {"bf16": bf16, "int8": int8, "int4": int8})], settings)
    assert lines[0].startswith("on this GPU") and any("INT8 does not help" in line for line in lines) != helps, lines
    lines = flan.where_it_fits([(8, True, {"bf16": 300, "int8": 150, "int4": 90})], settings)  # fits nowhere
    assert not any("INT8 does not help" in line for line in lines), lines


# ----------------------------------------------------------------------------------------------------------------------
# --lr-find
# ----------------------------------------------------------------------------------------------------------------------


def range_test_on_a_quadratic(flan, curvature, seed=0):
    """Noisy gradient descent on curvature / 2 |x|^2: 1 / curvature is the best rate, 2 / curvature diverges."""
    rng, x = np.random.default_rng(seed), np.ones(50)
    rates, losses = np.geomspace(1e-6, 1, 100), []
    for rate in rates:
        losses.append(1 + curvature / 2 * float(x @ x) / 50)
        if flan.diverges(losses):
            break
        x = x - rate * (curvature * x + 0.1 * curvature * rng.standard_normal(50))
    return rates[: len(losses)].tolist(), losses


@pytest.mark.parametrize("curvature", [30.0, 300.0, 3000.0])
def test_the_range_test_on_a_quadratic(flan, curvature):
    """It ends where divergence begins, with noise a little before; it suggests 1/5 to 1/50 of the best rate."""
    rates, losses = range_test_on_a_quadratic(flan, curvature)
    assert 1 / curvature < rates[-1] < 8 / curvature and len(losses) < 100
    assert 0.02 < flan.suggest_learning_rate(rates, losses) * curvature < 0.2


def test_the_suggestion_follows_the_curvature(flan):
    """A hundred times the curvature, a hundredth of the rate."""
    flat, steep = (flan.suggest_learning_rate(*range_test_on_a_quadratic(flan, c)) for c in (30.0, 3000.0))
    assert flat / steep == pytest.approx(100, rel=0.5)


def test_no_finite_loss_gives_no_suggestion(flan):
    with pytest.raises(flan.UserError, match="not finite"):
        flan.suggest_learning_rate([1e-6], [float("nan")])


def test_a_loss_that_is_not_finite_diverges(flan):
    assert flan.diverges([3.0, 2.0, float("nan")]) and flan.diverges([3.0, float("inf")])
    assert not flan.diverges([3.0, 2.0, 1.0]) and not flan.diverges([3.0] * 20)


@pytest.mark.parametrize("times, ends", [(1.9, False), (2.1, True)])
def test_the_range_test_ends_at_twice_the_lowest_loss(flan, times, ends):
    assert flan.diverges([3.0, *[1.5] * 9, *[1.5 * times] * 4]) == ends


@pytest.fixture(scope="module")
def range_test(flan, command, data, model_folder, tmp_path_factory):
    """One --lr-find: the rates that the optimiser really used, what was printed, and the folder it ran in."""
    home, rates = tmp_path_factory.mktemp("lr-find"), []
    original = flan.SummarizationTrainer.training_step

    def training_step(self, *args, **kwargs):
        rates.append(self.optimizer.param_groups[0]["lr"])
        return original(self, *args, **kwargs)

    flan.SummarizationTrainer.training_step = training_step
    try:
        files = {path: path.read_bytes() for path in model_folder.iterdir()}
        done = command("--model", model_folder, "--dataset", data, "--lr-find", *RECIPE[2:], cwd=home)
        assert {path: path.read_bytes() for path in model_folder.iterdir()} == files
    finally:
        flan.SummarizationTrainer.training_step = original
    assert done.code == 0, done
    return rates, done, home


def test_lr_find_sweeps_the_rate_exponentially_on_the_real_training(range_test, trained):
    rates, _, home = range_test
    found = json.loads((home / "runs/flan-t5-small-chats-lr-find/lr_find.json").read_text())
    steps = rates[::2]  # two micro-batches a step
    assert found["learning_rates"] == pytest.approx(steps[: len(found["losses"])])
    assert found["learning_rates"] == pytest.approx(np.geomspace(1e-6, 1, 100)[: len(found["losses"])])
    # The first step is that of the training with the same seed: same rows, same dropout, weights not yet changed.
    first = json.loads((trained.folder / "metrics.json").read_text())["curve"][0]
    assert found["losses"][0] == first["loss"]
    assert min(found["losses"]) < found["losses"][0] - 0.5 and len(found["losses"]) > 50


def test_lr_find_leaves_a_plot_and_no_weights(range_test):
    _, done, home = range_test
    (run,) = (home / "runs").iterdir()
    assert {path.name for path in run.iterdir()} == {"lr_find.json", "lr_find.png"}
    assert (run / "lr_find.png").read_bytes().startswith(b"\x89PNG")
    suggestion = json.loads((run / "lr_find.json").read_text())["suggestion"]
    (line,) = [line for line in done.out.splitlines() if line.startswith("train:")]
    words = line.split()
    assert "--lr-find" not in words and float(words[words.index("--lr") + 1]) == pytest.approx(suggestion)
    assert words[words.index("--batch-size") + 1] == "4"


def test_the_command_that_lr_find_prints_trains_with_the_suggestion(range_test, command, trained):
    _, done, home = range_test
    (line,) = [line for line in done.out.splitlines() if line.startswith("train:")]
    words = shlex.split(line.split("flan-t5_samsum.py ")[1])
    again = command(*words, "--limit", "4", "--epochs", "1", cwd=home)
    assert again.code == 0, again
    (run,) = (path for path in (home / "runs").iterdir() if not path.name.endswith("lr-find"))
    found, expected = (json.loads((folder / "metrics.json").read_text())["configuration"]
                       for folder in (run, trained.folder))
    changed = {name for name in expected if found[name] != expected[name]}
    assert changed == {"lr", "limit", "epochs"}
    shutil.rmtree(run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_lr_find_interrupted_leaves_nothing(flan, command, data, model_folder, tmp_path, monkeypatch, number):
    """By SIGTERM as well as by Ctrl-C: neither a folder nor a checkpoint, and not even the folder of the runs."""
    collate, calls = flan.Collator.__call__, []

    def interrupt(*rest):
        calls.append(1)
        if len(calls) == 9:
            os.kill(os.getpid(), number)
        return collate(*rest)

    monkeypatch.setattr(flan.Collator, "__call__", interrupt)
    done = command("--model", model_folder, "--dataset", data, "--lr-find", *RECIPE[2:], cwd=tmp_path)
    assert done.code == 128 + number and "interrupted" in done.err.splitlines()[-1] and len(calls) < 13, done
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("flag, advice", [("--lr-find", "choose another --output-dir"),
                                          ("--seed=1", "--resume, or choose another --output-dir")])
def test_a_folder_in_use_is_refused_before_any_work(flan, command, tmp_path, monkeypatch, flag, advice):
    """A model or data would be looked for, and a sweep of rates made in vain."""
    monkeypatch.setattr(flan, "load_for_training", lambda *_: pytest.fail("it has begun"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").touch()
    (tmp_path / "file").touch()
    for name in ("run", "file"):
        done = command(flag, "--output-dir", name, cwd=tmp_path)
        expected = {"run": f"not empty: {advice}", "file": "a file: choose another --output-dir"}[name]
        assert (done.code, done.out, done.err) == (2, "", f"error: {name} is {expected}\n")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")  # no folder of another name is taken for it
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(flan.UserError, match="cannot write to link"):
        flan.new_run_folder(flan.parse_settings([flag, "--output-dir", "link"]), "name")
    with pytest.raises(flan.UserError, match="cannot write to xxx"):
        flan.refuse_used_folder(flan.parse_settings([flag, "--output-dir", "x" * 300]))


def test_a_suggestion_that_cannot_be_written_is_printed(flan, command, data, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(flan, "RANGE_TEST", flan.RANGE_TEST[60:64])
    folder = tmp_path / "file/run"
    folder.parent.touch()  # in which there can be no folder
    done = command("--model", model_folder, "--dataset", data, "--lr-find", "--output-dir", folder, cwd=tmp_path)
    assert done.code == 2 and "cannot write to" in done.err and "\nsuggested: " in done.out, done
    assert done.out.splitlines()[-1].startswith("train: ")


def test_a_sweep_that_diverges_leaves_a_file_that_every_reader_of_json_takes(
    flan, command, data, model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(flan, "RANGE_TEST", np.r_[np.geomspace(1e-4, 1e-2, 8), 1e20, 1e20])
    done = command("--model", model_folder, "--dataset", data, "--lr-find", "--output-dir", "find", cwd=tmp_path)
    assert done.code == 0, done
    found = json.loads((tmp_path / "find/lr_find.json").read_text(), parse_constant=pytest.fail)
    assert found["losses"][-1] is None and min(found["losses"][:8]) > 0


# ----------------------------------------------------------------------------------------------------------------------
# --plot
# ----------------------------------------------------------------------------------------------------------------------


def write_logs(folder, losses, rates=None, tag="train/loss", totals=()):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for i, loss in enumerate(losses, 1):
            writer.add_scalar(tag, loss, 10 * i)
            if rates is not None:
                writer.add_scalar("train/learning_rate", rates[i - 1], 10 * i)
        for name, value in totals:
            writer.add_scalar(name, value, 10 * len(losses))
    return folder


@pytest.fixture
def figures(flan, monkeypatch):
    """All figures that were drawn."""
    kept, figure = [], flan.Figure

    def new(*args, **options):
        kept.append(figure(*args, **options))
        return kept[-1]

    monkeypatch.setattr(flan, "Figure", new)
    return kept


def test_plot_finds_the_smallest_loss_with_its_step_and_rate(command, figures, tmp_path):
    losses = 2 + np.cos(np.linspace(0, 5, 200))
    losses[77] = 0.5
    rates = np.linspace(1e-5, 1e-3, 200)
    logs = write_logs(tmp_path / "their-run", losses, rates)
    done = command("--plot", logs, cwd=tmp_path)
    assert done.code == 0 and f"0.5000 at step 780, learning rate {rates[77]:.2e}" in done.out, done
    for name in ("training_loss.png", "smallest_training_loss.png"):
        assert (logs / name).read_bytes().startswith(b"\x89PNG")
    whole, near = figures
    x, y = whole.axes[0].get_lines()[0].get_data()
    assert list(x) == list(range(10, 2010, 10)) and list(y) == pytest.approx(list(losses))
    x, y = near.axes[0].get_lines()[0].get_data()
    assert list(x) == list(range(380, 1190, 10)) and list(y) == pytest.approx(list(losses[37:118]))
    mark = near.axes[0].get_lines()[1].get_xydata()
    assert mark.tolist() == [[780.0, 0.5]]
    x, y = near.axes[1].get_lines()[0].get_data()
    assert list(x) == list(range(380, 1190, 10)) and list(y) == pytest.approx(list(rates[37:118]))


def test_plot_reads_logs_deep_in_a_folder_and_without_a_rate(command, tmp_path):
    """The Trainer's own place is <output_dir>/runs/<date>; a custom loop may log "loss" and nothing else."""
    write_logs(tmp_path / "output/runs/Nov01_12-00", [3.0, 1.5, 2.0], tag="loss")
    done = command("--plot", tmp_path / "output", "--output-dir", tmp_path / "plots", cwd=tmp_path)
    assert done.code == 0 and "1.5000 at step 20" in done.out and "learning rate" not in done.out, done
    names = {path.name for path in (tmp_path / "plots/output").iterdir()}
    assert names == {"training_loss.png", "smallest_training_loss.png"}


@pytest.mark.parametrize("bad", [0, 77])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_plot_passes_over_losses_that_are_not_finite(command, figures, tmp_path, bad, value):
    losses = 2 + np.cos(np.linspace(0, 5, 100))
    losses[bad], losses[40] = value, 0.5
    done = command("--plot", write_logs(tmp_path / "logs", losses), cwd=tmp_path)
    assert done.code == 0 and "0.5000 at step 410" in done.out, done
    assert figures[0].axes[0].get_lines()[2].get_xydata().tolist() == [[410.0, 0.5]]


def test_plot_of_a_run_without_any_finite_loss(command, tmp_path):
    done = command("--plot", write_logs(tmp_path / "logs", [np.nan, np.inf]), "--output-dir", "plots", cwd=tmp_path)
    assert done.code == 2 and "logs: no logged training loss is finite" in done.err and not done.out, done
    assert len(done.err.splitlines()) == 1 and not (tmp_path / "plots").exists()


def test_plot_prints_the_last_mean_and_what_the_trainer_logs_at_its_end(command, tmp_path):
    totals = [("train/train_samples_per_second", 6.72), ("train/train_runtime", 21_960.0)]
    write_logs(tmp_path / "long", [9.0] * 50 + [2.0] * 50 + [1.0] * 50, totals=totals)
    write_logs(tmp_path / "short", [3.0, 1.0])
    done = command("--plot", "long", "short", cwd=tmp_path)
    assert done.code == 0, done
    long, short = done.out.split("short: ")
    assert "last 100 logged losses: 1.5000" in long and "6.7 samples/s, 6.1 hours" in long
    assert "last 2 logged losses: 2.0000" in short and "samples/s" not in short


def test_plot_of_the_current_folder_and_of_two_with_one_name(command, figures, tmp_path):
    for place in ("a/run", "b/run"):
        write_logs(tmp_path / place, [2.0, 1.0])
    done = command("--plot", ".", cwd=tmp_path / "a/run")
    assert done.code == 0 and done.out.startswith("run: ") and figures[0].axes[0].get_title() == "run", done
    assert command("--plot", "a/run", "b/run", cwd=tmp_path).code == 0
    done = command("--plot", "a/run", "b/run", "--output-dir", "plots", cwd=tmp_path)
    assert done.code == 2 and "called run" in done.err and not (tmp_path / "plots").exists(), done


def test_plot_draws_a_run_of_this_script(command, trained, tmp_path):
    metrics = json.loads((trained.folder / "metrics.json").read_text())
    smallest = min(metrics["curve"], key=lambda entry: entry["loss"])
    done = command("--plot", trained.folder, "--output-dir", tmp_path, cwd=tmp_path)
    assert done.code == 0 and f"{smallest['loss']:.4f} at step {smallest['step']}" in done.out, done


@pytest.mark.parametrize("make, words", [
    (lambda folder: None, "no such folder"),
    (lambda folder: folder.mkdir(), "no event files"),
    (lambda folder: write_logs(folder, [1.0], tag="eval/loss"), "no train/loss"),
    (lambda folder: (write_logs(folder / "a", [1.0]), write_logs(folder / "b", [2.0])), "2 runs"),
])  # fmt: skip
def test_plot_says_what_is_missing(command, tmp_path, make, words):
    make(tmp_path / "logs")
    done = command("--plot", tmp_path / "logs", cwd=tmp_path)
    assert done.code == 2 and len(done.err.splitlines()) == 1 and words in done.err and "logs" in done.err, done


# ----------------------------------------------------------------------------------------------------------------------
# --compare
# ----------------------------------------------------------------------------------------------------------------------


def exact_bootstrap(differences):
    """All n^n equally likely resamples: their means, and the exact two-sided p."""
    rows = len(differences)
    means = np.array([np.mean(draw) for draw in itertools.product(differences, repeat=rows)])
    return means, np.mean(np.abs(means - np.mean(differences)) >= abs(np.mean(differences)) - 1e-9)


@pytest.mark.parametrize("differences", [[4.0, -1.0, 2.5, 0.5, 3.0], [1.0, -1.2, 0.3, 0.1], [0.0, 0.0, 6.0, 0.0, 0.0]])
def test_paired_bootstrap_against_every_resample(flan, differences):
    a = np.array([30.0, 55.0, 41.0, 12.0, 77.0])[: len(differences)]
    difference, low, high, p = flan.paired_bootstrap(a, a + differences)
    means, exact = exact_bootstrap(differences)
    assert difference == pytest.approx(np.mean(differences))
    assert p == pytest.approx(exact, abs=0.02)  # 10,000 samples: four standard errors
    for found, share in ((low, 0.025), (high, 0.975)):  # the quantile of a discrete distribution, give or take 0.6%
        assert np.quantile(means, share - 0.006) - 1e-9 <= found <= np.quantile(means, share + 0.006) + 1e-9


def test_paired_bootstrap_of_equal_runs_and_of_clear_ones(flan):
    a = np.random.default_rng(0).uniform(0, 100, 200)
    assert flan.paired_bootstrap(a, a) == (0, 0, 0, 1)
    difference, low, high, p = flan.paired_bootstrap(a, a + 1)
    assert (difference, low, high) == pytest.approx((1, 1, 1)) and 0 < p < 0.001
    # Rows that go together: the spread of the rows themselves (29 points) must not hide a steady half point.
    noisy = a + 0.5 + np.random.default_rng(1).normal(0, 1, 200)
    assert flan.paired_bootstrap(a, noisy)[3] < 0.001
    forth, back = flan.paired_bootstrap(a, noisy)[0], flan.paired_bootstrap(noisy, a)[0]
    assert forth == -back > 0


@pytest.fixture(scope="module")
def other(command, data, model_folder, trained):
    """A second run beside `trained`: another rate, and two epochs instead of three."""
    done = command("--model", model_folder, "--dataset", data, "--epochs", "2", "--lr", "2e-2", *RECIPE[2:],
                   "--output-dir", "runs/other", cwd=trained.home)  # fmt: skip
    assert done.code == 0, done
    yield trained.home / "runs/other"
    shutil.rmtree(trained.home / "runs/other")  # `trained` is as it was


def cells(line):
    return [cell.strip(" *") for cell in line.strip("|").split("|")]


def test_compare_shows_what_the_runs_recorded(command, trained, other, tmp_path, figures):
    done = command("--compare", trained.folder, other, "--output-dir", tmp_path / "here", cwd=tmp_path)
    assert done.code == 0, done
    runs = [json.loads((run / "metrics.json").read_text()) for run in (trained.folder, other)]
    lines = done.out.splitlines()
    first = next(i for i, line in enumerate(lines) if cells(line) == ["Epoch", trained.folder.name, "other"])
    for epoch in range(4):
        shown = cells(lines[first + 2 + epoch])
        scores = [run["epochs"][epoch]["test"]["rouge1"] if epoch < len(run["epochs"]) else None for run in runs]
        expected = ["" if score is None else f"{score:.2f}" for score in scores]
        assert shown == [str(epoch), *expected]
        bold = ["**" in cell for cell in lines[first + 2 + epoch].split("|")[2:4]]
        assert bold == [run["results"]["best_epoch"] == epoch for run in runs]
    first = next(i for i, line in enumerate(lines) if line.startswith("| Run "))
    for line, run, name in zip(lines[first + 2 :], runs, (trained.folder.name, "other"), strict=False):
        test = run["epochs"][run["results"]["best_epoch"]]["test"]
        values = cells(line)
        assert values[:3] == [name, str(run["results"]["best_epoch"]), f"{test['rouge1']:.2f}"]
        assert numbers(values[3]) == pytest.approx(test["rouge1_interval"], abs=0.006)
        share = 100 * run["trainable_parameters"] / run["parameters"]
        minutes = (run["results"]["training_seconds"] + run["results"]["evaluation_seconds"]) / 60
        assert float(values[4].rstrip("%")) == pytest.approx(share, abs=0.006)
        assert float(values[5]) == pytest.approx(run["results"]["samples_per_second"], abs=0.06)
        assert float(values[6]) == pytest.approx(run["results"]["peak_memory_gib"], abs=0.06)
        assert float(values[7]) == pytest.approx(minutes, abs=0.06)
    assert {"flan-t5-small-chats-lr=1e-2: lr 0.01, epochs 3", "other: lr 0.02, epochs 2"} <= {*lines}
    first = next(i for i, line in enumerate(lines) if cells(line)[:2] == ["A", "B"])
    a, b, difference, interval, p, corrected = cells(lines[first + 2])
    assert corrected == p  # a single pair
    scores = [run["epochs"][run["results"]["best_epoch"]]["test"]["rouge1"] for run in runs]
    assert (a, b) == (trained.folder.name, "other")
    assert float(difference) == pytest.approx(scores[1] - scores[0], abs=0.02)
    low, high = map(float, re.findall(r"[+-][\d.]+", interval))
    assert low <= float(difference) <= high and 0 < float(p) <= 1
    assert (tmp_path / "here/comparison.png").read_bytes().startswith(b"\x89PNG")
    drawn = figures[-1].axes[0].get_lines()
    assert [list(line.get_ydata()) for line in drawn[::2]] == [
        [entry["test"]["rouge1"] for entry in run["epochs"]] for run in runs]


def test_compare_puts_its_picture_beside_the_runs(command, trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "runs" / trained.folder.name)
    done = command("--compare", "runs/" + trained.folder.name, cwd=tmp_path)
    picture = tmp_path / "runs/comparison.png"
    assert done.code == 0 and picture.exists() and str(picture) in done.out and "p (Holm)" not in done.out, done


@pytest.mark.parametrize("change, words", [
    (("scoring", "max_new_tokens", 128), "max_new_tokens is 24 in one, 128 in the other"),
    (("scoring", "prefix", ""), "prefix is 'summarize: ' in one, '' in the other"),
    (("scoring", "decoding", "beam search with 4 beams"), "decoding"),
    (("scoring", "max_source_length", 256), "max_source_length"),
    (("rows", "test", slice(0, 4)), "their test rows differ (5 and 4 rows)"),
    (("rows", "validation", slice(6, None, -1)), "their validation rows differ"),
    (("reference", "test", "another summary"), "their test rows differ (5 and 5 rows)"),
])  # fmt: skip
def test_compare_refuses_what_cannot_be_compared(command, trained, tmp_path, change, words):
    kind, name, value = change
    other = shutil.copytree(trained.folder, tmp_path / "other")
    metrics = json.loads((other / "metrics.json").read_text())
    if kind == "scoring":
        metrics["scoring"][name] = value
        (other / "metrics.json").write_text(json.dumps(metrics))
    else:
        path = other / f"predictions/{name}-epoch-{metrics['results']['best_epoch']}.jsonl"
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if kind == "rows":
            rows = rows[value]
        else:
            rows[2]["reference"] = value
        write_jsonl(path, rows)
    done = command("--compare", trained.folder, other, cwd=tmp_path)
    assert done.code == 2 and len(done.err.splitlines()) == 1 and not done.out, done
    assert words in done.err and "other" in done.err and trained.folder.name in done.err
    assert not (tmp_path / "comparison.png").exists()


def test_compare_says_which_runs_were_scored_on_the_fast_path(command, trained, tmp_path):
    runs = [shutil.copytree(trained.folder, tmp_path / name) for name in ("A", "B")]
    for number, run in enumerate(runs):
        metrics = json.loads((run / "metrics.json").read_text())
        assert {entry["fast"] for entry in metrics["epochs"]} == {False}
        done = command("--compare", *runs, cwd=tmp_path)
        assert done.code == 0 and ("the fast path, where rounding differs a little: only A\n" in done.out) == number
        for entry in metrics["epochs"]:
            entry["fast"] = True
        (run / "metrics.json").write_text(json.dumps(metrics))
    assert "fast path" not in command("--compare", *runs, cwd=tmp_path).out


def test_compare_refuses_two_runs_of_one_name(command, trained, tmp_path):
    other = shutil.copytree(trained.folder, tmp_path / trained.folder.name)
    done = command("--compare", trained.folder, other, cwd=tmp_path)
    assert done.code == 2 and len(done.err.splitlines()) == 1 and trained.folder.name in done.err, done


def test_compare_takes_a_run_that_ended_in_mid_epoch(command, data, model_folder, trained, tmp_path):
    flags = ("--model", model_folder, "--dataset", data, "--max-steps", "4", *RECIPE, "--output-dir", "a")
    assert command(*flags, cwd=tmp_path).code == 0
    best = json.loads((tmp_path / "a/metrics.json").read_text())["results"]["best_epoch"]
    assert best == pytest.approx(2 / 3, abs=1e-3)  # better than epoch 0; else its scores are not those of the mid epoch
    done = command("--compare", "a", trained.folder, "--output-dir", ".", cwd=tmp_path)
    assert done.code == 0 and f"| {best} |" in done.out, done


def test_compare_refuses_a_run_that_died_before_its_first_epoch(command, trained, tmp_path):
    other = shutil.copytree(trained.folder, tmp_path / "other")
    metrics = json.loads((other / "metrics.json").read_text())
    (other / "metrics.json").write_text(json.dumps(metrics | {"curve": [], "epochs": metrics["epochs"][:1]}))
    done = command("--compare", trained.folder, other, cwd=tmp_path)
    assert done.code == 2 and len(done.err.splitlines()) == 1 and "other has no finished epoch" in done.err, done


def test_compare_says_what_a_run_is_not(command, trained, tmp_path):
    other = shutil.copytree(trained.folder, tmp_path / "other")
    for file in other.glob("predictions/*.jsonl"):
        file.write_text('{"dialogue": "Ada: hi"}\n')
    done = command("--compare", trained.folder, other, cwd=tmp_path)
    assert done.code == 2 and "is damaged: score the run again" in done.err and done.err.count("\n") == 1, done
    (other / "metrics.json").write_text('{"configuration": {"block_size": 8}}')
    done = command("--compare", trained.folder, other, cwd=tmp_path)
    assert done.code == 2 and "other was made by gpt2_from_scratch.py" in done.err, done


def test_compare_needs_runs_with_scores(command, trained, tmp_path):
    (tmp_path / "empty").mkdir()
    done = command("--compare", trained.folder, tmp_path / "empty", cwd=tmp_path)
    assert done.code == 2 and len(done.err.splitlines()) == 1, done
    assert "empty" in done.err and "metrics.json" in done.err
