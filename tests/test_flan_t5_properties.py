"""flan-t5_samsum.py: what must hold for any text, any rows and any batch, tried with generated examples."""

import csv
import itertools
import json
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import write_jsonl
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)  # no lone surrogates: they are no UTF-8
awkward = example("Zoë: \U0001f468\u200d\U0001f469\u200d\U0001f467 ok?\r\n\tBen:  \u2028 nbsp\u00a0\ufeff \x00 end ")


@pytest.fixture(scope="module")
def tokenizer(flan, model_folder):
    return flan.load_tokenizer_and_config(model_folder)[0]


@pytest.fixture(scope="module")
def tiny_tokenizer(flan):
    """The one that ships with the tiny model."""
    return flan.load_tokenizer_and_config(flan.Path(flan.MODELS["tiny"]))[0]


# ----------------------------------------------------------------------------------------------------------------------
# Text to tokens and back
# ----------------------------------------------------------------------------------------------------------------------


@quick
@awkward
@given(text=texts)
def test_tokens_decode_to_the_text(flan, tokenizer, text):
    ((ids,), cut) = flan.encode(tokenizer, [text], 10**6)
    assert cut == [False] and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == text


@quick
@awkward
@given(text=texts)
def test_the_shipped_tokenizer_loses_nothing_but_white_space(flan, tiny_tokenizer, text):
    """Byte fallback: no character is unknown to it."""
    ((ids,), _) = flan.encode(tiny_tokenizer, [text], 10**6)
    assert tiny_tokenizer.unk_token_id not in ids
    assert tiny_tokenizer.decode(ids, skip_special_tokens=True).split() == text.split()


@quick
@given(rows=st.lists(texts, min_size=1, max_size=5), limit=st.integers(2, 40))
def test_cut_rows_begin_like_the_whole_ones_and_end_with_the_end_token(flan, tokenizer, rows, limit):
    whole, _ = flan.encode(tokenizer, rows, 10**6)
    cut, was_cut = flan.encode(tokenizer, rows, limit)
    assert len(cut) == len(was_cut) == len(rows)
    for long, short, flag in zip(whole, cut, was_cut, strict=True):
        assert flag == (len(long) > limit) and len(short) == min(len(long), limit)
        assert short[:-1] == long[: len(short) - 1] and short[-1] == tokenizer.eos_token_id


# ----------------------------------------------------------------------------------------------------------------------
# Dialogues from files
# ----------------------------------------------------------------------------------------------------------------------

lines = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=20)
full_lines = lines.filter(lambda line: line.strip() and not line.lstrip().startswith(("{", "\ufeff")))
blank_lines = st.sampled_from(["", " ", "\t", "\u3000 "])


@quick
@given(
    dialogues=st.lists(st.lists(full_lines, min_size=1, max_size=4), min_size=1, max_size=5),
    gaps=st.lists(st.lists(blank_lines, min_size=1, max_size=3), min_size=6, max_size=6),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]), bom=st.booleans(), last=st.sampled_from(["", "\n"]),
)  # fmt: skip
def test_dialogues_are_the_runs_of_lines_between_blank_ones(flan, tmp_path, dialogues, gaps, line_end, bom, last):
    parts = []
    for i, dialogue in enumerate(dialogues):
        parts += [*dialogue, *gaps[i]] if i < len(dialogues) - 1 else dialogue
    text = line_end.join([*gaps[5], *parts]) + last
    path = tmp_path / "chat.txt"
    path.write_bytes(text.encode("utf-8-sig") if bom else text.encode())
    expected = ["\n".join(line.strip() for line in dialogue) for dialogue in dialogues]
    assert list(flan.read_dialogues(str(path))) == expected


@quick
@awkward
@given(text=texts.filter(lambda text: text.replace("\r", "").strip()))
def test_a_dialogue_is_the_same_text_in_training_and_in_use(flan, tmp_path, text):
    """From JSONL: whatever its line breaks are."""
    path = write_jsonl(tmp_path / "d" / "rows.jsonl", [{"dialogue": text, "summary": "x"}] * 10)
    args = flan.parse_settings(["--dataset", str(path)])
    trained_on = flan.load_data(args)["train"]["dialogue"][0]
    assert list(flan.read_dialogues(str(path))) == [trained_on] * 10


@quick
@given(rows=st.lists(st.fixed_dictionaries({"dialogue": texts, "summary": texts}), min_size=10, max_size=12))
def test_rows_are_read_alike_from_every_kind_of_file(flan, tmp_path, rows):
    """CSV cannot tell a missing field from an empty one, and both are dropped alike."""
    folder = tmp_path / "kinds"
    write_jsonl(folder / "d.jsonl", rows)
    (folder / "d.json").write_text(json.dumps(rows))
    with open(folder / "d.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["dialogue", "summary"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "d.parquet")
    for kind in ("jsonl", "json", "csv", "parquet"):
        assert flan.read_files([folder / f"d.{kind}"], tmp_path / "cache") == rows, kind


# ----------------------------------------------------------------------------------------------------------------------
# The order of rows
# ----------------------------------------------------------------------------------------------------------------------


@quick
@given(
    sources=st.lists(st.lists(st.integers(3, 400), min_size=1, max_size=12), min_size=1, max_size=30),
    batch_size=st.integers(1, 9), room=st.integers(1, 12),
)  # fmt: skip
def test_summaries_keep_the_order_of_the_rows(flan, tokenizer, sources, batch_size, room):
    """A model that repeats what it reads, in batches that may have to be halved for lack of memory."""
    seen = []

    def generate(input_ids, attention_mask, generation_config, stopping_criteria):
        if len(input_ids) > room:
            raise torch.OutOfMemoryError
        seen.extend(int(mask.sum()) for mask in attention_mask)
        return input_ids

    model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, generate=generate)
    how = flan.parse_settings(["--no-fast"])
    summarizer = flan.Summarizer(model, tokenizer, how, torch.device("cpu"), torch.float32)
    summarizer.batch_size = batch_size
    summaries = summarizer(sources)
    assert summaries == [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in sources]
    assert seen == sorted(map(len, sources), reverse=True)


@quick
@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=900), batch_size=st.integers(1, 16),
    seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 50), processes=st.integers(1, 5),
)  # fmt: skip
def test_an_epoch_is_a_permutation_in_whole_batches(flan, lengths, batch_size, seed, epoch, processes):
    def sampler(at):
        new = flan.LengthGroupedSampler(lengths, batch_size, seed, 1, processes)
        new.epoch = at
        return new

    batch_size *= processes
    order = list(sampler(epoch))
    assert len(order) == len(sampler(epoch)) == -(-len(lengths) // processes) * processes
    assert sorted(order[: len(lengths)]) == list(range(len(lengths))) and set(order[len(lengths) :]) <= {len(lengths)}
    batches = [order[: len(lengths)][i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    assert all(len(batch) == batch_size for batch in batches[:-1])
    groups = [[lengths[i] for i in batch] for batch in batches]
    assert processes > 1 or all(group == sorted(group, reverse=True) for group in groups)
    groups = [sorted(group, reverse=True) for group in groups]
    if 8 * batch_size <= len(lengths) < 12 * batch_size:  # chunks of two batches: between their lengths lies no other
        whole = sorted((group for group in groups if len(group) == batch_size), reverse=True)
        overlaps = sum(a[-1] < b[0] for a, b in itertools.combinations(whole, 2))
        assert overlaps <= len(whole) * (len(whole) - 1) / 2 - len(whole) // 2
    again = sampler(epoch)  # as a resumed run makes it
    list(sampler(epoch + 1))
    assert list(again) == order and list(again) == order
