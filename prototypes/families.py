"""Expand families into chats; name what is wrong."""
import re, sys
KINDS = set("man woman surname pet town day month date time price num brand title venue team".split())
SLOT = re.compile(r"\{([^{}]*)\}")
def families(text):
    for block in re.split(r"\n\s*\n", text.strip()):
        yield [l.rstrip() for l in block.split("\n") if l.strip()]
def expand(lines):
    head = re.fullmatch(r"@ topic: (.+?) \| ((?:[A-D]=[fmx] ?)+)", lines[0].strip())
    if not head: raise ValueError(f"bad head {lines[0]!r}")
    sexes = dict(p.split("=") for p in head[2].split())
    out, turns, sums, base = [], [], [], None
    def close():
        nonlocal base
        if base is None: base = list(turns)
        out.append((head[1], sexes, list(turns), list(sums)))
    for l in lines[1:]:
        if m := re.fullmatch(r"\s*>\s*(\d+)", l):
            close(); turns, sums = base[: int(m[1]) - 1], []
            if int(m[1]) > len(base) + 1 or int(m[1]) < 2: raise ValueError(f"{l} of {len(base)} messages in {head[1]}")
        elif m := re.fullmatch(r"\s*([A-D]): (.+)", l):
            if sums: raise ValueError(f"message after a summary in {head[1]}: {l!r}")
            turns.append((m[1], m[2].strip()))
        elif m := re.fullmatch(r"\s*= (.+)", l): sums.append(m[1].strip())
        else: raise ValueError(f"bad line in {head[1]}: {l!r}")
    close()
    return out
OK = set("I I'm I'll I've I'd OK Ok TV DIY GP PE UK EU USB PIN PC DVD CD AC HR IT CV MRI X-ray Christmas Easter English French Spanish German Italian Polish Latin Dutch Greek Turkish Japanese Chinese Dad Mum Mom Grandma Grandpa Gran Granny Nana Auntie Aunt Uncle Mr Mrs Ms Dr Professor God Sunday Monday ABS LED WiFi Wi-Fi Halloween Ramadan Eid Diwali New Year Year's Eve Valentine's Day".split())
def problems(chat):
    topic, sexes, turns, sums = chat
    said = " ".join(t for _, t in turns)
    if not sums: yield "no summary"
    missing = {s for s in SLOT.findall(" ".join([said, *sums])) if ":" not in s and s not in sexes}
    if missing: yield f"unknown {missing}"
    for s in SLOT.findall(" ".join([said, *sums])):
        if ":" in s and s.split(":")[0] not in KINDS: yield f"unknown kind {s}"
    slots = set(SLOT.findall(said))
    for x in sums:
        for s in SLOT.findall(x):
            if ":" in s and s not in slots: yield f"{{{s}}} of a summary is not in the chat"
            if ":" not in s and s in sexes and s not in {a for a, _ in turns} and "{%s}" % s not in said: yield f"{s} never talks"
        if len(x.split()) > 26: yield f"long summary ({len(x.split())} words)"
        if x.count("{") != x.count("}") : yield "braces"
        if not x.endswith((".", "!", "?")): yield f"summary without full stop: {x!r}"
    if sums and len(sums[0].split()) < 5: yield f"first summary is short: {sums[0]!r}"
    if sums and not re.search(r"\{", sums[0]): yield f"nobody in the first summary: {sums[0]!r}"
    if len(turns) < 2: yield "one message"
    for text in [t for _, t in turns] + sums:
        bare = SLOT.sub("x", text)
        for m in re.finditer(r"(?<=[a-z,;:] )[A-Z][a-z']+", bare):
            if m[0] not in OK and m[0].rstrip("'s") not in OK: yield f"capital {m[0]!r} outside braces: {text!r}"
        if text.count("{") != text.count("}"): yield f"braces: {text!r}"
if __name__ == "__main__":
    n = e = bad = 0
    for path in sys.argv[1:]:
        for f in families(open(path, encoding="utf-8").read()):
            try: cs = expand(f)
            except ValueError as x: print("ERROR", x); bad += 1; continue
            n += 1; e += len(cs) - 1
            for i, c in enumerate(cs):
                for p in problems(c): print(f"{c[0]} (ending {i}): {p}"); bad += 1
    print(f"{n} families, {e} other endings, {bad} problems")
