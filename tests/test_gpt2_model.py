"""The model of gpt2_from_scratch.py against Hugging Face's GPT-2, and its generation with a cache against none."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpt2_from_scratch as gpt2

TINY = {"vocab_size": 203, "n_positions": 24, "n_embd": 32, "n_layer": 3, "n_head": 4}
END = gpt2.END_OF_TEXT


def random_weights(model: torch.nn.Module, seed: int) -> None:
    """Weights far from any initialisation (biases and norms too), so that a mistake in any of them shows.

    The token embedding is small beside the rest: otherwise the tied head predicts the token that it has just read.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.1 if "wte" in name else 0.4, generator=generator)
            if "ln_" in name and name.endswith("weight"):
                parameter.add_(1)


@pytest.fixture
def reference(tmp_path):
    """A tiny GPT2LMHeadModel with random weights, and the folder that it was saved in."""
    config = GPT2Config(**TINY, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    random_weights(model, 0)
    model.save_pretrained(tmp_path / "reference")
    return model, tmp_path / "reference"


@pytest.fixture(scope="module")
def tokenizer():
    text = [f"the quick brown fox number {i} jumps over the lazy dog\n" for i in range(40)]
    return gpt2.train_tokenizer(iter(text), 300)


def tokens_like(model: GPT2LMHeadModel, rows: int = 3, length: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (rows, length or model.config.n_positions)
    return torch.randint(model.config.vocab_size, shape, generator=generator)


def assert_same_gradients(ours: gpt2.GPT, theirs: GPT2LMHeadModel) -> None:
    for name, parameter in theirs.transformer.named_parameters():
        gradient = dict(ours.named_parameters())[name].grad
        if name.endswith(gpt2.TRANSPOSED):
            gradient = gradient.t()
        torch.testing.assert_close(gradient[: len(parameter)], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_loaded_logits_loss_and_gradients_equal_transformers(reference):
    theirs, folder = reference
    ours = gpt2.load_pretrained(folder)
    tokens = tokens_like(theirs)
    expected = theirs(tokens, labels=tokens)
    logits = ours(tokens)
    torch.testing.assert_close(logits[..., : TINY["vocab_size"]], expected.logits, rtol=1e-4, atol=1e-4)
    assert logits[..., TINY["vocab_size"] :].eq(-torch.inf).all()

    loss = ours(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs)
    assert ours.wte.weight.grad[TINY["vocab_size"] :].eq(0).all()


def test_export_of_own_weights_gives_transformers_the_same_function(tokenizer, tmp_path):
    size = gpt2.vocabulary_size(tokenizer)
    ours = gpt2.GPT(gpt2.GPTConfig(size, block_size=16, layers=2, heads=2, width=24)).eval()
    random_weights(ours, 3)
    with torch.no_grad():
        ours.wte.weight[size:] = 0
    gpt2.save_pretrained(ours, tokenizer, tmp_path)
    theirs, notes = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"] and not notes["mismatched_keys"]
    tokens = tokens_like(theirs)
    torch.testing.assert_close(ours(tokens)[..., :size], theirs.eval()(tokens).logits, rtol=1e-4, atol=1e-4)
    assert load_file(tmp_path / "model.safetensors")["transformer.wte.weight"].shape == (size, 24)  # no padding rows

    (ours(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()).backward()
    theirs(tokens, labels=tokens).loss.backward()
    assert_same_gradients(ours, theirs)

    back = gpt2.load_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), back.parameters(), strict=True))


def test_exported_tokenizer_is_the_same_in_transformers(tokenizer, tmp_path):
    model = gpt2.GPT(gpt2.GPTConfig(gpt2.vocabulary_size(tokenizer), block_size=8, layers=1, heads=1, width=8))
    gpt2.save_pretrained(model, tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the lazy fox", " a\n\tb  c\r\n", "naïve 🦊 日本語", ""):
        assert theirs(text)["input_ids"] == gpt2.encode(tokenizer, text)
        assert theirs.decode(theirs(text)["input_ids"], clean_up_tokenization_spaces=False) == text
    assert theirs.eos_token_id == tokenizer.token_to_id(END)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("shards", [1, 2])
def test_reads_every_layout_of_the_published_weights(reference, tmp_path, prefix, shards):
    """OpenAI's upload has no prefix and holds the causal masks; a tied head may be written out; there may be shards."""
    theirs, folder = reference
    weights = {prefix + name: tensor.clone() for name, tensor in theirs.transformer.state_dict().items()}
    weights[f"{prefix}h.0.attn.bias"] = torch.ones(24, 24).tril()[None, None]
    weights["lm_head.weight"] = theirs.lm_head.weight.clone()
    (folder / "model.safetensors").unlink()
    names = [f"model-{shard}.safetensors" for shard in range(shards)] if shards > 1 else ["model.safetensors"]
    where = {name: names[i % shards] for i, name in enumerate(weights)}
    for name in names:
        save_file({key: tensor for key, tensor in weights.items() if where[key] == name}, folder / name)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    tokens = tokens_like(theirs)
    ours = gpt2.load_pretrained(folder)(tokens)[..., : TINY["vocab_size"]]
    torch.testing.assert_close(ours, theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def assert_same_logits_and_gradients(ours, theirs):
    """On one row of 12 tokens."""
    tokens = tokens_like(theirs, rows=1, length=12)
    expected = theirs(tokens, labels=tokens)
    torch.testing.assert_close(ours(tokens)[..., :50257], expected.logits, rtol=1e-4, atol=1e-4)
    (ours(tokens[:, :-1], tokens[:, 1:]) / 11).backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs)


def test_real_gpt2_shape_logits_and_gradients_equal_transformers(tmp_path):
    """124M random weights, the published configuration, float32; and exported they are the same again."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()
    theirs.save_pretrained(tmp_path)
    ours = gpt2.load_pretrained(tmp_path)
    assert gpt2.count_parameters(ours) == 124_439_808 == sum(parameter.numel() for parameter in theirs.parameters())
    assert_same_logits_and_gradients(ours, theirs)
    (tmp_path / "exported").mkdir()
    gpt2.save_pretrained(ours, gpt2.train_tokenizer(iter(["text"]), 257), tmp_path / "exported")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "exported").state_dict()
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.state_dict().items())


def test_matrices_by_columns_are_the_same_matrices(reference):
    """As `--sample` lays them out on a CPU; the head's is that of the embeddings."""
    theirs, folder = reference
    tokens, ours = tokens_like(theirs, length=10), gpt2.load_pretrained(folder)
    gpt2.speed_up_products(ours)
    turned = {name for name, weight in ours.named_parameters() if weight.dim() == 2 and weight.stride(0) == 1}
    wide = {name for name, weight in ours.named_parameters() if weight.dim() == 2 and weight.shape[0] > weight.shape[1]}
    assert turned == wide - {"wpe.weight"} and {"wte.weight", "h.0.attn.c_attn.weight"} <= turned
    torch.testing.assert_close(ours(tokens)[..., : TINY["vocab_size"]], theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_products_by_numpy_are_the_same_products(reference, monkeypatch):
    """Of one token and of several, in one row and in several; only in float32, and with one thread of torch's."""
    threads, called = [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(gpt2, "LARGE", 0)
    monkeypatch.setattr(np, "show_config", lambda mode: {"blas": "mkl"})
    product = gpt2.NumpyProduct.__call__
    monkeypatch.setattr(gpt2.NumpyProduct, "__call__", lambda self, x: called.append(x.shape) or product(self, x))
    theirs, folder = reference
    tokens, ours = tokens_like(theirs, rows=3, length=10), gpt2.load_pretrained(folder).eval()
    half = gpt2.load_pretrained(folder).to(torch.bfloat16)
    gpt2.speed_up_products(ours)  # with another BLAS there is nothing to be gained
    monkeypatch.setattr(np, "show_config", lambda mode: {"blas": "openblas"})
    gpt2.speed_up_products(half)
    assert not threads and half(tokens).dtype is torch.bfloat16 and ours(tokens).requires_grad and not called
    gpt2.speed_up_products(ours)
    assert set(threads) == {1}
    with torch.inference_mode():
        cache = gpt2.KVCache(ours.config, 3, 10, tokens.device, torch.float32)
        first, second = (ours(part, cache=cache)[:, -1] for part in (tokens[:, :9], tokens[:, 9:]))
        expected = theirs(tokens).logits
    for found, place in ((first, 8), (second, 9)):
        torch.testing.assert_close(found[:, : TINY["vocab_size"]], expected[:, place], rtol=1e-4, atol=1e-4)
        assert (found[:, TINY["vocab_size"] :] == -math.inf).all() and found.shape[1] > TINY["vocab_size"]
    assert len(called) == 2 * (4 * ours.config.layers + 1)  # every product of both passes


def test_a_shorter_context_keeps_the_first_positions(reference):
    theirs, folder = reference
    tokens = tokens_like(theirs, length=10)
    ours = gpt2.load_pretrained(folder, block_size=10)
    assert ours.config.block_size == 10
    torch.testing.assert_close(ours(tokens)[..., : TINY["vocab_size"]], theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt_neo"}, "model_type"),
        ({"activation_function": "gelu"}, "activation_function"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_inner": 77}, "n_inner"),
        ({"n_layer": 4}, "lacks the weight h.3"),
        ({"n_head": 5}, "multiple of the heads"),
        ({"n_embd": 64}, "has shape"),
        ({"n_head": "4"}, "whole number"),
    ],
)
def test_refuses_what_is_not_gpt2(reference, change, message):
    _, folder = reference
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(gpt2.UserError, match=message):
        gpt2.load_pretrained(folder)


def test_refuses_more_context_than_was_learned(reference):
    with pytest.raises(gpt2.UserError, match=r"--block-size 25 .* 24 positions"):
        gpt2.load_pretrained(reference[1], block_size=25)


def test_initialisation_is_openai_s():
    model = gpt2.GPT(gpt2.GPTConfig(1000, block_size=256, layers=8, heads=4, width=128))
    model.initialise(0)
    weights = dict(model.named_parameters())
    std = {
        name: parameter[: 1000 if name == "wte.weight" else None].std().item() for name, parameter in weights.items()
    }
    assert std["wte.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["wpe.weight"] == pytest.approx(0.01, rel=0.05)
    assert std["h.3.attn.c_attn.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["h.3.attn.c_proj.weight"] == pytest.approx(0.02 / 4, rel=0.05)  # 1 / sqrt(2 x 8)
    assert std["h.3.mlp.c_proj.weight"] == pytest.approx(0.02 / 4, rel=0.05)
    assert all(parameter.eq(0).all() for name, parameter in weights.items() if name.endswith("bias"))
    assert all(weights[name].eq(1).all() for name in weights if "ln_" in name and name.endswith("weight"))


def test_no_position_sees_the_future():
    model = gpt2.GPT(gpt2.GPTConfig(50, block_size=12, layers=2, heads=2, width=16)).eval()
    tokens = torch.arange(12)[None]
    changed = tokens.clone()
    changed[0, 7] = 40
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:, :50], after[:, 7:, :50])


def greedy(model: gpt2.GPT, prompt: list[int], new: int, end: int = -1) -> list[list[int]]:
    steps = gpt2.generate(model, prompt, 2, new, end, temperature=0)
    return [list(column) for column in zip(*steps, strict=True)]


@torch.no_grad()
def greedy_without_cache(model: gpt2.GPT, prompt: list[int], new: int) -> list[int]:
    """Everything computed anew for each token; when the context is full, its newer half is kept."""
    seen, text, context = prompt[-model.config.block_size :], [], model.config.block_size
    for _ in range(new):
        seen = seen if len(seen) <= context else seen[-(context // 2) :]
        text.append(model(torch.tensor([seen]))[0, -1].argmax().item())
        seen = [*seen, text[-1]]
    return text


def test_greedy_text_equals_generate_of_transformers(reference):
    theirs, folder = reference
    ours, prompt = gpt2.load_pretrained(folder), [5, 17, 3]
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=21, do_sample=False, pad_token_id=0)[
        0, 3:
    ].tolist()
    assert len(expected) == 21 and len(set(expected)) > 3
    assert greedy(ours, prompt, 21) == [expected, expected]


@pytest.mark.parametrize("prompt_length", [1, 9, 24, 30])
def test_cached_and_uncached_greedy_tokens_are_equal_also_beyond_the_context(reference, prompt_length):
    model = gpt2.load_pretrained(reference[1])
    prompt = [(7 * i) % 200 for i in range(prompt_length)]
    assert greedy(model, prompt, 40) == [greedy_without_cache(model.eval(), prompt, 40)] * 2


def test_a_cache_that_grows_keeps_each_row(reference, monkeypatch):
    """Drawn rows differ; each goes on as it would alone: its tokens have the probability that the whole text gives."""
    model, seen = gpt2.load_pretrained(reference[1]).eval(), []
    monkeypatch.setattr(gpt2, "CACHE_STEP", 4)
    draw = gpt2.sample_token
    monkeypatch.setattr(gpt2, "sample_token", lambda logits, *how: seen.append(logits) or draw(logits, *how))
    steps = list(gpt2.generate(model, [5, 17, 3], 3, 18, end=-1, temperature=3.0, top_k=0))
    texts = torch.tensor([[5, 17, 3, *row] for row in zip(*steps, strict=True)])
    assert len({tuple(row) for row in texts.tolist()}) == 3
    for length in range(18):
        torch.testing.assert_close(seen[length], model(texts[:, : 3 + length])[:, -1], rtol=1e-4, atol=1e-4)


def test_only_what_the_fast_decoder_can_draw_is_left_to_it(reference, monkeypatch):
    model, asked = gpt2.load_pretrained(reference[1]), []
    monkeypatch.setattr(gpt2, "graph_decoder", lambda *_: asked.append(True))
    for top_p in (0.9, 1.0):
        list(gpt2.generate(model, [1], 1, 2, end=-1, top_p=top_p))
        assert len(asked) == (top_p == 1)


def test_the_cache_works_in_bf16(reference):
    """Under autocast keys and values come as bf16."""
    model = gpt2.load_pretrained(reference[1])
    with torch.autocast("cpu", torch.bfloat16):
        steps = list(gpt2.generate(model, [5, 17, 3], 2, 30, end=-1, temperature=0))
    assert len(steps) == 30 and all(0 <= token < TINY["vocab_size"] for step in steps for token in step)


def test_generation_stops_when_all_have_reached_the_end(reference):
    model = gpt2.load_pretrained(reference[1])
    free = greedy(model, [5, 17, 3], 10)[0]
    first = free.index(free[4])
    assert greedy(model, [5, 17, 3], 10, end=free[4]) == [free[: first + 1]] * 2


def test_training_mode_is_as_it_was_after_generating(reference):
    model = gpt2.load_pretrained(reference[1], dropout=0.5).train()
    list(gpt2.generate(model, [1], 1, 3, end=-1))
    assert model.training


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]])).expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = lambda **how: gpt2.sample_token(
        logits, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | how, generator=generator
    )
    share = torch.bincount(drawn().flatten(), minlength=5) / 4000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]), atol=0.03, rtol=0)
    assert set(drawn(top_k=2).flatten().tolist()) == {1, 3}
    assert set(drawn(top_p=0.75).flatten().tolist()) == {1, 3, 4}  # 0.4 + 0.3 < 0.75 <= 0.4 + 0.3 + 0.15
    assert set(drawn(top_p=0.69).flatten().tolist()) == {1, 3}
    assert set(drawn(top_p=0.01).flatten().tolist()) == {1}
    assert set(drawn(temperature=0).flatten().tolist()) == {1}
    hot, cold = (torch.bincount(drawn(temperature=t).flatten(), minlength=5)[1] / 4000 for t in (5.0, 0.3))
    assert hot < 0.3 < 0.6 < cold


def test_padding_rows_are_never_drawn():
    model = gpt2.GPT(gpt2.GPTConfig(3, block_size=8, layers=1, heads=1, width=8)).eval()
    steps = list(gpt2.generate(model, [0], 64, 8, end=-1, temperature=50.0, top_k=0))
    assert {token for step in steps for token in step} == {0, 1, 2}


@pytest.mark.parametrize("parts", [(5, 4), (1, 8), (3, 1, 5), (2, 2, 2, 3)])
def test_several_tokens_at_once_into_a_filled_cache(reference, parts):
    """Each sees what came before it, and nothing that comes after."""
    theirs, folder = reference
    ours, tokens = gpt2.load_pretrained(folder).eval(), tokens_like(theirs, rows=2, length=sum(parts))
    cache, start = gpt2.KVCache(ours.config, 2, 12, torch.device("cpu")), 0
    for length in parts:
        logits = ours(tokens[:, start : start + length], cache=cache)
        start += length
        expected = theirs(tokens[:, :start]).logits[:, -1:]
        torch.testing.assert_close(logits[..., : TINY["vocab_size"]], expected, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_nothing_but_what_is_kept(reference):
    """Same loss and gradients, dropout included; far fewer tensors are kept for the backward pass."""
    theirs, folder = reference
    tokens, results = tokens_like(theirs), []
    for checkpointing in (False, True):
        model = gpt2.load_pretrained(folder, dropout=0.3).train()
        model.gradient_checkpointing = checkpointing
        kept = []
        torch.manual_seed(0)
        keep = lambda tensor, kept=kept: kept.append(tensor.numel()) or tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        inner = sum(kept)
        loss.backward()
        results.append((loss, [parameter.grad for parameter in model.parameters()], inner))
    (loss, gradients, all_of_it), (same, others, few) = results
    assert torch.equal(loss, same) and few < 0.5 * all_of_it
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


def test_a_temperature_near_zero_takes_the_likeliest(reference):
    model = gpt2.load_pretrained(reference[1])
    expected = greedy(model, [5, 17, 3], 10)[0]
    for temperature in (1e-40, 1e-9, 1e-5):
        steps = gpt2.generate(model, [5, 17, 3], 1, 10, -1, temperature=temperature, top_p=0.9)
        assert [step[0] for step in steps] == expected


def test_a_continuation_that_has_ended_stays_ended(reference):
    """Of many different ones, some end early: from there on they are nothing but ends."""
    model = gpt2.load_pretrained(reference[1])
    end = 7
    steps = gpt2.generate(model, [5], 64, 20, end, temperature=3.0, top_k=0, seed=1)
    rows = list(zip(*steps, strict=True))
    ended = [row for row in rows if end in row[:-1]]
    assert ended and any(end not in row for row in rows)
    assert all(set(row[row.index(end) :]) == {end} for row in ended)


def test_text_comes_slowly_where_the_kernels_do_not_work(reference, monkeypatch, capsys):
    model = gpt2.load_pretrained(reference[1])
    expected = greedy(model, [5, 17, 3], 10)[0]

    def fail(*_):
        raise RuntimeError("Python.h: no such file\nand more")

    monkeypatch.setattr(gpt2.GraphDecoder, "can_run", lambda *_: True)
    monkeypatch.setattr(gpt2.GraphDecoder, "__init__", fail)
    assert [step[0] for step in gpt2.generate(model, [5, 17, 3], 1, 10, -1, temperature=0)] == expected
    note = capsys.readouterr().err
    assert "slowly" in note and "Python.h: no such file" in note and note.count("\n") == 1


def test_the_seed_decides_what_is_drawn(reference):
    model = gpt2.load_pretrained(reference[1])
    draw = lambda seed: list(gpt2.generate(model, [5], 3, 10, -1, temperature=2.0, top_k=0, seed=seed))
    assert draw(1) == draw(1) != draw(2)


def test_a_model_in_training_generates_without_dropout(monkeypatch):
    model, seen = gpt2.GPT(gpt2.GPTConfig(vocab_size=20, block_size=8, layers=1, heads=1, width=8, dropout=0.5)), []
    monkeypatch.setattr(gpt2.GraphDecoder, "can_run", lambda *_: True)
    monkeypatch.setattr(gpt2.GraphDecoder, "__init__", lambda self, model, *_: seen.append(model.training))
    monkeypatch.setattr(gpt2.GraphDecoder, "run", lambda self, prompt: iter([[3]]))
    assert list(gpt2.generate(model.train(), [1], 1, 1, 0)) == [[3]] and seen == [False] and model.training
