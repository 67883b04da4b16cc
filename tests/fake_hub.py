"""A miniature Hugging Face Hub on loopback, so that the Hub code paths run on a machine that cannot reach the real one.

    with FakeHub(root) as hub:
        subprocess.run([sys.executable, "flan-t5_samsum.py", "--model", "small"], env=hub.environment(cache_folder))
        assert "model.safetensors" in hub.downloads("google/flan-t5-small")

`root/models/<owner>/<name>/` and `root/datasets/<owner>/<name>/` hold the files of one repository each, with the single
branch `main`. The server knows the routes that huggingface_hub, transformers and datasets use for reading (the "Hub API
Endpoints" page of the Hub's documentation says what they answer). Every request is kept in `hub.requests`; what the
server does not know gets a plain 404 and is also kept in `hub.unknown`.
"""

import csv
import hashlib
import json
import os
import random
import shutil
import sys
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

# Kept in Git LFS by the real Hub: their ETag is the SHA-256 of the content. Any other file has its git blob id.
LFS_SUFFIXES = {".bin", ".safetensors", ".parquet", ".model", ".h5", ".msgpack", ".ot", ".tflite"}


class Request(NamedTuple):
    """One answered request: for example `Request("HEAD", "/google/flan-t5-small/resolve/main/config.json", 200)`."""

    method: str
    path: str  # with the query, as it came
    status: int


class RepositoryFile(NamedTuple):
    """What the Hub knows about one file of a repository."""

    path: Path
    size: int  # bytes
    git_id: str  # SHA-1, 40 hex digits
    sha256: str

    @property
    def in_lfs(self) -> bool:
        return self.path.suffix in LFS_SUFFIXES

    @property
    def etag(self) -> str:
        return self.sha256 if self.in_lfs else self.git_id


@cache
def _digests(path: Path, size: int, modified: int) -> tuple[str, str]:
    """git blob id and SHA-256 of a file. Size and time of change are arguments so that an edited file is read again."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % size + content).hexdigest(), hashlib.sha256(content).hexdigest()


def repository_files(folder: Path) -> dict[str, RepositoryFile]:
    """All files below `folder`, by their name in the repository (forward slashes), sorted."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        status = path.stat()
        digests = _digests(path, status.st_size, status.st_mtime_ns)
        files[path.relative_to(folder).as_posix()] = RepositoryFile(path, status.st_size, *digests)
    return files


def commit_of(files: dict[str, RepositoryFile]) -> str:
    """A commit hash (40 hex digits) that changes whenever a file does."""
    return hashlib.sha1(json.dumps([(name, file.git_id) for name, file in files.items()]).encode()).hexdigest()


def tree_entry(name: str, file: RepositoryFile | None) -> dict:
    """One row of the answers of /tree and /paths-info. A folder is a name without a file."""
    if file is None:
        return {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}
    entry = {"type": "file", "path": name, "size": file.size, "oid": file.git_id}
    if file.in_lfs:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # clients keep the connection open, as with the real Hub
    server: "_Server"

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def log_message(self, *_) -> None:
        """Requests are recorded in `FakeHub.requests`; the terminal belongs to pytest."""

    def _route(self) -> None:
        hub = self.server.hub
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if hub.silent:
            self._record(0)
            hub.closing.wait()  # the connection is open and no byte ever comes
            self.close_connection = True
            return
        # quoted slashes (revision refs%2Fpr%2F1) must not split a part: unquote after the split
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        match parts:
            case ["api", ("models" | "datasets") as kind, owner, name, *rest]:
                self._api(kind, f"{owner}/{name}", rest, body)
            case ["datasets", owner, name, "resolve", revision, *path] if path:
                self._file("datasets", f"{owner}/{name}", revision, "/".join(path))
            case [owner, name, "resolve", revision, *path] if path:
                self._file("models", f"{owner}/{name}", revision, "/".join(path))
            case _:
                self._unknown()

    def _repository(self, kind: str, repo_id: str, revision: str) -> tuple[dict[str, RepositoryFile], str] | None:
        """The repository's files and its commit, or None once the request has been answered with an error."""
        folder = self.server.hub.root / kind / repo_id
        if not folder.is_dir():
            return self._error("RepoNotFound", "Repository not found")
        files = repository_files(folder)
        commit = commit_of(files)
        if revision not in ("main", commit):
            return self._error("RevisionNotFound", f"Invalid rev id: {revision}")
        return files, commit

    def _api(self, kind: str, repo_id: str, rest: list[str], body: bytes) -> None:
        """/api/models/<id>[/revision/<rev>], .../tree/<rev>[/<folder>] and .../paths-info/<rev>."""
        match self.command, rest:
            case "GET", [] | ["revision", _]:
                endpoint, revision, folder = "info", (rest or ["", "main"])[1], ""
            case "GET", ["tree", revision, *path]:
                endpoint, folder = "tree", "/".join(path)
            case "POST", ["paths-info", revision]:
                endpoint, folder = "paths-info", ""
            case _:
                return self._unknown()
        repository = self._repository(kind, repo_id, revision)
        if repository is None:
            return None
        files, commit = repository
        folders = {parent.as_posix(): None for name in files for parent in Path(name).parents if parent != Path(".")}
        if endpoint == "info":
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repo_id, "sha": commit, "private": False, "gated": False, "disabled": False, "tags": []}
            return self._json(info | {"siblings": siblings})
        if endpoint == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            found = folders | files
            return self._json([tree_entry(name, found[name]) for name in wanted if name in found])
        if folder and folder not in folders:
            return self._error("EntryNotFound", f"{folder} does not exist on {revision}", commit)
        query = parse_qs(urlsplit(self.path).query)
        below = folder + "/" if folder else ""
        rows = {name: file for name, file in sorted((folders | files).items()) if name.startswith(below)}
        if query.get("recursive", ["false"])[0].lower() != "true":
            rows = {name: file for name, file in rows.items() if "/" not in name[len(below) :]}
        return self._json([tree_entry(name, file) for name, file in rows.items()])

    def _file(self, kind: str, repo_id: str, revision: str, name: str) -> None:
        """/<id>/resolve/<rev>/<path>: the content of one file, whole or the asked range of bytes."""
        repository = self._repository(kind, repo_id, revision)
        if repository is None:
            return
        files, commit = repository
        if name not in files:
            self._error("EntryNotFound", "Entry not found", commit)
            return
        file = files[name]
        content = file.path.read_bytes()
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file.in_lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        status = 200
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, file.size - int(last))
            stop = min(int(last) + 1, file.size) if first and last else file.size
            if start >= stop:
                self._answer(416, b"", {"Content-Range": f"bytes */{file.size}"})
                return
            content, status = content[start:stop], 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
        self._answer(status, content, headers)

    def _unknown(self) -> None:
        self.server.hub.unknown.append(Request(self.command, self.path, 404))
        self._answer(404, b'{"error": "the fake Hub has no such route"}')

    def _error(self, code: str, message: str, commit: str | None = None) -> None:
        # huggingface_hub chooses its exception by the code, and with the commit it remembers that a file is missing
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._answer(404, b"", headers | ({"X-Repo-Commit": commit} if commit else {}))

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _record(self, status: int) -> None:
        self.server.hub.requests.append(Request(self.command, self.path, status))

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self._record(status)
        self.send_response(status)
        for key, value in {"Content-Type": "application/octet-stream", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: "FakeHub"

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a killed client is part of some tests
            super().handle_error(request, client_address)


class FakeHub:
    """Serves `root` on a free port of 127.0.0.1 from `__enter__` to `__exit__`.

    With `silent=True` it accepts every connection and never answers, like a Hub behind a broken firewall.
    """

    def __init__(self, root: str | Path, silent: bool = False):
        self.root = Path(root)
        self.silent = silent
        self.closing = threading.Event()
        self.requests: list[Request] = []
        self.unknown: list[Request] = []

    def __enter__(self) -> "FakeHub":
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, cache_folder: str | Path, offline: bool = False) -> dict[str, str]:
        """The environment for a subprocess that talks to this Hub and to nothing else, with its own cache."""
        return environment(self.endpoint, cache_folder, offline)

    def downloads(self, repo_id: str) -> list[str]:
        """The files of a model (or data set) whose content was sent, each once per GET, in order."""
        prefixes = (f"/{repo_id}/resolve/", f"/datasets/{repo_id}/resolve/")
        sent = [urlsplit(path).path for method, path, status in self.requests if method == "GET" and status < 300]
        return [unquote(path.split("/resolve/")[1].partition("/")[2]) for path in sent if path.startswith(prefixes)]

    def forget(self) -> None:
        """Empty the records, for example between a first and a second run."""
        self.requests.clear()
        self.unknown.clear()


def environment(endpoint: str, cache_folder: str | Path, offline: bool = False) -> dict[str, str]:
    """This process's environment without its Hub settings, tokens and proxies, for an endpoint and a cache of its own.

    Only what isolates a test is set here. What a script needs to behave well (time-outs, no conversion of old
    checkpoints) is the script's own affair, so that a user gets it too.
    """
    settings = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "DATASETS_", "DISABLE_SAFETENSORS_CONVERSION")
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(settings) and not key.lower().endswith("_proxy")
    }
    return kept | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(Path(cache_folder).resolve()),
        "HF_HUB_DISABLE_XET": "1",  # Xet fetches files from servers of its own
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets counts every load at s3.amazonaws.com, even that of a local file
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "RES_OPTIONS": "timeout:1 attempts:1",  # datasets looks up datasets-server.127.0.0.1, which no name server has
        **({"HF_HUB_OFFLINE": "1"} if offline else {}),
    }


# Repositories to serve. Each function writes one below `root` under its real name and returns its folder. The fields
# are those of the real repositories, the sizes are tiny and the weights random: they prove the path, not the quality.

SAFETENSORS_METADATA = {"format": "pt"}  # the metadata without which transformers refuses a safetensors file

# google/flan-t5-small as published, except for the sizes of its layers.
FLAN_T5_CONFIG = {
    "architectures": ["T5ForConditionalGeneration"],
    "classifier_dropout": 0.0,
    "d_ff": 64,
    "d_kv": 8,
    "d_model": 32,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    # Left over from T5: beam search settings that must not slip into a fine-tuned model's generation.
    "task_specific_params": {
        "summarization": {
            "early_stopping": True,
            "length_penalty": 2.0,
            "max_length": 200,
            "min_length": 30,
            "no_repeat_ngram_size": 3,
            "num_beams": 4,
            "prefix": "summarize: ",
        },
        **{
            f"translation_en_to_{code}": {
                "early_stopping": True,
                "max_length": 300,
                "num_beams": 4,
                "prefix": f"translate English to {language}: ",
            }
            for code, language in {"de": "German", "fr": "French", "ro": "Romanian"}.items()
        },
    },
    "tie_word_embeddings": False,
    "transformers_version": "4.33.0.dev0",
    "use_cache": True,
}

# openai-community/gpt2 as published, except for the sizes. The ids of the end-of-text token follow the vocabulary.
GPT2_CONFIG = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 128,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 128,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}


def flan_t5_small(root: str | Path, tokenizer_folder: str | Path, seed: int = 0) -> Path:
    """google/flan-t5-small: safetensors, beside the same weights in formats that nobody should download."""
    from safetensors.torch import save_file

    folder = Path(root) / "models/google/flan-t5-small"
    config = _copy_tokenizer(folder, tokenizer_folder)
    weights = _random_flan_t5(config, seed)
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        del weights[name]  # copies of shared.weight, which safetensors refuses
    save_file(weights, folder / "model.safetensors", SAFETENSORS_METADATA)
    _write_json(folder / "config.json", config)
    special_tokens = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **special_tokens})
    _other_formats(folder, "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack")
    return folder


def flan_t5_xxl_sharded_fp16(root: str | Path, tokenizer_folder: str | Path, shards: int = 3, seed: int = 1) -> Path:
    """philschmid/flan-t5-xxl-sharded-fp16: fp16 in several pickled shards, as repositories of 2022 look.

    There is no safetensors file and no generation_config.json, and the shared embedding is stored three times.
    """
    import torch

    folder = Path(root) / "models/philschmid/flan-t5-xxl-sharded-fp16"
    config = _copy_tokenizer(folder, tokenizer_folder) | {"_name_or_path": "google/flan-t5-xxl"}
    weights = {name: value.half() for name, value in _random_flan_t5(config, seed).items()}
    _write_json(folder / "config.json", config | {"torch_dtype": "float16"})
    names, weight_map = list(weights), {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        torch.save({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    metadata = {"total_size": sum(value.nbytes for value in weights.values())}
    _write_json(folder / "pytorch_model.bin.index.json", {"metadata": metadata, "weight_map": weight_map})
    return folder


def gpt2_repo(root: str | Path, seed: int = 0) -> Path:
    """openai-community/gpt2: OpenAI's names without the prefix `transformer.`, the causal masks among the weights.

    Its byte-level BPE is trained on the text of this file: 256 bytes, 256 merges and, last as in the real vocabulary,
    the end-of-text token.
    """
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = Path(root) / "models/openai-community/gpt2"
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([__file__], trainer)
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    _write_json(folder / "vocab.json", dict(vocabulary), indent=None)
    _write_json(folder / "tokenizer_config.json", {"model_max_length": GPT2_CONFIG["n_positions"]})

    end_of_text = {"bos_token_id": len(vocabulary) - 1, "eos_token_id": len(vocabulary) - 1}
    config = GPT2_CONFIG | end_of_text | {"vocab_size": len(vocabulary)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = GPT2LMHeadModel(GPT2Config(**config)).transformer.state_dict()  # the head is tied to wte
    context = config["n_positions"]
    for layer in range(config["n_layer"]):
        weights[f"h.{layer}.attn.bias"] = torch.ones(context, context).tril()[None, None]
    save_file(weights, folder / "model.safetensors", SAFETENSORS_METADATA)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **end_of_text})
    _other_formats(folder, "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "64.tflite")
    return folder


def samsum_csv(root: str | Path, rows: dict[str, list[dict[str, str]]] | None = None) -> Path:
    """knkarthick/samsum: train.csv, validation.csv and test.csv with the columns id, dialogue and summary.

    `rows` gives the rows of each split (default: 24, 8 and 8 of `samsum_rows`). In the middle of the train rows comes
    one more without a dialogue, with the id of the real broken row: `datasets` reads that dialogue as None.
    """
    folder = Path(root) / "datasets/knkarthick/samsum"
    folder.mkdir(parents=True)
    rows = rows or {split: samsum_rows(split, count) for split, count in SAMSUM_COUNTS.items()}
    for split, split_rows in rows.items():
        with open(folder / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["id", "dialogue", "summary"])
            writer.writeheader()
            middle = len(split_rows) // 2
            broken = [SAMSUM_BROKEN_ROW] if split == "train" else []
            writer.writerows(split_rows[:middle] + broken + split_rows[middle:])
    return folder


SAMSUM_COUNTS = {"train": 24, "validation": 8, "test": 8}
SAMSUM_BROKEN_ROW = {"id": "13828807", "dialogue": "", "summary": "A summary of nothing."}
# What A says, what B answers, and the summary.
_SCENES = [
    ("Do you still have my {thing}?", "Yes, sorry! I will bring it {time}", "{b} will bring {a} the {thing} {time}."),
    ("I lost the {thing} :(", 'Again? "Be careful", I said', "{a} lost the {thing}, although {b} had said it."),
    ("Can we meet {time}? I need a {thing}", "Sure, take mine", "{b} gives {a} a {thing} {time}."),
    ("I bought a {thing}, it was cheap", "Nice, show me {time}", "{a} bought a {thing} and shows it to {b} {time}."),
]
_NAMES = ["Ada", "Bruno", "Chloé", "Dmitri", "Esra", "Femi", "Greta"]
_THINGS = ["bike", "blue umbrella", "old phone", "tent", "guitar"]
_TIMES = ["tonight", "tomorrow at 7", "on Friday"]


def samsum_rows(split: str, count: int) -> list[dict[str, str]]:
    """`count` short messenger dialogues with summaries, always the same for a split. Most have Windows line breaks."""
    chooser, rows = random.Random(split), []
    for number in range(count):
        ask, answer, summary = chooser.choice(_SCENES)
        a, b = chooser.sample(_NAMES, 2)
        words = {"a": a, "b": b, "thing": chooser.choice(_THINGS), "time": chooser.choice(_TIMES)}
        turns = [f"{a}: Hi {b}!", f"{a}: {ask}", f"{b}: {answer}", f"{a}: Ok, thanks"]
        line_break = "\n" if number % 8 == 7 else "\r\n"
        rows.append(
            {
                # The real ids are strings too: numbers, some with a suffix.
                "id": f"1{len(split)}{number:06}" + ("-1" if number % 4 == 3 else ""),
                "dialogue": line_break.join(turns).format(**words),
                "summary": summary.format(**words),
            }
        )
    return rows


def _copy_tokenizer(folder: Path, tokenizer_folder: str | Path) -> dict:
    """Start a Flan-T5 repository with a tokenizer's files; returns the configuration with its size of the vocabulary.

    The embedding is padded beyond the tokenizer to the next multiple of 128, as the real 32,128 rows for 32,100 pieces.
    """
    from tokenizers import Tokenizer

    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model"):
        if (Path(tokenizer_folder) / name).exists():
            shutil.copy(Path(tokenizer_folder) / name, folder)
    pieces = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    return FLAN_T5_CONFIG | {"vocab_size": (pieces // 128 + 1) * 128}


def _random_flan_t5(config: dict, seed: int) -> dict:
    """All weights by name, fp32. The head is drawn here: in transformers 5 a T5 that is not loaded is always tied."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = T5ForConditionalGeneration(T5Config(**config)).state_dict()
        head = torch.randn(config["vocab_size"], config["d_model"]) * config["d_model"] ** -0.5
    return weights | {"lm_head.weight": head}


def _other_formats(folder: Path, *names: str) -> None:
    """Files that the real repository has as well, gigabytes in all: a test can assert that they stay where they are."""
    for name in names:
        (folder / name).write_bytes(b"the same weights in another format")


def _write_json(path: Path, value: dict, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
