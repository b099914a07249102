"""Plans for a whole model, the command that prints them, and training on one."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from cprec import checkpoint
from cprec.cli_options import make_model_config
from cprec.data import prepare_synthetic
from cprec.model import NextItNet, NextItNetConfig
from cprec.planning import frontier_table, plan_frontier, plan_model, plot_frontier
from cprec_kernels.planning import Planner

COUNTS = np.floor(3e5 / np.arange(1, 2001)).astype(np.int64)


def model(**options) -> NextItNetConfig:
    return NextItNetConfig.from_plan(2000, 32, **({"dilations": (1,)} | options))


@pytest.mark.parametrize(
    "options",
    [{}, {"head_bias": True}, {"head_bias": True, "tail_bias": True}, {"dilations": (1, 2)}, {"tie_tails": True}],
)
@pytest.mark.parametrize("compression", [1.0, 2.0, 3.3])
def test_the_whole_model_is_as_small_as_asked(options, compression):
    found = plan_model(model(**options), COUNTS, compression)
    count = sum(parameter.numel() for parameter in NextItNet(found.config).parameters())
    assert count == found.config.num_parameters
    assert found.compression >= compression
    assert found.config.input_partition == found.config.output_partition == found.tables.partition
    assert found.config.twin() == model(**options | {"tie_tails": False})


def test_a_model_that_cannot_be_so_small_says_how_small_it_can_be():
    with pytest.raises(ValueError, match="compression 50 is more than this model allows") as caught:
        plan_model(model(), COUNTS, 50)
    largest = float(str(caught.value).split(" parameters, ")[1].split(" times")[0])
    assert plan_model(model(), COUNTS, largest).compression >= largest
    with pytest.raises(ValueError, match="is more than this model allows"):
        plan_model(model(), COUNTS, largest * 1.002)


def test_biases_that_tip_the_scale_take_few_attempts(monkeypatch):
    """Whether the tables' natural size fits or not, a plan is asked for a few times, not once per bias."""
    asked = []
    plan = Planner.plan
    monkeypatch.setattr(Planner, "plan", lambda self, **budget: (asked.append(budget), plan(self, **budget))[1])
    biased = model(head_bias=True, tail_bias=True)
    counts = COUNTS // 50
    natural = plan_model(biased, counts, 1.1).config.num_parameters
    for short in range(0, 2200, 100):
        asked.clear()
        found = plan_model(biased, counts, biased.twin().num_parameters / (natural - short))
        assert found.config.num_parameters <= natural - short
        assert len(asked) <= 5


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="there are counts of 3 items, the model has 2,000"):
        plan_model(model(), [3, 2, 1], 2)
    with pytest.raises(ValueError, match="compression must be a finite number above 0, got nan"):
        plan_model(model(), COUNTS, float("nan"))
    with pytest.raises(ValueError, match="more than this model allows"):
        plan_frontier(model(), COUNTS, [90, 100])


def test_a_planner_for_other_tails_is_refused():
    for tied in (False, True):
        with pytest.raises(ValueError, match=f"tie_tails = {not tied}, the model {tied}"):
            plan_model(model(tie_tails=tied), COUNTS, 2.0, planner=Planner(COUNTS, 32, tie_tails=not tied))


def test_the_frontier_has_every_model_once(tmp_path):
    plans = plan_frontier(model(), COUNTS)
    sizes = [found.config.num_parameters for found in plans]
    assert sizes == sorted(set(sizes), reverse=True)
    planner = Planner(COUNTS, 32)
    for found in plans:
        assert found.compression >= found.asked
        assert found.tables.prediction == planner.predict(found.config.input_partition)
    assert frontier_table(plans).row_count == len(plans) + 1
    plot_frontier(plans, tmp_path / "plan.png", "title")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_plan_that_is_asked_for_twice_is_there_once_as_the_larger_compression():
    (found,) = plan_frontier(model(), COUNTS, [2.0, 2.0000001])
    assert found.asked == 2.0000001
    assert found.config == plan_model(model(), COUNTS, 2.0).config


def test_faster_is_the_twins_time_over_that_of_the_plan():
    (found,) = plan_frontier(model(), COUNTS, [2.0])
    ours = dataclasses.replace(found.tables.prediction, train_ms=2.0, topk_ms=4.0)
    plain = dataclasses.replace(found.tables.plain, train_ms=8.0, topk_ms=6.0)
    found = dataclasses.replace(found, tables=dataclasses.replace(found.tables, prediction=ours, plain=plain))
    columns = [column for column in frontier_table([found]).columns if column.header == "faster"]
    assert [list(column.cells) for column in columns] == [["", "4.0x"], ["", "1.5x"]]


def test_a_plot_has_a_tick_beside_that_of_the_twin(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **options: drawn.append(figure))
    small = NextItNetConfig.from_plan(60, 32, dilations=(1, 4), repeats=40)
    close = plan_frontier(small, range(200, 140, -1))
    assert 1 < close[-1].compression < 1.01
    for plans, ticks in (
        (plan_frontier(model(), COUNTS, [2, 4.1]), ["1x", "2x", "4x"]),
        (close, ["1x", f"{close[-1].compression:.3f}x"]),
    ):
        plot_frontier(plans, tmp_path / "plan.png", "title")
        for axis in drawn.pop().axes:
            assert sorted(label.get_text() for label in axis.get_xticklabels()) == sorted(ticks)


# The command line; ``run`` is the fixture in conftest.py


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "data"
    prepare_synthetic(folder, 600, 300, seed=1)
    return folder


SMALL = ("--dim", 16, "--dilations", "1", "--repeats", 1)


def test_plan_prints_a_table_and_leaves_figures_and_a_plot(run, data, tmp_path):
    out, _ = run("plan", data, *SMALL, "--plot", tmp_path / "plan.png", "--json", tmp_path / "plan.json")
    assert "training interactions" in out
    assert "twin" in out
    assert "next: cprec train" in out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert figures["plans"]
    for found in figures["plans"]:
        assert found["compression"] >= found["asked"]
        assert f"{found['parameters']:,}" in out
    printed = json.loads(run("plan", data, *SMALL, "--json", "-")[0])
    assert printed == figures
    one = json.loads(run("plan", data, *SMALL, "--compressions", "2", "--objective", "quality", "--json", "-")[0])
    assert [found["asked"] for found in one["plans"]] == [2.0]


def test_the_next_command_is_the_better_one_by_the_objective(run, data):
    fast = ("--dim", 64, "--dilations", "1", "--repeats", 1, "--objective", "speed", "--rows", 1000)
    train = f"next: cprec train {data} --out RUN"
    assert run("plan", data, *SMALL)[0].endswith(f"{train} --twin\n")
    assert run("plan", data, *SMALL, "--no-tie-tails")[0].endswith(f"{train} --twin\n")
    assert run("plan", data, *SMALL, "--compressions", 2)[0].endswith(
        f"{train} --compression 2\n"
    )  # wanted all the same
    assert run("plan", data, *fast)[0].endswith(f"{train} --compression 2\n")
    assert run("plan", data, *fast, "--no-tie-tails")[0].endswith(f"{train} --compression 2 --no-tie-tails\n")


def test_plan_help_teaches(run):
    out = " ".join(run("plan", "--help")[0].split())
    for phrase in (
        "nothing is trained",
        "it is no metric",
        "small, dense catalogue",
        "cprec train data -o run --compression 6",
    ):
        assert phrase in out


def test_train_takes_the_planned_partition_and_its_run_keeps_it(run, data, tmp_path):
    quick = ("--epochs", 1, "--length", 5, "-q")
    out, _ = run("train", data, "-o", tmp_path / "run", *SMALL, *quick, "--compression", 2)
    config, _ = checkpoint.read_config(tmp_path / "run")
    assert f"planned: cutoffs {list(config.input_partition.cutoffs)}, ranks {list(config.input_partition.ranks)}" in out
    assert config.twin().num_parameters / config.num_parameters >= 2
    info = json.loads(run("info", tmp_path / "run", "--json", "-")[0])
    assert info["compression"] >= 2
    assert json.loads(run("info", data, *SMALL, "--compression", 2, "--json", "-")[0]) == info
    run("train", data, "-o", tmp_path / "run", *SMALL, *quick, "--compression", 2, "--resume")
    _, err = run("train", data, "-o", tmp_path / "run", *SMALL, *quick, "--compression", 1.2, "--resume", expect=1)
    assert "cannot go on with another configuration" in err
    for flag, there in (("--no-tie-tails", True), ("--tie-tails", False)):
        folder = tmp_path / f"run{there}"
        own = ("--tie-tails",) if there else ()
        given = (*SMALL, *quick, "--cutoffs", 100, "--ranks", "16,4")
        run("train", data, "-o", folder, *given, *own)
        before = (folder / "config.json").read_text()
        _, err = run("train", data, "-o", folder, *given, flag, "--resume", expect=1)
        assert f"model.tie_tails: {there} in the run, {not there} now" in err
        assert (folder / "config.json").read_text() == before
        run("train", data, "-o", folder, *given, "--resume")  # unasked, it goes on as it was


def test_a_run_from_before_tails_were_tied_goes_on_with_its_command(run, data, tmp_path):
    command = ("train", data, "-o", tmp_path / "run", *SMALL, "--epochs", 1, "--length", 5, "-q", "--compression", 2)
    run(*command, "--no-tie-tails")
    run(*command, "--resume")
    assert not checkpoint.read_config(tmp_path / "run")[0].tie_tails


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compression", "2", "--cutoffs", "100"], "leave out --cutoffs, or leave out --compression"),
        (["--compression", "2", "--ranks", "16,4"], "leave out --ranks,"),
        (["--compression", "2", "--cutoffs", "none", "--ranks", "16", "--twin"], "--cutoffs and --ranks and --twin"),
        (["--compression", "2", "--softmax-ranks", "16,4"], "leave out --softmax-ranks,"),
        (["--twin", "--softmax-cutoffs", "100"], "--twin has one cluster in both tables: leave out --softmax-cutoffs"),
        (["--softmax-cutoffs", "600"], "--softmax-cutoffs none for one cluster"),
        (["--compression", "900"], "compression 900 is more than this model allows"),
        (["--compression", "0"], "compression must be a finite number above 0, got 0"),
    ],
)
def test_conflicts_and_impossible_compressions_are_refused(run, data, tmp_path, arguments, message):
    _, err = run("train", data, "-o", tmp_path / "run", *SMALL, *arguments, expect=1)
    assert message in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--compressions", "x"], 2, "'x' in 'x' is not a number"),
        (["--compressions", "900"], 1, "more than this model allows"),
        (["--ranks", "64"], 1, "ranks must hold at least one rank in 1..16"),
        (["--max-clusters", "9"], 1, "at most 8 clusters"),
        (["--tokens", "0"], 1, "tokens must be at least 1, got 0"),
        (["--objective", "best"], 2, "best"),
        (["--plot", "nowhere/plan.png"], 1, "no such directory to write plan.png in"),
        (
            ["--plot", "plan.jpg", "--compressions", "900"],
            1,
            "plan.jpg: a plot is written as PNG, name a file that ends in .png",
        ),
    ],
)
def test_wrong_input_to_plan_is_one_sentence(run, data, arguments, code, message):
    _, err = run("plan", data, *SMALL, *arguments, expect=code)
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_without_a_choice_the_cutoffs_are_the_usual_ones():
    options = {"dilations": "1", "repeats": 1}
    config = make_model_config(COUNTS, 32, None, None, False, **options)
    assert config.input_partition.cutoffs == (100, 400)
    assert make_model_config(COUNTS, 32, None, None, True, **options).input_partition.num_clusters == 1


def test_tails_are_tied_where_a_plan_is_asked_for_unless_something_speaks_against_it():
    options = {"dilations": "1", "repeats": 1}
    planned = make_model_config(COUNTS, 32, None, None, False, compression=2, **options)
    assert planned.tie_tails
    apart = make_model_config(COUNTS, 32, None, None, False, compression=2, tie_tails=False, **options)
    assert not apart.tie_tails
    assert planned.output_partition != apart.output_partition
    assert not make_model_config(
        COUNTS, 32, None, None, False, compression=2, sparse_embedding=True, **options
    ).tie_tails
    assert not make_model_config(COUNTS, 32, None, None, True, tie_tails=True, **options).tie_tails
    assert not make_model_config(COUNTS, 32, "100", "32,8", False, **options).tie_tails
    assert make_model_config(COUNTS, 32, "100", "32,8", False, tie_tails=True, **options).tie_tails
    with pytest.raises(ValueError, match="one partition for embedding and softmax"):
        make_model_config(COUNTS, 32, "100", "32,8", False, softmax_cutoffs="200,900", tie_tails=True, **options)


def test_the_softmax_may_have_clusters_of_its_own():
    options = {"dilations": "1", "repeats": 1}
    config = make_model_config(COUNTS, 32, "100", "32,8", False, softmax_cutoffs="200,900", **options)
    assert (config.input_partition.cutoffs, config.input_partition.ranks) == ((100,), (32, 8))
    assert (config.output_partition.cutoffs, config.output_partition.ranks) == ((200, 900), (32, 8, 2))
    config = make_model_config(COUNTS, 32, "100", "32,8", False, softmax_ranks="16,4", **options)
    assert (config.output_partition.cutoffs, config.output_partition.ranks) == ((100,), (16, 4))
    config = make_model_config(COUNTS, 32, "100", "32,8", False, softmax_cutoffs="none", **options)
    assert config.output_partition.num_clusters == 1


def test_a_catalogue_too_small_for_any_default_gets_the_smallest_model_there_is():
    """Most of it is blocks. Who asks for nothing in particular is not told that it was too much."""
    model = NextItNetConfig.from_plan(60, 32, dilations=(1, 4), repeats=4)
    counts = range(200, 140, -1)
    (plan,) = plan_frontier(model, counts)
    assert 1 < plan.compression < 1.5
    with pytest.raises(ValueError, match="more than this model allows"):
        plan_frontier(model, counts, [1.5])
