"""The text that `make_flan-t5-tiny.py` reads: freely written chats with summaries, and everyday sentences.

`flan-t5-tiny-text/README.md` says how the chats are written. A chat is told otherwise each time: whatever stands in
braces (names, places, days, times, titles) is drawn anew each time, and so are the habits of typing.
"""

import lzma
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import make_sample

TEXT = Path(__file__).parent / "flan-t5-tiny-text"
SLOT = re.compile(r"\{([^{}]*)\}")
TOWNS = tuple(
    """
    Madrid Lisbon Rome Milan Prague Warsaw Budapest Athens Berlin Munich Cologne Zurich Geneva Brussels Amsterdam
    Copenhagen Stockholm Helsinki Riga Tallinn Vilnius London Manchester Liverpool Edinburgh Belfast Cork Paris
    Lille Nice Chicago Boston Seattle Denver Toronto Montreal Sydney Melbourne Auckland Delhi Mumbai Tokyo Osaka
    Seoul Cairo Lagos Nairobi Accra Istanbul Ankara Dubai Bangkok Hanoi Lima Bogota Santiago Spain France Italy
    Greece Poland Japan Canada Mexico Brazil Turkey Morocco Kenya Vietnam
    """.split()  # noqa: SIM905  (words, as a reader wants to see them)
)
AMOUNT = re.compile(r"[£$€]?(\d+(?:\.\d+)?)(?: (?:euros?|pounds?|dollars?))?")
CURRENCIES = ("{} euros", "{} pounds", "${}", "£{}", "€{}")
SWAPPED = 0.4  # share of the tellings in which this is tried; a third of the chats have nouns for it
NO_THINGS = set(
    """
    same other others first last next best right left rest most whole only wrong tomorrow today yesterday tonight
    myself yourself himself herself themselves itself cheapest smallest biggest largest oldest newest something
    anything nothing everything someone anyone everyone nobody somebody moment matter thanks
    """.split()  # noqa: SIM905  (words, as a reader wants to see them)
)
DAYS, MONTHS = make_sample.DAYS, make_sample.COMMON["month"]


def read_lines(name: str) -> list[str]:
    """The lines of a compressed file."""
    return lzma.decompress((TEXT / f"{name}.txt.xz").read_bytes()).decode("utf-8").splitlines()


def prepare_names() -> None:
    """First names of many languages (Faker's lists), none of anybody who talks in the held-out rows."""
    women, men = read_lines("names")
    make_sample.REAL_NAMES.update(f=women.split(), m=men.split())


@cache
def load(name: str = "chats") -> tuple[dict, ...]:
    """All chats of a file: topic, sexes of the speakers, turns [(speaker, text)], summaries."""
    chats = []
    for block in "\n".join(read_lines(name)).split("\n\n"):
        head, *lines = block.strip().split("\n")
        match = re.fullmatch(r"@ topic: (.+?) \| ((?:[A-D]=[fmx] ?)+)", head.strip())
        if not match:
            continue
        turns = [(m[1], m[2].strip()) for line in lines if (m := re.match(r"([A-D]): (.+)", line))]
        summaries = [line[2:].strip() for line in lines if line.startswith("= ")]
        sexes = dict(pair.split("=") for pair in match[2].split())
        if {speaker for speaker, _ in turns} == set(sexes) and summaries:
            chats.append({"topic": match[1], "sexes": sexes, "turns": turns, "summaries": summaries})
    return tuple(chats)


UNREAD = 500  # the last chats of the file


def read() -> tuple[dict, ...]:
    """The chats that training text is made of."""
    return load()[:-UNREAD]


def unread() -> tuple[dict, ...]:
    """The others, by which what a model has learnt can be told from what it knows by heart."""
    return load()[-UNREAD:]


def draw(kind: str, rng: random.Random, split: str = "pretrain") -> str:
    """A value for a slot of this kind, of the people and things that a split may know."""
    number = rng.randint(2, 99)
    is_pretraining = split == "pretrain"
    if kind in ("man", "woman"):
        return make_sample.draw_person(split, rng, kind == "woman", is_pretraining and rng.random() < 0.85).name
    if kind == "town":
        known = is_pretraining and rng.random() < 0.5
        return rng.choice(TOWNS) if known else make_sample.draw_value("town", split, rng)
    if kind == "day":
        return rng.choice(DAYS)
    if kind == "month":
        return rng.choice(MONTHS)
    if kind == "time":
        hour, minute = rng.randint(1, 12), rng.choice(("00", "05", "10", "15", "20", "30", "40", "45", "50"))
        forms = (f"{hour} pm", f"{hour} am", f"{hour}:{minute}", f"{hour}:{minute}", f"{hour}pm", f"{hour}:{minute} pm",
                 "noon", f"{hour + 11}:{minute}")  # fmt: skip
        return rng.choice(forms)
    if kind == "date":
        day, month = rng.randint(1, 28), rng.choice(MONTHS)
        suffix = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}.get(day, "th")
        return rng.choice((f"{month} {day}{suffix}", f"{day} {month}", f"{month} {day}", f"the {day}{suffix}"))
    if kind == "price":
        amount = rng.choice((number, number, 5 * rng.randint(2, 200), 10 * rng.randint(10, 300)))
        return rng.choice(CURRENCIES).format(amount)
    if kind == "num":
        return str(number)
    if kind == "surname":
        return make_sample.invent(rng, capital=True)
    if kind == "pet":
        return make_sample.draw_value("petname", split, rng)
    if kind == "brand":
        known = not is_pretraining or rng.random() < 0.5
        return make_sample.draw_value("firm", split, rng) if known else make_sample.invent(rng, capital=True)
    if kind == "title":
        return make_sample.draw_value(rng.choice(("film", "book")), split, rng)
    if kind == "venue":
        return make_sample.draw_value(rng.choice(("venue", "venue", "shop", "cinema")), split, rng)
    return make_sample.draw_value("team", split, rng)


def in_proportion(price: str, factor: float) -> str | None:
    """The amount of a price times a factor, at least 1, without decimals; None for "20 cents", "50k" and the like."""
    match = AMOUNT.fullmatch(price.replace(",", ""))
    return match and str(max(1, round(float(match[1]) * factor)))


def values_for(chat: dict, rng: random.Random, split: str = "pretrain") -> tuple[dict[str, str], dict[str, bool]]:
    """slot -> value, no two alike; and the speakers' names -> whether a woman.

    The prices of a chat are in one currency and keep their proportions: who refuses 50 for what costs 40 haggles badly.
    """
    slots = dict.fromkeys(SLOT.findall(" ".join([text for _, text in chat["turns"]] + chat["summaries"])))
    values: dict[str, str] = {}
    woman: dict[str, bool] = {}
    currency, factor = rng.choice(CURRENCIES), 2 ** rng.uniform(-1, 2)
    for slot in [*chat["sexes"], *(s for s in slots if ":" in s)]:
        kind, _, like = slot.partition(":")
        for _ in range(20):
            if slot in chat["sexes"]:
                is_woman = {"f": True, "m": False}.get(chat["sexes"][slot], rng.random() < 0.5)
                value = draw("woman" if is_woman else "man", rng, split)
            elif kind == "price" and (amount := in_proportion(like, factor)):
                value = currency.format(amount)  # two that were close may be alike now
            else:
                value = draw(kind, rng, split)
                # A date may stand anywhere: "May 3rd" for "the 3rd", and the other way round.
                value = value[0].upper() + value[1:] if like[:1].isupper() and kind != "date" else value
            if value not in values.values():
                break
        values[slot] = value
        if slot in chat["sexes"]:
            woman[value] = is_woman
    return values, woman


def fill(text: str, values: dict[str, str]) -> str:
    text = SLOT.sub(lambda m: values.get(m[1], m[1].split(":")[-1]), text)
    return re.sub(r"\b(the|The|a) the\b", lambda m: "the" if m[1] == "a" else m[1], text)


DETERMINERS = r"(?:a|an|the|my|your|his|her|our|their|some|no|this|that|these|those)"
# What follows a noun: the end of a phrase, or a word that begins another one. So "green" in "the green scarf" is none.
AFTER_NOUN = (
    r"(?=[.,?!;:\n]|$|\s+(?:is|are|was|were|has|had|will|can|in|on|at|for|to|of|and|or|from|with|by|but|so|that|if)\b)"
)


# A word, and before it one after which it can only be a noun, if there is one.
BEFORE_THING = re.compile(
    rf"(?:(?<![\w'])({DETERMINERS}|of|with|for|in|on|at|by|from|about|into|without|#'s) )?"
    r"(?<![\w{:'-])([a-z]{4,})(?![\w}'-])"
)


@cache
def things() -> tuple[frozenset[str], frozenset[str]]:
    """Nouns of the chats, singular and plural, as far as the words around them show what they are."""
    found, nouns = Counter(), Counter()
    for chat in load():
        text = "\n".join(text for _, text in chat["turns"]).lower()
        found.update(re.findall(rf"\b{DETERMINERS} ([a-z]{{4,}})\b(?!['}}])", text))
        nouns.update(re.findall(rf"\b{DETERMINERS} ([a-z]{{4,}})\b(?!['}}]){AFTER_NOUN}", text))
    known = {noun for noun, count in nouns.items() if count >= 2 and count >= 0.6 * found[noun]} - NO_THINGS
    plural = {noun for noun in known if noun.endswith("s") and not noun.endswith("ss")}
    return frozenset(known - plural), frozenset(plural)


@cache
def ordered_things() -> tuple[list[str], ...]:
    return tuple(sorted(kind) for kind in things())


def swap_things(chat: dict, rng: random.Random, share: float = 0.5) -> dict:
    """The chat about other things: nouns of its messages that its summaries take up become others, the same in both.

    So a summary cannot be known by heart, or guessed from what people usually do: its things must be read.
    """
    said, told = (Counter(BEFORE_THING.findall(SLOT.sub("#", "\n".join(texts)))) for texts in
                  ([text for _, text in chat["turns"]], chat["summaries"]))  # fmt: skip
    shared = {noun for noun in {word for _, word in said} & {word for _, word in told}
              if all(before for before, word in [*said, *told] if word == noun)}  # nowhere is it a verb
    new = {}
    for kind, ordered in zip(things(), ordered_things(), strict=True):
        new |= {noun: rng.choice(ordered) for noun in sorted(shared & kind) if rng.random() < share}
    if not new:
        return chat
    pattern = re.compile(rf"(?<![\w{{:'-])(?:(a|an|A|An) )?({'|'.join(new)})(?![\w}}'-])")

    def other(match: re.Match) -> str:
        noun = new[match[2]]
        article = "" if not match[1] else match[1][0] + "n" * (noun[0] in "aeiou") + " "
        return article + noun

    swap = lambda text: "".join(part if part.startswith("{") else pattern.sub(other, part)
                                for part in re.split(r"(\{[^{}]*\})", text))
    return chat | {"turns": [(speaker, swap(text)) for speaker, text in chat["turns"]],
                   "summaries": [swap(text) for text in chat["summaries"]]}


SMALL = [chunk for table in (make_sample.SMALL_TALK,) for chunk in make_sample.chunks(table)]


def draw_habits(rng: random.Random) -> dict[str, float]:
    """How one person types: the share of messages that each habit touches."""
    return {
        "typos": rng.choice((0, 0, 0.1)), "lower": rng.random() < 0.15, "bare": rng.choice((0, 0.5)),
        "shorthand": rng.choice((0, 0, 0, 0.3)), "emoji": rng.choice((0, 0, 0.1)),
    }  # fmt: skip


def outside_slots(text: str, change: Callable[[str], str]) -> str:
    """The text changed, but for what stands in braces: it is the key to a value."""
    return "".join(part if part.startswith("{") else change(part) for part in re.split(r"(\{[^{}]*\})", text))


def retype(text: str, habits: dict, rng: random.Random) -> str:
    """A turn, still with its slots, in somebody's habits of typing."""
    if rng.random() < habits["typos"]:
        words = list(re.finditer(r"(?<![\w{:])[a-z]{4,}(?![\w}])", SLOT.sub(lambda m: "#" * len(m[0]), text)))
        if words:
            at = rng.choice(words).start() + rng.randrange(1, 3)
            text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    if habits["lower"]:
        text = outside_slots(text, str.lower)
    if habits["shorthand"]:
        for word, short in make_sample.SHORTHAND.items():
            if rng.random() < habits["shorthand"]:
                text = outside_slots(text, partial(re.sub, rf"\b{word}\b", short))
    if rng.random() < habits["bare"]:
        text = re.sub(r"(?<=\w)[.!]+$", "", text)
    if rng.random() < habits["emoji"] and text[-1:].isalnum():
        text += " " + rng.choice(make_sample.SAD if make_sample.SAD_WORDS.search(text) else make_sample.HAPPY)
    return text


def tell(chat: dict, rng: random.Random, split: str = "pretrain") -> dict:
    """One telling: dialogue, summaries, the facts in them, sexes by name.

    For pretraining some are about other things, or have small talk at their end.
    """
    chat = swap_things(chat, rng) if split == "pretrain" and rng.random() < SWAPPED else chat
    values, woman = values_for(chat, rng, split)
    turns = list(chat["turns"])
    if split == "pretrain" and rng.random() < 0.15:
        x = turns[-1][0]
        y = next((s for s, _ in reversed(turns) if s != x), None)
        if y:
            more = make_sample.with_roles(rng.choice(SMALL), {"X": x, "Y": y})
            texts = [make_sample.choose(turn.text, rng) for turn in more]
            facts = make_sample.draw_facts([*texts, "{A}"], {}, "pretrain", rng)
            facts |= {s: make_sample.Person(values[s], woman[values[s]]) for s in chat["sexes"]}
            turns += [(turn.role, make_sample.fill(text, facts)) for turn, text in zip(more, texts, strict=True)]
    habits = {speaker: draw_habits(rng) for speaker in chat["sexes"]}
    said = [(values[s], fill(retype(text, habits[s], rng), values)) for s, text in turns]
    return {
        "kind": "free",
        "turns": said,
        "dialogue": "\n".join(f"{name}: {text}" for name, text in said),
        "summaries": [fill(summary, values) for summary in chat["summaries"]],
        "facts": values,
        "woman": woman,
    }


def sample_rows(split: str) -> Iterator[dict[str, str]]:
    """Half of the sample's rows of a split, dialogue and summary: chats that no pretraining text is made of.

    Each is told once, and its people, towns and the like are those of the split in `make_sample.py`.
    """
    sizes = [make_sample.SIZES[name] // 2 for name in make_sample.SPLITS]  # in the order of the file
    at = make_sample.SPLITS.index(split)
    for i, chat in enumerate(load("sample")[sum(sizes[:at]) : sum(sizes[: at + 1])]):
        row = tell(chat, random.Random(f"{split}-{i}"), split)
        yield {"dialogue": row["dialogue"], "summary": row["summaries"][0]}


# ----------------------------------------------------------------------------------------------------------------------
# Reported speech: what somebody says, told by a third person
# ----------------------------------------------------------------------------------------------------------------------

BE = {
    "am": "is", "'m": "is", "are": "is", "'re": "is", "have": "has", "'ve": "has", "do": "does", "don't": "doesn't",
    "haven't": "hasn't", "aren't": "isn't", "'ll": "will", "'d": "would", "were": "was", "weren't": "wasn't",
}  # fmt: skip
FIXED = {
    "can", "can't", "cannot", "could", "couldn't", "did", "didn't", "had", "hadn't", "has", "is", "may", "might",
    "must", "never", "shall", "should", "shouldn't", "was", "wasn't", "will", "won't", "would", "wouldn't",
}  # fmt: skip
ADVERBS = {
    "actually", "almost", "already", "also", "always", "both", "even", "finally", "just", "never", "now", "often",
    "only", "really", "simply", "so", "still", "usually",
}  # fmt: skip


@cache
def verbs() -> tuple[frozenset[str], frozenset[str]]:
    """Base forms, and irregular past forms (WordNet)."""
    base, past = read_lines("verbs")
    return frozenset(base.split()), frozenset(past.split())


def third_person(verb: str) -> str | None:
    """The form of a verb after he or she, from the one after I or you; None if it is no verb."""
    base, past = verbs()
    if verb in BE:
        return BE[verb]
    if verb in FIXED or verb in past or (verb.endswith("ed") and verb not in base):
        return verb
    if verb not in base:
        return None
    if re.search(r"(s|x|z|ch|sh|o)$", verb):
        return verb + "es"
    return verb[:-1] + "ies" if re.search(r"[^aeiou]y$", verb) else verb + "s"


STATEMENT = re.compile(
    r"(?i)(the|a|an|it|that|this|there|he|she|they|his|her|their|some|all|most|every\w*|no)(?:'\w+)?\b(?!,)"
)
OPENINGS = re.compile(r"(?i)^(ok|yes|no|oh|well|haha|lol|sure|hi|hey|sorry|and|but|so),? ")


def only_statement(text: str) -> str | None:
    """The first sentence of a message that is no question, without greeting, emoji and full stop."""
    sentences = re.split(r"(?<=[.!?)])\s+|\.\.\.+", text)
    statement = next((s for s in sentences if len(s.split()) > 2 and "?" not in s), "")
    statement = OPENINGS.sub("", re.sub(r"[^\w\s.,'$£€%:-]", "", statement).strip(" .,"))
    return statement if 3 <= len(statement.split()) <= 18 else None


def report_speech(text: str, speaker: str, listener: str, woman: bool, rng: random.Random) -> str | None:
    """A message in the third person, as far as simple rules go: None where they end (questions, commands, "we").

    "I lost my keys" by Anna becomes "Anna lost her keys."; "the bus is late", "Anna says that the bus is late."
    """
    statement = only_statement(text)
    if statement is None:
        return None
    he, him, his = ("she", "her", "her") if woman else ("he", "him", "his")
    words = re.sub(r"(?i)\b(i|you)('\w+)", r"\1 \2", statement).split()  # "I'm": subject and verb apart
    told, named, at = [], False, 0
    while at < len(words):
        word, tail = re.fullmatch(r"(.*?)([.,:]*)", words[at]).groups()
        at += 1
        low = word.lower()
        if low in ("we", "us", "our", "ours", "let's", "we're", "we'll", "we've"):
            return None
        verb_at = next((i for i in range(at, len(words)) if words[i].lower() not in ADVERBS), at)
        verb, verb_tail = re.fullmatch(r"(.*?)([.,:]*)", words[verb_at] if verb_at < len(words) else "").groups()
        form = third_person(verb.lower()) if low in ("i", "you") and not tail and verb else None
        if low == "i" and form is None:
            return None
        if form:
            subject = listener if low == "you" else he if named else speaker
            told += [subject, *words[at:verb_at], form + verb_tail]
            named, at = named or low == "i", verb_at + 1
            continue
        other = {
            "me": him if named else speaker, "my": his if named else f"{speaker}'s", "mine": his,
            "myself": him + "self", "you": listener, "your": f"{listener}'s", "yours": f"{listener}'s",
        }  # fmt: skip
        named = named or low in ("me", "my")
        told.append(other.get(low, word) + tail)
    sentence = " ".join(told)
    if not named:
        if not sentence.startswith(listener) and not STATEMENT.match(sentence):
            return None
        start = sentence if sentence.startswith(listener) else sentence[0].lower() + sentence[1:]
        sentence = f"{speaker} {rng.choice(('says that', 'says', f'tells {listener} that'))} {start}"
    return (sentence[0].upper() + sentence[1:]).rstrip(".,:") + "."


@cache
def everyday() -> tuple[str, ...]:
    """Short sentences without names."""
    return tuple(read_lines("everyday"))


def loose_line(chat: dict, listener: str, rng: random.Random) -> tuple[str, list[str]]:
    """One message of a freely written chat by itself, with values of its own; and these values."""
    text = rng.choice(chat["turns"])[1]
    values = {s: draw(s.split(":", 1)[0], rng) if ":" in s else listener for s in SLOT.findall(text)}
    return fill(text, values), list(values.values())


def murmur(rng: random.Random, sentences: tuple[str, ...], free: tuple[dict, ...]) -> dict:
    """A chat of sentences that have nothing to do with each other, and the same in reported speech."""
    people = []
    while len(people) < rng.choice((2, 2, 3)):
        woman = rng.random() < 0.5
        person = make_sample.draw_person("pretrain", rng, woman, rng.random() < 0.85)
        if person.name not in [p.name for p in people]:
            people.append(person)
    said, told, facts = [], [], {p.name: p.name for p in people}
    last = None
    for _ in range(rng.randint(2, 6)):
        speaker = rng.choice([p for p in people if p is not last] if last and rng.random() < 0.85 else people)
        listener = rng.choice([p for p in people if p is not speaker])
        last = speaker
        if rng.random() < 0.5:
            text, values = loose_line(rng.choice(free), listener.name, rng)
            facts |= {value: value for value in values}
            said.append((speaker.name, text))
            told.append((speaker.name, report_speech(text, speaker.name, listener.name, speaker.woman, rng)))
            continue
        text = rng.choice(sentences)
        other = make_sample.draw_person("pretrain", rng, rng.random() < 0.5, True).name
        text = re.sub(r"^(he|she)\b", other if rng.random() < 0.6 else r"\1", text)
        if other in text:
            facts[other] = other
        if rng.random() < 0.12:
            fact = draw(rng.choice(("day", "time", "town", "date", "price")), rng)
            text = f"{text.rstrip('.')} {rng.choice(('on', 'at', 'in', 'for', 'not', 'from'))} {fact}"
            facts[fact] = fact
        retold = report_speech(text, speaker.name, listener.name, speaker.woman, rng)
        if rng.random() < 0.6:
            text = text[0].upper() + text[1:]
        text += rng.choice(("", "", ".", "!", " :)", "..."))
        said.append((speaker.name, text))
        told.append((speaker.name, retold))
    names = [p.name for p in people if p.name in [n for n, _ in said]]
    return {
        "kind": "murmur", "turns": said, "dialogue": "\n".join(f"{n}: {t}" for n, t in said), "told": told,
        "narration": " ".join(t for _, t in told if t), "summaries": [], "facts": facts,
        "woman": {p.name: p.woman for p in people if p.name in names},
    }  # fmt: skip
