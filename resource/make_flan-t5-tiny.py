"""Rebuild `resource/flan-t5-tiny/`: a tiny T5 v1.1 with its own tokenizer, pretrained on text made in this project.

    python resource/make_flan-t5-tiny.py --output runs/flan-t5-tiny      # a GPU: about 5 minutes; a CPU is slower
    python resource/make_flan-t5-tiny.py --output runs/dry-run --steps 20 --batch-size 8
    python resource/make_flan-t5-tiny.py --output runs/flan-t5-tiny-half --scale 0.5      # half as wide

The default output is the folder that ships; one that is not empty is never overwritten.

The text is the endless `pretrain` source of `make_sample.py`: chats between invented people, and the same chats retold
in reported speech. Most tasks are span corruption (Raffel et al. 2020, section 3.1.4), the rest are small questions
about a chat. The model never sees a summary, nor the prefix "summarize: ": learning that is left to fine-tuning.
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
from collections import Counter, deque
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from queue import Full

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

FOLDER = Path(__file__).parent / "flan-t5-tiny"
sys.path.insert(0, str(Path(__file__).parent))
import make_sample

# The geometry of Flan-T5 (T5 v1.1: gated GELU, untied head, relative positions), in small.
GEOMETRY = {
    "d_model": 192, "d_kv": 48, "num_heads": 4, "d_ff": 448, "num_layers": 3, "num_decoder_layers": 3,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
VOCAB_SIZE = 4096  # of which 3 special tokens, 256 bytes and 100 sentinels
SENTINELS = 100
DROPOUT = 0.1  # for fine-tuning; as in T5 v1.1, pretraining goes without, for its text never runs out
PAD, EOS = 0, 1
SOURCE_LENGTH, TARGET_LENGTH = 256, 128  # fixed shapes, so that the compiled model is compiled once
SHARD_ROWS = 2048
WINDOW_SHARDS = 64
IGNORE = -100  # label of padding: no loss

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------------------------

# A word takes the space before it, as in GPT-2. A capitalised word does not: a name is the same tokens at the start of
# a turn ("Anna: hi") and within a sentence ("asks Anna"), which is what makes it easy to copy. Line breaks stand alone.
WORDS = "|".join(
    [
        r"\p{Lu}\p{L}+",
        r" ?(?!\p{Lu}\p{L})\p{L}+(?:'\p{Ll}+)?",
        r"'\p{Ll}+",
        r" ?\p{N}{1,2}",
        r" ?[^\s\p{L}\p{N}]+(?: (?=\p{Lu}\p{L}))?",  # with the space before a capital, as in "Anna: Hi"
        r"\s",
    ]
)


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
    bpe.train_from_iterator(texts, trainer)
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
# Tasks: from a chat to (source ids, target ids), both without </s>
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


def masked_narration(row: dict, encode: Encode, rng: random.Random) -> Pair:
    """The chat, then its narration with spans missing."""
    source, target = corrupt_spans(encode(row["narration"]), rng.choice((0.15, 0.3, 0.5)), rng.choice((3, 6)), rng)
    return encode(row["dialogue"] + "\n\n") + source, target


def masked_facts(row: dict, encode: Encode, rng: random.Random) -> Pair:
    """The chat, then its narration without some of its names and facts."""
    values = sorted({v for v in row["facts"].values() if len(v) > 1}, key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, values))})(?!\w)")
    source, target, n = encode(row["dialogue"] + "\n\n"), [], 0
    for i, piece in enumerate(pattern.split(row["narration"])):  # odd pieces are facts
        if i % 2 and n < SENTINELS - 1 and rng.random() < 0.6:
            source.append(sentinel(n))
            target += [sentinel(n), *encode(piece)]
            n += 1
        else:
            source += encode(piece)
    return source, [*target, sentinel(n)]


def retell(row: dict, encode: Encode, rng: random.Random) -> Pair:
    """The whole narration, turn by turn in reported speech."""
    return encode("retell: " + row["dialogue"]), encode(row["narration"])


def continue_chat(row: dict, encode: Encode, rng: random.Random) -> Pair:
    """The turns so far, then the next two: after no instruction, or any word that is not one of the other tasks.

    So the model takes an instruction that it does not know, as `summarize` is, for a chat to go on with.
    """
    turns = row["dialogue"].split("\n")
    at = rng.randrange(1, len(turns))
    word = rng.choice(("", "continue", make_sample.invent(rng, capital=False), rng.choice(row["narration"].split())))
    word = re.sub(r"\W", "", word).lower()
    return encode((word and word + ": ") + "\n".join(turns[:at])), encode("\n".join(turns[at : at + 2]))


def who_says(row: dict, encode: Encode, rng: random.Random) -> Pair:
    """A message; the answer is the name of its sender."""
    name, message = rng.choice(row["dialogue"].split("\n")).split(": ", 1)
    return encode(f"who says: {message}\n\n{row['dialogue']}"), encode(name)


def what_about(row: dict, encode: Encode, rng: random.Random) -> Pair:
    """A name; the answer is what the narration tells about this person."""
    sentences = re.split(r"(?<=\.) ", row["narration"])
    name = rng.choice(sorted({turn.split(": ", 1)[0] for turn in row["dialogue"].split("\n")}))
    about = [sentence for sentence in sentences if name in sentence]
    return encode(f"what about {name}?\n\n{row['dialogue']}"), encode(" ".join(about[:3]) or "nothing")


def which_facts(row: dict, encode: Encode, rng: random.Random) -> Pair:
    """Who talks, or which names and things are mentioned, in the order of the chat."""
    chat = row["dialogue"]
    if rng.random() < 0.4:
        names = list(dict.fromkeys(turn.split(": ", 1)[0] for turn in chat.split("\n")))
        return encode("who talks?\n\n" + chat), encode(" and ".join([", ".join(names[:-1]), names[-1]]))
    mentioned = sorted((chat.find(value), value) for value in set(row["facts"].values()) if value in chat)
    return encode("which facts?\n\n" + chat), encode(", ".join(value for _, value in mentioned))


TASKS = {  # task: share of the examples
    masked_chat: 0.14, masked_narration: 0.20, masked_facts: 0.14, retell: 0.20,
    continue_chat: 0.16, who_says: 0.04, what_about: 0.06, which_facts: 0.06,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Batches: worker processes make shards, the training draws from all shards made so far
# ----------------------------------------------------------------------------------------------------------------------


def make_shard(folder: str, seed: int, rows: int = SHARD_ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Sources (rows, SOURCE_LENGTH) and targets (rows, TARGET_LENGTH) as uint16 ids, ended by </s>, padded with 0."""
    bpe = Tokenizer.from_file(f"{folder}/tokenizer.json")
    encode = lambda text: bpe.encode(text, add_special_tokens=False).ids
    rng = random.Random(f"tasks-{seed}")
    sources = np.full((rows, SOURCE_LENGTH), PAD, dtype=np.uint16)
    targets = np.full((rows, TARGET_LENGTH), PAD, dtype=np.uint16)
    done = 0
    for row in make_sample.records("pretrain", seed):
        for task in rng.choices(list(TASKS), weights=list(TASKS.values()), k=4):
            source, target = task(row, encode, rng)
            # The few that are too long are left out: a cut target would teach to stop early.
            if done < rows and len(source) < SOURCE_LENGTH and len(target) < TARGET_LENGTH:
                sources[done, : len(source) + 1] = [*source, EOS]
                targets[done, : len(target) + 1] = [*target, EOS]
                done += 1
        if done == rows:
            return sources, targets


def start_worker(folder: str, queue: multiprocessing.Queue, first_seed: int, step: int) -> None:
    """Fill the queue with shards until the parent ends this process, or is no more."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    for seed in range(first_seed, 10**9, step):
        shard = make_shard(folder, seed)
        while True:
            try:
                queue.put(shard, timeout=5)
                break
            except Full:
                if not parent.is_alive():  # it was killed: leave nothing behind
                    queue.cancel_join_thread()
                    return


class Batches:
    """Random batches over the latest shards. When the training is faster than the workers, examples come up again."""

    def __init__(self, folder: Path, workers: int, batch_size: int, device: str):
        self.batch_size, self.device = batch_size, device
        spawn = multiprocessing.get_context("spawn")
        self.queue = spawn.Queue(maxsize=2 * workers)
        self.processes = [
            spawn.Process(target=start_worker, args=(str(folder), self.queue, 1000 + i, workers), daemon=True)
            for i in range(workers)
        ]
        for process in self.processes:
            process.start()
        self.shards = deque(maxlen=WINDOW_SHARDS)
        self.rng = np.random.default_rng(0)
        self.made = self.drawn = 0

    def add(self) -> None:
        shard = self.queue.get(timeout=600)
        self.shards.append(tuple(torch.from_numpy(part.astype(np.int16)).to(self.device) for part in shard))
        self.made += SHARD_ROWS

    def draw(self) -> dict[str, torch.Tensor]:
        """One batch. New shards are taken in only as fast as they are used, so that slow machines do not fill up."""
        while not self.shards or (self.made < self.drawn + 4 * SHARD_ROWS and not self.queue.empty()):
            self.add()
        self.drawn += self.batch_size
        sources, targets = self.shards[self.rng.integers(len(self.shards))]
        rows = torch.from_numpy(self.rng.choice(len(sources), self.batch_size, replace=False)).to(self.device)
        return to_batch(sources[rows], targets[rows])

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
# Training
# ----------------------------------------------------------------------------------------------------------------------


def scaled(scale: float) -> dict[str, int]:
    """The part of the geometry that `scale` changes: the layers' widths and the number of heads."""
    return {name: round(scale * GEOMETRY[name]) for name in ("d_model", "num_heads", "d_ff")}


def make_model(scale: float = 1) -> T5ForConditionalGeneration:
    """Random weights in T5's own initialisation, with a head of its own.

    transformers 5 ties the head of every new T5 to the embedding, whatever the configuration says, and unties it only
    when a checkpoint holds both. The head starts small, so that the first loss is about log(VOCAB_SIZE).
    """
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB_SIZE, dropout_rate=0.0, **(GEOMETRY | scaled(scale))))
    head = torch.randn(VOCAB_SIZE, model.config.d_model) * model.config.d_model**-0.5
    model.lm_head.weight = torch.nn.Parameter(head)
    model.config.tie_word_embeddings = False
    return model


def learning_rate(progress: float, peak: float, warmup: float = 0.03) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak; progress runs from 0 to 1."""
    return peak * min((progress + 1e-3) / warmup, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def compiled(model: T5ForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The model through torch.compile, or as it is where the compiler does not work (it needs Triton and gcc)."""
    try:
        fast = torch.compile(model)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            fast(**batch).loss.backward()
    except Exception as error:  # whatever the compiler stumbles over; the training itself would stumble again
        print(f"torch.compile does not work here, training without it: {str(error).splitlines()[0]}", flush=True)
        fast = model
    model.zero_grad(set_to_none=True)
    return fast


@torch.no_grad()
def held_out_loss(model: T5ForConditionalGeneration, shard: tuple[np.ndarray, np.ndarray], device: str) -> float:
    """Mean loss over a shard that is never trained on (nats per token, weighted by batch)."""
    model.eval()
    sources, targets = (torch.from_numpy(part.astype(np.int16)).to(device) for part in shard)
    losses = []
    for source, target in zip(sources.split(128), targets.split(128), strict=True):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            losses.append(model(**to_batch(source, target)).loss.float().item())
    model.train()
    return sum(losses) / len(losses)


def pretrain(model: T5ForConditionalGeneration, folder: Path, args: argparse.Namespace, device: str) -> dict[str, str]:
    """Train in place, return the facts of the run. It lasts until `--minutes` or `--steps` is over.

    The clock starts after the first step, which compiles.
    """
    batches = Batches(folder, args.workers, args.batch_size, device)
    held_out = make_shard(str(folder), seed=1, rows=256)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98), fused=device == "cuda",
    )  # fmt: skip
    model.to(device).train()
    step_model = compiled(model, batches.draw()) if device == "cuda" else model
    start, last_report, examples = time.time(), 0.0, 0
    for step in range(args.steps or 10**9):
        minutes = (time.time() - start) / 60
        if not args.steps and minutes >= args.minutes:
            break
        progress = step / args.steps if args.steps else minutes / args.minutes
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.lr)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = step_model(**batches.draw()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        examples += args.batch_size
        if step == 0:
            print(f"first step after {time.time() - start:.0f} s, loss {loss.item():.2f}", flush=True)
            start, examples = time.time(), 0
        elif time.time() - start - last_report > args.report_seconds:
            last_report = time.time() - start
            print(
                f"step {step:6d}  {last_report:5.0f} s  loss {loss.item():.3f}  "
                f"held-out {held_out_loss(model, held_out, device):.3f}  "
                f"{examples / last_report:,.0f} examples/s  {batches.made:,} made",
                flush=True,
            )
    batches.stop()
    steps = step + bool(args.steps)
    facts = {
        "steps": f"{steps:,} of {args.batch_size} examples, {batches.made:,} different ones",
        "training time": f"{(time.time() - start) / 60:.1f} minutes after the first step, on {device_name(device)}",
        "held-out loss": f"{held_out_loss(model, held_out, device):.3f} nats per token, over all tasks",
    }
    print(*(f"{key}: {value}" for key, value in facts.items()), sep="\n", flush=True)
    return facts


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


@torch.no_grad()
def answer(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[str]:
    """Greedy answers to the texts."""
    model.eval()
    inputs = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    return tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=128), skip_special_tokens=True)


def report(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """What the model does with chats of people it has never met: the question tasks, and zero-shot summaries."""
    rows = list(islice(make_sample.records("validation"), 200))
    names = [" and ".join(dict.fromkeys(t.split(": ")[0] for t in r["dialogue"].split("\n"))) for r in rows]
    told = answer(model, tokenizer, ["retell: " + row["dialogue"] for row in rows])
    talk = answer(model, tokenizer, ["who talks?\n\n" + row["dialogue"] for row in rows])
    zero = answer(model, tokenizer, ["summarize: " + row["dialogue"] for row in rows])
    mean = lambda a, b: sum(map(rouge1, a, b)) / len(rows)
    for row, t, z in list(zip(rows, told, zero, strict=True))[:3]:
        print(f"\n{row['dialogue']}\n  retell:    {t}\n  summarize: {z}")
    scores = {
        "retelling the chat": f"ROUGE-1 {mean(told, [row['narration'] for row in rows]):.1f}",
        "naming the speakers": f"ROUGE-1 {mean(talk, names):.1f}",
        "summaries, without fine-tuning": f"ROUGE-1 {mean(zero, [row['summary'] for row in rows]):.1f}",
    }
    print(*(f"{key}: {value}" for key, value in scores.items()), sep="\n", flush=True)
    return scores


CARD = """# {name}

A T5 v1.1 of {millions:.1f} M parameters (gated GELU, untied head, relative positions; bf16) with a byte-level BPE of
{vocab:,} tokens. It exists so that `flan-t5_samsum.py` can fine-tune something real in minutes on a CPU. It is no
general language model, and it has nothing but its geometry in common with Google's Flan-T5.

It was pretrained only on text made in this project, the `pretrain` source of `resource/make_sample.py`: chats between
invented people, and the same chats retold in reported speech. The tasks are span corruption and small questions about
a chat. It has seen no summary, no prefix "summarize: ", and no name or thing of the held-out rows of `resource/sample`.

To rebuild it: `python resource/make_flan-t5-tiny.py {flags}`.
How far it gets depends on the machine. This copy:

{facts}

The last three are greedy answers for the 200 validation chats of the sample, F1 without a stemmer.
"""


def save(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write bf16 weights, configuration and tokenizer."""
    model.config.dropout_rate = DROPOUT
    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rebuild_flags(args: argparse.Namespace, defaults: argparse.Namespace) -> str:
    """The flags that gave this model, for the command line in its card; its folder by name only."""
    names = ("scale", "steps", "minutes", "batch_size", "lr")
    changed = [name for name in names if getattr(args, name) != getattr(defaults, name)]
    flags = [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in changed]
    return " ".join([f"--output runs/{args.output.resolve().name}", *flags])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.5, help="training time after compilation (default 4.5)")
    parser.add_argument("--steps", type=int, default=0, help="train for so many steps instead")
    parser.add_argument("--scale", type=float, default=1, help="width, heads and d_ff, as multiples of the usual ones")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW (default 2e-3)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--report-seconds", type=float, default=15)
    parser.add_argument("--output", type=Path, default=FOLDER)
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    if scaled(args.scale)["num_heads"] < 1:
        parser.error(f"--scale {args.scale:g} leaves no attention head")
    if args.output.exists() and any(args.output.iterdir()):
        parser.error(f"{args.output} is not empty: delete it, or give another folder, --output DIR")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    args.output.mkdir(parents=True, exist_ok=True)
    chats = islice(make_sample.records("pretrain", seed=0), 12_000)
    tokenizer = train_tokenizer(text for row in chats for text in (row["dialogue"], row["narration"]))
    tokenizer.save_pretrained(args.output)
    model = make_model(args.scale)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{millions:.2f} M parameters, {len(tokenizer)} tokens, {args.workers} workers, {device}", flush=True)
    facts = pretrain(model, args.output, args, device)
    save(model, tokenizer, args.output)
    saved = T5ForConditionalGeneration.from_pretrained(args.output, dtype=torch.float32).to(device)
    facts |= report(saved, tokenizer)
    lines = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    flags = rebuild_flags(args, parser.parse_args([]))
    card = CARD.format(name=args.output.name, millions=millions, vocab=len(tokenizer), flags=flags, facts=lines)
    (args.output / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
