"""flan-t5_samsum.py: generation keeps the order of the rows, and ROUGE with its interval is what it should be."""

import json
import types

import fake_hub
import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def model(flan, model_folder):
    return flan.load_base(model_folder, *flan.get_device())


@pytest.fixture(scope="module")
def tokenizer(flan, model_folder):
    return flan.load_tokenizer_and_config(model_folder)[0]


@pytest.fixture(scope="module")
def sources(tokenizer):
    """Token ids of 20 dialogues of very different lengths. Without the prefix the model does summarise."""
    texts = [row["dialogue"].replace("\r\n", "\n") for row in fake_hub.samsum_rows("sources", 20)]
    texts = [text[: 20 + 7 * (11 * i % 20)] for i, text in enumerate(texts)]
    sources = tokenizer(texts).input_ids
    assert len(set(map(len, sources))) > 10 and sources != sorted(sources, key=len)
    return sources


@pytest.fixture(scope="module")
def summarise(flan, model, tokenizer, sources):
    def summarise(*flags, sources=sources, model=model, batch_size=None):
        settings = flan.parse_settings(["--max-new-tokens", "24", *flags])
        summarizer = flan.Summarizer(model, tokenizer, settings, *flan.get_device())
        summarizer.batch_size = batch_size or summarizer.batch_size
        return summarizer(sources)

    return summarise


@pytest.fixture(scope="module")
def by_hand(flan, model_folder, tokenizer, sources):
    """Greedy summaries one row at a time and one token at a time, without padding, cache or `generate`."""
    torch = flan.torch
    plain = flan.transformers.T5ForConditionalGeneration.from_pretrained(model_folder).eval()
    summaries = []
    for row in sources:
        tokens = [0]
        while len(tokens) <= 24 and tokens[-1] != 1:
            with torch.inference_mode():
                logits = plain(input_ids=torch.tensor([row]), decoder_input_ids=torch.tensor([tokens])).logits
            tokens.append(int(logits[0, -1].argmax()))
        summaries.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
    assert len(set(summaries)) > 10
    return summaries


# ----------------------------------------------------------------------------------------------------------------------
# Generation
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_summaries_come_in_the_order_of_the_rows(summarise, by_hand, batch_size):
    assert summarise(batch_size=batch_size) == by_hand


def test_beam_search_is_that_of_transformers_without_loops(flan, summarise, sources, model_folder, tokenizer):
    """Of a model that ends, and of one that never does, which would repeat itself."""
    plain = flan.transformers.T5ForConditionalGeneration.from_pretrained(model_folder).eval()
    plain.generation_config = flan.GenerationConfig(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    how = {"num_beams": 3, "max_new_tokens": 24, "no_repeat_ngram_size": 6}

    def expected(**more):
        outputs = [plain.generate(flan.torch.tensor([row]), **how | more)[0] for row in sources]
        return [tokenizer.decode(output, skip_special_tokens=True).strip() for output in outputs]

    assert summarise("--num-beams", "3") == expected()
    plain.lm_head.weight.data[1] = 0  # the end token never has the largest logit
    settings = flan.parse_settings(["--max-new-tokens", "24", "--num-beams", "3"])
    found = flan.Summarizer(plain, tokenizer, settings, *flan.get_device())(sources)
    assert found == expected() != expected(no_repeat_ngram_size=0)


@pytest.mark.parametrize("limit", [5, 60])
def test_only_max_new_tokens_limits_a_summary(flan, model_folder, summarise, sources, monkeypatch, limit):
    """Neither the folder's max_length of 20, nor its beams, nor task_specific_params: a model that never ends shows."""
    endless = flan.load_base(model_folder, *flan.get_device())
    settings = json.loads((model_folder / "generation_config.json").read_text())
    assert (settings["max_length"], settings["num_beams"]) == (20, 4)
    endless.lm_head.weight.data[1] = 0  # the end token never has the largest logit
    lengths, generate = [], endless.generate

    def spy(**inputs):
        output = generate(**inputs)
        lengths.append(output.shape[1] - 1)  # the start token is not new
        return output

    monkeypatch.setattr(endless, "generate", spy)
    summarise("--max-new-tokens", str(limit), sources=sources[:3], model=endless)
    assert lengths == [limit]


@pytest.fixture
def memory_for(flan, model, monkeypatch):
    """memory_for(rows): from now on there is memory to generate for so many; returns the batch sizes that are tried."""
    generate, sizes = model.generate, []

    def memory_for(rows):
        def small_memory(**inputs):
            sizes.append(len(inputs["input_ids"]))
            if sizes[-1] > rows:
                raise flan.torch.OutOfMemoryError("no room")
            return generate(**inputs)

        monkeypatch.setattr(model, "generate", small_memory)
        return sizes

    return memory_for


def test_out_of_memory_halves_the_batch_for_good(flan, model, tokenizer, sources, by_hand, memory_for):
    sizes = memory_for(3)
    settings = flan.parse_settings(["--max-new-tokens", "24"])
    summarizer = flan.Summarizer(model, tokenizer, settings, *flan.get_device())
    assert summarizer(sources) == by_hand and sizes == [20, 10, 5, *[2] * 10]
    sizes.clear()
    assert summarizer(sources[:5]) == by_hand[:5] and sizes == [2, 2, 1]


def test_out_of_memory_with_one_row_is_not_hidden(flan, summarise, memory_for):
    memory_for(0)
    with pytest.raises(flan.torch.OutOfMemoryError):
        summarise()


@pytest.mark.parametrize("beams", [1, 3])
def test_a_signal_ends_a_batch_within_a_token(flan, model_folder, tokenizer, sources, beams):
    """All rows are one batch, of a model that would go on for a thousand tokens."""
    endless = flan.load_base(model_folder, *flan.get_device())
    endless.lm_head.weight.data[1] = 0  # the end token never has the largest logit
    settings, tokens = flan.parse_settings(["--max-new-tokens", "1000", "--num-beams", str(beams)]), []
    summarizer = flan.Summarizer(endless, tokenizer, settings, *flan.get_device())

    def told(*_):
        tokens.append(1)
        if len(tokens) == 5:
            summarizer.stop.receive(15, None)

    endless.lm_head.register_forward_hook(told)
    with pytest.raises(flan.Interrupted):
        summarizer(sources[:8])
    assert len(tokens) <= 6 and (summarizer.stop.number, summarizer.stop.is_set) == (15, True)


# ----------------------------------------------------------------------------------------------------------------------
# ROUGE
# ----------------------------------------------------------------------------------------------------------------------


def rouge(flan, prediction, reference):
    scores = flan.Rouge(keep_in_memory=True).compute(predictions=[prediction], references=[reference])
    return [scores[kind][0] for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")]


@pytest.mark.parametrize("prediction, reference, expected", [
    # 4 of 5 and of 6 words agree, as "the" counts once: 2 * 4 / 11. One of 4 and of 5 pairs: 2 * 1 / 9.
    # The longest common subsequence is "the cat on mat".
    ("the cat on a mat", "the cat sat on the mat", (800 / 11, 200 / 9, 800 / 11, 800 / 11)),
    # Sentence by sentence both are found; in one piece only three words of six stand in order. Pairs: 4 of 5.
    ("Bob drinks tea. Anna eats cake!", "Anna eats cake. Bob drinks tea.", (100, 80, 50, 100)),
    # The stemmer makes meeting and meets one word; case and punctuation do not count.
    ("Ann MEETS Tom?", "Ann: meeting Tom", (100, 100, 100, 100)),
    ("", "Ann meets Tom", (0, 0, 0, 0)),
    ("...", "Ann meets Tom", (0, 0, 0, 0)),
])  # fmt: skip
def test_rouge_on_paper(flan, prediction, reference, expected):
    assert rouge(flan, prediction, reference) == pytest.approx(expected)


def test_rouge_is_rouge_score_called_by_hand(flan):
    from rouge_score.rouge_scorer import RougeScorer

    rows = fake_hub.samsum_rows("rouge", 30)
    references = [row["summary"] + " They are running late." for row in rows]
    predictions = ["They run late! " + row["summary"].replace("a", "the ") for row in rows[::-1]]
    metric = flan.Rouge(keep_in_memory=True).compute(predictions=predictions, references=references)
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    assert list(metric) == kinds
    scorer = RougeScorer(kinds, use_stemmer=True)
    for i, (reference, prediction) in enumerate(zip(references, predictions, strict=True)):
        by_hand = scorer.score(reference.replace(". ", ".\n"), prediction.replace("! ", "!\n"))
        for kind in kinds:
            assert metric[kind][i] == pytest.approx(100 * by_hand[kind].fmeasure), (kind, i)
    assert metric["rougeLsum"] != metric["rougeL"] and 0 < np.mean(metric["rouge2"]) < 100


@pytest.mark.parametrize("scores, expected", [
    ([7.5], (7.5, 7.5)),
    ([3.0] * 9, (3, 3)),
    # Both draws are 0 in a quarter of the samples, both 1 in another: far more than 2.5% at each end.
    ([0.0, 1.0], (0, 1)),
    # Ones among ten draws are binomial(10, 1/2): P(at most 1) = 1.07% < 2.5% < 5.47% = P(at most 2).
    ([0.0, 100.0] * 5, (20, 80)),
])  # fmt: skip
def test_bootstrap_interval_on_paper(flan, scores, expected):
    assert tuple(flan.bootstrap_interval(scores)) == expected


def test_samples_drawn_together_are_those_drawn_one_by_one(flan):
    """Of so many rows that they come in three parts, the last a smaller one."""
    values, rng = np.random.default_rng(1).random(3000), np.random.default_rng(0)
    expected = [values[rng.integers(0, 3000, 3000)].mean() for _ in range(700)]
    assert flan.resampled_means(values, 700, 0).tolist() == pytest.approx(expected, rel=1e-12)


def test_bootstrap_interval_of_many_rows_is_the_normal_one(flan):
    scores = np.random.default_rng(1).uniform(20, 60, 800)
    half = 1.96 * scores.std() / np.sqrt(len(scores))
    low, high = flan.bootstrap_interval(scores)
    # The ends are quantiles of 1000 samples: their own standard error is about 0.085 of the half width.
    assert low == pytest.approx(scores.mean() - half, abs=0.3 * half)
    assert high == pytest.approx(scores.mean() + half, abs=0.3 * half)
    assert flan.bootstrap_interval(scores) == [low, high]  # no chance: the same scores have one interval


def test_bootstrap_leaves_the_global_generators_alone(flan):
    """Otherwise an evaluation would change the training that follows it."""
    state, numpy_state = flan.torch.get_rng_state(), np.random.get_state()[1].copy()
    flan.bootstrap_interval([1.0, 2.0, 3.0])
    assert flan.torch.equal(flan.torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_score_compares_whole_references_row_by_row(flan, tokenizer, data, tmp_path):
    """Labels cut to 4 tokens are for training: a perfect summary still scores 100."""
    args = flan.parse_settings(["--dataset", str(data), "--max-target-length", "4", "--cache-dir", str(tmp_path)])
    rows = flan.tokenize(flan.load_data(args), tokenizer, args)["validation"]
    assert max(map(len, rows["labels"])) == 4
    predictions = list(rows["summary"])
    predictions[2], predictions[5] = "Nobody knows.", ""

    def fake(sources):
        assert list(sources) == list(rows["input_ids"])
        return predictions

    scores, examples = flan.score(fake, rows)
    assert [row["rouge1"] for row in examples] == [100, 100, 0, 100, 100, 0, 100]
    for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        assert scores[kind] == pytest.approx(500 / 7)
        low, high = scores[kind + "_interval"]
        assert 0 <= low < 500 / 7 < high <= 100
    originals = fake_hub.samsum_rows("validation", 7)
    assert [row["id"] for row in examples] == [row["id"] for row in originals]
    assert [row["dialogue"] for row in examples] == [row["dialogue"].replace("\r\n", "\n") for row in originals]
    assert [row["reference"] for row in examples] == [row["summary"] for row in originals]
    assert [row["prediction"] for row in examples] == predictions


@pytest.mark.parametrize("rows, processes", [(1, 4), (2, 8), (3, 8), (5, 3), (8, 4)])
def test_all_processes_summarise_the_same_number_of_batches(flan, monkeypatch, rows, processes):
    """One that has no row left would wait for ever for the others, which compare notes after every batch."""
    calls, parts = [], [{i: str(i)} for i in range(rows)]
    monkeypatch.setattr(flan.torch.distributed, "all_gather_object", lambda to, _: to.__setitem__(slice(None), parts))
    monkeypatch.setattr(flan, "agree", lambda device, *flags: [bool(flag) for flag in flags])
    monkeypatch.setattr(flan.Summarizer, "generate", lambda self, sources: calls.append(rank) or [""] * len(sources))
    for rank in range(processes):
        state = types.SimpleNamespace(num_processes=processes, process_index=rank, is_main_process=False)
        monkeypatch.setattr(flan, "PartialState", lambda state=state: state)
        summarizer = flan.Summarizer(None, None, flan.parse_settings(["--no-fast"]), torch.device("cpu"), torch.float32)
        summarizer.batch_size = 1
        assert summarizer([[5]] * rows) == [str(i) for i in range(rows)]
    assert {calls.count(rank) for rank in range(processes)} == {-(-rows // processes)}
