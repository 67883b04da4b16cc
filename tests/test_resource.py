"""What ships in `resource/`: the sample dialogues, and the tiny Flan-T5 with its tokenizer."""

import importlib.util
import json
import random
import re
from itertools import islice
from pathlib import Path

import pytest

RESOURCE = Path(__file__).parents[1] / "resource"
SIZES = {"train": 2000, "validation": 200, "test": 200}


def load_script(name: str):
    """A script of `resource/` as a module; its name may hold a dash."""
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", name), RESOURCE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_sample():
    return load_script("make_sample")


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[dict]]:
    """The rows as they ship."""
    return {
        split: [json.loads(line) for line in (RESOURCE / f"sample/{split}.jsonl").read_text("utf-8").splitlines()]
        for split in SIZES
    }


def speakers(row: dict) -> set[str]:
    return {line.split(": ", 1)[0] for line in row["dialogue"].split("\n")}


def contains(text: str, value: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) is not None


# ----------------------------------------------------------------------------------------------------------------------
# The sample
# ----------------------------------------------------------------------------------------------------------------------


def test_sample_is_what_its_script_writes(make_sample, tmp_path):
    random.seed(0)
    state = random.getstate()
    make_sample.write_sample(tmp_path)
    assert random.getstate() == state, "the global generator was used"
    for split in SIZES:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (RESOURCE / f"sample/{split}.jsonl").read_bytes()


def test_sample_sizes_and_shape(shipped):
    assert {split: len(rows) for split, rows in shipped.items()} == SIZES
    rows = [row for split in SIZES for row in shipped[split]]
    assert all(list(row) == ["id", "dialogue", "summary"] for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    assert {len(speakers(row)) for row in rows} == {2, 3, 4}
    for row in rows:
        lines = row["dialogue"].split("\n")
        assert 4 <= len(lines) <= 14
        assert all(re.match(r"[^\W\d_]+: \S", line) for line in lines), row["dialogue"]
        assert 1 <= len(re.findall(r"[.!?](?: |$)", row["summary"])) <= 3, row["summary"]
        assert len(row["summary"].split()) < len(row["dialogue"].split())


def test_no_leftovers_of_the_grammar(shipped):
    for rows in shipped.values():
        for row in rows:
            text = row["dialogue"] + "\n" + row["summary"]
            assert not re.search(r"[\[\]{}<>|]|  |\bthe the\b|\ba an?\b|\ba [aeio]\w*", text), text
            assert not re.search(r"\ban? (?=the\b)|\.\.$", row["summary"]), text


def test_no_dialogue_twice(shipped):
    dialogues = [row["dialogue"] for rows in shipped.values() for row in rows]
    assert len(set(dialogues)) == len(dialogues)


def test_no_story_with_the_same_facts_twice(make_sample):
    keys = [(r["scenario"], tuple(r["facts"].items())) for split in SIZES for r in make_sample.records(split)]
    pretrain = [(r["scenario"], tuple(r["facts"].items())) for r in islice(make_sample.records("pretrain"), 5000)]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & set(pretrain)


def test_held_out_facts_are_not_in_other_splits(make_sample, shipped):
    """No name and no value of one split's pools is in another split's text."""
    text = {split: "\n".join(r["dialogue"] + "\n" + r["summary"] for r in rows) for split, rows in shipped.items()}
    lists = dict(make_sample.pools())
    for table in (make_sample.WOMEN, make_sample.MEN):
        lists[table["train"][:9]] = {split: table[split].split() for split in SIZES}
    for kind, pool in lists.items():
        for held_out in ("validation", "test"):
            others = [split for split in SIZES if split != held_out]
            for value in pool[held_out]:
                for split in others:
                    assert not contains(text[split], value), f"{kind}: {value!r} of {held_out} is in {split}"
                assert not any(value.lower() == v.lower() for split in others for v in pool[split]), value
    # Read off the rows, without the pools: nobody speaks in two splits.
    heard = {split: set().union(*map(speakers, rows)) for split, rows in shipped.items()}
    assert len(heard["train"]) >= 150 and len(heard["validation"]) >= 40 and len(heard["test"]) >= 40
    assert not heard["validation"] & heard["test"]
    assert not heard["train"] & (heard["validation"] | heard["test"])


def test_pretraining_text_knows_nobody_of_the_held_out_rows(make_sample, shipped):
    heard = set().union(*(speakers(row) for split in ("validation", "test") for row in shipped[split]))
    for row in islice(make_sample.records("pretrain"), 3000):
        assert not speakers(row) & heard


def test_many_topics(make_sample):
    for split in SIZES:
        topics = {row["scenario"].split(",")[0] for row in make_sample.records(split)}
        assert len(topics) >= 24, split


def test_summary_needs_the_dialogue(make_sample):
    """Every name and value that a summary states can be read in its dialogue, and no summary repeats a whole turn."""
    for row in make_sample.records("test"):
        for value in row["facts"].values():
            if contains(row["summary"], value):
                assert value.removeprefix("the ").lower() in row["dialogue"].lower(), (value, row)
    summaries = [row["summary"] for row in make_sample.records("train")]
    assert len(set(summaries)) > 0.99 * len(summaries)


def test_unknown_split(make_sample):
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        next(make_sample.records("dev"))
