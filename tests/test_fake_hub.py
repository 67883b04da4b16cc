"""The miniature Hub answers as huggingface_hub, transformers and datasets expect, and its repositories load."""

import http.client
import json
import subprocess

import pytest
from conftest import python
from fake_hub import (
    FLAN_T5_CONFIG,
    FakeHub,
    Request,
    environment,
    flan_t5_small,
    flan_t5_xxl_sharded_fp16,
    gpt2_repo,
    samsum_csv,
    samsum_rows,
)

SMALL, XXL, GPT2 = "google/flan-t5-small", "philschmid/flan-t5-xxl-sharded-fp16", "openai-community/gpt2"


def run(code: str, env: dict[str, str]):
    """Run Python code in a fresh process, as the Hub's address is read at import; returns what it prints as JSON."""
    done = subprocess.run([*python(), "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ask(hub: FakeHub, method: str, path: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=5)
    connection.request(method, path, headers=headers or {})
    response = connection.getresponse()
    response.content = response.read()
    connection.close()
    return response


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A tokenizer of single characters with the special tokens where Flan-T5 has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("tokenizer")
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(pieces[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    special_tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", **special_tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory, tokenizer_folder):
    root = tmp_path_factory.mktemp("hub")
    flan_t5_small(root, tokenizer_folder)
    flan_t5_xxl_sharded_fp16(root, tokenizer_folder)
    gpt2_repo(root)
    samsum_csv(root)
    return root


@pytest.fixture
def hub(tmp_path):
    """A Hub with the one repository o/n: a text file, a binary one and a folder."""
    folder = tmp_path / "models/o/n"
    (folder / "sub").mkdir(parents=True)
    (folder / "hello.txt").write_bytes(b"hello\n")
    (folder / "abc.bin").write_bytes(b"abc")
    (folder / "sub/a b.txt").write_bytes(b"0123456789")
    with FakeHub(tmp_path) as hub:
        yield hub


def test_etags_are_git_blob_ids_or_sha256(hub):
    # printf 'hello\n' | git hash-object --stdin, and the SHA-256 of "abc" from FIPS 180-4
    head = ask(hub, "HEAD", "/o/n/resolve/main/hello.txt")
    assert (head.status, head.headers["ETag"]) == (200, '"ce013625030ba8dba906f756967f9e9ca394464a"')
    assert (head.headers["Content-Length"], head.content) == ("6", b"")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert ask(hub, "HEAD", "/o/n/resolve/main/abc.bin").headers["X-Linked-Etag"] == f'"{sha256}"'


@pytest.mark.parametrize(
    "asked, status, content, content_range",
    [
        ("bytes=2-5", 206, b"2345", "bytes 2-5/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-2", 206, b"89", "bytes 8-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=10-", 416, b"", "bytes */10"),
    ],
)
def test_ranges(hub, asked, status, content, content_range):
    answer = ask(hub, "GET", "/o/n/resolve/main/sub/a%20b.txt", {"Range": asked})
    assert (answer.status, answer.content, answer.headers["Content-Range"]) == (status, content, content_range)
    assert hub.downloads("o/n") == (["sub/a b.txt"] if status == 206 else [])


def test_a_missing_file_comes_with_the_commit(hub):
    # huggingface_hub then remembers that the commit has no such file, and does not ask again
    commit = json.loads(ask(hub, "GET", "/api/models/o/n").content)["sha"]
    missing = ask(hub, "HEAD", "/o/n/resolve/main/none.txt")
    assert (missing.status, missing.headers["X-Error-Code"]) == (404, "EntryNotFound")
    assert missing.headers["X-Repo-Commit"] == commit


def test_an_edited_file_makes_a_new_commit(hub):
    first = json.loads(ask(hub, "GET", "/api/models/o/n").content)["sha"]
    assert json.loads(ask(hub, "GET", f"/api/models/o/n/revision/{first}").content)["sha"] == first
    (hub.root / "models/o/n/hello.txt").write_bytes(b"changed")
    assert json.loads(ask(hub, "GET", "/api/models/o/n").content)["sha"] != first


def test_what_it_does_not_know_is_recorded(hub):
    assert ask(hub, "GET", "/api/models/o/n/commits/main").status == 404
    assert hub.unknown == hub.requests == [Request("GET", "/api/models/o/n/commits/main", 404)]
    hub.forget()
    assert hub.unknown == hub.requests == []


def test_silent_hub_never_answers(hub):
    hub.silent = True
    connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=0.3)
    connection.request("GET", "/api/models/o/n")
    with pytest.raises(TimeoutError):
        connection.getresponse()
    assert hub.requests == [Request("GET", "/api/models/o/n", 0)]


def test_environment_leaves_the_users_hub_settings_out(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OTHER", "stays")
    env = environment("http://127.0.0.1:9", tmp_path)
    assert env["HF_ENDPOINT"] == "http://127.0.0.1:9" and env["HF_HOME"] == str(tmp_path) and env["OTHER"] == "stays"
    assert not {"HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "https_proxy", "ALL_PROXY"} & {
        *env
    }
    assert environment("http://127.0.0.1:9", tmp_path, offline=True)["HF_HUB_OFFLINE"] == "1"


def test_huggingface_hub_reads_it(hub, tmp_path):
    code = """
import json, pathlib
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
errors = []
for repo, file, revision in [("o/n", "none", "main"), ("o/none", "hello.txt", "main"), ("o/n", "hello.txt", "v2")]:
    try:
        hf_hub_download(repo, file, revision=revision)
    except HfHubHTTPError as error:
        errors.append(type(error).__name__)
tree = {}
for recursive in (False, True):
    tree[recursive] = [entry.path for entry in HfApi().list_repo_tree("o/n", recursive=recursive)]
infos = [info.path for info in HfApi().get_paths_info("o/n", ["sub", "sub/a b.txt", "none"])]
folder = pathlib.Path(snapshot_download("o/n"))
files = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
print(json.dumps([errors, tree[False], tree[True], infos, files]))
"""
    errors, top, everything, infos, files = run(code, hub.environment(tmp_path / "cache"))
    assert errors == ["RemoteEntryNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError"]
    assert top == ["abc.bin", "hello.txt", "sub"] and everything == [*top, "sub/a b.txt"]
    assert infos == ["sub", "sub/a b.txt"]
    assert files == {"abc.bin": "abc", "hello.txt": "hello\n", "sub/a b.txt": "0123456789"}
    assert not hub.unknown


def test_transformers_loads_both_flan_t5_and_again_offline(root, tmp_path):
    code = f"""
import json, os
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer
result = []
for name in ("{SMALL}", "{XXL}"):
    model, info = AutoModelForSeq2SeqLM.from_pretrained(name, output_loading_info=True)
    config, tokenizer = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    loss = model.float()(**tokenizer("ab c", return_tensors="pt"), labels=torch.tensor([[5, 1]])).loss
    result.append([str(info["missing_keys"]), str(config.dtype), len(tokenizer), config.vocab_size, loss.item()])
print(json.dumps(result))
"""
    with FakeHub(root) as hub:
        online = run(code, hub.environment(tmp_path))
        assert not hub.unknown
        weights = [[name for name in hub.downloads(repo) if "model" in name] for repo in (SMALL, XXL)]
        hub.forget()
        assert run(code, hub.environment(tmp_path, offline=True)) == online
        assert hub.requests == []
    assert weights[0] == ["model.safetensors"]
    shards = [f"pytorch_model-{number:05}-of-00003.bin" for number in (1, 2, 3)]
    assert sorted(weights[1]) == [*shards, "pytorch_model.bin.index.json"]
    (missing, dtype, tokens, rows, loss), (missing_xxl, dtype_xxl, _, _, loss_xxl) = online
    assert (missing, missing_xxl, dtype, dtype_xxl) == ("set()", "set()", "None", "torch.float16")
    assert (tokens, rows) == (30, 128)
    assert 0 < loss < 50 and 0 < loss_xxl < 50 and loss != loss_xxl


def test_flan_t5_is_untied_and_keeps_the_published_fields(root):
    from safetensors.torch import load_file
    from transformers import AutoModelForSeq2SeqLM

    folder = root / "models" / SMALL
    stored = load_file(folder / "model.safetensors")
    assert not stored["lm_head.weight"].equal(stored["shared.weight"])
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert all(model.get_parameter(name).equal(value) for name, value in stored.items())
    config = json.loads((folder / "config.json").read_text())
    assert config == FLAN_T5_CONFIG | {"vocab_size": 128}
    assert config["task_specific_params"]["summarization"]["num_beams"] == 4


def test_shards_are_fp16_and_load_without_running_pickled_code(root):
    import torch

    folder = root / "models" / XXL
    weight_map = json.loads((folder / "pytorch_model.bin.index.json").read_text())["weight_map"]
    shards = {name: torch.load(folder / name, weights_only=True) for name in {*weight_map.values()}}
    assert len(shards) == 3 and {name: file for file in shards for name in shards[file]} == weight_map
    assert {value.dtype for shard in shards.values() for value in shard.values()} == {torch.float16}


def test_datasets_loads_samsum_with_its_broken_row(root, tmp_path):
    code = """
import json
from datasets import load_dataset
splits = load_dataset("knkarthick/samsum")
print(json.dumps({name: split.to_list() for name, split in splits.items()}))
"""
    with FakeHub(root) as hub:
        online = run(code, hub.environment(tmp_path))
        assert not hub.unknown
        streamed = run(
            code.replace('samsum"', 'samsum", streaming=True').replace("split.to_list()", "list(split)"),
            hub.environment(tmp_path / "other"),
        )
        hub.forget()
        assert run(code, hub.environment(tmp_path, offline=True)) == online
        assert hub.requests == []
    assert streamed == online
    assert [row["id"] for row in online["train"] if row["dialogue"] is None] == ["13828807"]
    assert online["validation"] == samsum_rows("validation", 8) and online["test"] == samsum_rows("test", 8)
    assert len(online["train"]) == 25
    with_windows_breaks = [row for row in online["test"] if "\r\n" in row["dialogue"]]
    assert len(online["test"]) / 2 < len(with_windows_breaks) < len(online["test"])


def test_gpt2_has_the_names_of_the_real_repository(root):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, GPT2LMHeadModel

    folder = root / "models" / GPT2
    stored = load_file(folder / "model.safetensors")
    assert {name.split(".")[0] for name in stored} == {"wte", "wpe", "h", "ln_f"}
    assert stored["h.1.attn.bias"].shape == (1, 1, 128, 128)
    assert stored["h.1.attn.bias"][0, 0, :2, :3].tolist() == [[1, 0, 0], [1, 1, 0]]
    model, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and model.transformer.wte.weight.equal(stored["wte.weight"])
    assert model(torch.tensor([[0, 512]])).logits.shape == (1, 2, 513)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Naïve  token\r\n🙂 <|endoftext|>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and ids[-1] == tokenizer.eos_token_id == 512
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert vocabulary == tokenizer.get_vocab() and (vocabulary["!"], vocabulary["Ġ"]) == (0, 220)  # as in the real one
    assert len((folder / "merges.txt").read_text().splitlines()) == 1 + 256
