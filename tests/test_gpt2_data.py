"""Tokenizer, token files and the training order of gpt2_from_scratch.py."""

import argparse
import hashlib
import json
import math
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import GPT2TokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpt2_from_scratch as gpt2

REAL_GPT2 = Path(__file__).resolve().parents[2] / "shared/data/tokenizers/gpt2"
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "omicron"]


def document(seed: int, words: int = 60) -> str:
    """Text with a word of its own, so that every document differs and can be told from its tokens."""
    choice = random.Random(seed)
    return f"document{seed} " + " ".join(choice.choice(WORDS) for _ in range(words)) + "\n"


def data_settings(folder: Path, data: Path | str, **changes) -> argparse.Namespace:
    values = gpt2.DEFAULTS | gpt2.PRESETS["nano"] | {"fingerprint": None, "hub_cache": None, "tokenizer": "bpe"}
    values |= {"data": str(data), "cache_dir": str(folder / "cache"), "vocab_size": 300} | changes
    return argparse.Namespace(**values)


def texts_of(data: gpt2.TokenData, split: str) -> list[str]:
    """The documents of a split, from its tokens."""
    end, documents = data.tokenizer.token_to_id(gpt2.END_OF_TEXT), []
    for token in getattr(data, split).tolist():
        if token == end:
            documents.append([])
        else:
            documents[-1].append(token)
    return [gpt2.decode(data.tokenizer, tokens) for tokens in documents]


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
        pieces = list(gpt2.pieces(text))
    finally:
        gpt2.PIECE = former
    assert "".join(pieces) == text
    tokens = [token for piece in pieces for token in gpt2.encode(tokenizer, piece)]
    assert tokens == gpt2.encode(tokenizer, text)


def test_a_long_document_is_really_cut(monkeypatch):
    monkeypatch.setattr(gpt2, "PIECE", 10)
    assert list(gpt2.pieces("0123456789 abc\ndef\n\n ghi 0123456789\nj")) == [
        "0123456789 abc\n",
        "def\n\n ghi 0123456789\n",
        "j",
    ]


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


def test_of_a_few_documents_one_is_for_validation(tmp_path):
    for i in range(3):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / f"texts/{i}.txt").write_text(document(i))
    data = gpt2.prepare_tokens(data_settings(tmp_path, tmp_path / "texts", val_fraction=1e-6))
    assert len(texts_of(data, "train")) == 2 and len(texts_of(data, "validation")) == 1


def labelled_documents(texts: list[str], is_stream: bool, fraction: float | None) -> dict[str, list[str]]:
    source = gpt2.Source("texts", [], lambda: iter(texts), [] if is_stream else [Path("texts")])
    documents, length = gpt2.split_documents(source, fraction)
    assert length == (None if is_stream else sum(map(len, texts)))
    return {split: [text for name, text in documents() if name == split] for split in gpt2.SPLITS}


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


def test_a_folder_gives_its_text_files_by_pattern(tmp_path):
    folder = tmp_path / "code"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    contents = {"a.py": document(1), "deep/b.py": document(2), "c.md": document(3), ".git/d.py": document(4)}
    for name, text in contents.items():
        (folder / name).write_text(text)
    (folder / "binary.py").write_bytes(b"\x00\x01" * 100)
    (folder / "latin.py").write_bytes("é".encode("latin-1") * 100)
    (folder / "windows.py").write_bytes(b"\xef\xbb\xbf" + document(5).replace("\n", "\r\n").encode())
    data = gpt2.prepare_tokens(data_settings(tmp_path, folder, glob="*.py", val_fraction=0.3))
    assert set(texts_of(data, "train") + texts_of(data, "validation")) == {document(1), document(2), document(5)}


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
    assert sorted(texts_of(one, "train") + texts_of(one, "validation")) == sorted(texts)


def test_limit_takes_the_first_documents(tmp_path):
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": document(i)}) for i in range(40)))
    data = gpt2.prepare_tokens(data_settings(tmp_path, tmp_path / "texts.jsonl", limit=10, val_fraction=0.2))
    assert set(texts_of(data, "train") + texts_of(data, "validation")) == {document(i) for i in range(10)}


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


def test_a_file_that_changes_under_way_is_noticed_and_leaves_nothing(tmp_path, monkeypatch):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": document(i)}) for i in range(40)))
    original = gpt2.train_tokenizer

    def append_and_train(*arguments):
        with open(file, "a") as more:
            more.write("\n" + json.dumps({"text": "more"}))
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
        assert "too little text fell to train" in str(error)  # with so few, all may fall to the other side
        return
    train, validation = texts_of(data, "train"), texts_of(data, "validation")
    held_out = set(validation)
    assert held_out and train == [text for text in texts if text not in held_out]
    assert validation == [text for text in texts if text in held_out]


@given(world=st.sampled_from([1, 2, 4]), share=st.integers(1, 3), step=st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_processes_share_the_windows_of_a_step(world, share, step):
    """Together they read what one process reads, whatever their number, in any step of any epoch."""
    context, rows = 7, world * share
    order = gpt2.TrainingOrder(np.arange(900, dtype=np.uint16), context, 0)
    parts = []
    for rank in range(world):
        session = object.__new__(gpt2.Session)
        vars(session).update(order=order, world=world, rank=rank, device=torch.device("cpu"))
        session.settings = argparse.Namespace(batch_tokens=rows * context)
        parts.append(session.fetch_batch(step))
    assert np.array_equal(torch.cat(parts), order.windows(step * rows, rows))


@given(tokens=st.integers(40, 400), context=st.integers(3, 20), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_visits_windows_once_and_no_token_is_twice_a_target(tokens, context, seed):
    order = gpt2.TrainingOrder(np.arange(tokens, dtype=np.uint16), context, seed)
    windows = order.windows(0, order.per_epoch)
    assert windows.shape == (order.per_epoch, context + 1)
    assert (np.diff(windows, axis=1) == 1).all()  # stretches of the stream
    targets = windows[:, 1:].flatten().tolist()
    assert len(set(targets)) == len(targets)
    assert len(targets) > tokens - 3 * context  # at most the ends are left out


def test_the_order_is_seeded_shuffled_and_new_in_each_epoch():
    make = lambda seed: gpt2.TrainingOrder(np.arange(2000, dtype=np.uint16), 10, seed)
    order = make(1)
    n = order.per_epoch
    first, second = order.windows(0, n)[:, 0], order.windows(n, n)[:, 0]
    assert np.array_equal(make(1).windows(0, n)[:, 0], first)
    assert not np.array_equal(make(2).windows(0, n)[:, 0], first)
    assert not np.array_equal(np.sort(first), first)
    assert first.min() % 10 != second.min() % 10 or not np.array_equal(first, second)
    assert not np.array_equal(first, second)


def test_a_position_in_the_order_does_not_depend_on_how_it_was_reached():
    tokens = np.arange(500, dtype=np.uint16)
    straight = gpt2.TrainingOrder(tokens, 7, 0).windows(0, 200)
    jumping = gpt2.TrainingOrder(tokens, 7, 0)
    parts = [jumping.windows(first, 20) for first in range(180, -1, -20)]
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
