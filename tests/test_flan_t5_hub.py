"""flan-t5_samsum.py and the Hub, as real processes against a miniature Hub on loopback.

It serves google/flan-t5-small, the XXL repository as several fp16 .bin shards, and knkarthick/samsum with its row
without a dialogue. The weights are random and tiny: what is tested is that everything arrives, once, and that the run
is the one on the same files in a folder.
"""

import json
import os
import re
import shutil
import socket
import time
from pathlib import Path
from typing import NamedTuple

import fake_hub
import pytest
from conftest import Done, start, wait

SMALL, XXL, SAMSUM = "google/flan-t5-small", "philschmid/flan-t5-xxl-sharded-fp16", "knkarthick/samsum"
TOKENIZER_AND_CONFIG = ["config.json", "tokenizer.json", "tokenizer_config.json"]
TRAINING = ("--dataset", "samsum", "--max-steps", "3", "--lr", "1e-2", "--max-new-tokens", "12")


@pytest.fixture(scope="module")
def root(tmp_path_factory, tokenizer_folder):
    root = tmp_path_factory.mktemp("hub")
    fake_hub.flan_t5_small(root, tokenizer_folder)
    fake_hub.flan_t5_xxl_sharded_fp16(root, tokenizer_folder)
    folder = fake_hub.samsum_csv(root)
    for name in ("README.md", "samsum.py", "corpus.7z"):  # what such repositories hold as well, and nobody needs
        (folder / name).write_text("raise SystemExit('code from the Hub was run')")
    return root


@pytest.fixture(scope="module")
def hub(root):
    with fake_hub.FakeHub(root) as hub:
        yield hub


@pytest.fixture(scope="module")
def closed_port():
    """The address of a port on which nobody listens: it is taken, so that nobody else can."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def only(environment):
    """For conftest.start, which adds to this process's environment: takes away everything else."""
    return dict.fromkeys(os.environ) | environment


class FirstRun(NamedTuple):
    """A training with empty caches: the folder it was started in, and what was asked of the Hub."""

    home: Path
    done: Done
    downloads: dict  # {repository: [file, ...]}
    requests: list
    unknown: list


def first_run(process, hub, home, *words):
    hub.forget()
    done = process(*TRAINING, *words, "--output-dir", "first", cwd=home, env=only(hub.environment(home / "hf")))
    downloads = {repo: hub.downloads(repo) for repo in (SMALL, XXL, SAMSUM)}
    return FirstRun(home, done, downloads, list(hub.requests), list(hub.unknown))


@pytest.fixture(scope="module")
def small(process, hub, tmp_path_factory):
    return first_run(process, hub, tmp_path_factory.mktemp("small"), "--model", "small")


@pytest.fixture(scope="module")
def xxl(process, hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("xxl")
    return first_run(process, hub, home, "--model", "xxl", "--int8", "--cache-dir", "cache")


def result(run):
    """What a run measured: its losses and gradient norms by step, its scores by epoch and all its predictions."""
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    assert metrics["status"] == "finished"
    curve = [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in metrics["curve"]]
    epochs = [(entry["step"], entry["validation"], entry["test"]) for entry in metrics["epochs"]]
    return curve, epochs, {path.name: path.read_text("utf-8") for path in (run / "predictions").iterdir()}


def assert_one_line(done, *words):
    assert done.code == 2 and done.out == "", done
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    for word in words:
        assert word in done.err, (word, done.err)


# ----------------------------------------------------------------------------------------------------------------------
# Download and train, then offline
# ----------------------------------------------------------------------------------------------------------------------


def test_small_trains_on_samsum_from_the_hub(command, hub, small, tmp_path):
    """As on the same files in folders, so nothing else was read. The row without a dialogue is dropped, and named."""
    run = small
    assert run.done.code == 0 and run.done.err == "" and not run.unknown, run
    assert re.search(r"^train: dropped 1 row\(s\) without dialogue or summary: \d+$", run.done.out, re.MULTILINE)
    out = " ".join(run.done.out.split())
    assert "rows: 24 train, 8 validation, 8 test" in out
    local = ("--model", hub.root / "models" / SMALL, "--dataset", hub.root / "datasets" / SAMSUM)
    done = command(*TRAINING[2:], *local, "--output-dir", tmp_path / "local", cwd=tmp_path)
    assert done.code == 0, done
    curve, epochs, predictions = result(run.home / "first")
    assert (curve, epochs, predictions) == result(tmp_path / "local")
    assert [step for step, _, _ in curve] == [1, 2, 3] and len({loss for _, loss, _ in curve}) == 3
    rows = [json.loads(line) for line in predictions["test-epoch-1.jsonl"].splitlines()]
    assert [row["reference"] for row in rows] == [row["summary"] for row in fake_hub.samsum_rows("test", 8)]


def test_only_what_is_needed_of_small_is_downloaded_and_once(small):
    """Not the three other formats of the same weights, nor the data set's code and archives."""
    downloads = small.downloads
    assert sorted(downloads[SMALL]) == sorted([*TOKENIZER_AND_CONFIG, "generation_config.json", "model.safetensors"])
    assert sorted(downloads[SAMSUM]) == ["test.csv", "train.csv", "validation.csv"]
    assert not downloads[XXL]


@pytest.mark.parametrize("name", ["small", "xxl"])
def test_nothing_is_asked_of_the_hub_once_model_and_data_are_there(request, name):
    """Neither by loading the weights nor by saving adapters and checkpoints: without a network, each would wait."""
    requests = request.getfixturevalue(name).requests
    assert "/datasets/" in requests[-1].path, requests[-1]


def test_small_runs_again_offline(process, hub, small):
    home = small.home
    hub.forget()
    done = process("--model", "small", *TRAINING, "--output-dir", "offline", cwd=home,
                   env=only(hub.environment(home / "hf", offline=True)))  # fmt: skip
    assert done.code == 0 and done.err == "", done
    assert hub.requests == []
    assert result(home / "offline") == result(home / "first")


def test_xxl_with_int8_comes_in_fp16_shards_and_runs_again_when_the_hub_is_gone(
    flan, command, process, hub, xxl, closed_port, tmp_path
):
    home, run = xxl.home, xxl
    assert run.done.code == 0 and run.done.err == "" and not run.unknown, run
    shards = [f"pytorch_model-{number:05}-of-00003.bin" for number in (1, 2, 3)]
    expected = [*TOKENIZER_AND_CONFIG, *shards, "pytorch_model.bin.index.json"]
    assert sorted(run.downloads[XXL]) == sorted(expected) and not run.downloads[SMALL]
    assert not (home / "hf").exists() or not list((home / "hf").rglob("*.bin"))  # they are in --cache-dir

    environment = only(fake_hub.environment(closed_port, home / "hf"))
    again = process("--model", "xxl", "--int8", "--cache-dir", "cache", *TRAINING, "--output-dir", "gone", cwd=home,
                    env=environment)  # fmt: skip
    assert again.code == 0 and again.err == "", again
    assert result(home / "gone") == result(home / "first")

    local = ("--model", hub.root / "models" / XXL, "--dataset", hub.root / "datasets" / SAMSUM)
    for flags, same in ((["--int8"], True), ([], False)):
        name = "".join(["local", *flags])
        done = command(*TRAINING[2:], *local, *flags, "--output-dir", tmp_path / name, cwd=tmp_path)
        assert done.code == 0, done
        assert (result(tmp_path / name)[0] == result(home / "first")[0]) is same


# ----------------------------------------------------------------------------------------------------------------------
# --plan
# ----------------------------------------------------------------------------------------------------------------------


def test_plan_counts_the_data_and_downloads_no_weights(process, hub, tmp_path):
    hub.forget()
    done = process("--plan", "--model", "small", cwd=tmp_path, env=only(hub.environment(tmp_path / "hf")))
    assert done.code == 0 and done.err == "" and "data: 24 training rows" in done.out, done
    assert sorted(hub.downloads(SMALL)) == sorted([*TOKENIZER_AND_CONFIG, "generation_config.json"])
    assert sorted(hub.downloads(SAMSUM)) == ["test.csv", "train.csv", "validation.csv"]


# ----------------------------------------------------------------------------------------------------------------------
# What the Hub does not have or does not give, and a Hub that cannot be reached
# ----------------------------------------------------------------------------------------------------------------------


def test_an_unknown_repository(process, hub, tmp_path):
    words = ("--dataset", "nobody/chats")
    done = process(*words, cwd=tmp_path, env=only(hub.environment(tmp_path / "hf")))
    assert_one_line(done, "there is no dataset nobody/chats on the Hub", "hf auth login")
    assert not (tmp_path / "runs").exists()


def test_a_gated_repository(process, root, tmp_path, monkeypatch):
    """The Hub shows to everybody what is in it, and refuses the files."""

    class Gate(fake_hub._Handler):
        def _file(self, *arguments):
            self._answer(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted."})

    monkeypatch.setattr(fake_hub, "_Handler", Gate)
    with fake_hub.FakeHub(root) as hub:
        done = process("--model", "small", cwd=tmp_path, env=only(hub.environment(tmp_path / "hf")))
    assert_one_line(done, SMALL, "licence", "hf auth login")
    assert not (tmp_path / "runs").exists()


def test_nobody_listens(process, closed_port, tmp_path):
    environment = only(fake_hub.environment(closed_port, tmp_path / "hf"))
    done = process("--model", "small", "--dataset", "sample", cwd=tmp_path, env=environment)
    assert_one_line(done, SMALL, "not in the cache", "--model FOLDER")
    assert not (tmp_path / "runs").exists()


def test_a_hub_that_never_answers_is_given_up_within_15_seconds(small, root, tmp_path):
    """Although two things are wanted of it: here the model is in the cache, and the data set is not."""
    home = small.home
    (cached,) = (home / "hf/hub").glob("models--*")
    shutil.copytree(cached, tmp_path / "hf/hub" / cached.name, symlinks=True)
    with fake_hub.FakeHub(root, silent=True) as hub:
        process = start("--model", "small", cwd=tmp_path, env=only(hub.environment(tmp_path / "hf")))
        while not hub.requests and process.poll() is None:  # the imports take what they take on a busy machine
            time.sleep(0.05)
        done = wait(process, timeout=15)
    assert_one_line(done, SAMSUM, "no answer within", "not in the cache", "--dataset FOLDER")
    assert not (tmp_path / "runs").exists()
