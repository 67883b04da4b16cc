"""Tokenizer, token files and the training order of gpt2_from_scratch.py."""

import gzip
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from transformers import GPT2TokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpt2_from_scratch as gpt2

REAL_GPT2 = Path(__file__).resolve().parents[2] / "shared/data/tokenizers/gpt2"
END = gpt2.END_OF_TEXT
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "omicron"]


def document(seed: int, words: int = 60) -> str:
    """Text with a word of its own, so that every document differs and can be told from its tokens."""
    choice = random.Random(seed)
    return f"document{seed} " + " ".join(choice.choice(WORDS) for _ in range(words)) + "\n"


def data_settings(folder: Path, data: Path | str, **changes) -> gpt2.Settings:
    values = gpt2.PRESETS["nano"] | {"tokenizer": "bpe", "vocab_size": 300}
    values |= {"data": str(data), "cache_dir": str(folder / "cache")} | changes
    return gpt2.Settings(**values)


def texts_of(data: gpt2.TokenData, split: str) -> list[str]:
    """The documents of a split, from its tokens."""
    end, documents = data.tokenizer.token_to_id(gpt2.END_OF_TEXT), []
    for token in getattr(data, split).tolist():
        if token == end:
            documents.append([])
        else:
            documents[-1].append(token)
    return [gpt2.decode(data.tokenizer, tokens) for tokens in documents]


def rejoin(train: list[str], validation: list[str], texts: list[str]) -> dict[str, tuple[int, int]]:
    """For each document, how many of its characters are in each split. Fails unless all come back, in their order."""
    train, validation, sides = list(train), list(validation), {}
    for text in texts:
        if train and train[0] == text:
            side = len(train.pop(0)), 0
        elif validation and validation[0] == text:
            side = 0, len(validation.pop(0))
        else:
            side = len(train[0]), len(validation[0])
            assert train.pop(0) + validation.pop(0) == text
        assert sides.setdefault(text, side) == side  # equal documents are treated alike
    assert not train and not validation
    return sides


@pytest.fixture(scope="module")
def tokenizer():
    return gpt2.train_tokenizer((document(i) for i in range(50)), 320)


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(tokenizer, text):
    assert gpt2.decode(tokenizer, gpt2.encode(tokenizer, text)) == text


@given(st.binary(max_size=400))
@settings(max_examples=300, deadline=None)
def test_any_bytes_come_back(tokenizer, content):
    text = content.decode("latin-1")  # one character for every byte
    assert gpt2.decode(tokenizer, gpt2.encode(tokenizer, text)).encode("latin-1") == content


def test_end_of_text_in_a_text_is_text(tokenizer):
    tokens = gpt2.encode(tokenizer, f"a{gpt2.END_OF_TEXT}b")
    assert tokenizer.token_to_id(gpt2.END_OF_TEXT) not in tokens
    assert gpt2.decode(tokenizer, tokens) == f"a{gpt2.END_OF_TEXT}b"


def test_bytes_tokenizer_has_one_token_per_byte():
    tokenizer = gpt2.train_tokenizer((document(i) for i in range(20)), 257)
    assert gpt2.vocabulary_size(tokenizer) == 257
    assert len(gpt2.encode(tokenizer, "naïve 🦊")) == len("naïve 🦊".encode())


AWKWARD = [
    "Hello world",
    "  leading and trailing  ",
    "tabs\tand\n\n\nlines\r\n",
    "don't we'll I'VE it's",
    "x=1;y+=2//3",
    "naïve café 日本語 🦊👩‍👩‍👧 ﷽",
    "1234567890 3.14",
    "\u00a0\u2003\u3000",
    "zero\u200bwidth",
    "\x00\x01\x7f",
]


@pytest.mark.skipif(not REAL_GPT2.exists(), reason="the real GPT-2 vocabulary is not here")
def test_real_vocabulary_gives_the_tokens_of_transformers():
    ours = gpt2.load_tokenizer(REAL_GPT2)
    theirs = GPT2TokenizerFast(str(REAL_GPT2 / "vocab.json"), str(REAL_GPT2 / "merges.txt"))
    assert gpt2.vocabulary_size(ours) == 50257 and ours.token_to_id(gpt2.END_OF_TEXT) == 50256
    source = Path(gpt2.__file__).read_text().replace(gpt2.END_OF_TEXT, "")  # there a token, here text
    for text in [*AWKWARD, source, *(document(i) for i in range(20))]:
        assert gpt2.encode(ours, text) == theirs(text)["input_ids"]
        assert gpt2.decode(ours, gpt2.encode(ours, text)) == text
    assert gpt2.encode(ours, "Hello world") == [15496, 995]  # as OpenAI's encoder.py gives them


def test_vocab_and_merges_give_the_tokens_of_the_tokenizer_json(tokenizer, tmp_path):
    """A folder as OpenAI published it, without a tokenizer.json."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    tokenizer.save(str(tmp_path / "one/tokenizer.json"))
    tokenizer.model.save(str(tmp_path / "two"))
    one, two = gpt2.load_tokenizer(tmp_path / "one"), gpt2.load_tokenizer(tmp_path / "two")
    for text in [*AWKWARD, document(3)]:
        assert gpt2.encode(one, text) == gpt2.encode(two, text) == gpt2.encode(tokenizer, text)


@given(st.text(alphabet=st.sampled_from("ab \n\t.é"), min_size=1, max_size=300))
@settings(max_examples=300, deadline=None)
def test_tokens_of_pieces_are_those_of_the_whole_text(tokenizer, text):
    former, gpt2.PIECE = gpt2.PIECE, 10
    try:
        pieces = list(gpt2.pieces([text]))
    finally:
        gpt2.PIECE = former
    assert "".join(pieces) == text
    tokens = [token for piece in pieces for token in gpt2.encode(tokenizer, piece)]
    assert tokens == gpt2.encode(tokenizer, text)


def test_a_long_document_is_really_cut(monkeypatch):
    monkeypatch.setattr(gpt2, "PIECE", 10)
    assert list(gpt2.pieces(["0123456789 abc\ndef\n\n ghi 0123456789\nj"])) == [
        "0123456789 abc\n",
        "def\n\n ghi 0123456789\n",
        "j",
    ]


def test_a_line_that_never_ends_is_cut_between_words(tokenizer, monkeypatch):
    monkeypatch.setattr(gpt2, "PIECE", 10)
    text = document(0, 300).strip()
    pieces = list(gpt2.pieces([text[:70], text[70:75], text[75:]]))
    assert "".join(pieces) == text and max(map(len, pieces[:-1])) < 60
    assert [n for piece in pieces for n in gpt2.encode(tokenizer, piece)] == gpt2.encode(tokenizer, text)


@pytest.mark.parametrize("text", ["é" * 90 + "\n\n" + "字" * 50, "x" * 200 + "\n" + "ab\ncd\n" * 30, "a\n" * 200])
def test_text_in_parts_is_cut_where_the_whole_is(monkeypatch, text):
    """And no place is looked at twice, but for the ends of parts: a text without any place is read in linear time."""
    monkeypatch.setattr(gpt2, "PIECE", 10)
    whole = list(gpt2.pieces([text]))
    assert "".join(whole) == text and max(map(len, whole)) < 250
    for size in (1, 7, 40):
        assert list(gpt2.pieces(text[i : i + size] for i in range(0, len(text), size))) == whole
    looked = []
    real = gpt2.WORD_OR_LINE_END
    monkeypatch.setattr(gpt2, "WORD_OR_LINE_END", type("", (), {"search": staticmethod(
        lambda text, *at: looked.append(max(0, len(text) - at[0])) or real.search(text, *at))}))  # fmt: skip
    list(gpt2.pieces(text[i : i + 10] for i in range(0, len(text), 10)))
    assert sum(looked) < 2 * len(text) + 3 * len(looked)


@pytest.mark.parametrize("text", ["x" * 3000, f"ab{END}" * 200, "<" * 400 + "<ab" * 200 + "字" * 2000])
def test_a_line_without_white_space_is_cut_but_never_within_end_of_text(monkeypatch, text):
    """Otherwise the longest such line would be kept whole, and copied whenever more of it is read."""
    monkeypatch.setattr(gpt2, "PIECE", 10)
    whole = list(gpt2.pieces([text]))
    assert "".join(whole) == text and sum(piece.count(END) for piece in whole) == text.count(END)
    assert max(map(len, whole)) < 1500 and len(whole[-1]) < 400
    for size in (1, 7, 40):
        assert list(gpt2.pieces(text[i : i + size] for i in range(0, len(text), size))) == whole


def test_every_document_is_on_exactly_one_side_and_equal_ones_on_the_same(tmp_path):
    """200 different documents, a quarter of them twice, as JSONL."""
    texts = [document(i) for i in range(200)] + [document(i) for i in range(0, 200, 4)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = gpt2.prepare_tokens(data_settings(tmp_path, file, val_fraction=0.2))
    train, validation = texts_of(data, "train"), texts_of(data, "validation")
    assert Counter(train + validation) == Counter(texts)
    assert not set(train) & set(validation)
    assert 0.1 < len(set(validation)) / 200 < 0.3
    assert data.facts["documents"] == {"train": len(train), "validation": len(validation)}
    assert data.facts["bytes"]["validation"] == sum(len(text.encode()) for text in validation)


def test_a_single_document_is_cut_at_its_end(tmp_path):
    file = tmp_path / "one.txt"
    text = "".join(document(i) for i in range(30))
    file.write_text(text)
    data = gpt2.prepare_tokens(data_settings(tmp_path, file, val_fraction=0.1))
    (train,), (validation,) = texts_of(data, "train"), texts_of(data, "validation")
    assert train + validation == text
    assert len(validation) == pytest.approx(0.1 * len(text), abs=1)


def test_a_long_document_begins_once_however_many_parts_it_is_read_in(tmp_path, monkeypatch):
    """On both sides of the cut: an end-of-text token before each part would teach that texts end anywhere."""
    monkeypatch.setattr(gpt2, "PIECE", 100)
    file = tmp_path / "one.txt"
    text = "".join(document(i) for i in range(30))
    file.write_text(text)
    data = gpt2.prepare_tokens(data_settings(tmp_path, file, val_fraction=0.3))
    (train,), (validation,) = texts_of(data, "train"), texts_of(data, "validation")
    assert train + validation == text and len(validation) > 10 * 100
    assert data.facts["documents"] == {"train": 1, "validation": 1}


def labelled_documents(texts: list[str], is_stream: bool, fraction: float | None) -> dict[str, list[str]]:
    """What each split gets, as texts; a document that is cut gives one to each."""
    read = lambda place: ((True, text) for text in texts)
    source = gpt2.Source("texts", [], [] if is_stream else [Path("texts")], read, lambda: {})
    settings = gpt2.Settings(val_fraction=fraction)
    split = gpt2.Split(source, settings)
    assert split.characters == (None if is_stream else sum(map(len, texts)))
    found = {name: [] for name in gpt2.SPLITS}
    for shard in gpt2.labelled_shards(source, split, settings):
        for name, begins, text in shard:
            found[name].append(text) if begins else found[name].append(found[name].pop() + text)
    return found


@pytest.mark.parametrize("is_stream", [False, True])
def test_much_data_gives_no_more_validation_text_than_an_evaluation_should_read(monkeypatch, is_stream):
    """2,000 documents of about 400 characters, the first 500 of them again at the end."""
    monkeypatch.setattr(gpt2, "VALIDATION_TEXT", 10_000)
    texts = [document(i) for i in range(2000)] + [document(i) for i in range(500)]
    split = labelled_documents(texts, is_stream, None)
    assert not set(split["train"]) & set(split["validation"])
    assert 4_000 < sum(map(len, set(split["validation"]))) < 12_000
    split = labelled_documents(texts, is_stream, 0.05)  # asked for, it is a twentieth
    assert not set(split["train"]) & set(split["validation"])
    assert 0.04 < len(split["validation"]) / len(texts) < 0.06


def test_little_data_gives_a_twentieth():
    split = labelled_documents([document(i) for i in range(2000)], False, None)
    assert 0.04 < len(split["validation"]) / 2000 < 0.06


def test_the_tokenizer_never_sees_validation_text(tmp_path):
    """The held-out end of the text is full of a word that would otherwise become one token."""
    file = tmp_path / "one.txt"
    file.write_text("".join(document(i) for i in range(40)) + "xylophones " * 200)
    data = gpt2.prepare_tokens(data_settings(tmp_path, file, val_fraction=0.2, vocab_size=400))
    assert len(gpt2.encode(data.tokenizer, "xylophones")) > 3


def test_a_tokenizer_learns_from_the_beginning_of_much_text(tmp_path, monkeypatch):
    monkeypatch.setattr(gpt2, "TOKENIZER_TEXT", 5000)
    file = tmp_path / "texts.jsonl"
    texts = [*(document(i) for i in range(40)), *(f"xylophones {i} " * 50 for i in range(40))]  # 16 and 32 kB
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = gpt2.prepare_tokens(data_settings(tmp_path, file, val_fraction=0.02, vocab_size=400))
    assert len(gpt2.encode(data.tokenizer, "xylophones")) > 3 and len(gpt2.encode(data.tokenizer, " alpha")) == 1


def test_a_tokenizer_learns_from_the_beginning_of_a_text_that_cannot_be_cut(monkeypatch):
    monkeypatch.setattr(gpt2, "TOKENIZER_TEXT", 5000)
    parts = [("validation", True, "no"), ("train", True, "abc" * 1000), ("train", True, "xyz" * 2000)]
    assert "".join(gpt2.training_text(iter(parts))) == "abc" * 1000 + ("xyz" * 2000)[:2000]


def test_tokens_that_are_there_are_still_asked_for_by_all_processes_together(tmp_path, monkeypatch):
    """A process that decided by itself what is there would not meet the others."""
    file, calls, on_main_process = tmp_path / "one.txt", [], gpt2.on_main_process
    file.write_text("".join(document(i) for i in range(40)))
    monkeypatch.setattr(gpt2, "on_main_process", lambda work: calls.append(1) or on_main_process(work))
    data = gpt2.prepare_tokens(data_settings(tmp_path, file))
    file.unlink()  # a resumed run needs the tokens only
    assert gpt2.prepare_tokens(data_settings(tmp_path, file), data.fingerprint).facts == data.facts
    assert calls == [1, 1]


def test_unfinished_token_files_of_dead_processes_go_after_a_week(tmp_path):
    old, new = (tmp_path / f"cache/tokens-{name}.incomplete" for name in ("old", "new"))
    for folder, days in ((old, 8), (new, 6)):
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - days * 86400,) * 2)
    (tmp_path / "one.txt").write_text("".join(document(i) for i in range(30)))
    gpt2.prepare_tokens(data_settings(tmp_path, tmp_path / "one.txt"))
    assert new.exists() and not old.exists()


def test_a_folder_gives_its_text_files_by_pattern(tmp_path):
    folder = tmp_path / "code"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    contents = {"a.py": document(1), "deep/b.py": document(2), "c.md": document(3), ".git/d.py": document(4),
                ".hidden.py": document(6)}  # fmt: skip
    for name, text in contents.items():
        (folder / name).write_text(text)
    (folder / "binary.py").write_bytes(b"\x00\x01" * 100)
    (folder / "latin.py").write_bytes("é".encode("latin-1") * 100)
    (folder / "windows.py").write_bytes(b"\xef\xbb\xbf" + document(5).replace("\n", "\r\n").encode())
    data = gpt2.prepare_tokens(data_settings(tmp_path, folder, glob="*.py", val_fraction=0.3))
    rejoin(texts_of(data, "train"), texts_of(data, "validation"), [document(1), document(5), document(2)])


def test_parquet_and_jsonl_columns_give_the_same_tokens(tmp_path):
    texts = [document(i) for i in range(40)]
    rows = [{"id": i, "body": text} for i, text in enumerate(texts)] + [
        {"id": 40, "body": None},
        {"id": 41, "body": ""},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "texts.parquet")
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, two = (
        gpt2.prepare_tokens(data_settings(tmp_path, tmp_path / f"texts.{kind}", text_column="body"))
        for kind in ("parquet", "jsonl")
    )
    for split in gpt2.SPLITS:
        assert texts_of(one, split) == texts_of(two, split)
    rejoin(texts_of(one, "train"), texts_of(one, "validation"), texts)


def test_limit_takes_the_first_documents(tmp_path):
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": document(i)}) for i in range(40)))
    data = gpt2.prepare_tokens(data_settings(tmp_path, tmp_path / "texts.jsonl", limit=10, val_fraction=0.2))
    rejoin(texts_of(data, "train"), texts_of(data, "validation"), [document(i) for i in range(10)])


@pytest.mark.parametrize("limit", [2, 3, 4, None])
def test_files_behind_the_limit_need_not_be_text(tmp_path, limit):
    texts = [document(i) for i in range(4)]
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in zip("abcf", texts, strict=True):
        (folder / f"{name}.txt").write_text(text)
    (folder / "d.bin").write_bytes(b"\0\xff" * 100)
    (folder / "e.txt").write_bytes(b"")
    (folder / "g.bin").write_bytes(b"\0\xff" * 100)
    data = gpt2.prepare_tokens(data_settings(tmp_path, folder, limit=limit, val_fraction=0.2))
    rejoin(texts_of(data, "train"), texts_of(data, "validation"), texts[:limit])
    _, size = gpt2.tokens_of_text(gpt2.Settings(evaluate=str(folder), limit=limit), data.tokenizer)
    assert size == sum(len(text.encode()) for text in texts[:limit])


def test_tokens_are_made_once_and_again_when_anything_changes(tmp_path, monkeypatch):
    calls = []
    original = gpt2.write_tokens
    monkeypatch.setattr(gpt2, "write_tokens", lambda *arguments: calls.append(1) or original(*arguments))
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": document(i), "other": document(i + 50)}) for i in range(40)))
    run = lambda **changes: gpt2.prepare_tokens(data_settings(tmp_path, file, **changes))
    first = run()
    assert np.array_equal(run().train, first.train) and len(calls) == 1
    for count, changes in enumerate(
        [{"vocab_size": 310}, {"val_fraction": 0.3}, {"limit": 20}, {"text_column": "other"}, {"tokenizer": "bytes"}], 2
    ):
        run(**changes)
        assert len(calls) == count, changes
    file.write_text("\n".join(json.dumps({"text": document(i)}) for i in range(41)))
    assert texts_of(run(), "train") != texts_of(first, "train") and len(calls) == 7


@pytest.mark.parametrize(("name", "end"), [("texts.jsonl", b'\n{"text": "more"}'), ("texts.txt", b"not UTF-8: \xff")])
def test_a_file_that_changes_under_way_is_noticed_and_leaves_nothing(tmp_path, monkeypatch, name, end):
    file = tmp_path / name
    file.write_text("\n".join(json.dumps({"text": document(i)}) for i in range(40)))
    original = gpt2.train_tokenizer

    def append_and_train(*arguments):
        with open(file, "ab") as more:
            more.write(end)
        return original(*arguments)

    monkeypatch.setattr(gpt2, "train_tokenizer", append_and_train)
    with pytest.raises(gpt2.UserError, match="changed while"):
        gpt2.prepare_tokens(data_settings(tmp_path, file))
    assert not list((tmp_path / "cache").iterdir())


def test_truncated_token_files_are_refused(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("".join(document(i) for i in range(40)))
    gpt2.prepare_tokens(data_settings(tmp_path, file))
    folder = next((tmp_path / "cache").iterdir())
    tokens = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(tokens[:-6])
    with pytest.raises(gpt2.UserError, match="damaged"):
        gpt2.prepare_tokens(data_settings(tmp_path, file))


@given(texts=st.lists(st.text(min_size=1), min_size=2, max_size=12), fraction=st.floats(0.01, 0.5))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_documents_come_back_from_the_token_files(tmp_path, texts, fraction):
    """All of them, with whatever characters, and in their order within each split."""
    texts = [text for text in texts if text.encode("utf-8", "ignore").decode() == text]
    assume(len(set(texts)) > 1)
    folder = tmp_path / hashlib.sha256(repr((texts, fraction)).encode()).hexdigest()
    folder.mkdir(exist_ok=True)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    try:
        data = gpt2.prepare_tokens(data_settings(folder, folder / "texts.jsonl", val_fraction=fraction))
    except gpt2.UserError as error:
        assert "too little text fell to" in str(error)  # of so few characters
        return
    train, validation = texts_of(data, "train"), texts_of(data, "validation")
    sides = rejoin(train, validation, texts)
    assert sum(0 < held_out < len(text) for text, (_, held_out) in sides.items()) <= 1  # at most one is cut


@given(world=st.sampled_from([1, 2, 4]), share=st.integers(1, 3), step=st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_processes_share_the_sequences_of_a_step(world, share, step):
    """Together they read what one process reads, whatever their number, in any step of any epoch."""
    block_size, count = 7, world * share
    order = gpt2.TrainingOrder(np.arange(900, dtype=np.uint16), block_size, 0)
    parts = []
    for rank in range(world):
        trainer = object.__new__(gpt2.Trainer)
        trainer.order, trainer.settings = order, gpt2.Settings(batch_tokens=count * block_size)
        trainer.machine = gpt2.Machine(rank=rank, world=world, device=torch.device("cpu"), dtype=torch.float32,
                                       micro_batch_size=1, matmul_rate=1.0)  # fmt: skip
        parts.append(trainer.fetch_batch(step))
    assert np.array_equal(torch.cat(parts), order.sequences(step * count, count))


@given(tokens=st.integers(40, 400), block_size=st.integers(3, 20), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_visits_sequences_once_and_no_token_is_twice_a_target(tokens, block_size, seed):
    order = gpt2.TrainingOrder(np.arange(tokens, dtype=np.uint16), block_size, seed)
    sequences = order.sequences(0, order.per_epoch)
    assert sequences.shape == (order.per_epoch, block_size + 1)
    assert (np.diff(sequences, axis=1) == 1).all()  # stretches of the stream
    targets = sequences[:, 1:].flatten().tolist()
    assert len(set(targets)) == len(targets)
    assert len(targets) > tokens - 3 * block_size  # at most the ends are left out


def test_the_order_is_seeded_shuffled_and_new_in_each_epoch():
    make = lambda seed: gpt2.TrainingOrder(np.arange(2000, dtype=np.uint16), 10, seed)
    order = make(1)
    n = order.per_epoch
    first, second = order.sequences(0, n)[:, 0], order.sequences(n, n)[:, 0]
    assert np.array_equal(make(1).sequences(0, n)[:, 0], first)
    assert not np.array_equal(make(2).sequences(0, n)[:, 0], first)
    assert not np.array_equal(np.sort(first), first)
    assert first.min() % 10 != second.min() % 10 or not np.array_equal(first, second)
    assert not np.array_equal(first, second)


def test_a_position_in_the_order_does_not_depend_on_how_it_was_reached():
    tokens = np.arange(500, dtype=np.uint16)
    straight = gpt2.TrainingOrder(tokens, 7, 0).sequences(0, 200)
    jumping = gpt2.TrainingOrder(tokens, 7, 0)
    parts = [jumping.sequences(first, 20) for first in range(180, -1, -20)]
    assert np.array_equal(np.concatenate(parts[::-1]), straight)


def test_bigram_loss_of_a_known_case():
    """By hand, interpolated Kneser-Ney: a a b a b, then b a after b."""
    train, validation = np.array([0, 0, 1, 0, 1]), np.array([1, 0, 1])
    discount = 2 / (2 + 2 * 1)  # two bigrams seen once (00, 10), one twice (01)
    total = {0: 3, 1: 1}
    lower = np.array([2.5, 1.5]) / 4  # a follows 2 different tokens, b follows 1; plus a half each
    p_a_after_b = (1 - discount) / total[1] + discount * 1 / total[1] * lower[0]
    p_b_after_a = (2 - discount) / total[0] + discount * 2 / total[0] * lower[1]
    expected = -(math.log(p_a_after_b) + math.log(p_b_after_a)) / 2
    assert gpt2.bigram_loss(train, validation) == pytest.approx(expected)


def test_bigram_probabilities_add_up_to_one():
    random = np.random.default_rng(0)
    train = random.integers(0, 8, 300)
    losses = [gpt2.bigram_loss(np.append(train, 9), np.array([5, token])) for token in range(10)]
    assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1)


# The split, by text


SIZES = st.one_of(
    st.lists(st.integers(1, 300), min_size=3, max_size=300),
    st.lists(st.sampled_from([20, 40, 4000]), min_size=3, max_size=60),
    st.lists(st.floats(0, 12).map(lambda x: round(math.exp(x)) + 1), min_size=3, max_size=60),
)


@given(sizes=SIZES, fraction=st.floats(0.02, 0.5), seed=st.integers(0, 99), copies=st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_the_share_of_text_is_right_whatever_the_sizes(sizes, fraction, seed, copies):
    """Random text, some documents several times: within a tenth, nothing twice, equal documents alike."""
    choice = random.Random(seed)
    texts = [f"{i}:" + choice.choice("abcdefgh") * size for i, size in enumerate(sizes)]
    texts += [text for text in texts[:2] for _ in range(copies)]
    choice.shuffle(texts)
    total = sum(map(len, texts))
    assume(fraction * total > 100)  # characters, of which one may be a tenth
    split = labelled_documents(texts, False, fraction)
    sides = rejoin(split["train"], split["validation"], texts)
    held_out = sum(map(len, split["validation"]))
    assert held_out == pytest.approx(fraction * total, rel=0.1)
    assert sum(0 < tail < len(text) for text, (_, tail) in sides.items()) <= 1
    assert not set(split["train"]) & set(split["validation"])


def test_a_large_document_among_small_ones_is_cut_at_its_end():
    """1,000 and 100,000 characters: by documents, 99% of the text could be held out."""
    for seed in range(12):
        texts = [f"{seed} " + "a" * 1000, f"{seed} " + "b" * 100_000]
        split = labelled_documents(texts, False, 0.05)
        assert sum(map(len, split["validation"])) == pytest.approx(0.05 * 101_000, rel=0.1)
        assert len(split["train"][-1]) > 90_000


def test_a_run_prints_both_shares_in_characters(tmp_path, capsys):
    data = gpt2.prepare_tokens(data_settings(tmp_path, "stdlib", limit=20, val_fraction=0.1))
    characters = data.facts["characters"]
    assert characters["validation"] / sum(characters.values()) == pytest.approx(0.1, rel=0.1)
    trainer = object.__new__(gpt2.Trainer)
    trainer.data, trainer.order = data, gpt2.TrainingOrder(data.train, 64, 0)
    trainer.model = gpt2.GPT(gpt2.GPTConfig(300, block_size=64, layers=1, heads=1, width=8))
    trainer.settings = gpt2.Settings(**gpt2.PRESETS["nano"] | {"warmup_steps": 1})
    trainer.machine = gpt2.Machine(device=torch.device("cpu"), dtype=torch.float32, micro_batch_size=1, matmul_rate=1.0)
    gpt2.describe(trainer)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{characters['train']:,} and {characters['validation']:,} characters" in said


# Readers


def test_the_suffix_of_each_file_tells_how_to_read_it_in_a_folder_too(tmp_path, capsys):
    """Rows, columns, text and code, plain and compressed, in one folder."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    lines = lambda numbers: "".join(json.dumps({"text": document(i)}) + "\n" for i in numbers).encode()
    table = lambda numbers: pyarrow.Table.from_pylist([{"text": document(i), "id": i} for i in numbers])
    (folder / "a.jsonl").write_bytes(lines(range(0, 3)))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(range(3, 6))))
    pyarrow.parquet.write_table(table(range(6, 9)), folder / "c.parquet")
    (folder / "d.txt").write_text(document(9))
    (folder / "e.txt.gz").write_bytes(gzip.compress(document(10).encode()))
    with pyarrow.CompressedOutputStream(str(folder / "f.jsonl.zst"), "zstd") as file:
        file.write(lines(range(11, 14)))
    with pyarrow.CompressedOutputStream(str(folder / "g.py.zst"), "zstd") as file:
        file.write(document(14).encode())
    pyarrow.parquet.write_table(table(range(15, 17)), tmp_path / "h.parquet")
    (folder / "h.parquet.gz").write_bytes(gzip.compress((tmp_path / "h.parquet").read_bytes()))
    (folder / "i.JSONL").write_bytes(lines(range(17, 19)))
    (folder / "j.json").write_bytes(lines(range(19, 21)))
    (folder / "k.json").write_text(json.dumps([{"text": document(i)} for i in range(21, 23)], indent=2))
    (folder / "l.Json.GZ").write_bytes(gzip.compress(lines(range(23, 25))))
    data = gpt2.prepare_tokens(data_settings(tmp_path, folder, val_fraction=0.2))
    rejoin(texts_of(data, "train"), texts_of(data, "validation"), [document(i) for i in range(25)])


@pytest.mark.parametrize("name, content", [("x.txt.gz", b"\x1f\x8bnonsense"), ("x.jsonl.zst", b"nonsense")])
def test_a_broken_archive_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(gpt2.UserError, match=r"x\.\w+\.\w+ cannot be read"):
        gpt2.prepare_tokens(data_settings(tmp_path, tmp_path / name))


def test_what_is_left_out_is_counted_and_named(tmp_path, capsys):
    folder = tmp_path / "files"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(document(i))
    (folder / "picture.png").write_bytes(b"PNG\r\n\0\0" * 9)
    (folder / "latin.txt").write_bytes("é".encode("latin-1") * 300_000)
    (folder / "late.txt").write_bytes(b"fine text " * 60_000 + b"\xff")  # found only behind two pieces of good text
    (folder / "nothing.txt").touch()
    (folder / "package.json").write_text(json.dumps({"name": "x"}, indent=2))
    (folder / "table.csv").write_text("id,text\n1,hello\n")
    (folder / "rows.json").write_text("\ufeff " + json.dumps([{"text": document(6)}, {"text": None}]), "utf-8")
    (folder / "rows.jsonlines").write_text('{"text": ""}\n' * 3 + json.dumps({"text": document(7)}))
    data = gpt2.prepare_tokens(data_settings(tmp_path, folder, val_fraction=0.2))
    rejoin(texts_of(data, "train"), texts_of(data, "validation"), [document(i) for i in range(8)])
    assert data.facts["empty_rows"] == 4
    reasons = {Path(file).name: reason for file, reason in data.facts["left_out"].items()}
    expected = {"picture.png": "binary", "nothing.txt": "empty"}
    assert expected.items() <= reasons.items() and "UTF-8" in reasons["latin.txt"] and "UTF-8" in reasons["late.txt"]
    assert "JSON without a column 'text'" in reasons["package.json"] and "a table" in reasons["table.csv"]
    assert len(reasons) == 6


def test_a_broken_row_is_an_error_and_its_file_is_not_left_out(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text(document(0))
    (tmp_path / "texts/b.json").write_text(json.dumps({"text": document(1)}) + "\n{")
    with pytest.raises(gpt2.UserError, match=r"b\.json, line 2"):
        gpt2.prepare_tokens(data_settings(tmp_path, tmp_path / "texts"))


def test_end_of_text_in_a_text_is_a_border_only_if_asked_for(tmp_path):
    """As TinyStories and WebText are published: one file, <|endoftext|> between the stories."""
    stories = [document(i) for i in range(30)]
    file = tmp_path / "stories.txt"
    file.write_text(f"{gpt2.END_OF_TEXT}\n".join(stories))
    plain = gpt2.prepare_tokens(data_settings(tmp_path, file, val_fraction=0.2))
    assert plain.facts["documents"] == {"train": 1, "validation": 1} and plain.facts["end_of_text_in_text"] == 29
    data = gpt2.prepare_tokens(data_settings(tmp_path, file, val_fraction=0.2, split_on_eot=True))
    rejoin(texts_of(data, "train"), texts_of(data, "validation"), stories)
    assert data.facts["end_of_text_in_text"] == 0


FRAGMENTS = ["<|endoftext|>", "a", "b ", "\n", "<|endof", "text|>"]


@example(text=11 * gpt2.END_OF_TEXT + "\n")  # the line break comes with another piece
@given(text=st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join))
@settings(max_examples=200, deadline=None)
def test_documents_between_ends_of_text_are_those_that_a_plain_split_gives(text):
    former, gpt2.PIECE = gpt2.PIECE, 4
    try:
        parts = [(i == 0, piece) for i, piece in enumerate(gpt2.pieces([text]))]
        found = []
        for begins, piece in gpt2.documents_of(parts, gpt2.Settings(split_on_eot=True)):
            found.append(piece) if begins else found.append(found.pop() + piece)
    finally:
        gpt2.PIECE = former
    first, *others = text.split(gpt2.END_OF_TEXT)
    assert found == [story for story in (first, *(other.lstrip("\n") for other in others)) if story]


MEMORY = """
import resource, sys
sys.path.insert(0, {folder!r})
import gpt2_from_scratch as gpt2
gpt2.PIECE = 2**12
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
gpt2.prepare_tokens(gpt2.Settings(**gpt2.PRESETS["nano"] | dict(data={file!r}, cache_dir={cache!r}, tokenizer="bytes")))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_large_file_does_not_need_its_size_in_memory(tmp_path):
    """2 and 9 MB of text, in processes of their own: both take the same, which is what one batch of tokens takes."""
    pytest.importorskip("resource")
    line, needed = "".join(document(i) for i in range(20)), []
    for megabytes in (2, 9):
        file = tmp_path / f"{megabytes}.txt"
        with open(file, "w") as output:
            for _ in range(megabytes * 10**6 // len(line)):
                output.write(line)
        names = {"folder": str(Path(gpt2.__file__).parent), "file": str(file), "cache": str(tmp_path / "cache")}
        words = [sys.executable, "-c", MEMORY.format(**names)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        needed.append(float(done.stdout.split()[-1]))
    assert needed[1] < needed[0] + 7  # MiB; in one piece, 2.9 times 7


# A stream that breaks off


class Stream:
    """What `datasets` gives for a data set on the Hub: rows with a position, which may fail."""

    def __init__(self, texts, fail_at=None):
        self.texts, self.fail_at, self.next, self.read = texts, fail_at, 0, []

    def load_state_dict(self, position):
        self.next = position["next"]

    def state_dict(self):
        return {"next": self.next}

    def __iter__(self):
        while self.next < len(self.texts):
            if self.next == self.fail_at:
                raise ConnectionError("the network is down")
            self.next += 1
            self.read.append(self.next - 1)
            yield {"text": self.texts[self.next - 1]}


@pytest.mark.parametrize(("limit", "fraction"), [(None, 0.3), (45, 0.3), (None, None)])
def test_finished_shards_survive_an_error_in_a_stream(tmp_path, monkeypatch, capsys, limit, fraction):
    """Without a fraction the first 600 characters below the threshold are held out, and what equals them later."""
    import datasets

    texts = [document(i) for i in range(68)] + ["", ""] + [document(i) for i in range(68)]
    monkeypatch.setattr(gpt2, "SHARD", 8)
    monkeypatch.setattr(gpt2, "ask_hub", lambda *arguments: ("a commit", None))
    monkeypatch.setattr(gpt2, "VALIDATION_TEXT", 600)
    how = {"data": "someone/texts", "val_fraction": fraction, "tokenizer": "bytes", "limit": limit}
    streams = iter([Stream(texts), Stream(texts)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **options: next(streams))
    straight = gpt2.prepare_tokens(data_settings(tmp_path / "straight", **how))
    broken = [Stream(texts), Stream(texts, fail_at=20), Stream(texts, fail_at=35), Stream(texts)]
    streams = iter(broken)
    for _ in range(2):
        with pytest.raises(gpt2.UserError, match=r"the network is down.* the same command goes on"):
            gpt2.prepare_tokens(data_settings(tmp_path / "broken", **how))
        (unfinished,) = (tmp_path / "broken/cache").glob("*.incomplete")
        with open(unfinished / "train.bin", "ab") as file:  # as a process leaves that is killed between two notes
            file.write(b"junk")
    data = gpt2.prepare_tokens(data_settings(tmp_path / "broken", **how))
    assert "going on behind" in capsys.readouterr().out
    assert broken[2].read[0] == 16 and broken[3].read[0] == 32  # the shards before were not read again
    assert np.array_equal(data.train, straight.train) and np.array_equal(data.validation, straight.validation)
    assert data.facts == straight.facts
    assert data.facts["empty_rows"] == (0 if limit else 2)
    documents = [text for text in texts[:limit] if text]
    assert Counter(texts_of(data, "train") + texts_of(data, "validation")) == Counter(documents)
    assert not set(texts_of(data, "train")) & set(texts_of(data, "validation"))


@pytest.fixture
def hub(monkeypatch):
    """hub(texts): they are on the Hub from now on. Returns the streams that are made of them."""
    import datasets

    def put(texts):
        streams = []
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: streams.append(Stream(texts)) or streams[-1])
        return streams

    monkeypatch.setattr(gpt2, "ask_hub", lambda *arguments: ("a commit", None))
    return put


def test_a_limit_reads_no_more_of_a_stream(tmp_path, hub):
    streams = hub([document(i) if i % 3 else "" for i in range(100)])
    data = gpt2.prepare_tokens(data_settings(tmp_path, "someone/texts", val_fraction=0.5, tokenizer="bytes", limit=20))
    assert sum(data.facts["documents"].values()) == 20
    assert {len(stream.read) for stream in streams} == {30}  # of which ten are empty
    assert data.facts["empty_rows"] == 10


def test_another_commit_of_a_data_set_is_other_text(tmp_path, hub, monkeypatch):
    hub([document(i) for i in range(40)])
    settings = data_settings(tmp_path, "someone/texts", val_fraction=0.3, tokenizer="bytes")
    first = gpt2.prepare_tokens(settings)
    hub([document(i) for i in range(50)])
    assert gpt2.prepare_tokens(settings).fingerprint == first.fingerprint
    monkeypatch.setattr(gpt2, "ask_hub", lambda *arguments: ("another commit", None))
    assert sum(gpt2.prepare_tokens(settings).facts["documents"].values()) == 50


def test_a_subset_of_a_data_set_is_asked_for_by_its_name(tmp_path, hub, monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **options: asked.append((words, options)) or Stream(
        [document(i) for i in range(40)]))  # fmt: skip
    gpt2.prepare_tokens(data_settings(tmp_path, "someone/texts:sample-10BT", val_fraction=0.3, tokenizer="bytes"))
    assert all("sample-10BT" in (*words, *options.values()) for words, options in asked) and asked


def test_rows_of_the_hub_are_text_or_an_error(tmp_path, hub):
    hub([document(0), 5])
    with pytest.raises(gpt2.UserError, match="someone/texts: 'text' holds int, not text"):
        gpt2.prepare_tokens(data_settings(tmp_path, "someone/texts", tokenizer="bytes"))


def test_tokens_of_large_vocabularies_take_four_bytes(tmp_path):
    """From 2^16 + 1 tokens on; ids may have gaps."""
    for size, dtype in ((2**16, np.uint16), (2**16 + 1, np.uint32)):
        folder = tmp_path / str(size)
        folder.mkdir()
        described = json.loads(gpt2.train_tokenizer(iter(["text"]), 257).to_str())
        described["added_tokens"].append(described["added_tokens"][0] | {"id": size - 1, "content": "<last>"})
        described["model"]["vocab"]["<last>"] = size - 1
        (folder / "tokenizer.json").write_text(json.dumps(described))
        file = tmp_path / "texts.txt"
        file.write_text("".join(document(i) for i in range(10)))
        data = gpt2.prepare_tokens(data_settings(tmp_path, file, tokenizer=str(folder)))
        assert data.train.dtype == dtype
        assert texts_of(data, "train")[0] + texts_of(data, "validation")[0] == file.read_text()


def test_pieces_with_merged_white_space_are_those_of_the_whole_text():
    """A tokenizer that has learnt runs of line breaks and blanks as one token: cut elsewhere, they would fall apart."""
    tokenizer = gpt2.train_tokenizer(("a\n\n\nb  \n\n  c\n\td \n" * 50 for _ in range(20)), 400)
    assert any(token.count("Ċ") > 1 for token in tokenizer.get_vocab())
    text = "a\n\n\nb  \n\n  c\n\td \n" * 20 + "end"
    former, gpt2.PIECE = gpt2.PIECE, 10
    try:
        tokens = [token for piece in gpt2.pieces([text]) for token in gpt2.encode(tokenizer, piece)]
    finally:
        gpt2.PIECE = former
    assert tokens == gpt2.encode(tokenizer, text)


def test_each_epoch_is_cut_at_another_offset():
    """Otherwise the same tokens would stand at the ends of sequences in every epoch."""
    order = gpt2.TrainingOrder(np.arange(2005, dtype=np.uint16), 10, 0)
    offsets = {int(order.sequences(epoch * order.per_epoch, 1)[0, 0]) % 10 for epoch in range(30)}
    assert len(offsets) > 3
