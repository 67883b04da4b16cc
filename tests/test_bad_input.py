"""Bad input to both scripts: one line that says what is wrong and the way out, exit code 2, nothing written.

And unusual input that is not bad: it must work. What gpt2_from_scratch.py answers to bad flags, folders and weights is
in test_gpt2_command_line.py; here is what data can do to it.
"""

import json
import shutil
import sys
from pathlib import Path

import fake_hub
import pyarrow
import pyarrow.parquet
import pytest
from conftest import start, wait, write_jsonl
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpt2_from_scratch as gpt2

ROW = {"id": "1", "dialogue": "Ada: hi\nFemi: ho", "summary": "They greet."}
MEGABYTE = "Ada: hello there " * 62_000


class Files:
    """The folder a command is started in, and what the cases put there."""

    def __init__(self, home, model_folder, trained, data):
        self.home, self.model_folder, self.trained, self.data = home, model_folder, trained, data

    def write(self, name, content):
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    def jsonl(self, *rows, name="d.jsonl", count=12):
        """A file of `count` good rows and then `rows`, which are rows or lines."""
        lines = [json.dumps(ROW)] * count + [row if isinstance(row, str) else json.dumps(row) for row in rows]
        return self.write(name, "\n".join(lines) + "\n")

    def splits(self, **rows):
        """The folder chats/ with a file for each split; those not named have good rows."""
        for split in ("train", "validation", "test"):
            write_jsonl(self.home / f"chats/{split}.jsonl", rows.get(split, [ROW] * 3))
        return "chats"

    def parquet(self, name="d.parquet", **columns):
        pyarrow.parquet.write_table(pyarrow.table(columns), self.home / name)
        return name

    def copy(self, folder, name):
        return shutil.copytree(folder, self.home / name)

    def model(self, weights=None, **changes):
        """A copy of the model with changes to its config.json; `weights`: a function of a dictionary of tensors."""
        folder = self.copy(self.model_folder, "model")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        if weights:
            tensors = load_file(folder / "model.safetensors")
            weights(tensors)
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    def adapter(self, weights=None, **changes):
        folder = self.copy(self.trained.folder / "adapter", "adapter")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        if weights:
            tensors = load_file(folder / "adapter_model.safetensors")
            weights(tensors)
            save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    def run(self, metrics):
        self.write("run/metrics.json", metrics)
        (self.home / "run/checkpoints/step-00000006").mkdir(parents=True)
        return "run"


@pytest.fixture
def files(tmp_path, model_folder, trained, data):
    (tmp_path / "home").mkdir()
    return Files(tmp_path / "home", model_folder, trained, data)


def halve(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def with_file(folder, name, content):
    (folder / name).write_text(content)
    return folder


def without(folder, *names):
    for name in names:
        (folder / name).unlink()
    return folder


def tokenizer_of(folder, **changes):
    content = json.loads((folder / "tokenizer_config.json").read_text())
    for name, value in changes.items():
        content.pop(name) if value is None else content.update({name: value})
    return with_file(folder, "tokenizer_config.json", json.dumps(content))


def larger_tokenizer(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"<new{i}>": 480 + i for i in range(200)}
    return with_file(folder, "tokenizer.json", json.dumps(content))


# ----------------------------------------------------------------------------------------------------------------------
# flan-t5_samsum.py. Each case: what is prepared, which gives the command line, and what the line must say: the thing
# and the way out.
# ----------------------------------------------------------------------------------------------------------------------

FLAGS = {
    "--lr 0": "above 0, at most 1", "--lr -1": "above 0, at most 1", "--lr nan": "above 0, at most 1",
    "--lr 2": "above 0, at most 1", "--lr fast": "invalid number value: 'fast'", "--lr": "expected one argument",
    "--epochs 0": "at least 1", "--epochs 1.5": "invalid whole number value: '1.5'", "--epochs -3": "at least 1",
    "--max-steps 0": "at least 1", "--max-steps 1e3": "invalid whole number value", "--batch-size 0": "at least 1",
    "--batch-size 8 --micro-batch-size 3": "--batch-size 8 is not a multiple of --micro-batch-size 3",
    "--micro-batch-size 16": "--batch-size 8 is not a multiple of --micro-batch-size 16",
    "--limit 0": "at least 1", "--seed -1": "at least 0", "--seed 4294967296": "at most 4294967295",
    "--lora-r 0": "at least 1", "--lora-r 100000000000": "at most 65536", "--lora-alpha 0": "above 0",
    "--lora-alpha inf": "above 0", "--lora-dropout 1": "at most 0.99", "--lora-dropout -0.1": "at least 0",
    "--lora-targets": "expected at least one argument", "--max-new-tokens 0": "at least 1",
    "--num-beams 0": "at least 1", "--max-source-length 7": "at least 8", "--max-target-length 1": "at least 2",
    "--int8 --full": "not allowed with argument --int8", "--int8 --int4": "not allowed with argument --int8",
    "--summarize --evaluate": "not allowed with argument --summarize", "--split dev": "choose from",
    **{f"--resume {mode}": "goes on with a training" for mode in
       ("--summarize", "--evaluate", "--export m", "--plan", "--lr-find", "--plot p", "--compare a b")},
    "--adapter runs/a": "to train on, --resume", "--adapter runs/a --plan": "to train on, --resume",
    "--unknown": "unrecognized arguments: --unknown (--help lists", "stray": "unrecognized arguments: stray (--help",
    "--summarise a --max-step 3": "(did you mean --summarize --max-steps?)",
}  # fmt: skip


@pytest.mark.parametrize("flags", FLAGS)
def test_flan_flags(command, tmp_path, flags):
    done = command(*flags.split(), cwd=tmp_path)
    assert done.code == 2 and done.out == "", done
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert flags.split()[-1 if flags == "stray" else 0] in done.err and FLAGS[flags] in done.err
    assert not any(tmp_path.iterdir())


def dataset(make):
    return lambda f: ["--dataset", make(f)]


def model(make):
    return lambda f: ["--dataset", f.data, "--model", make(f)]


def adapter(make):
    return lambda f: ["--summarize", f.write("chat.txt", "Ada: hi"), "--adapter", make(f)]


def summarize(make):
    return lambda f: ["--summarize", make(f), "--adapter", f.trained.folder]


COLUMNS = "there are: id, dialogue, summary"
BAD = {
    # Files and folders
    "no such file": (dataset(lambda f: "nothing.jsonl"), ["nothing.jsonl", "a file or folder"]),
    "no such folder": (dataset(lambda f: "a/b/c"), ["a/b/c", "a file or folder"]),
    "a name that is nothing": (dataset(lambda f: "samsun"), ["samsun", "give samsum"]),
    "a text file": (dataset(lambda f: f.write("d.txt", "Ada: hi")), ["d.txt", ".jsonl", ".csv"]),
    "an empty file": (dataset(lambda f: f.write("d.jsonl", "")), ["d.jsonl has 0 rows", "at least 10"]),
    "nine rows": (dataset(lambda f: f.jsonl(count=9)), ["d.jsonl has 9 rows", "at least 10"]),
    "an empty folder": (dataset(lambda f: (f.home / "d").mkdir() or "d"), ["train and validation and test", "none"]),
    "two kinds of files in a split": (
        dataset(lambda f: (f.splits(), f.write("chats/train.csv", "dialogue,summary\na,b\n"))[0]),
        ["train.csv", "train.jsonl", "are of two kinds"],
    ),
    "a folder with one split": (
        dataset(lambda f: without(f.home / f.splits(), "validation.jsonl", "test.jsonl")),
        ["lacks validation and test", "found train"],
    ),
    "a folder with the name of a file": (dataset(lambda f: (f.home / "d.jsonl").mkdir() or "d.jsonl"), ["lacks train"]),
    "a split in two folders": (
        dataset(lambda f: (f.splits(), f.jsonl(name="chats/other/train.jsonl"))[0]),
        ["chats", "several folders", "give one of them"],
    ),
    "an empty split": (dataset(lambda f: f.splits(test=[])), ["the test split of", "is empty"]),
    "an empty train split": (dataset(lambda f: f.splits(train=[])), ["the train split of", "is empty"]),
    # Rows of the wrong kind
    "a broken line": (dataset(lambda f: f.jsonl('{"dialogue": "x"', ROW)), ["d.jsonl:13: not valid JSON"]),
    "a line cut short": (dataset(lambda f: f.jsonl('{"dialogue": "x')), ["d.jsonl:13: not valid JSON"]),
    "half a character": (
        dataset(lambda f: f.jsonl('{"dialogue": "x \\ud83d", "summary": "y"}')), ["d.jsonl:13: half a character"],
    ),
    "a broken line of 1 MB": (dataset(lambda f: f.jsonl('{"dialogue": "' + MEGABYTE)), ["d.jsonl:13: not valid JSON"]),
    "an object instead of lines": (
        dataset(lambda f: f.write("d.jsonl", json.dumps({"train": [ROW] * 20}, indent=1))),
        ["d.jsonl has 1 rows", "at least 10"],
    ),
    "an object in one line": (
        dataset(lambda f: f.write("d.jsonl", json.dumps({"data": [ROW] * 20}) + "\n")),
        ["d.jsonl has 1 rows", "at least 10"],
    ),
    "an object instead of a list": (
        dataset(lambda f: f.write("d.json", json.dumps({"data": [ROW] * 20}))),
        ["d.json:1: expected rows", "a list of them", "found an object"],
    ),
    "lists": (dataset(lambda f: f.jsonl(["x", "y"])), ["d.jsonl:13: expected rows", "one a line", "found list"]),
    "numbers": (dataset(lambda f: f.jsonl("7")), ["d.jsonl:13: expected rows", "found int"]),
    "strings": (dataset(lambda f: f.write("d.json", '["x", "y"]')), ["d.json has 2 rows", "at least 10"]),
    "nothing but null": (dataset(lambda f: f.write("d.json", "null")), ["d.json:1: expected rows", "found NoneType"]),
    "nesting without end": (dataset(lambda f: f.jsonl("[" * 200_000)), ["d.jsonl:13:", "JSON"]),
    # Fields of the wrong kind
    "a dialogue that is a number": (dataset(lambda f: f.jsonl(ROW | {"dialogue": 7}, count=20)),
                                    ["d.jsonl:21: dialogue is int, not text"]),
    "a dialogue that is a number in a list": (
        dataset(lambda f: f.write("d.json", json.dumps([ROW] * 11 + [ROW | {"dialogue": 7}]))),
        ["d.json:row 12: dialogue is int, not text"],
    ),
    "a key that comes twice": (dataset(lambda f: f.jsonl('{"dialogue": "x", "dialogue": "y", "summary": "z"}')),
                               ["d.jsonl:13: two columns are called dialogue", "rename"]),
    "a dialogue that is a list": (dataset(lambda f: f.splits(train=[ROW, ROW | {"dialogue": ["Ada: hi"]}])),
                                  ["chats/train.jsonl:2: dialogue is list, not text"]),
    "a summary that is an object": (dataset(lambda f: f.splits(test=[ROW | {"summary": {"en": "x"}}])),
                                    ["chats/test.jsonl:1: summary is dict, not text"]),
    "a summary that is false": (dataset(lambda f: f.splits(validation=[ROW | {"summary": False}])),
                                ["chats/validation.jsonl:1: summary is bool, not text"]),
    "dialogues that are all null": (dataset(lambda f: f.splits(train=[ROW | {"dialogue": None}] * 9)),
                                    ["the train split of", "is empty"]),
    "summaries that are all empty": (dataset(lambda f: f.splits(test=[ROW | {"summary": " \n"}] * 9)),
                                     ["the test split of", "is empty"]),
    "a split without the column": (dataset(lambda f: f.splits(test=[{"id": "2", "dialogue": "x"}])),
                                   ["row 1 of test has no column summary"]),
    # Columns
    "columns of other names": (dataset(lambda f: f.jsonl(*[{"text": "x", "gist": "y"}] * 12, count=0)),
                               ["cannot tell the source among text, gist", "--source-column NAME --target"]),
    "two columns that may be it": (dataset(lambda f: f.jsonl(*[ROW | {"article": "z"}] * 12, count=0)),
                                   ["cannot tell the source among", "article", "--source-column NAME"]),
    "a column that is not there": (lambda f: ["--dataset", f.jsonl(), "--target-column", "gist"],
                                   ["no column gist", "--target-column", COLUMNS]),
    # Encodings
    "Latin-1": (dataset(lambda f: f.write("d.jsonl", (json.dumps(ROW) + "\n").encode() * 12 + b'{"x": "Zo\xeb"}')),
                ["d.jsonl:13: not UTF-8 (byte 0xeb)", "convert it"]),
    "UTF-16": (dataset(lambda f: f.write("d.jsonl", (json.dumps(ROW) + "\n").encode("utf-16") * 12)),
               ["d.jsonl:1: not UTF-8 (byte 0xff)", "convert it"]),
    "a photograph": (dataset(lambda f: f.write("d.csv", b"\x89PNG\r\n\x1a\n\0\0")), ["d.csv:1: not UTF-8", "convert"]),
    # CSV
    "a quote that does not end": (dataset(lambda f: f.write("d.csv", 'dialogue,summary\n"Ada: hi,x\n' + "a,b\n" * 20)),
                                  ["d.csv:2: broken CSV"]),
    "text after a quote": (dataset(lambda f: f.write("d.csv", 'dialogue,summary\n"Ada" hi,x\n')),
                           ["d.csv has 1 rows", "at least 10"]),
    "commas without quotes": (dataset(lambda f: f.write("d.csv", "dialogue,summary\n" + "Hi, Ada,greets\n" * 12)),
                              ["d.csv:2: more fields than the header", "quote fields"]),
    "commas without quotes further down": (
        dataset(lambda f: f.write("d.csv", 'dialogue,summary\n"Ada: hi\nFemi: hi",Hi.\n' + "a,b\n" * 12 + "a,b,c\n")),
        ["d.csv:16: more fields"]),
    "only a header": (dataset(lambda f: f.write("d.csv", "dialogue,summary\n")), ["d.csv has 0 rows", "at least 10"]),
    "two columns of one name": (dataset(lambda f: f.write("d.csv", "summary,dialogue,dialogue\n" + "a,b,c\n" * 12)),
                                ["d.csv", "two columns are called dialogue", "rename"]),
    "semicolons, as Excel writes them in Europe": (
        dataset(lambda f: f.write("d.csv", "dialogue;summary\n" + "Ada: hi;They greet.\n" * 12)),
        ["'dialogue;summary' are not separated by commas"]),
    "no header": (dataset(lambda f: f.write("d.csv", "Ada: hi,They greet.\n" * 12)),
                  ["cannot tell the source among Ada: hi", "--source-column NAME"]),
    # Parquet
    "Parquet that is none": (dataset(lambda f: f.write("d.parquet", "PAR1 nonsense")), ["d.parquet", "not a readable"]),
    "Parquet cut short": (dataset(lambda f: halve(f.home / f.parquet(dialogue=["x"] * 99)) or "d.parquet"),
                          ["d.parquet", "not a readable"]),
    "an empty Parquet file": (dataset(lambda f: f.write("d.parquet", "")), ["d.parquet", "not a readable"]),
    "Parquet of numbers": (dataset(lambda f: f.parquet(dialogue=[1] * 12, summary=["x"] * 12)),
                           ["row 1 of train", "dialogue is int, not text"]),
    "Parquet of bytes": (dataset(lambda f: f.parquet(dialogue=[b"x"] * 12, summary=["x"] * 12)),
                         ["row 1 of train", "dialogue is bytes, not text"]),
    # Models
    "no such model folder": (model(lambda f: "./nowhere"), ["./nowhere", "a Hub id (owner/name) or a folder"]),
    "a model name that is nothing": (model(lambda f: "huge"), ["no model huge", "tiny, small"]),
    "a model that is a file": (model(lambda f: f.write("m.safetensors", "x")), ["m.safetensors", "a folder"]),
    "a folder without a model": (model(lambda f: (f.home / "m").mkdir() or "m"), ["m holds no usable model"]),
    "a broken config.json": (model(lambda f: with_file(f.model(), "config.json", "{")), ["no usable model"]),
    "a config.json that is a list": (model(lambda f: with_file(f.model(), "config.json", "[]")), ["no usable model"]),
    "another architecture": (model(lambda f: f.model(model_type="gpt2")), ["is a gpt2 model, not T5"]),
    "an unknown architecture": (model(lambda f: f.model(model_type="gpt9")), ["holds no usable model", "gpt9"]),
    "widths that are words": (model(lambda f: f.model(d_model="wide")), ["holds no usable model", "d_model"]),
    "no weights": (model(lambda f: without(f.model(), "model.safetensors")), ["cannot load the weights in", "model"]),
    "weights cut short": (model(lambda f: (f.model(), halve(f.home / "model/model.safetensors"))[0]),
                          ["cannot load the weights in"]),
    "weights that are none": (model(lambda f: with_file(f.model(), "model.safetensors", "nonsense" * 99)),
                              ["cannot load the weights in"]),
    "weights with one missing": (model(lambda f: f.model(weights=lambda w: w.pop("lm_head.weight"))),
                                 ["lacks weights: lm_head.weight"]),
    "weights of other geometry": (model(lambda f: f.model(d_ff=128)), ["cannot load the weights in"]),
    "a shard that is missing": (
        model(lambda f: with_file(without(f.model(), "model.safetensors"), "model.safetensors.index.json",
                                  '{"metadata": {}, "weight_map": {"shared.weight": "model-1-of-1.safetensors"}}')),
        ["cannot load the weights in"],
    ),
    "no tokenizer": (model(lambda f: without(f.model(), "tokenizer.json", "tokenizer_config.json")),
                     ["holds no tokenizer", "tokenizer.json"]),
    "a broken tokenizer": (model(lambda f: with_file(f.model(), "tokenizer.json", '{"model": 7}')),
                           ["holds no usable model"]),
    "a tokenizer larger than the embedding": (model(lambda f: larger_tokenizer(f.model())),
                                              ["its tokenizer has 6", "its embedding 512 rows"]),
    "a tokenizer without an end": (model(lambda f: tokenizer_of(f.model(), eos_token=None)), ["an end", "token"]),
    "no start token": (model(lambda f: f.model(decoder_start_token_id=None)), ["decoder_start_token_id"]),
    "targets that no layer has": (lambda f: ["--dataset", f.data, "--model", f.model_folder, "--lora-targets", "query"],
                                  ["--lora-targets query"]),
    # Adapters
    "no such adapter": (adapter(lambda f: "nowhere"), ["nowhere holds no adapter", "adapter_config.json"]),
    "a folder without an adapter": (adapter(lambda f: f.data), ["holds no adapter", "adapter_config.json"]),
    "an adapter without weights": (
        adapter(lambda f: without(f.adapter(), "adapter_model.safetensors")), ["adapter", "has no weights"]),
    "an adapter cut short": (adapter(lambda f: (f.adapter(), halve(f.home / "adapter/adapter_model.safetensors"))[0]),
                             ["adapter", "does not fit"]),
    "an adapter of other geometry": (lambda f: [*adapter(lambda f: f.adapter())(f), "--model", "tiny"],
                                     ["adapter", "does not fit", "flan-t5-tiny"]),
    "an adapter of another rank": (adapter(lambda f: f.adapter(r=4)), ["adapter", "does not fit"]),
    "an adapter with weights missing": (
        adapter(lambda f: f.adapter(weights=lambda w: w.pop(sorted(w)[0]))), ["adapter", "lacks weights"]),
    "an adapter of other layers": (adapter(lambda f: f.adapter(target_modules=["q_proj"])), ["does not fit", "q_proj"]),
    "a broken adapter_config.json": (adapter(lambda f: with_file(f.adapter(), "adapter_config.json", "{")),
                                     ["adapter_config.json", "--model NAME"]),
    "an adapter without a base": (adapter(lambda f: f.adapter(base_model_name_or_path=None)), ["--model NAME"]),
    "an adapter whose base is gone": (adapter(lambda f: f.adapter(base_model_name_or_path="/gone/model")),
                                      ["no model /gone/model", "folder"]),
    "an adapter for the embedding": (
        lambda f: ["--dataset", f.data, "--model", f.model_folder, "--lora-targets", "q", "shared"], ["embedding"]),
    # Dialogues to summarise
    "a table of chats": (summarize(lambda f: f.write("chats.csv", "dialogue\nAda: hi\n")), ["text and .jsonl"]),
    "a list of chats": (summarize(lambda f: f.write("chats.json", '[{"dialogue": "Ada: hi"}]')), ["text and .jsonl"]),
    "no such chat": (summarize(lambda f: "nothing.txt"), ["cannot read nothing.txt", "No such file"]),
    "a chat that is a folder": (summarize(lambda f: f.data), ["cannot read", "Is a directory"]),
    "an empty chat": (summarize(lambda f: f.write("chat.txt", "")), ["chat.txt holds no dialogue"]),
    "a chat of blank lines": (summarize(lambda f: f.write("chat.txt", "\n \r\n\t\n")), ["chat.txt holds no dialogue"]),
    "a chat in Latin-1": (summarize(lambda f: f.write("chat.txt", b"Zo\xeb: hi")),
                          ["chat.txt:1: not UTF-8 (byte 0xeb)", "convert it"]),
    "a broken line in a chat": (summarize(lambda f: f.write("c.jsonl",
        '{"dialogue": "x"}\n{')), ["c.jsonl:2:", "JSON"]),
    "a chat without its column": (summarize(lambda f: f.write("c.jsonl", '{"text": "x"}\n')),
                                  ["cannot tell the source among text", "--source-column NAME"]),
    "a chat that is null": (summarize(lambda f: f.write("c.jsonl", '{"dialogue": "x"}\n{"dialogue": null}\n')),
                            ["c.jsonl:2: no text in dialogue"]),
    "a chat that is empty": (summarize(lambda f: f.write("c.jsonl", '{"dialogue": " "}\n')),
                             ["c.jsonl:1: no text in dialogue"]),
    # Runs and folders
    "nothing to resume": (lambda f: ["--resume"], ["no run in", "train first, or name one (--output-dir DIR)"]),
    "a run of another version": (lambda f: ["--resume", "--output-dir", f.run('{"configuration": {}}')],
                                 ["run was made by another version of this script"]),
    "a run to use as one to write": (
        lambda f: ["--evaluate", "--output-dir", f.trained.folder], ["--output-dir", "--adapter RUN"]),
    "an empty variable": (lambda f: ["--output-dir="], ["--output-dir: it is empty"]),
    "an empty word": (lambda f: ["--dataset", ""], ["--dataset: it is empty"]),
    "nothing to use": (lambda f: ["--summarize", "x"], ["no run with adapter or model in", "train first, or name one"]),
    "resuming nowhere": (lambda f: ["--resume", "--output-dir", "nowhere"], ["nowhere holds no run (no metrics.json)"]),
    "metrics cut short": (lambda f: ["--resume", "--output-dir", f.run('{"configuration": ')],
                          ["run/metrics.json is damaged"]),
    "metrics of another program": (lambda f: ["--resume", "--output-dir", f.run("[1, 2]")],
                                   ["run/metrics.json is damaged"]),
    "metrics without a configuration": (lambda f: ["--resume", "--output-dir", f.run('{"configuration": 5}')],
                                        ["run/metrics.json is damaged"]),
    "output that is a file": (lambda f: ["--dataset", f.data, "--model", f.model_folder, "--output-dir",
                                         f.write("out", "x")], ["out", "--output-dir"]),
    "output below a file": (lambda f: ["--dataset", f.data, "--model", f.model_folder, "--output-dir",
                                       f.write("out", "x") + "/run"], ["cannot write to out/run"]),
    "output that is not empty": (lambda f: ["--dataset", f.data, "--model", f.model_folder, "--output-dir",
                                            Path(f.write("out/x", "x")).parent], ["out is not empty", "another"]),
    "a cache that is a file": (lambda f: ["--dataset", f.data, "--model", f.model_folder, "--cache-dir",
                                          f.write("cache", "x")], ["cache", "--cache-dir DIR"]),
    "exporting into something": (
        lambda f: ["--export", Path(f.write("out/x", "x")).parent, "--adapter", f.trained.folder],
        ["out exists and is not empty", "choose another folder"],
    ),
    "exporting into a file": (lambda f: ["--export", f.write("out", "x"), "--adapter", f.trained.folder],
                            ["out", "choose another folder"]),
}  # fmt: skip


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def assert_one_line(done, words):
    assert done.code == 2, done
    (line,) = [line for line in done.err.splitlines() if not line.startswith("model: ")]  # named before it is used
    assert line.startswith("error: ") and "Traceback" not in done.err, done.err
    for word in words:
        assert word in line, (word, line)


@pytest.mark.parametrize("name", BAD)
def test_flan_bad_input(command, files, name):
    prepare, words = BAD[name]
    arguments = prepare(files)
    before, run_before = contents(files.home), contents(files.trained.folder)
    assert_one_line(command(*arguments, cwd=files.home), words)
    assert contents(files.home) == before and contents(files.trained.folder) == run_before


def test_a_file_that_vanishes_under_way(flan, command, files, monkeypatch):
    find_files = flan.find_files

    def and_lose_one(folder):
        found = find_files(folder)
        found["test"][0].unlink()
        return found

    monkeypatch.setattr(flan, "find_files", and_lose_one)
    assert_one_line(command("--dataset", files.splits(), cwd=files.home), ["test.jsonl", "No such file"])


def test_fsdp_is_refused_where_nothing_would_be_sharded(command, tmp_path, monkeypatch):
    """On a CPU accelerate ignores it without a word."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert_one_line(command(cwd=tmp_path), ["FSDP", "GPUs", "torchrun"])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["a row", "the order", "the tokenizer"])
def test_rows_that_changed_since_the_run_began(flan, command, files, change):
    model, chats = files.copy(files.model_folder, "model"), files.copy(files.data, "chats")
    flags = ("--model", model, "--dataset", chats, "--max-steps", "1", "--max-new-tokens", "2")
    assert command(*flags, cwd=files.home).code == 0
    lines = (chats / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    if change == "a row":
        lines[3] = json.dumps(ROW) + "\n"
    elif change == "the order":
        lines[3:5] = lines[4], lines[3]
    else:
        other = json.loads((model / "tokenizer.json").read_text()) | {"normalizer": {"type": "Lowercase"}}
        (model / "tokenizer.json").write_text(json.dumps(other))
    (chats / "train.jsonl").write_text("".join(lines), "utf-8")
    before = contents(files.home)
    assert_one_line(command("--resume", cwd=files.home), [str(chats), "began with", "start a new run"])
    assert contents(files.home) == before


@pytest.mark.parametrize("flags, words", [
    (["--lr", "fast"], ["--lr", "fast"]),
    (["--dataset", "nothing.csv"], ["nothing.csv", "a file or folder"]),
    (["--dataset", "chats", "--model", "model"], ["cannot load the weights in", "model"]),
])  # fmt: skip
def test_flan_as_a_process(files, flags, words):
    files.splits(), halve(files.model() / "model.safetensors")
    before = contents(files.home)
    done = wait(start(*flags, cwd=files.home))
    assert_one_line(done, words)
    assert done.err.count("\n") == 1 and contents(files.home) == before


# ----------------------------------------------------------------------------------------------------------------------
# gpt2_from_scratch.py
# ----------------------------------------------------------------------------------------------------------------------

SIZES = ["--layers", "1", "--heads", "2", "--width", "16", "--block-size", "16", "--batch-tokens", "64", "--max-steps",
         "2", "--vocab-size", "300"]  # fmt: skip
TEXT = "".join(f"Line {i} of a text about {('cats', 'dogs', 'fish')[i % 3]}.\n" for i in range(200))


@pytest.fixture
def gpt2_command(tmp_path, monkeypatch, capsys):
    """gpt2_command(*words): main() in tmp_path/home; exit code, standard output and error."""
    monkeypatch.setattr(sys, "argv", [gpt2.__file__])

    def run(*words):
        monkeypatch.chdir(tmp_path / "home")
        capsys.readouterr()
        try:
            code = gpt2.main(gpt2.parse_arguments([str(word) for word in words]))
        except SystemExit as exit:
            code = exit.code
        return (code, *capsys.readouterr())

    return run


def text(name, content):
    return lambda f: ["--data", f.write(name, content)]


GPT2_BAD = {
    "a broken line of 1 MB": (text("x.jsonl", '{"text": "a"}\n{"text": "' + MEGABYTE), ["x.jsonl", "line 2"]),
    "an object instead of lines": (text("x.jsonl", '{\n "text": "a"\n}\n'), ["x.jsonl", "line 1"]),
    "strings": (text("x.jsonl", '"text"\n'), ["x.jsonl", "line 1"]),
    "null texts": (text("x.jsonl", '{"text": null}\n' * 9), ["--data ", "x.jsonl: there is no text in it"]),
    "lists of texts": (text("x.jsonl", '{"text": ["a"]}\n'), ["x.jsonl", "list, not text"]),
    "empty texts": (text("x.jsonl", '{"text": ""}\n' * 9), ["--data ", "x.jsonl: there is no text in it"]),
    "blank lines only": (text("x.jsonl", "\n\n\n"), ["--data ", "x.jsonl: there is no text in it"]),
    "nesting without end": (text("x.jsonl", "[" * 200_000), ["x.jsonl", "line 1"]),
    "UTF-16": (text("x.txt", TEXT.encode("utf-16")), ["x.txt", "UTF-8"]),
    "Latin-1": (text("x.txt", b"Zo\xeb said hi.\n" * 99), ["x.txt", "UTF-8"]),
    "UTF-16 in JSONL": (text("x.jsonl", '{"text": "a"}\n'.encode("utf-16")), ["x.jsonl", "line 1"]),
    "an empty Parquet file": (text("x.parquet", ""), ["x.parquet"]),
    "a Parquet text of bytes": (lambda f: ["--data", f.parquet(text=[b"x"] * 9)], ["d.parquet", "bytes, not text"]),
    "a checkpoint folder as data": (lambda f: ["--data", f.copy(f.model_folder, "model"), "--glob", "*.safetensors"],
                                    ["model.safetensors", "not UTF-8"]),
    "an absurd width": (lambda f: ["--data", f.write("x.txt", TEXT), "--width", "-64"], ["--width", "at least 1"]),
    "an absurd vocabulary": (lambda f: ["--vocab-size", "99999999"], ["--vocab-size", "at most"]),
    "an absurd seed": (lambda f: ["--seed", "-5"], ["--seed", "at least 0"]),
    "weights of a T5": (lambda f: ["--init", f.model_folder, "--data", f.write("x.txt", TEXT)], ["flan-t5-small"]),
}  # fmt: skip


@pytest.mark.parametrize("name", GPT2_BAD)
def test_gpt2_bad_input(gpt2_command, files, name):
    prepare, words = GPT2_BAD[name]
    arguments = prepare(files)
    before = contents(files.home)
    code, _, error = gpt2_command(*arguments, *(SIZES if "--data" in arguments and "--width" not in arguments else ()))
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error, (word, error)
    after = contents(files.home)
    assert {path: after.get(path) for path in before} == before
    assert {path.relative_to(files.home).parts[0] for path in after.keys() - before.keys()} <= {"cache"}
    assert not any(path.is_file() for path in after.keys() - before.keys()), "something is left half-made"


# ----------------------------------------------------------------------------------------------------------------------
# Unusual, and fine
# ----------------------------------------------------------------------------------------------------------------------

EMOJI = "\U0001f600\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467"


def test_flan_trains_on_unusual_rows(command, files):
    """Byte-order marks, both kinds of line break, quoted CSV, the same id twice, emoji alone, 1 MB in a line."""
    rows = fake_hub.samsum_rows("train", 6)
    odd = {"id": "odd", "dialogue": "A: \0 \u2028 \u200b <pad>", "summary": "\ufeffOdd.", "more": [1]}
    unusual = [ROW, ROW | {"summary": "Again."}, {"id": "e", "dialogue": EMOJI, "summary": EMOJI},
               {"id": "long", "dialogue": MEGABYTE, "summary": "They greet."}, odd]  # fmt: skip
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in [*rows, *unusual])
    files.write("d/train.jsonl", "\ufeff" + lines + "\r\n\r\n")
    quoted = '1,"Ada: ""hi"", you\r\nFemi: ho","They, greet."\r\n1,' + EMOJI + ',"Fun.\r\n"\r\n2,x,\r\n'
    files.write("d/validation.csv", "\ufeffid,dialogue,summary\r\n" + quoted)
    summaries = ["She greets.", "Fun.", None]
    files.parquet("d/test.parquet", id=[7, 7, None], dialogue=["Ada: hi", EMOJI, "x"], summary=summaries)
    done = command("--dataset", "d", "--model", files.model_folder, "--batch-size", "2", "--epochs", "1",
                   "--max-new-tokens", "4", "--max-source-length", "64", cwd=files.home)  # fmt: skip
    assert done.code == 0 and done.err == "", done
    assert "validation: dropped 1 row(s)" in done.out and "test: dropped 1 row(s)" in done.out
    assert "rows: 11 train (9.1% truncated to 64 tokens), 2 validation, 2 test" in " ".join(done.out.split())
    (run,) = (files.home / "runs").iterdir()
    found = {split: [json.loads(line) for line in (run / f"predictions/{split}-epoch-1.jsonl").open(encoding="utf-8")]
             for split in ("validation", "test")}  # fmt: skip
    assert [(row["id"], row["dialogue"], row["reference"]) for row in found["validation"]] == [
        ("1", 'Ada: "hi", you\nFemi: ho', "They, greet."), ("1", EMOJI, "Fun.")]  # fmt: skip
    assert [(row["id"], row["reference"]) for row in found["test"]] == [("7", "She greets."), ("7", "Fun.")]


@pytest.mark.parametrize("name, content, count", [
    ("chat.txt", "\ufeffAda: hi\r\nFemi: ho\r\n\r\nAda: bye\r\n", 2),
    ("chat.txt", EMOJI, 1),
    ("chat.txt", MEGABYTE, 1),
    ("chat.jsonl", "\ufeff" + json.dumps(ROW) + "\r\n\r\n" + json.dumps(ROW | {"dialogue": EMOJI}), 2),
    ("chat.log", '{"a": hi', 1), ("CHAT.TXT", '{"dialogue": hi', 1),  # text, whatever it begins with
])  # fmt: skip
def test_flan_summarises_unusual_chats(command, files, name, content, count):
    done = command("--summarize", files.write(name, content), "--adapter", files.trained.folder, "--max-new-tokens",
                   "4", cwd=files.home)  # fmt: skip
    assert done.code == 0 and len(done.out.splitlines()) == count, done


@pytest.mark.parametrize("name, content", [
    ("bom.txt", "\ufeff" + TEXT), ("crlf.txt", TEXT.replace("\n", "\r\n")), ("emoji.txt", EMOJI * 99),
    ("line.txt", MEGABYTE[:200_000]), ("twice.jsonl", json.dumps({"text": TEXT}) + "\n" + json.dumps({"text": TEXT})),
    ("bom.jsonl", "\ufeff" + '{"text": "Ada and Femi greet one another."}\r\n' * 60),
])  # fmt: skip
def test_gpt2_trains_on_unusual_text(gpt2_command, files, name, content):
    code, _, error = gpt2_command("--data", files.write(name, content), "--tokenizer", "bytes", *SIZES)
    assert code == 0, error
