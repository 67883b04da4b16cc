"""flan-t5_samsum.py: the base in each precision, the adapter on it, and merging for a while."""

import json
import re
import shutil
import weakref

import pytest
from safetensors.torch import load_file

PROJECTIONS = ("q", "k", "v", "o")
# Two encoder layers with one attention block each, two decoder layers with two each.
ATTENTION = {
    *(f"encoder.block.{i}.layer.0.SelfAttention.{name}" for i in (0, 1) for name in PROJECTIONS),
    *(f"decoder.block.{i}.layer.0.SelfAttention.{name}" for i in (0, 1) for name in PROJECTIONS),
    *(f"decoder.block.{i}.layer.1.EncDecAttention.{name}" for i in (0, 1) for name in PROJECTIONS),
}


@pytest.fixture
def load(flan, model_folder):
    """load(dtype, quantization): the base on the CPU."""
    cpu = flan.torch.device("cpu")
    return lambda dtype=flan.torch.float32, quantization=None: flan.load_base(model_folder, cpu, dtype, quantization)


@pytest.fixture
def adapted(flan, load):
    """adapted(flags..., dtype=..., quantization=...): a base with an adapter whose update is not zero."""

    def adapted(*flags, **options):
        flan.torch.manual_seed(0)
        model = flan.add_lora(load(**options), flan.parse_settings(list(flags)))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                flan.torch.nn.init.normal_(parameter, std=0.05)
        return model.eval()

    return adapted


@pytest.fixture
def logits(flan):
    """logits(model): of fixed tokens, one row shorter than the other. [rows, target, vocabulary], fp32"""
    torch = flan.torch
    generator = torch.Generator().manual_seed(1)
    sources, targets = (torch.randint(3, 400, (2, length), generator=generator) for length in (12, 9))
    mask = torch.ones_like(sources)
    mask[1, 7:] = 0

    def logits(model):
        with torch.inference_mode():
            return model(input_ids=sources, attention_mask=mask, decoder_input_ids=targets).logits.float()

    return logits


def weights_of(model):
    """A copy of all weights and buffers, bit for bit."""
    return {name: value.clone() for name, value in model.state_dict().items()}


# ----------------------------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability, expected", [
    ((7, 0), "float32"), ((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16"), ((12, 0), "bfloat16"),
])  # fmt: skip
def test_bf16_where_the_gpu_has_it_and_never_fp16(flan, monkeypatch, capability, expected):
    """A V100 (7.0) and a T4 (7.5) claim to support bf16, but emulate it."""
    cuda = flan.torch.cuda
    for name, value in {"is_available": True, "get_device_capability": capability, "is_bf16_supported": True}.items():
        monkeypatch.setattr(cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(cuda, "set_device", lambda _: None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    device, precision = flan.get_device_of_this_machine()
    assert (str(device), str(precision)) == ("cuda:3", f"torch.{expected}")


def test_a_cpu_computes_in_fp32(flan, monkeypatch):
    monkeypatch.setattr(flan.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(flan.torch.backends.mps, "is_available", lambda: False)
    assert flan.get_device_of_this_machine() == (flan.torch.device("cpu"), flan.torch.float32)


def test_the_stored_weights_are_loaded_untied(load, model_folder):
    stored = load_file(model_folder / "model.safetensors")
    model = load()
    assert not model.training
    for name, value in stored.items():
        assert model.get_parameter(name).equal(value), name
    assert not model.lm_head.weight.equal(model.shared.weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_fp16_checkpoint_does_not_stay_fp16(flan, tmp_path, tokenizer_folder, dtype):
    from fake_hub import flan_t5_xxl_sharded_fp16

    folder = flan_t5_xxl_sharded_fp16(tmp_path, tokenizer_folder)
    dtype = getattr(flan.torch, dtype)
    model = flan.load_base(folder, flan.torch.device("cpu"), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    stored = flan.torch.load(folder / "pytorch_model-00001-of-00003.bin", weights_only=True)
    assert model.shared.weight.equal(stored["shared.weight"].to(dtype))


@pytest.mark.parametrize("quantization, bytes_each", [("int8", 1), ("int4", 0.5)])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_quantised_weights_take_the_memory_of_quantised_weights(
    flan, load, adapted, model_folder, quantization, bytes_each, with_adapter
):
    """Attention and wi are quantised; all the rest, `wo` and the embeddings too, stays in bf16: nothing is upcast."""
    torch = flan.torch
    model = load(torch.bfloat16, quantization)
    if with_adapter:
        model = adapted(dtype=torch.bfloat16, quantization=quantization).get_base_model()
    quantised = re.compile(r".*(Attention\.[qkvo]|DenseReluDense\.wi_[01])\.weight")
    expected = 0
    for name, value in load_file(model_folder / "model.safetensors").items():
        expected += value.numel() * (bytes_each if quantised.fullmatch(name) else 2)
    parameters = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    assert sum(p.nbytes for p in parameters.values()) == expected
    for name, p in parameters.items():
        assert p.dtype in (torch.int8, torch.uint8) if quantised.search(name.replace(".base_layer", "")) else (
            p.dtype == torch.bfloat16), name  # fmt: skip
        assert not p.requires_grad or not with_adapter


def test_int4_is_normal_float(flan, load):
    from bitsandbytes.nn import Linear4bit

    layers = [module for module in load(quantization="int4").modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 24 + 8
    assert {(layer.weight.quant_type, layer.compute_dtype) for layer in layers} == {("nf4", flan.torch.float32)}


# Dettmers et al. 2023, appendix E. The widest gap is the first one, 0.304.
NF4 = (-1.0, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0.0,
       0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1.0)  # fmt: skip


def test_quantised_weights_are_the_nearest_values(flan, load, model_folder):
    """INT8: 127 steps up to the largest value of a row. NF4: its 16 values times the largest one of 64 weights."""
    from bitsandbytes.functional import dequantize_4bit

    levels = flan.torch.tensor(NF4)
    stored = load_file(model_folder / "model.safetensors")
    int8, int4 = load(quantization="int8"), load(quantization="int4")
    for name in (*ATTENTION, "encoder.block.1.layer.1.DenseReluDense.wi_1"):
        exact = stored[f"{name}.weight"]
        weight = int8.get_submodule(name).weight
        largest = exact.abs().amax(1, keepdim=True)
        assert ((weight.data * weight.SCB[:, None] / 127 - exact).abs() <= largest / 127 * 0.6).all(), name  # via fp16
        weight = int4.get_submodule(name).weight
        blocks = exact.reshape(-1, 64)
        largest = blocks.abs().amax(1, keepdim=True)
        nearest = levels[(blocks / largest).unsqueeze(-1).sub(levels).abs().argmin(-1)] * largest
        found = dequantize_4bit(weight.data, weight.quant_state).reshape(-1, 64)
        assert ((found - blocks).abs() <= (nearest - blocks).abs() + 1e-4 * largest).all(), name


def test_int8_computes_nearly_the_same(load, logits):
    exact, rounded = logits(load()), logits(load(quantization="int8"))
    assert 0 < (rounded - exact).std() / exact.std() < 0.2


@pytest.mark.parametrize("kernel", ["MatMul8bitFp", "MatMul8bitLt"])  # of a CPU and of a GPU; here both run
def test_an_int8_layer_does_not_keep_its_input(flan, load, monkeypatch, kernel):
    """Its weights are frozen: nothing needs the input. bitsandbytes would keep it, as the second layer shows."""
    functions, torch = flan.bitsandbytes.autograd._functions, flan.torch
    monkeypatch.setattr(flan.bitsandbytes, "matmul", lambda x, weight, bias, state: getattr(functions, kernel).apply(
        x, weight, None, bias, state))  # fmt: skip
    layer, plain = (load(quantization="int8").encoder.block[0].layer[0].SelfAttention.q.train() for _ in range(2))
    plain._forward_hooks.clear()
    is_kept, gradients, start = [], [], torch.randn(2, 5, layer.in_features)
    for module in (layer, plain):
        x = start.clone().requires_grad_()
        hidden = x * 1
        storage = weakref.ref(hidden.untyped_storage())
        output = module(hidden)
        del hidden
        is_kept.append(storage() is not None)
        output.square().sum().backward()
        gradients.append(x.grad)
    assert is_kept == [False, True]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_an_evaluation_does_not_change_the_gradient(flan, model_folder, tmp_path, quantization):
    """bitsandbytes packs NF4 weights for an inference kernel of some CPUs, through which no gradient flows back."""
    torch = flan.torch
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"dropout_rate": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    base = flan.load_base(folder, torch.device("cpu"), torch.float32, quantization)
    model = flan.add_lora(base, flan.parse_settings(["--lora-dropout", "0"]))
    tokens = torch.randint(3, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens[:, :9].contiguous()}

    def gradients():
        model.train()
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    assert all(grad.any() for name, grad in before.items() if "lora_B" in name)
    model.eval()
    with torch.inference_mode():
        model(**batch)
    after = gradients()
    for name, grad in before.items():
        torch.testing.assert_close(after[name], grad, msg=lambda text, name=name: f"{name}: {text}")


# ----------------------------------------------------------------------------------------------------------------------
# LoRA
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_lora_on_exactly_q_k_v_o(flan, load, quantization):
    model = flan.add_lora(load(quantization=quantization), flan.parse_settings(["--model", "base"]))
    found = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert found == ATTENTION
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trainable) == {f"base_model.model.{name}.lora_{ab}.default.weight" for name in ATTENTION for ab in "AB"}
    assert {tuple(p.shape) for p in trainable.values()} == {(16, 64), (64, 16)}
    assert {p.dtype for p in trainable.values()} == {flan.torch.float32}
    for layer in found:
        module = model.get_submodule(f"base_model.model.{layer}")
        assert (module.scaling["default"], module.lora_dropout["default"].p) == (32 / 16, 0.05)
        assert module.lora_A["default"].weight.any() and not module.lora_B["default"].weight.any()
        assert module.lora_A["default"].bias is None and module.lora_B["default"].bias is None


def test_lora_flags(flan, load):
    flags = ["--lora-targets", "wi_0", "v", "--lora-r", "3", "--lora-alpha", "6", "--lora-dropout", "0"]
    model = flan.add_lora(load(), flan.parse_settings(flags))
    layers = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    wi_0 = {f"{block}.DenseReluDense.wi_0" for i in (0, 1) for block in (f"encoder.block.{i}.layer.1",
                                                                          f"decoder.block.{i}.layer.2")}  # fmt: skip
    assert set(layers) == {name for name in ATTENTION if name.endswith(".v")} | wi_0
    for module in layers.values():
        assert (module.lora_A["default"].out_features, module.scaling["default"]) == (3, 2)


def test_lora_computes_w_plus_alpha_over_r_b_a(flan, load, adapted, logits):
    """Hu et al. 2021, equation 3, put into a plain model by hand."""
    model = adapted("--lora-r", "4", "--lora-alpha", "10")
    plain = load()
    assert not flan.torch.allclose(logits(model), logits(plain), atol=1e-2)
    for layer in ATTENTION:
        module = model.get_submodule(f"base_model.model.{layer}")
        a, b = (getattr(module, name)["default"].weight.data for name in ("lora_A", "lora_B"))
        plain.get_submodule(layer).weight.data += 10 / 4 * b @ a
    flan.torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how_it_ends", ["well", "with an exception"])
def test_merging_for_a_while_leaves_no_trace(flan, adapted, logits, how_it_ends):
    model = adapted()
    before, expected = weights_of(model), logits(model)
    layer = model.get_submodule("base_model.model.decoder.block.1.layer.1.EncDecAttention.q")
    try:
        with flan.merged_adapter(model) as merged:
            assert layer.merged
            update = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            change = layer.get_base_layer().weight - before[layer_name(model, layer)]
            flan.torch.testing.assert_close(change, update, atol=1e-6, rtol=1e-4)
            flan.torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
            if how_it_ends == "with an exception":
                raise InterruptedError
    except InterruptedError:
        pass
    after = weights_of(model)
    assert list(after) == list(before)
    assert all(after[name].equal(before[name]) for name in before)
    assert not layer.merged and logits(model).equal(expected)


def layer_name(model, layer):
    return next(name for name, module in model.named_modules() if module is layer) + ".base_layer.weight"


def test_merging_for_a_while_gives_back_the_same_bits(flan, adapted):
    """Which adding and subtracting the update does not."""
    model = adapted()
    before = weights_of(model)
    for _ in range(3):
        with flan.merged_adapter(model):
            assert any(not value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    naive = adapted()  # what this guards against
    naive.merge_adapter()
    naive.unmerge_adapter()
    assert any(not value.equal(before[name]) for name, value in naive.state_dict().items())


@pytest.mark.parametrize("dtype, quantization", [("float32", "int8"), ("float32", "int4"), ("bfloat16", None),
                                                 ("bfloat16", "int8"), ("bfloat16", "int4")])  # fmt: skip
def test_only_fp32_weights_are_merged(flan, adapted, logits, dtype, quantization):
    """So bf16, INT8 and NF4 are scored alike, with the adapter beside the base: merging rounds the update away."""
    model = adapted(dtype=getattr(flan.torch, dtype), quantization=quantization)
    before, expected = weights_of(model), logits(model)
    with flan.merged_adapter(model):
        assert all(value.equal(before[name]) for name, value in model.state_dict().items())
        assert logits(model).equal(expected)


def test_a_bare_model_has_nothing_to_merge(flan, load):
    model = load()
    with flan.merged_adapter(model) as same:
        assert same is model


def test_saving_is_whole_or_absent_and_names_the_base(flan, adapted, model_folder, tmp_path, monkeypatch):
    model, tokenizer = adapted(), flan.load_tokenizer_and_config(model_folder)[0]
    folder, args = tmp_path / "adapter", flan.parse_settings(["--model", "small"])
    flan.save_result(tmp_path, model, tokenizer, args)
    names = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "google/flan-t5-small"
    first = (folder / "adapter_model.safetensors").read_bytes()
    model.get_submodule("base_model.model.encoder.block.0.layer.0.SelfAttention.q").lora_B["default"].weight.data += 1

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(flan.UserError, match="disk full"):
        patch.setattr(type(tokenizer), "save_pretrained", fail)
        flan.save_result(tmp_path, model, tokenizer, args)
    assert (folder / "adapter_model.safetensors").read_bytes() == first
    flan.save_result(tmp_path, model, tokenizer, args)
    assert (folder / "adapter_model.safetensors").read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_an_adapter_loads_as_it_was_saved(flan, load, adapted, logits, model_folder, tmp_path, quantization):
    model = adapted(quantization=quantization)
    args = flan.parse_settings(["--model", str(model_folder)])
    flan.save_result(tmp_path, model, flan.load_tokenizer_and_config(model_folder)[0], args)
    again = flan.load_adapter(load(quantization=quantization), tmp_path / "adapter")
    assert logits(again).equal(logits(model))
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_weights_are_read_without_running_code(flan, tmp_path, tokenizer_folder):
    """A pickle that would create a file is refused."""
    from fake_hub import flan_t5_xxl_sharded_fp16

    folder = flan_t5_xxl_sharded_fp16(tmp_path, tokenizer_folder)
    mark = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return mark.touch, ()

    shard = folder / "pytorch_model-00001-of-00003.bin"
    flan.torch.save({"shared.weight": Bomb()}, shard)
    with pytest.raises(flan.UserError, match="weights with code in them, which is not run"):
        flan.load_base(folder, flan.torch.device("cpu"), flan.torch.float32)
    assert not mark.exists()
    flan.torch.load(shard, weights_only=False)
    assert mark.exists(), "not a real bomb"


def test_remote_code_is_not_run(flan, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSeq2SeqLM": "modeling_x.X", "AutoConfig": "modeling_x.C"}
    (folder / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "executed"
    (folder / "modeling_x.py").write_text(f"open({str(mark)!r}, 'w')")
    flan.load_tokenizer_and_config(folder)
    flan.load_base(folder, flan.torch.device("cpu"), flan.torch.float32)
    assert not mark.exists()
