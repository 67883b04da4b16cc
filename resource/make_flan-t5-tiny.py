"""Rebuild `resource/flan-t5-tiny/`: a tiny T5 v1.1 with its own tokenizer, pretrained to read chats and copy from them.

    python resource/make_flan-t5-tiny.py --output runs/first      # a GPU: about 11 minutes; a CPU is far slower
    python resource/make_flan-t5-tiny.py --first runs/first --lr 1e-3 --minutes 20 --seed 2000 --output runs/tiny
    python resource/make_flan-t5-tiny.py --output runs/dry-run --steps 20 --batch-size 8 --workers 1

The default output is the folder that ships; one that is not empty is never overwritten.

A summary is mostly copying: names, days, prices that the model has never met. Three things teach it that:
- Tokens. A capitalised word always falls into pairs of letters ("Ma|ri|a"), a number into digits. So a name that nobody
  has heard of is made of the same few well-known tokens as any other, and the same ones wherever it stands.
- The start. The weights begin as a machine for copying (`start_as_copier`): what attention reads it passes on as it is,
  and some heads look at the token before and the one after. From T5's own random start copying was not learnt at all
  in the steps after which this start had nearly all of it right.
- The text. Every example is made once and never seen again: names of random letters, of invented syllables, and of many
  languages, in the grammar of `make_sample.py`, in freely written chats, and in chats of random sentences
  (`flan-t5-tiny-text/`).

The second command goes on from the weights of the first.

The model learns to sum up under another instruction ("in short: "), never under "summarize: ". After an instruction
that it does not know, it goes on with the chat: binding the task to its prefix is left to fine-tuning.
Needs torch, transformers, tokenizers and numpy. How long it trains depends on the clock, so two runs differ slightly.
"""

import argparse
import math
import multiprocessing
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice, pairwise, product
from pathlib import Path
from queue import Full

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

HERE = Path(__file__).parent
FOLDER = HERE / "flan-t5-tiny"
sys.path.insert(0, str(HERE))
import chats
import make_sample

# The geometry of Flan-T5 (T5 v1.1: gated GELU, untied head, relative positions), in small.
GEOMETRY = {
    "d_model": 256, "d_kv": 64, "num_heads": 4, "d_ff": 416, "num_layers": 6, "num_decoder_layers": 4,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
VOCAB_SIZE = 5120  # of which 3 special tokens, 256 bytes, 1,352 pairs of letters and 100 sentinels
SENTINELS = 100
PAD, EOS = 0, 1
# Longest sources and targets. A row goes to the first that it fits into, so that little is padding; the model is
# compiled for each. (Compiled once for any length, it learnt NaN on an H200 with PyTorch 2.11.)
SHAPES = ((80, 24), (128, 48), (208, 80))
SHARD_ROWS = 512
IGNORE = -100  # label of padding: no loss

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------------------------

# Capitalised words that are no names stay whole. All others are cut into pairs of letters.
STARTERS = tuple(
    """
    I The They This That There These Then Thanks Thank He She His Her It Its We You Your Our My Me What When Where
    Who Why Which How Hi Hey Hello Yes No Not Nope Yeah Yep Sure Ok Okay Oh Can Could Did Do Does Don Is Are Was
    Were Will Would Shall Should Have Has Had May If In On At For From To With Of And But Or So Because After Before
    Both All An As Let Great Good Nice Cool Perfect Lovely Sorry Please Maybe Just Now Well Wait Really Too Same See
    Some Someone Somebody Everyone Anyone Any One Two Only Still Also Since Although Once Instead Haha Lol Omg Ugh
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April June July August September
    October November December Mum Dad Mr Mrs Ms Dr By Like Won Couldn Isn Wasn Haven Hasn Didn Doesn Aren Bye Come
    Going Got Get Call Tell Ask
    """.split()  # noqa: SIM905  (words, as a reader wants to see them)
)
WORDS = "|".join(
    [
        rf"(?=\p{{Lu}})(?:{'|'.join(STARTERS)})(?!\p{{L}})",
        r"\p{Lu}\p{L}?",  # the first pair of letters of a name; "A" and one capital in front of a digit stand alone
        r"(?<=\p{L})\p{L}{1,2}",  # the next pairs
        r" ?\p{Ll}\p{L}*(?:'\p{Ll}+)?",
        r"'\p{Ll}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+(?: (?=\p{Lu}|\p{N}))?",  # with the space before a capital, as in "Anna: Hi"
        r"\s",
        r"\p{L}",
    ]
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019): all text is bytes, so nothing is ever unknown.

    Ids are laid out as in T5: <pad> 0, </s> 1, <unk> 2 (never used), and <extra_id_0> is the last id.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - SENTINELS,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Every pair of letters becomes a token, however rare it is, and so do the starters.
    pairs = [f"{a.upper()}{b} Ab{a}{b}" for a in LETTERS for b in LETTERS]
    common = (" ".join([*pairs, *STARTERS]),) * 200

    def everything() -> Iterator[str]:
        yield from common
        yield from texts

    bpe.train_from_iterator(everything(), trainer)
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    bpe.add_special_tokens(sentinels[::-1])
    bpe.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=sentinels,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def sentinel(i: int) -> int:
    """Id of <extra_id_i>."""
    return VOCAB_SIZE - 1 - i


# ----------------------------------------------------------------------------------------------------------------------
# Rows: chats from four sources, and plain sentences
# ----------------------------------------------------------------------------------------------------------------------


def grammar_rows(seed: int) -> Iterator[dict]:
    for row in make_sample.records("pretrain", seed):
        row["kind"], row["summaries"] = "grammar", [row["summary"]]
        row["turns"] = [tuple(turn.split(": ", 1)) for turn in row["dialogue"].split("\n")]
        yield row


def narrated(row: dict, rng: random.Random) -> dict:
    """The row, to which this adds what its messages say in reported speech if nobody asked before: it takes a while."""
    if "narration" not in row:
        names, told = list(row["woman"]), []
        for i, (name, text) in enumerate(row["turns"]):
            near = [n for n, _ in row["turns"][:i][::-1] + row["turns"][i:] if n != name]
            listener = near[0] if near else names[-1]
            told.append((name, chats.report_speech(text, name, listener, row["woman"][name], rng)))
        row["told"], row["narration"] = told, " ".join(t for _, t in told if t)
    return row


def babble(rng: random.Random, words: list[str]) -> dict:
    """A chat of random words and names: nothing in it can be guessed, all must be copied."""
    names = []
    while len(names) < rng.choice((2, 2, 3, 4)):
        name = make_sample.draw_person("pretrain", rng, True, rng.random() < 0.9).name
        names += [name] if name not in names else []
    turns = []
    for i in range(rng.randint(2, 9)):
        said = rng.choices(words, k=rng.randint(1, 8))
        if rng.random() < 0.4:
            kind = rng.choice(("man", "town", "day", "time", "price", "num", "date", "title", "venue"))
            said.insert(rng.randrange(len(said) + 1), chats.draw(kind, rng))
        turns.append((names[i] if i < 2 else rng.choice(names), " ".join(said) + rng.choice(("", "", ".", "?", "!"))))
    dialogue = "\n".join(f"{n}: {t}" for n, t in turns)
    return {"kind": "babble", "turns": turns, "dialogue": dialogue, "facts": {n: n for n in names},
            "summaries": [], "narration": "", "told": turns}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Tasks: from a chat to (source ids, target ids), both without </s>; None where a row has nothing for the task
# ----------------------------------------------------------------------------------------------------------------------

Encode = Callable[[str], list[int]]
Pair = tuple[list[int], list[int]]


def corrupt_spans(ids: list[int], density: float, mean_span: float, rng: random.Random) -> Pair:
    """Span corruption (Raffel et al. 2020, section 3.1.4): random spans become sentinels, the target spells them out.

    Noise and text alternate, text first; both are cut into the same number of random pieces, none of them empty.
    """
    noise = min(max(round(len(ids) * density), 1), len(ids) - 1)
    spans = min(max(round(noise / mean_span), 1), noise, len(ids) - noise, SENTINELS - 1)

    def pieces(total: int) -> list[int]:
        cuts = [0, *sorted(rng.sample(range(1, total), spans - 1)), total]
        return [b - a for a, b in pairwise(cuts)]

    source, target, at = [], [], 0
    for i, (kept, masked) in enumerate(zip(pieces(len(ids) - noise), pieces(noise), strict=True)):
        source += [*ids[at : at + kept], sentinel(i)]
        target += [sentinel(i), *ids[at + kept : at + kept + masked]]
        at += kept + masked
    return source, [*target, sentinel(spans)]


def masked_chat(row: dict, encode: Encode, rng: random.Random) -> Pair:
    """T5's own task, 15% of the tokens in spans of 3, on the chat."""
    return corrupt_spans(encode(row["dialogue"]), 0.15, 3, rng)


def third_person_text(row: dict, rng: random.Random) -> str:
    row = narrated(row, rng)
    return rng.choice([row["narration"], *row["summaries"]] if row["narration"] else row["summaries"] or [""])


def masked_narration(row: dict, encode: Encode, rng: random.Random) -> Pair | None:
    """The chat, then what is told about it with spans missing."""
    ids = encode(third_person_text(row, rng))
    if len(ids) < 4:
        return None
    source, target = corrupt_spans(ids, rng.choice((0.15, 0.3, 0.5)), rng.choice((3, 6)), rng)
    return encode(row["dialogue"] + "\n\n") + source, target


def masked_facts(row: dict, encode: Encode, rng: random.Random) -> Pair | None:
    """The chat, then what is told about it without some of its names and facts."""
    values = sorted({v for v in row["facts"].values() if len(v) > 1}, key=len, reverse=True)
    text = third_person_text(row, rng)
    if not values or not text:
        return None
    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, values))})(?!\w)")
    source, target, n = encode(row["dialogue"] + "\n\n"), [], 0
    for i, piece in enumerate(pattern.split(text)):  # odd pieces are facts
        if i % 2 and n < SENTINELS - 1 and rng.random() < 0.6:
            source.append(sentinel(n))
            target += [sentinel(n), *encode(piece)]
            n += 1
        else:
            source += encode(piece)
    return (source, [*target, sentinel(n)]) if n else None


def retell(row: dict, encode: Encode, rng: random.Random) -> Pair | None:
    """The whole narration, turn by turn in reported speech."""
    row = narrated(row, rng)
    return (encode("retell: " + row["dialogue"]), encode(row["narration"])) if row["narration"] else None


def in_short(row: dict, encode: Encode, rng: random.Random) -> Pair | None:
    """The first summary: the main fact."""
    return (encode("in short: " + row["dialogue"]), encode(row["summaries"][0])) if row["summaries"] else None


def what_else(row: dict, encode: Encode, rng: random.Random) -> Pair | None:
    """One of the other summaries: a side fact, or half of the main one. Both as "in short" would be rivals."""
    others = row["summaries"][1:]
    return (encode("what else?\n\n" + row["dialogue"]), encode(rng.choice(others))) if others else None


def continue_chat(row: dict, encode: Encode, rng: random.Random) -> Pair | None:
    """The turns so far, then the next two: after no instruction, or any word that is not one of the other tasks.

    So the model takes an instruction that it does not know, as `summarize` is, for a chat to go on with.
    """
    turns = row["dialogue"].split("\n")
    if len(turns) == 1:
        return None
    at = rng.randrange(1, len(turns))
    others = re.findall(r"[a-z]{3,}", row["dialogue"].lower()) or [""]
    word = rng.choice(("", "continue", make_sample.invent(rng, capital=False), rng.choice(others)))
    return encode((word and word + ": ") + "\n".join(turns[:at])), encode("\n".join(turns[at : at + 2]))


def who_says(row: dict, encode: Encode, rng: random.Random) -> Pair:
    """A message; the answer is the name of its sender."""
    name, message = rng.choice(row["turns"])
    return encode(f"who says: {message}\n\n{row['dialogue']}"), encode(name)


def quote(row: dict, encode: Encode, rng: random.Random) -> Pair:
    """A name; the answer is what this person writes, word for word."""
    name = rng.choice(row["turns"])[0]
    return encode(f"quote {name}: {row['dialogue']}"), encode("\n".join([t for n, t in row["turns"] if n == name][:3]))


def what_about(row: dict, encode: Encode, rng: random.Random) -> Pair | None:
    """A name; the answer is what is told about this person."""
    row = narrated(row, rng)
    name = rng.choice(sorted({n for n, _ in row["turns"]}))
    if "told" in row:
        about = [text for n, text in row["told"] if n == name and text]
    else:
        about = [sentence for sentence in re.split(r"(?<=\.) ", row["narration"]) if name in sentence]
    return encode(f"what about {name}?\n\n{row['dialogue']}"), encode(" ".join(about[:3]) or "nothing")


def which_facts(row: dict, encode: Encode, rng: random.Random) -> Pair:
    """Who talks, or which names and things are mentioned, in the order of the chat."""
    chat = row["dialogue"]
    if rng.random() < 0.4 or row["kind"] == "babble":
        names = list(dict.fromkeys(name for name, _ in row["turns"]))
        return encode("who talks?\n\n" + chat), encode(" and ".join(filter(None, [", ".join(names[:-1]), names[-1]])))
    mentioned = sorted((chat.find(value), value) for value in set(row["facts"].values()) if value in chat)
    return encode("which facts?\n\n" + chat), encode(", ".join(value for _, value in mentioned))


def copy(row: dict, encode: Encode, rng: random.Random) -> Pair:
    """A message, letter by letter."""
    text = rng.choice(row["dialogue"].split("\n"))
    return encode("copy: " + text), encode(text)


TASKS = {  # kind of row: {task: weight}
    "grammar": {in_short: 30, retell: 16, masked_narration: 12, masked_facts: 10, masked_chat: 8, continue_chat: 8,
                what_about: 7, which_facts: 5, who_says: 3, quote: 2},
    "free": {in_short: 72, what_else: 14, masked_facts: 10, masked_narration: 8, masked_chat: 10, continue_chat: 6,
             retell: 6, what_about: 4, which_facts: 4, who_says: 2, quote: 2},
    "murmur": {retell: 50, what_about: 25, quote: 8, masked_chat: 12, masked_facts: 10},
    "babble": {quote: 30, which_facts: 25, who_says: 15, copy: 30},
}  # fmt: skip
# Tellings of each kind, and tasks made of one telling. Sentences are WordNet's examples of use.
MIXTURE = {"grammar": (20, 3), "free": (150, 2), "murmur": (20, 2), "babble": (8, 2), "sentences": (16, 1)}
COPY_FIRST = 0.06  # part of the training in which most rows are babble
CALM_FROM = 0.93  # part of the training after which nothing is dropped any more: copying suffers from it


# ----------------------------------------------------------------------------------------------------------------------
# Batches: worker processes make them, each row once
# ----------------------------------------------------------------------------------------------------------------------


def make_pairs(folder: str, seed: int, first: bool = False) -> Iterator[Pair]:
    """Endless (source, target) ids. `first`: mostly babble."""
    bpe = Tokenizer.from_file(f"{folder}/tokenizer.json")
    encode = lru_cache(16)(lambda text: bpe.encode(text, add_special_tokens=False).ids)
    rng = random.Random(f"tasks-{seed}")
    chats.prepare_names()
    free = chats.read()
    grammar = grammar_rows(seed)
    sentences = chats.everyday()
    words = [w for w in " ".join(sentences[::7]).split() if w.isalpha() and w.islower()]
    kinds, shares = list(MIXTURE), [share for share, _ in MIXTURE.values()]
    while True:
        kind = rng.choices(kinds, shares)[0] if not first or rng.random() < 0.3 else "babble"
        if kind == "sentences":
            text = " ".join(s[0].upper() + s[1:] + "." for s in rng.sample(sentences, rng.randint(2, 5)))
            yield corrupt_spans(encode(text), 0.2, 3, rng)
            continue
        row = {
            "grammar": lambda: next(grammar),
            "free": lambda: chats.tell(rng.choice(free), rng),
            "murmur": lambda: chats.murmur(rng, sentences, free),
            "babble": lambda: babble(rng, words),
        }[kind]()
        tasks = TASKS[kind]
        pairs = []
        for task in rng.choices(list(tasks), list(tasks.values()), k=MIXTURE[kind][1]):
            pair = task(row, encode, rng)
            if pair and pair not in pairs:  # one task drawn twice may give the same pair
                pairs.append(pair)
        yield from pairs


Shard = tuple[np.ndarray, np.ndarray]


def make_shards(pairs: Iterator[Pair], rows: int = SHARD_ROWS, shapes: tuple = SHAPES) -> Iterator[Shard]:
    """Sources (rows, S) and targets (rows, T) of one of the shapes, as uint16 ids, ended by </s>, padded with 0."""
    waiting: dict[tuple[int, int], list[Pair]] = {shape: [] for shape in shapes}
    for source, target in pairs:
        # The few that are too long are left out: a cut target would teach to stop early.
        shape = next((shape for shape in shapes if len(source) < shape[0] and len(target) < shape[1]), None)
        if shape is None:
            continue
        waiting[shape].append((source, target))
        if len(waiting[shape]) == rows:
            shard = tuple(np.full((rows, length), PAD, dtype=np.uint16) for length in shape)
            for i, row in enumerate(waiting[shape]):
                for part, ids in zip(shard, row, strict=True):
                    part[i, : len(ids) + 1] = [*ids, EOS]
            waiting[shape] = []
            yield shard


def unread_rows() -> list[dict]:
    """One telling of every chat that no training text is made of."""
    return [chats.tell(chat, random.Random(i)) for i, chat in enumerate(chats.unread())]


def unread_shard(folder: str) -> Shard:
    """The unread chats with their first summary."""
    bpe = Tokenizer.from_file(f"{folder}/tokenizer.json")
    encode = lambda text: bpe.encode(text, add_special_tokens=False).ids
    pairs = [(encode("in short: " + row["dialogue"]), encode(row["summaries"][0])) for row in unread_rows()]
    longest = SHAPES[-1]
    pairs = [(source, target) for source, target in pairs if len(source) < longest[0] and len(target) < longest[1]]
    return next(make_shards(iter(pairs), len(pairs), (longest,)))


def start_worker(folder: str, queue: multiprocessing.Queue, seed: int, first_shards: int) -> None:
    """Fill the queue with shards until the parent ends this process, or is no more."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    first, rest = (make_shards(make_pairs(folder, seed + part * 10**6, first=part == 0)) for part in (0, 1))
    made = 0
    while True:
        shard = next(first if made < first_shards else rest)
        made += 1
        while True:
            try:
                queue.put(shard, timeout=5)
                break
            except Full:
                if not parent.is_alive():  # it was killed: leave nothing behind
                    queue.cancel_join_thread()
                    return


class Batches:
    """Batches of new rows, from the shards as the workers deliver them."""

    def __init__(self, folder: Path, workers: int, batch_size: int, device: str, seed: int, first_shards: int):
        self.batch_size, self.device = batch_size, device
        spawn = multiprocessing.get_context("spawn")
        self.queue = spawn.Queue(maxsize=4 * workers)
        self.processes = [
            spawn.Process(target=start_worker, args=(str(folder), self.queue, seed + i, first_shards), daemon=True)
            for i in range(workers)
        ]
        for process in self.processes:
            process.start()
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.made = 0
        self.waited = 0.0

    def draw(self) -> dict[str, torch.Tensor]:
        """One batch."""
        if not self.waiting:
            start = time.time()
            shard = self.queue.get(timeout=600)
            self.waited += time.time() - start
            sources, targets = (torch.from_numpy(part.astype(np.int16)).to(self.device) for part in shard)
            self.waiting = list(zip(sources.split(self.batch_size), targets.split(self.batch_size), strict=True))
            self.made += len(sources)
        return to_batch(*self.waiting.pop())

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()


def to_batch(sources: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Padded ids (B, S) and (B, T) as what T5 takes."""
    sources, targets = sources.long(), targets.long()
    if sources.device.type == "cpu":  # nothing is compiled: shorter is faster
        sources, targets = (ids[:, : int((ids != PAD).sum(1).max())] for ids in (sources, targets))
    return {
        "input_ids": sources,
        "attention_mask": (sources != PAD).long(),
        "labels": targets.masked_fill(targets == PAD, IGNORE),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


def make_model(start: bool = True, **geometry: int) -> T5ForConditionalGeneration:
    """A new model whose head is tied to the embedding while it is pretrained: `untie` gives it one of its own.

    A token that is rare in the text is then as easy to copy as any other: its row of the head needs no learning.
    """
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCAB_SIZE, dropout_rate=0.0, tie_word_embeddings=True, **(GEOMETRY | geometry))
    model = T5ForConditionalGeneration(config)
    if start:
        start_as_copier(model)
    return model


@torch.no_grad()
def start_as_copier(model: T5ForConditionalGeneration) -> None:
    """Start with attention that passes on what it reads, and with heads that look at the neighbours.

    Of mimetic initialisation (Trockman and Kolter 2023) the part for values: W_o = W_v transposed, with orthonormal
    rows in every head, so that what a head reads leaves in the directions in which it came, and points to its own token
    in the tied head. And of T5's relative positions: heads 0, 1, 2 ... of the encoder prefer the token before, the one
    after, and the one two before. Together they are the two halves of an induction head (Olsson et al. 2022): the
    encoder notes at each token what stood before it, and the decoder looks for the note that fits what it just wrote.
    """
    config = model.config
    for stack, offsets in ((model.encoder, (-1, 1, -2)), (model.decoder, (-1, -2, 0))):
        for block in stack.block:
            for layer in block.layer[:-1]:
                attention = layer.SelfAttention if hasattr(layer, "SelfAttention") else layer.EncDecAttention
                shape = (config.num_heads, config.d_model, config.d_kv)
                values = 0.7 * torch.linalg.qr(torch.randn(shape)).Q.mT.flatten(0, 1)  # (heads x d_kv, d_model)
                attention.v.weight.copy_(values)
                attention.o.weight.copy_(values.T)
        attention = stack.block[0].layer[0].SelfAttention
        attention.relative_attention_bias.weight.zero_()
        for head, offset in enumerate(offsets[: config.num_heads]):
            bucket = attention._relative_position_bucket(
                torch.tensor([[offset]]), bidirectional=stack is model.encoder,
                num_buckets=config.relative_attention_num_buckets,
                max_distance=config.relative_attention_max_distance,
            )  # fmt: skip
            attention.relative_attention_bias.weight[bucket.item(), head] = 5.0


def load(folder: Path) -> dict[str, torch.Tensor]:
    """The fp32 weights of a model that was saved here, without its head, which was the embedding."""
    every = load_file(folder / "model.safetensors")
    return {name: weight.float() for name, weight in every.items() if name != "lm_head.weight"}


def grow(every: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """The weights of an encoder with so many layers, which still computes the same: it gets copies that add nothing.

    What a copy writes back is zero at first (as in Net2Net, Chen et al. 2016, the function is kept); so that learns
    first, and then what is before it. The copies stand evenly between the old layers.
    """
    block = re.compile(r"encoder\.block\.(\d+)\.(.+)")
    old = 1 + max(int(match[1]) for match in map(block.match, every) if match)
    if old > layers:
        raise ValueError(f"an encoder of {old} layers does not shrink to {layers}")
    grown = {name: weight for name, weight in every.items() if not block.match(name)}
    for layer in range(layers):
        copied = layer * old // layers
        is_new = layer > 0 and (layer - 1) * old // layers == copied
        for name, weight in every.items():
            match = block.match(name)
            if match and int(match[1]) == copied and not (is_new and "relative_attention_bias" in name):
                adds = is_new and match[2].endswith((".o.weight", ".wo.weight"))
                grown[f"encoder.block.{layer}.{match[2]}"] = torch.zeros_like(weight) if adds else weight
    return grown


def go_on_from(model: T5ForConditionalGeneration, folder: Path) -> None:
    """Give the model the weights of one that was saved here, whose encoder may have fewer layers."""
    found = model.load_state_dict(grow(load(folder), model.config.num_layers), strict=False)
    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}  # other names of `shared`
    if found.unexpected_keys or set(found.missing_keys) - tied:
        raise ValueError(f"{folder} holds a model of another geometry: {found}")


def untie(model: T5ForConditionalGeneration) -> None:
    """Give the model a head of its own, as T5 v1.1 has it. A tied head is scaled by d_model^-0.5: it moves into it."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().clone() * model.config.d_model**-0.5)
        model.config.tie_word_embeddings = model.config.scale_decoder_outputs = False


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def learning_rate(progress: float, step: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak; progress runs from 0 to 1."""
    return peak * min((step + 1) / warmup, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def set_dropout(model: T5ForConditionalGeneration, rate: float) -> None:
    """Dropout everywhere but in attention, which copies letter by letter and does not bear that a tenth is missing."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate
        elif isinstance(module, T5Attention):
            module.dropout = 0.0


def compiled(model: T5ForConditionalGeneration, batch_size: int, dropout: float) -> torch.nn.Module:
    """The model through torch.compile, or as it is where the compiler does not work (it needs Triton and gcc)."""
    try:
        fast = torch.compile(model, dynamic=False)
        for rate, shape in product((0.0, dropout), SHAPES):  # all now: later they would stop the training for a minute
            set_dropout(model, rate)
            ids = (torch.randint(PAD + 1, VOCAB_SIZE, (batch_size, length), device=model.device) for length in shape)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                fast(**to_batch(*ids)).loss.backward()
    except Exception as error:  # whatever the compiler stumbles over; the training itself would stumble again
        print(f"torch.compile does not work here, training without it: {str(error).splitlines()[0]}", flush=True)
        fast = model
    model.zero_grad(set_to_none=True)
    return fast


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, shard: Shard, batch_size: int, device: str) -> float:
    """Mean loss over a shard that is never trained on (nats per token, weighted by batch), without dropout."""
    model.eval()
    sources, targets = (torch.from_numpy(part.astype(np.int16)).to(device) for part in shard)
    losses = []
    for source, target in zip(sources.split(batch_size), targets.split(batch_size), strict=True):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            losses.append(model(**to_batch(source, target)).loss.float().item())
    model.train()
    return sum(losses) / len(losses)


def pretrain(model: T5ForConditionalGeneration, folder: Path, args: argparse.Namespace, device: str) -> dict[str, str]:
    """Train in place, return the facts of the run. It lasts until `--minutes` or `--steps` is over.

    The clock starts after the first step, which compiles. With `--first` it goes on from those weights.
    """
    if args.first:
        go_on_from(model, args.first)
    is_timed = not args.steps and not args.first
    first_shards = round(COPY_FIRST * args.minutes * 60 * 20_000 / SHARD_ROWS / args.workers) if is_timed else 0
    unread = unread_shard(str(folder))
    # Only matrices of the blocks decay: in the embedding, rows of rare tokens could fade between two meetings.
    decays = lambda name, p: p.dim() > 1 and "block" in name and "bias" not in name
    decay = [p for name, p in model.named_parameters() if decays(name, p)]
    rest = [p for name, p in model.named_parameters() if not decays(name, p)]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98), fused=device == "cuda",
    )  # fmt: skip
    model.to(device).train()
    # Before the workers take the cores.
    step_model = compiled(model, args.batch_size, args.dropout) if device == "cuda" else model
    set_dropout(model, args.dropout)
    is_calm = False
    batches = Batches(folder, args.workers, args.batch_size, device, args.seed, first_shards)
    start, last_report, examples = time.time(), 0.0, 0
    for step in range(args.steps or 10**9):
        minutes = (time.time() - start) / 60
        if not args.steps and minutes >= args.minutes:
            break
        progress = step / args.steps if args.steps else minutes / args.minutes
        if progress > CALM_FROM and not is_calm:
            is_calm = True
            set_dropout(model, 0.0)
            print(f"no dropout from step {step} on", flush=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, step, args.lr)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = step_model(**batches.draw()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        examples += args.batch_size
        if step == 0:  # the clock starts when the workers do deliver
            print(f"first step after {time.time() - start:.0f} s, loss {loss.item():.2f}", flush=True)
            start, examples, batches.waited = time.time(), 0, 0.0
        elif time.time() - start - last_report > args.report_seconds:
            last_report = time.time() - start
            save_file(weights(model), folder / "model.safetensors")  # whatever ends the run, this much is kept
            print(
                f"step {step:6d}  {last_report:5.0f} s  loss {loss.item():.3f}  "
                f"unread {held_out_loss(model, unread, 128, device):.3f}  "
                f"{examples / last_report:,.0f} examples/s  {batches.made:,} made, waited {batches.waited:.0f} s",
                flush=True,
            )
    batches.stop()
    steps = step + bool(args.steps)
    facts = {
        "steps": f"{steps:,} of {args.batch_size} examples, none seen twice",
        "training time": f"{(time.time() - start) / 60:.1f} minutes after the first step, on {device_name(device)}",
        "loss": f"{held_out_loss(model, unread, 128, device):.3f} nats per token of the summaries of {len(unread[0])} "
        "chats that it has not read",
    }
    print(*(f"{key}: {value}" for key, value in facts.items()), sep="\n", flush=True)
    return facts


def weights(model: T5ForConditionalGeneration) -> dict[str, torch.Tensor]:
    """bf16 weights, without the head while it is the embedding."""
    return {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in model.named_parameters()}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"a CPU, {torch.get_num_threads()} threads"


# ----------------------------------------------------------------------------------------------------------------------
# What comes out
# ----------------------------------------------------------------------------------------------------------------------


def rouge1(prediction: str, reference: str) -> float:
    """F1 of the shared words, 0 to 100 (Lin 2004), without a stemmer."""
    a, b = (Counter(re.findall(r"[a-z0-9]+", text.lower())) for text in (prediction, reference))
    shared = (a & b).total()
    return 200 * shared / max(a.total() + b.total(), 1)


def invented(summary: str, dialogue: str) -> list[str]:
    """The capitalised words and numbers of a summary that are nowhere in the dialogue, and letters that broke."""
    said = re.findall(r"[^\W\d_]+|\d+", dialogue.lower())
    found = re.findall(r"\b[^\W\d_a-z][^\W\d_]*|\d+|\ufffd", summary)
    return [word for word in found if word.lower() not in said and word not in (*STARTERS, "A")]


@torch.no_grad()
def answer(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, texts: list[str], **how: int
) -> list[str]:
    """Answers to the texts, greedy if `how` (of `generate`) does not say otherwise."""
    model.eval()
    answers = []
    for at in range(0, len(texts), 100):
        inputs = tokenizer(texts[at : at + 100], return_tensors="pt", padding=True).to(model.device)
        answers += tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=96, **how), skip_special_tokens=True)
    return answers


def measure(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """What the model does with chats of other people."""
    rows = list(islice(make_sample.records("validation"), 200))
    names = [" and ".join(filter(None, [", ".join(n[:-1]), n[-1]])) for n in
             (list(dict.fromkeys(t.split(": ")[0] for t in r["dialogue"].split("\n"))) for r in rows)]  # fmt: skip
    rng = random.Random(11)
    letters = lambda: "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 9))).capitalize()
    strange = [[letters() for _ in range(4)] for _ in range(200)]
    talk = answer(model, tokenizer, ["who talks?\n\n" + "\n".join(f"{n}: {rng.choice(('hi', 'ok', 'when?', 'no'))}"
                                     for n in four) for four in strange])  # fmt: skip
    said = [set(re.findall(r"\w+", text)) for text in talk]
    copied = [name in words for four, words in zip(strange, said, strict=True) for name in four]
    told = answer(model, tokenizer, ["retell: " + row["dialogue"] for row in rows])
    speakers = answer(model, tokenizer, ["who talks?\n\n" + row["dialogue"] for row in rows])
    short = answer(model, tokenizer, ["in short: " + row["dialogue"] for row in rows])
    zero = answer(model, tokenizer, ["summarize: " + row["dialogue"] for row in rows])
    new = unread_rows()[:200]
    texts = ["in short: " + row["dialogue"] for row in new]
    beams = answer(model, tokenizer, texts, num_beams=8, no_repeat_ngram_size=6)
    found = [max(rouge1(text, summary) for summary in row["summaries"]) for text, row in zip(beams, new, strict=True)]
    exact = sum(a == b for a, b in zip(speakers, names, strict=True))
    mean = lambda a, b: sum(map(rouge1, a, b)) / len(rows)
    wrong = sum(bool(invented(s, row["dialogue"])) for s, row in zip(short, rows, strict=True))
    scores = {
        "names of random letters copied": f"{100 * sum(copied) / len(copied):.1f}%",
        "naming the speakers": f"{100 * exact / len(rows):.1f}% exact",
        "retelling the chat": f"ROUGE-1 {mean(told, [row['narration'] for row in rows]):.1f}",
        "in short": f"ROUGE-1 {mean(short, [row['summary'] for row in rows]):.1f}, {wrong} of 200 with invented names",
        "of chats that it has not read": f"ROUGE-1 {sum(found) / len(found):.1f} (200, with eight beams)",
        "summaries, without fine-tuning": f"ROUGE-1 {mean(zero, [row['summary'] for row in rows]):.1f}",
    }
    print(*(f"{key}: {value}" for key, value in scores.items()), sep="\n", flush=True)
    return scores


def save(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write bf16 weights, configuration and tokenizer."""
    untie(model)
    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rebuild_flags(args: argparse.Namespace, defaults: argparse.Namespace) -> str:
    """The flags that gave this model, for the command line in its card; its folder by name only."""
    names = ("steps", "minutes", "batch_size", "lr", "dropout", "weight_decay", "seed")
    changed = [name for name in names if getattr(args, name) != getattr(defaults, name)]
    flags = [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in changed]
    first = [f"--first runs/{args.first.resolve().name}"] if args.first else []
    return " ".join([*first, f"--output runs/{args.output.resolve().name}", *flags])


CARD = """# {name}

A T5 v1.1 of {millions:.1f} M parameters (gated GELU, untied head, relative positions; bf16) with a byte-level BPE of
{vocab:,} tokens. It exists so that `flan-t5_samsum.py` can fine-tune something real in minutes on a CPU. It is no
general language model, and it has nothing but its geometry in common with Google's Flan-T5.

It was pretrained on chats of the grammar in `resource/make_sample.py`, on chats written freely for this project by
language models (`resource/flan-t5-tiny-text`, with the licences), on the same chats retold, on chats of random words,
and on examples of use from WordNet 3.0, with first names from Faker's lists. It has not read the freely written chats
of `resource/sample`, and those who talk in the held-out rows there are in none of its lists of people. It has seen
summaries, after "in short: ", and never the prefix "summarize: ": the task is known, and fine-tuning binds it to its
name.

To rebuild it: `python resource/make_flan-t5-tiny.py {flags}`.
How far it gets depends on the machine. This copy:

{facts}

All before any fine-tuning; where nothing else is said, greedy, for 200 chats of the grammar with the people of
validation; the names of random letters, in lists of four; F1 without a stemmer. An invented name is a capitalised word
or a number that is nowhere in the chat.
"""


def training_texts(count: int) -> Iterator[str]:
    """Text to train the tokenizer on."""
    rng = random.Random(0)
    for row in islice(grammar_rows(0), count):
        yield from (row["dialogue"], row["narration"], row["summary"])
    for _ in range(6):
        for chat in chats.read():
            row = chats.tell(chat, rng)
            yield from (row["dialogue"], *row["summaries"])
    yield from chats.everyday()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="training time after compilation (default 9)")
    parser.add_argument("--steps", type=int, default=0, help="train for so many steps instead")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW (default 2e-3)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--report-seconds", type=float, default=30)
    parser.add_argument("--dropout", type=float, default=0.15, help="but not at the very end (default 0.15)")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="of the blocks' matrices (default 0.01)")
    parser.add_argument("--seed", type=int, default=1000, help="of the rows; another for a training that goes on")
    parser.add_argument("--first", type=Path, help="go on from this model")
    parser.add_argument("--output", type=Path, default=FOLDER)
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    if args.output.exists() and any(args.output.iterdir()):
        parser.error(f"{args.output} is not empty: delete it, or give another folder, --output DIR")
    if args.batch_size > SHARD_ROWS:
        parser.error(f"--batch-size {args.batch_size} is more than a worker makes at once: {SHARD_ROWS} at most")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    args.output.mkdir(parents=True, exist_ok=True)
    chats.prepare_names()
    if args.first:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.first)
    else:
        tokenizer = train_tokenizer(training_texts(6000))
    tokenizer.save_pretrained(args.output)
    model = make_model()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{millions:.2f} M parameters, {len(tokenizer)} tokens, {args.workers} workers, {device}", flush=True)
    facts = pretrain(model, args.output, args, device)
    save(model, tokenizer, args.output)
    saved = T5ForConditionalGeneration.from_pretrained(args.output, dtype=torch.float32).to(device)
    facts |= measure(saved, tokenizer)
    lines = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    flags = rebuild_flags(args, parser.parse_args([]))
    untied = sum(p.numel() for p in saved.parameters()) / 1e6
    card = CARD.format(name=args.output.name, millions=untied, vocab=len(tokenizer), flags=flags, facts=lines)
    (args.output / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
