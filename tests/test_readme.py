"""The documents say what is there: every command they show is accepted, every link leads somewhere, every flag exists.

Most commands are parsed, not run: the defaults run in CI, and what each flag does is tested elsewhere.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gpt2_from_scratch as gpt2

HERE = Path(__file__).parents[1]
DOCUMENTS = [HERE / name for name in ("README.md", "resource/EXPERIMENTS.md", "resource/flan-t5-tiny/README.md",
                                      "resource/flan-t5-tiny-text/README.md")]  # fmt: skip
SOURCES = [*DOCUMENTS, HERE / "flan-t5_samsum.py", HERE / "gpt2_from_scratch.py"]
SCRIPTS = ("flan-t5_samsum.py", "gpt2_from_scratch.py", "resource/make_flan-t5-tiny.py", "tests/benchmark_gpt2.py",
           "tests/benchmark_flan_t5.py", "tests/benchmark_recipes.py")  # fmt: skip
# Flags of other programs that the documents name.
FOREIGN = {"--torch-backend", "--depth", "--nproc-per-node", "--nnodes", "--rdzv-endpoint", "--rdzv-backend",
           "--use_fsdp", "--fsdp_version", "--num_processes", "--logdir", "--model_args", "--tasks", "--include_path",
           "--device"}  # fmt: skip


def commands(path: Path) -> list[str]:
    """The commands that a document or a docstring shows: in indented lines, in which `\\` goes on, and in backticks."""
    text = path.read_text("utf-8").split('"""')[1] if path.suffix == ".py" else path.read_text("utf-8")
    indented = re.sub(r"\\\n", " ", "\n".join(re.findall(r"^ {4}(.*(?:\\\n.*)*)$", text, re.MULTILINE)))
    shown = indented.splitlines() + [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    found = []
    for line in shown:
        for part in re.split(r"; (?:do )?|\| |&& ", line.partition(" # ")[0]):
            if re.search(r"\.py\b", part) and part.split()[0] in ("python", "torchrun", "accelerate"):
                found.append(part.strip())
    return found


def expand(words: list[str]) -> list[str]:
    """As a shell does with {a,b} and $name."""
    result = []
    for word in words:
        match = re.fullmatch(r"(.*)\{(.*)\}(.*)", word)
        result += [match[1] + one + match[3] for one in match[2].split(",")] if match else [word]
    return [re.sub(r"\$\w+", "1e-4", word) for word in result]


@pytest.fixture(scope="module")
def parsers(flan, make_tiny):
    return {"flan-t5_samsum.py": flan.build_parser().parse_args, "gpt2_from_scratch.py": gpt2.parse_arguments,
            "resource/make_flan-t5-tiny.py": make_tiny.build_parser().parse_args}  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name if path.suffix == ".py" else path.parent.name)
def test_every_command_is_accepted(parsers, path):
    found = commands(path)
    assert found or path.parent.name == "flan-t5-tiny-text"
    assert "nproc_per_node" not in path.read_text("utf-8")  # one spelling, in what is printed as well
    for command in found:
        words = expand(shlex.split(command))
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert (HERE / words[at]).is_file(), command
        if words[at] in parsers and "..." not in words:
            try:
                parsers[words[at]](words[at + 1 :])
            except SystemExit:
                pytest.fail(f"{path.name}: {command}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.parent.name)
def test_every_flag_exists(flan, path):
    """Also those that stand alone in the text."""
    known = FOREIGN | set(flan.build_parser()._option_string_actions)
    known |= {"--" + ("no-" if setting.default is True else "") + name.replace("_", "-")
              for name, setting in gpt2.FLAGS.items()}  # fmt: skip
    for script in SCRIPTS[2:]:
        known |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', (HERE / script).read_text("utf-8")))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", path.read_text("utf-8")))
    assert named <= known, sorted(named - known)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.parent.name)
def test_every_link_leads_somewhere(path):
    text = path.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", other.read_text("utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
            assert anchor in anchors, target


def test_every_picture_is_shown_somewhere():
    shown = set()
    for path in DOCUMENTS:
        pictures = re.findall(r"\]\(([^)]+\.png)\)", path.read_text("utf-8"))
        shown |= {(path.parent / picture).resolve() for picture in pictures}
    assert {picture.resolve() for picture in (HERE / "resource").rglob("*.png")} == shown


def test_a_flag_that_is_gone_is_found(parsers, tmp_path):
    """The test above sees through comments, loops, launchers and lines that go on."""
    document = tmp_path / "README.md"
    document.write_text("    for a in 1 2; do python flan-t5_samsum.py --lr $a \\\n        --epochs 2; done  # words\n"
                        "Or `torchrun --nproc-per-node=2\ngpt2_from_scratch.py --data x --gone 3`.\n")  # fmt: skip
    one, other = commands(document)
    assert shlex.split(one) == ["python", "flan-t5_samsum.py", "--lr", "$a", "--epochs", "2"]
    assert isinstance(parsers["flan-t5_samsum.py"](expand(shlex.split(one))[2:]), argparse.Namespace)
    with pytest.raises(SystemExit):
        gpt2.parse_arguments(shlex.split(other)[3:])


@pytest.mark.slow
def test_the_commands_that_take_minutes(tmp_path):
    """Those of Experiment 1, and a folder of text, word for word in bash. The other commands run in `.ci/run`, or need
    a network or a GPU."""
    text = (HERE / "README.md").read_text("utf-8")
    loop, compare = re.findall(r"^ {4}(for lr .*|.* --compare runs/sample/.*)$", text, re.MULTILINE)
    folder = re.search(r"`(\S+ gpt2_from_scratch\.py --data notes/ --glob '\*\.md')`", text)[1]
    for path in (*HERE.glob("*.py"), HERE / "resource"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "notes").mkdir()
    for i, path in enumerate(DOCUMENTS):
        shutil.copy(path, tmp_path / f"notes/{i}.md")
    told, env = {}, os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in (loop, compare, folder):
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done
        told[command] = done.stdout
    assert [told[compare].count(f"lr={lr} ") > 1 for lr in ("1e-5", "1e-4", "1e-3", "3e-2")] == [True] * 4
    assert (tmp_path / "runs/sample/comparison.png").is_file() and "sample:" in told[folder]
