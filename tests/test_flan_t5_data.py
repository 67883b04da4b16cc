"""flan-t5_samsum.py: from files to rows to tokens, and the cache of the tokens."""

import csv
import json
import os
import shutil

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from conftest import write_jsonl

SPLITS = ("train", "validation", "test")


def rows(count, **extra):
    return [{"id": f"r{i}", "dialogue": f"A: {i}\r\nB: ok", "summary": f"A says {i}.", **extra} for i in range(count)]


@pytest.fixture
def load(flan, tmp_path, monkeypatch):
    """load(name, flags...): the DatasetDict of --dataset, as plain lists of rows."""
    monkeypatch.chdir(tmp_path)

    def load(name, *flags):
        args = flan.parse_settings(["--dataset", str(name), *flags])
        return {split: table.to_list() for split, table in flan.load_data(args).items()}

    return load


def test_line_breaks_and_rows_without_text(load, tmp_path, capsys):
    row = {"id": "1", "dialogue": " A: hi\r\nB: ho\rA: hu\n", "summary": "They\r\ngreet. "}
    broken = [{"id": "2", "dialogue": None, "summary": "x"}, {"id": "3", "dialogue": " \r\n", "summary": "x"},
              {"id": "4", "dialogue": "A: a", "summary": ""}, {"dialogue": "A: b", "summary": "b"}]  # fmt: skip
    for split in SPLITS:
        write_jsonl(tmp_path / f"d/{split}.jsonl", [row, *broken] if split == "train" else [row])
    tables = load("d")
    clean = {"id": "1", "dialogue": "A: hi\nB: ho\nA: hu", "summary": "They\ngreet."}
    assert tables["train"] == [clean, {"id": "train-5", "dialogue": "A: b", "summary": "b"}]
    assert tables["validation"] == tables["test"] == [clean]
    assert capsys.readouterr().out.splitlines() == ["train: dropped 3 row(s) without dialogue or summary: 2, 3, 4"]


def test_dropped_rows_of_one_file_are_named_as_they_stand_in_it(load, tmp_path, capsys):
    broken = {"dialogue": "", "summary": "x"}
    write_jsonl(tmp_path / "one.jsonl", [*rows(15), broken, *rows(2), broken, rows(1)[0]])
    load("one.jsonl")
    assert [line for line in capsys.readouterr().out.splitlines() if "dropped" in line] == [
        "train: dropped 1 row(s) without dialogue or summary: 16",
        "test: dropped 1 row(s) without dialogue or summary: 19"]  # fmt: skip


def test_all_file_types_give_the_same_rows(load, tmp_path):
    # What breaks a reader that splits at lines or commas: quotes, commas, line breaks, and a BOM as Excel writes it.
    content = [*rows(11), {"id": "q", "dialogue": 'A: "so, what?"\nB: \u2028 ok', "summary": "A, asks."}]
    write_jsonl(tmp_path / "d.jsonl", content)
    (tmp_path / "d.json").write_text(json.dumps(content, indent=2))
    with open(tmp_path / "d.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["id", "dialogue", "summary"])
        writer.writeheader()
        writer.writerows(content)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / "d.parquet")
    tables = load("d.jsonl")
    assert tables["test"] == [{"id": "q", "dialogue": 'A: "so, what?"\nB: \u2028 ok', "summary": "A, asks."}]
    for name in ("d.json", "d.csv", "d.parquet"):
        assert load(name) == tables, name


def test_other_rows_in_a_file_of_the_same_time_are_read(load, tmp_path):
    """As `cp -p` leaves it. `datasets` alone would give the rows from before."""
    file = write_jsonl(tmp_path / "d.jsonl", rows(12))
    before = file.stat()
    assert load("d.jsonl")["train"][0]["summary"] == "A says 0."
    write_jsonl(file, [row | {"summary": row["summary"].replace("A", "B")} for row in rows(12)])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load("d.jsonl")["train"][0]["summary"] == "B says 0."


def test_a_name_is_no_pattern(load, tmp_path):
    write_jsonl(tmp_path / "d1.jsonl", rows(20))
    write_jsonl(tmp_path / "d[1].jsonl", rows(12))
    assert sum(map(len, load("d[1].jsonl").values())) == 12


def test_csv_with_the_index_of_pandas(load, tmp_path):
    pandas.DataFrame(rows(12)).to_csv(tmp_path / "d.csv")
    assert load("d.csv")["train"][0] == {"id": "r0", "dialogue": "A: 0\nB: ok", "summary": "A says 0."}


def test_one_file_is_split_at_its_end(load, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", rows(25))
    tables = load("d.jsonl")
    ids = [[row["id"] for row in tables[split]] for split in SPLITS]
    assert ids == [[f"r{i}" for i in range(21)], ["r21", "r22"], ["r23", "r24"]]


@pytest.mark.parametrize("names", [
    ("train.jsonl", "validation.jsonl", "test.jsonl"), ("training.jsonl", "val.jsonl", "testing.jsonl"),
    ("chats-train.jsonl", "chats-dev.jsonl", "chats_test_1.jsonl"), ("TRAIN.jsonl", "valid.jsonl", "Test.jsonl"),
    ("data/train-00000-of-00001.jsonl", "data/validation-00000.jsonl", "data/test-00000.jsonl"),
    ("train/0.jsonl", "dev/0.jsonl", "test/0.jsonl"),
])  # fmt: skip
def test_folders_name_their_splits(load, tmp_path, names):
    for i, name in enumerate(names):
        write_jsonl(tmp_path / "d" / name, rows(i + 1))
    write_jsonl(tmp_path / "d/.hidden/train.jsonl", rows(9))
    assert [len(load("d")[split]) for split in SPLITS] == [1, 2, 3]


def test_several_files_of_a_split_are_joined_in_order(load, tmp_path):
    for split in SPLITS:
        for part in (1, 0):
            write_jsonl(tmp_path / f"d/{split}-{part:05}-of-00002.jsonl", rows(2, id=f"{split}{part}"))
    assert [row["id"] for row in load("d")["train"]] == ["train0", "train0", "train1", "train1"]


def test_limit_takes_the_first_rows_that_can_be_used(load, tmp_path):
    for split in SPLITS:
        write_jsonl(tmp_path / f"d/{split}.jsonl", [{"id": "x", "dialogue": "", "summary": "y"}, *rows(5)])
    assert [[row["id"] for row in table] for table in load("d", "--limit", "2").values()] == [["r0", "r1"]] * 3


@pytest.mark.parametrize("columns, flags, expected", [
    ({"Dialogue": "s", "Highlights": "t"}, [], ("s", "t")),
    ({"note": "0", "text": "1", "gist": "2"}, ["--source-column", "text", "--target-column", "gist"], ("1", "2")),
    ({"dialogue": "0", "article": "1", "summary": "2"}, ["--source-column", "article"], ("1", "2")),
])  # fmt: skip
def test_columns_by_name(load, tmp_path, columns, flags, expected):
    write_jsonl(tmp_path / "d.jsonl", [columns] * 10)
    table = load("d.jsonl", *flags)["train"]
    assert {(row["dialogue"], row["summary"]) for row in table} == {expected}
    assert table[0]["id"] == "train-1"


@pytest.mark.parametrize("columns, flags, message", [
    (("id", "text", "gist"), [], "cannot tell the source among id, text, gist: name the columns, --source-column"),
    (("id", "dialogue", "gist"), [], "cannot tell the target among id, dialogue, gist"),
    (("dialogue", "article", "summary"), [], "cannot tell the source among dialogue, article, summary"),
    (("id", "dialogue", "summary"), ["--target-column", "gist"], "there is no column gist"),
])  # fmt: skip
def test_columns_are_never_guessed(flan, load, tmp_path, columns, flags, message):
    write_jsonl(tmp_path / "d.jsonl", [dict.fromkeys(columns, "x")] * 10)
    with pytest.raises(flan.UserError, match=message):
        load("d.jsonl", *flags)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(flan, model_folder):
    return flan.load_tokenizer_and_config(model_folder)[0]


@pytest.fixture
def tokenize(flan, data, tmp_path):
    """tokenize(tokenizer, flags..., change=function): the tokenised splits of the test data, cached in tmp_path."""

    def tokenize(tokenizer, *flags, change=None, cache=tmp_path):
        args = flan.parse_settings(["--dataset", str(data), "--cache-dir", str(cache), *flags])
        tables = flan.load_data(args)
        if change:
            tables = flan.datasets.DatasetDict(
                {split: flan.datasets.Dataset.from_list(change(table.to_list())) for split, table in tables.items()}
            )
        return flan.tokenize(tables, tokenizer, args)

    return tokenize


@pytest.fixture
def tokenised(tokenizer, monkeypatch):
    """The texts that any tokenizer of this class is asked to tokenise from now on."""
    texts, original = [], type(tokenizer).__call__

    def call(self, text, *args, **kwargs):
        texts.extend([text] if isinstance(text, str) else text)
        return original(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", call)
    return texts


def test_tokens_have_the_prefix_and_the_end(tokenize, tokenizer, model_folder):
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    tables = tokenize(tokenizer)
    for table in tables.values():
        for row in table:
            assert row["input_ids"] == raw.encode("summarize: " + row["dialogue"]).ids
            assert row["labels"] == raw.encode(row["summary"]).ids
            assert row["input_ids"][-1] == row["labels"][-1] == 1  # </s>
            assert row["truncated"] is False


def test_long_rows_are_cut_counted_and_still_end(flan, tokenize, tokenizer):
    whole = tokenize(tokenizer)["train"]
    limit = sorted(map(len, whole["input_ids"]))[12]
    cut = tokenize(tokenizer, "--max-source-length", str(limit), "--max-target-length", "9")["train"]
    for long, short in zip(whole, cut, strict=True):
        if len(long["input_ids"]) <= limit:  # a row that just fits is whole
            assert short["input_ids"] == long["input_ids"] and not short["truncated"]
        else:
            assert short["input_ids"] == [*long["input_ids"][: limit - 1], 1] and short["truncated"]
        assert short["labels"] == (long["labels"] if len(long["labels"]) <= 9 else [*long["labels"][:8], 1])
    share = sum(len(ids) > limit for ids in whole["input_ids"]) / len(whole)
    assert 0 < share < 1
    args = flan.parse_settings(["--max-source-length", str(limit)])
    assert flan.describe_scoring(args, {"train": cut})["truncated"]["train"] == pytest.approx(share, abs=1e-4)


def test_a_second_run_tokenises_nothing(tokenize, tokenizer, tokenised):
    first = tokenize(tokenizer)
    assert len(tokenised) == 2 * (24 + 7 + 5)
    tokenised.clear()
    again = tokenize(tokenizer)
    assert tokenised == []
    assert {split: table.to_list() for split, table in again.items()} == {s: t.to_list() for s, t in first.items()}


def other_tokenizer(flan, model_folder, folder):
    """The same tokenizer but for the letter Z, which comes out as z."""
    shutil.copytree(model_folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "Z"}, "content": "z"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return flan.load_tokenizer_and_config(folder)[0]


def test_a_changed_setting_never_meets_a_stale_file(
    flan, tokenize, tokenizer, tokenised, model_folder, monkeypatch, tmp_path
):
    """Each change, in the cache folder of the unchanged run, gives what it gives in an empty cache folder."""

    def in_text(column, split_rows):
        last = split_rows[-1]
        return [*split_rows[:-1], {**last, column: last[column] + " Zzz"}]

    changes = {
        "a dialogue": {"change": lambda table: in_text("dialogue", table)},
        "a summary": {"change": lambda table: in_text("summary", table)},
        "an id": {"change": lambda table: in_text("id", table)},
        "the order": {"change": lambda table: table[::-1]},
        "one row less": {"change": lambda table: table[:-1]},
        "the source length": {"flags": ["--max-source-length", "20"]},
        "the target length": {"flags": ["--max-target-length", "6"]},
        "the tokenizer": {"tokenizer": other_tokenizer(flan, model_folder, tmp_path / "other")},
        "the prefix": {"prefix": "tl;dr: "},
    }
    base = tokenize(tokenizer)
    for name, what in changes.items():
        monkeypatch.setattr(flan, "PREFIX", what.get("prefix", "summarize: "))
        arguments = (what.get("tokenizer", tokenizer), *what.get("flags", []))
        tokenised.clear()
        got = tokenize(*arguments, change=what.get("change"))
        assert tokenised, f"{name}: stale tokens were used"
        fresh = tokenize(*arguments, change=what.get("change"), cache=tmp_path / f"empty {name}")
        for split in SPLITS:
            assert got[split].to_list() == fresh[split].to_list(), name
            if name != "the tokenizer":  # it differs from the other by a letter that no row has
                assert got[split].to_list() != base[split].to_list(), name


def test_a_whole_second_run_tokenises_nothing(command, data, model_folder, tokenizer, tokenised, tmp_path):
    flags = ("--model", model_folder, "--dataset", data, "--max-steps", "1", "--batch-size", "2",
             "--max-new-tokens", "2", "--cache-dir", tmp_path / "cache")  # fmt: skip
    first = command(*flags, cwd=tmp_path)
    assert first.code == 0 and len(tokenised) == 72, first
    tokenised.clear()
    second = command(*flags, "--lr", "1e-3", cwd=tmp_path)
    assert second.code == 0 and tokenised == [], second


def test_the_cache_is_hugging_faces_own_by_default(flan, data, tokenizer):
    from conftest import CACHE

    args = flan.parse_settings(["--dataset", str(data), "--limit", "3"])
    flan.tokenize(flan.load_data(args), tokenizer, args)
    files = list((flan.Path(CACHE.name) / "tokenized").iterdir())
    assert {path.name.split("-")[0] for path in files} == set(SPLITS)
