"""flan-t5_samsum.py as it is met in the first minutes: what is on the screen, in the plots, and without a network."""

import contextlib
import io
import json
import logging
import re
import time

import numpy as np
import pytest
from conftest import RECIPE, SCRIPT


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def at_a_terminal(flan, monkeypatch):
    """at_a_terminal(words...): the script with both outputs at a terminal of 80 columns; returns (code, out, err)."""

    def run(*words, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(flan.sys, "argv", ["flan-t5_samsum.py", *map(str, words)])
        with contextlib.redirect_stdout(Terminal()) as out, contextlib.redirect_stderr(Terminal()) as err:
            code = flan.main(flan.parse_settings([str(word) for word in words]))
        return code, out.getvalue(), err.getvalue()

    return run


def widest(text):
    """Of lines without a path, which cannot be broken; what a bar overwrites is a line of its own."""
    return max(len(re.sub("\x1b.*?m|\x1b\\[A", "", line)) for line in re.split("[\r\n]", text) if "/tmp" not in line)


def test_a_training_at_80_columns(at_a_terminal, data, model_folder, tmp_path):
    words = ("--model", model_folder, "--dataset", data, "--max-steps", "7", *RECIPE, "--output-dir", "run")
    code, out, err = at_a_terminal(*words, cwd=tmp_path)
    assert code == 0 and widest(out) <= 80 and 70 <= widest(err) <= 79
    assert re.search(r"\d+%\|\S* *\| 7/7 .*loss \d\.\d+  \d+\.\d rows/s", err)  # steps, time, loss and speed


def test_tables_of_other_modes_at_80_columns(at_a_terminal, trained, tmp_path):
    for words in (("--evaluate",), ("--compare", trained.folder, "--output-dir", tmp_path)):
        code, out, _ = at_a_terminal(*words, cwd=trained.home)
        lines = [line for line in out.splitlines() if line.startswith("|")]
        assert code == 0 and max(map(len, lines)) <= 80 and "[" not in "".join(lines)
        assert len({line.count("|") for line in lines[-3:]}) == 1


def test_a_table_is_aligned(flan):
    assert flan.table(["run", "A", "x"], [["a", "b", "1.25"], ["long", "", "10"]], text=(0,)).splitlines() == [
        "| run  | A |    x |",
        "|:-----|--:|-----:|",
        "| a    | b | 1.25 |",
        "| long |   |   10 |"]


def test_nothing_is_shown_while_small_weights_are_loaded(flan, model_folder):
    with contextlib.redirect_stderr(Terminal()) as err, contextlib.redirect_stdout(Terminal()) as out:
        flan.load_base(model_folder, *flan.get_device())
    assert err.getvalue() == out.getvalue() == ""


def test_several_summaries_are_numbered_at_a_terminal_and_bare_when_piped(command, at_a_terminal, trained, tmp_path):
    (tmp_path / "two.txt").write_text("Ada: hi\n\nFemi: ho")
    (tmp_path / "one.txt").write_text("Ada: hi")
    words = ("--adapter", trained.folder)
    piped = command("--summarize", "two.txt", *words, cwd=tmp_path)
    assert piped.code == 0 and len(piped.out.splitlines()) == 2, piped
    _, out, _ = at_a_terminal("--summarize", "two.txt", *words, cwd=tmp_path)
    assert out.splitlines() == [f"{i}. {line}" for i, line in enumerate(piped.out.splitlines(), 1)]
    _, out, _ = at_a_terminal("--summarize", "one.txt", *words, cwd=tmp_path)
    assert out == piped.out.splitlines()[0] + "\n"  # nothing to tell apart


def test_the_shipped_model_says_that_it_is_a_toy_and_names_a_real_one(command, trained, tmp_path):
    words = ("--limit", "2", "--max-steps", "1", "--max-new-tokens", "2", "--output-dir", "run")
    done = command(*words, cwd=tmp_path)
    assert done.code == 0 and done.out.count("| test ") == 2, done  # of a single epoch, no table comes twice
    toy = f"A toy (10 million parameters). On a GPU: python {SCRIPT} --model base\n"
    assert done.out.count(toy) == 1 and len(toy.replace(str(SCRIPT), SCRIPT.name)) <= 80
    (tmp_path / "chat.txt").write_text("Ada: hi\nhello\n\nthere is no name")
    done = command("--summarize", "chat.txt", "--adapter", "run", cwd=tmp_path)
    assert done.code == 0 and done.err.count(toy) == 1 and "toy" not in done.out.lower(), done
    assert "dialogue 1" not in done.err and "note: dialogue 2 has no line like 'Anna: hi!'" in done.err, done
    assert "toy" not in trained.done.out.lower()


def test_the_command_for_a_real_model_trains_on_the_same_data(flan, data, capsys):
    words = ["--dataset", str(data), "--source-column", "my dialogue", "--batch-size", "4"]
    flan.say_if_toy(flan.parse_settings(words), 8e6)
    assert capsys.readouterr().out.endswith(f"--model base --dataset {data} --source-column 'my dialogue'\n")
    flan.say_if_toy(flan.parse_settings(["--model", "base", *words]), 8e6)
    assert capsys.readouterr().out == ""


def test_lr_find_says_where_the_default_stands(flan, command, data, model_folder, tmp_path):
    words = ("--model", model_folder, "--dataset", data, "--lr-find", *RECIPE[2:])
    done = command(*words, "--lr", "3e-3", cwd=tmp_path)
    assert done.code == 0, done
    found = json.loads(next(tmp_path.rglob("lr_find.json")).read_text())
    rates, losses = found["learning_rates"], found["losses"]
    means = [np.mean(losses[max(0, i - 3) : i + 4]) for i in range(len(losses))]
    (line,) = [line for line in done.out.splitlines() if line.startswith("without it: 3e-3, ")]
    times, there, smallest = map(float, re.findall(r"[\d.]+(?= times|;|$)", line))
    assert times == pytest.approx(3e-3 / found["suggestion"], rel=0.06)
    i = next(i for i, rate in enumerate(rates) if rate > 3e-3)
    assert min(means[i - 1 : i + 1]) - 1e-3 <= there <= max(means[i - 1 : i + 1]) + 1e-3
    assert smallest == pytest.approx(min(means), abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Plots
# ----------------------------------------------------------------------------------------------------------------------


def test_a_bar_says_what_is_summarised(flan, command, data, model_folder, tmp_path, monkeypatch):
    bars, new_bar = [], flan.new_bar
    monkeypatch.setattr(flan, "new_bar", lambda total, what, unit, **how: bars.append((what, total)) or new_bar(
        total, what, unit, **how))  # fmt: skip
    done = command("--model", model_folder, "--dataset", data, "--max-steps", 1, "--max-new-tokens", 2, cwd=tmp_path)
    assert done.code == 0, done
    assert [bar for bar in bars if bar[0]] == 2 * [("summaries of validation", 7), ("summaries of test", 5)]


@pytest.mark.parametrize("is_wide", [False, True])
def test_intervals_are_explained_where_they_are_shown(flan, trained, monkeypatch, is_wide):
    monkeypatch.setattr(flan, "is_wide", lambda: is_wide)
    scoring = json.loads((trained.folder / "metrics.json").read_text())["scoring"]
    assert ("bootstrap" in flan.scoring_in_words(scoring)) is is_wide


@pytest.fixture
def figures(flan, monkeypatch):
    """All figures that were drawn."""
    kept, figure = [], flan.Figure
    monkeypatch.setattr(flan, "Figure", lambda *args, **options: kept.append(figure(*args, **options)) or kept[-1])
    return kept


def test_a_legend_lies_beside_the_curves(flan, figures, trained, tmp_path):
    metrics = json.loads((trained.folder / "metrics.json").read_text())
    flan.plot_loss(metrics["curve"], tmp_path / "loss.png", "a")
    flan.plot_rouge(metrics["epochs"], tmp_path / "rouge.png", "b")
    flan.plot_comparison([flan.read_run(trained.folder)] * 2, tmp_path / "comparison.png")
    assert len(figures) == 3
    for figure in figures:
        (legend,) = figure.legends
        assert all(axes.get_legend() is None for axes in figure.axes)
        assert legend.get_window_extent().x0 >= max(axes.get_window_extent().x1 for axes in figure.axes)


@pytest.mark.parametrize(("first", "scale"), [(9.0, "log"), (3.0, "linear")])
def test_a_plot_shows_the_whole_fall(flan, figures, tmp_path, first, scale):
    """On a scale that does not flatten what follows; where the loss is no number, nothing."""
    for name, last in (("good", 1.0), ("diverged", float("nan"))):
        losses = [first - step / 5 * (first - 1) for step in range(6)] + [last] * 100
        flan.plot_loss([{"step": step, "loss": loss, "learning_rate": 1e-4} for step, loss in enumerate(losses)],
                       tmp_path / "loss.png", name)  # fmt: skip
        axes = figures[-1].axes[0]
        low, high = axes.get_ylim()
        assert axes.get_yscale() == scale and 0.5 < low < 1 and first < high < 2 * first


def test_runs_that_are_plotted_together_have_one_scale(command, figures, tmp_path):
    """Also where one of them is shorter, and one has a loss that is not finite. Alone, each fills its picture."""
    from torch.utils.tensorboard import SummaryWriter

    for name, losses in (("xl", np.linspace(9, 1, 200)), ("xxl", [2.0, float("inf"), *np.linspace(2, 0.5, 98)])):
        with SummaryWriter(str(tmp_path / name)) as writer:
            for step, loss in enumerate(losses):
                writer.add_scalar("train/loss", loss, 10 * step)
    assert command("--plot", "xl", "xxl", cwd=tmp_path).code == 0
    together = [(figure.axes[0].get_xlim(), figure.axes[0].get_ylim()) for figure in figures]
    assert {figure.axes[0].get_yscale() for figure in figures} == {"linear"}  # also of one that is steep
    assert together[0] == together[2] and together[1][1] == together[3][1]
    (low, high), (smallest, largest) = together[0]
    assert low <= 0 and high >= 1990 and smallest < 0.5 and largest > 3
    assert command("--plot", "xxl", cwd=tmp_path).code == 0
    assert figures[4].axes[0].get_xlim()[1] < 1100


# ----------------------------------------------------------------------------------------------------------------------
# The Hub, and plain transformers
# ----------------------------------------------------------------------------------------------------------------------


def test_a_name_that_cannot_be_looked_up_costs_five_seconds_once(flan, command, monkeypatch, tmp_path):
    """A resolver that never answers, as without a network on some machines."""
    asked = []
    monkeypatch.setattr(flan.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(flan.urllib.request, "getproxies", dict)
    monkeypatch.setattr(flan.socket, "getaddrinfo", lambda *_: asked.append(1) or time.sleep(30))
    monkeypatch.setattr(flan, "hub_silence", [])
    begin = time.monotonic()
    done = command("--model", "small", cwd=tmp_path)
    assert time.monotonic() - begin < 5 and done.code == 2, done
    assert "cannot be looked up" in done.err and "--model FOLDER" in done.err and done.err.count("\n") == 1
    begin = time.monotonic()
    assert "cannot be looked up" in command("--model", "base", cwd=tmp_path).err
    assert time.monotonic() - begin < 1 and asked == [1]


def test_an_exported_model_loads_with_no_word_that_a_published_one_does_not_have(
    flan, command, trained, model_folder, tmp_path
):
    """transformers 5 calls every T5 tied whatever its config.json says, and notes when it finds that Flan-T5's head is
    a matrix of its own. Nothing else may be said: of weights that are missing, unexpected or of another shape."""
    assert command("--export", "plain", "--adapter", trained.folder, cwd=tmp_path).code == 0
    heard, handler = [], logging.Handler()
    handler.emit = lambda record: heard[-1].append(record.getMessage())
    logger, load = logging.getLogger("transformers"), flan.AutoModelForSeq2SeqLM.from_pretrained
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        for folder in (model_folder, tmp_path / "plain"):
            heard.append([])
            with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
                load(folder)
            assert "LOAD REPORT" not in err.getvalue() + out.getvalue()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert heard[0] == heard[1] and len(heard[0]) == 1 and "lm_head.weight" in heard[0][0], heard


def test_names_of_runs_in_tables_are_what_tells_them_apart(flan):
    names = ["flan-t5-xl-samsum-lr=1e-3", "flan-t5-xl-samsum-lr=1e-4"]
    assert flan.without_common_start(names) == ["lr=1e-3", "lr=1e-4"]
    assert flan.without_common_start(["a", "a-int8"]) == ["a", "a-int8"]
    assert flan.without_common_start(["x-a-b", "x-a-b-b"]) == ["b", "b-b"]
    assert flan.without_common_start(["one", "two-b"]) == ["one", "two-b"]
    assert flan.without_common_start(["flan-t5-xl-samsum"]) == ["flan-t5-xl-samsum"]
