"""The cprec command: the whole job on a small generated catalogue, and what wrong input leads to."""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
import time

import pytest
import torch

import cprec
from cprec import checkpoint
from cprec.data import generate, write_interactions


@pytest.fixture(scope="module")
def interactions(tmp_path_factory):
    """A text file of sequences."""
    path = tmp_path_factory.mktemp("raw") / "interactions.txt"
    return write_interactions(path, generate(300, 200, mean_length=10, seed=1))


TINY = ("--dim", 16, "--epochs", 2, "--length", 8, "--dilations", "1,2", "--repeats", 1, "-q")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, interactions):
    """Prepared data and a trained run."""
    folder = tmp_path_factory.mktemp("work")
    command = [sys.executable, "-m", "cprec"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for arguments in (
        ["prepare", interactions, "-o", folder / "data", "-q"],
        ["train", folder / "data", "-o", folder / "run", *TINY],
    ):
        result = subprocess.run(
            [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
    return folder


def test_help_names_every_command(run):
    out, _ = run("--help")
    for command in ("demo", "prepare", "info", "plan", "train", "evaluate", "recommend", "export"):
        assert f" {command} " in out
    assert run("--version")[0].strip() == f"cprec {cprec.__version__}"


def test_help_and_preparing_do_not_wait_for_torch(interactions, tmp_path):
    code = """
import sys
from cprec.cli import app
app([*sys.argv[1:]], standalone_mode=False)
assert "torch" not in sys.modules
import cprec.data
assert cprec.data.TrainingWindows and cprec.__version__
"""
    for arguments in (["--help"], ["prepare", str(interactions), "-o", str(tmp_path / "data"), "-q"]):
        command = [sys.executable, "-c", code, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    for module in (cprec, cprec.data):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = module.nothing


def test_a_run_folder_holds_what_it_promises(trained):
    names = {path.name for path in (trained / "run").iterdir()}
    assert {"config.json", "weights.safetensors", "metrics.json", "curve.png", "logs"} <= names
    assert (trained / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_info_counts_the_parameters_of_run_and_plan(run, trained):
    out, _ = run("info", trained / "run")
    assert "compression" in out
    assert "twin" in out
    report = json.loads(run("info", trained / "run", "--json", "-")[0])
    assert report["parameters"] == sum(p.numel() for p in checkpoint.load(trained / "run").parameters())
    assert report["compression"] == pytest.approx(report["twin_parameters"] / report["parameters"])
    out, _ = run("info", trained / "data", "--twin", "--dim", 16)
    assert "compression 1.00x" in out


def test_info_of_a_plan_as_json_is_json_alone(run, trained):
    plan = json.loads(run("info", trained / "data", "--dim", 16, "--json", "-")[0])
    assert plan["compression"] > 1


def test_info_of_a_run_takes_no_options_of_a_model(run, trained):
    _, err = run("info", trained / "run", "--dim", 16, "--no-tie-tails", expect=1)
    assert "run holds a model, which --dim, --tie-tails cannot change: leave it out, or give prepared data" in err


def test_a_catalogue_too_small_to_cut_says_what_to_do(run, tmp_path):
    (tmp_path / "tiny.txt").write_text("a b c d\nb c d e\nc d e f\n", encoding="utf-8")
    run("prepare", tmp_path / "tiny.txt", "-o", tmp_path / "tiny", "-q")
    _, err = run("info", tmp_path / "tiny", expect=1)
    assert "--cutoffs none for one cluster" in err
    assert "compression 1.00x" in run("info", tmp_path / "tiny", "--twin")[0]
    assert "compression 1.00x" in run("info", tmp_path / "tiny", "--cutoffs", "none")[0]


def test_candidates_are_lines_not_words(run, tmp_path):
    (tmp_path / "raw.csv").write_text(
        "user,item\n" + "".join(f"u{u},item\u00a0{(u + s) % 12}\n" for u in range(20) for s in range(5)),
        encoding="utf-8",
    )
    run("prepare", tmp_path / "raw.csv", "-o", tmp_path / "data", "-q")
    run("train", tmp_path / "data", "-o", tmp_path / "run", *TINY, "--cutoffs", "4", "--epochs", 1)
    (tmp_path / "allowed.txt").write_text("\ufeff item\u00a03\n\nitem\u00a04\r\n", encoding="utf-8")
    (tmp_path / "one.jsonl").write_text('{"items": ["item\u00a01"]}\n', encoding="utf-8")
    arguments = ("recommend", tmp_path / "run", tmp_path / "one.jsonl", "-q", "--candidates", tmp_path / "allowed.txt")
    assert {line.split(",")[2] for line in run(*arguments)[0].splitlines()[1:]} == {"item\u00a03", "item\u00a04"}
    (tmp_path / "allowed.txt").write_bytes(b"caf\xe9\n")
    _, err = run(*arguments, expect=1)
    assert "allowed.txt: --candidates must be UTF-8 text" in err.replace("\n", "")
    _, err = run(*arguments[:-1], tmp_path / "nope.txt", expect=1)
    assert "nope.txt: --candidates cannot be read: No such file" in err.replace("\n", "")


def test_evaluate_repeats_the_metrics_of_training(run, trained, tmp_path):
    out, _ = run("evaluate", trained / "run", "-q", "--json", tmp_path / "report.json", "--topn", "5,10,20")
    assert "NDCG@10" in out
    assert "popul." in out
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    metrics = json.loads((trained / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert report == metrics["test"]


@pytest.mark.parametrize("command", ["demo", "prepare", "info", "plan", "train", "evaluate", "recommend", "export"])
def test_help_fills_the_lines_of_the_terminal(run, command):
    lines = [line.strip() for line in run(command, "--help")[0].splitlines()]
    start = next(number for number, line in enumerate(lines) if line.startswith("Usage"))
    text = list(itertools.takewhile(lambda line: not line.startswith("╭"), lines[start + 1 :]))
    assert any(text)
    for line, following in itertools.pairwise(text):
        if line and following:
            assert len(line) + 1 + len(following.split()[0]) > 116, f"{line!r} ends early"


def test_training_may_start_from_factorised_transitions(run, trained, tmp_path):
    run("train", trained / "data", "-o", tmp_path / "run", *TINY, "--epochs", 1, "--init", "als")
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["training"]["init"] == "als"
    _, err = run("train", trained / "data", "-o", tmp_path / "run", *TINY, "--resume", expect=1)
    assert "init" in err
    _, err = run("train", trained / "data", "-o", tmp_path / "other", *TINY, "--init", "svd", expect=2)
    assert "'random', 'als'" in err
    assert not (tmp_path / "other").exists()


def test_recommend_leaves_out_what_was_seen(run, trained, interactions, tmp_path):
    histories = interactions.read_text(encoding="utf-8").splitlines()[:20]
    (tmp_path / "histories.txt").write_text("\n".join([*histories, "no-such-item"]) + "\n", encoding="utf-8")
    _, err = run("recommend", trained / "run", tmp_path / "histories.txt", "-o", tmp_path / "top.csv", "-k", 7, "-q")
    assert "147 recommendations for 21 users" in err
    assert "no-such-item" in err
    with (tmp_path / "top.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for number, history in enumerate(histories, start=1):
        items = [row["item"] for row in rows if row["user"] == str(number)]
        assert len(set(items)) == 7
        assert not set(items) & set(history.split())
    out, _ = run("recommend", trained / "run", tmp_path / "histories.txt", "-k", 1, "-q", "--output-format", "jsonl")
    assert json.loads(out.splitlines()[0])["rank"] == 1


def test_recommend_reads_standard_input(trained, interactions):
    line = interactions.read_text(encoding="utf-8").splitlines()[0]
    result = subprocess.run(
        [sys.executable, "-m", "cprec", "recommend", str(trained / "run"), "-k", "3", "-q"],
        input=line + "\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 4


def test_a_stop_leaves_no_half_written_file(trained, tmp_path):
    command = [sys.executable, "-m", "cprec", "recommend", trained / "run", "-", "--out", tmp_path / "top.csv"]
    process = subprocess.Popen([*map(str, command)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.iterdir()):  # it waits for histories with the file begun
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_training_stops_with_its_last_state(trained, tmp_path):
    code = """
import os, signal, sys
from cprec.__main__ import main
from cprec.model import NextItNet
loss, calls = NextItNet.loss, []

def stopped(self, windows):
    calls.append(0)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return loss(self, windows)

NextItNet.loss = stopped
main()
"""
    options = (*TINY, "--batch-size", 16, "--checkpoint-every", 1)
    command = [sys.executable, "-c", code, "train", trained / "data", "-o", tmp_path / "run", *options]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 143, result.stderr
    assert result.stderr.splitlines()[-1] == "stopped; go on with --resume"
    assert (tmp_path / "run" / "last" / "state.ckpt").is_file()


def test_two_processes_train_one_model(run, trained, tmp_path):
    options = ("--batch-size", 16, "--accelerator", "cpu", "--devices", 2, "--strategy", "ddp")
    command = [sys.executable, "-m", "cprec", "train", trained / "data", "-o", tmp_path / "run", *TINY, *options]
    result = subprocess.run(
        [*map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("times fewer than the uncompressed twin") == 1
    assert result.stdout.count("best of 2 epochs") == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    report = json.loads(run("evaluate", tmp_path / "run", "--split", "valid", "--json", "-", "-q")[0])
    # Ranks of every example are counted once, wherever they were found.
    best = max(record["validation"]["ndcg@10"] for record in metrics["history"])
    assert best == pytest.approx(report["model"]["ndcg@10"], rel=1e-6)
    alone = ("--batch-size", 16, "--accelerator", "cpu", "--devices", 1, "--epochs", 3, "--resume")
    _, err = run("train", trained / "data", "-o", tmp_path / "run", *TINY, *alone, expect=1)
    assert "the run was trained on 2 devices and cannot go on with 1" in err


def test_recommend_chooses_among_candidates(run, trained, interactions, tmp_path):
    items = sorted(set(interactions.read_text(encoding="utf-8").split()))[:5]
    (tmp_path / "allowed.txt").write_text("\n".join(items), encoding="utf-8")
    (tmp_path / "one.jsonl").write_text('{"user": "u", "items": ["' + items[0] + '"]}\n', encoding="utf-8")
    out, _ = run(
        "recommend", trained / "run", tmp_path / "one.jsonl", "--candidates", tmp_path / "allowed.txt", "-k", 5, "-q"
    )
    assert {line.split(",")[2] for line in out.splitlines()[1:]} == set(items[1:])


def test_an_export_in_the_place_of_a_run_is_called_that(run, trained, tmp_path):
    run("export", trained / "run", "-o", tmp_path / "model")
    (tmp_path / "histories.txt").write_text("a\n")
    _, err = run("recommend", tmp_path / "model", tmp_path / "histories.txt", "-q", expect=1)
    assert "is that of an exported model: give the run it was exported from" in err.replace("\n", " ")


def test_a_length_beyond_what_blocks_see_is_said(run, trained, tmp_path):
    arguments = ("train", trained / "data", *TINY, "--epochs", 1, "--dilations", "1", "--repeats", 1)
    out, _ = run(*arguments, "-o", tmp_path / "long", "-L", 8)
    assert "--length 8 is beyond the 7 items that the blocks see" in out.replace("\n", " ")
    out, _ = run(*arguments, "-o", tmp_path / "short", "-L", 7)
    assert "is beyond" not in out


def test_recommend_says_which_candidates_are_unknown(run, trained, interactions, tmp_path):
    history = interactions.read_text(encoding="utf-8").split("\n", 1)[0]
    (tmp_path / "candidates.txt").write_text(f"{history.split()[0]}\nnobody\n")
    (tmp_path / "histories.txt").write_text(f"{history}\n")
    _, err = run(
        "recommend", trained / "run", tmp_path / "histories.txt", "--candidates", tmp_path / "candidates.txt", "-q"
    )
    assert "ignored 1 item in the candidates that the catalogue does not know, such as 'nobody'" in err.splitlines()
    assert "Warning" not in err


def test_export_loads_with_torch_alone(run, trained, interactions, tmp_path):
    run("export", trained / "run", "-o", tmp_path / "model")
    history = interactions.read_text(encoding="utf-8").split("\n", 1)[0].split()
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('polars', 'lightning', 'rich', 'typer', 'safetensors', 'matplotlib'):\n"
        "            raise ImportError('blocked: ' + name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import cprec\n"
        f"print(cprec.load({str(tmp_path / 'model')!r}).recommend([{history!r}], k=4))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    here = cprec.load(tmp_path / "model")
    assert result.stdout.strip() == str(here.recommend([history], k=4))


def test_train_resumes_and_refuses_to_overwrite(run, trained, tmp_path):
    _, err = run("train", trained / "data", "-o", trained / "run", *TINY, expect=1)
    assert "exists: resume it, overwrite it, or choose another folder" in err
    out, _ = run("train", trained / "data", "-o", trained / "run", *TINY, "--resume")
    assert "best of 2 epochs" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "{data}", "-o", "{new}", "--cutoffs", "0.2,0.05", "-q"], 1, "ascending"),
        (["train", "{data}", "-o", "{new}", "--cutoffs", "0.05", "--ranks", "16,0", "--dim", "16"], 1, "ranks[1] = 0"),
        (["train", "{data}", "-o", "{new}", "--ranks", "16,x,4"], 2, "'x' in '16,x,4' is not a number"),
        (["train", "{data}", "-o", "{new}", "--dilations", "1.5"], 2, "1.5 in '1.5' is not a whole number"),
        (["train", "{data}", "-o", "{new}", "--dropout", "1.5"], 1, "dropout = 1.5 is outside"),
        (["train", "{data}", "-o", "{new}", "--lr", "0"], 1, "learning_rate must be above 0"),
        (["train", "{raw}", "-o", "{new}"], 1, "{raw}"),
        (["train", "{data}", "-o", "{new}", "--sharing", "some"], 2, "some"),
        (["evaluate", "{data}"], 1, "{data}"),
        (["evaluate", "{run}", "--topn", "0"], 1, "at least 1"),
        (["recommend", "{run}", "{new}"], 1, "no such file of histories"),
        (["recommend", "{run}", "{new}", "-o", "{raw}.csv"], 1, "cprec: {new}: no such file of histories"),
        (["recommend", "{run}", "{raw}", "-o", "{new}/top.csv"], 1, "no such directory"),
        (["recommend", "{run}", "{raw}", "-o", "top.xlsx"], 1, "cannot tell the output format"),
        (["recommend", "{run}", "{raw}", "-k", "0"], 1, "k must be at least 1"),
        (["export", "{data}", "-o", "{new}"], 1, "{data}"),
        (["prepare", "-o", "{new}"], 2, "give either a file or --dataset NAME"),
        (["prepare", "{raw}"], 2, "name the folder to write"),
        (["prepare", "{raw}", "-o", "{new}", "--format", "xml"], 1, "format must be one of"),
        (["prepare", "{raw}", "-o", "{new}", "--split", "time"], 1, "a split by time needs timestamps"),
        (["prepare", "{raw}", "-o", "{data}"], 1, "{data}"),
        (["prepare", "--dataset", "netflix", "-o", "{new}"], 1, "unknown data set 'netflix'"),
        (["info", "{raw}"], 1, "{raw}"),
        (["info", "{data}", "--json", "{new}/x.json"], 1, "no such directory to write x.json in"),
        (["info", "{data}", "--cutoffs", "300"], 1, "--cutoffs none for one cluster"),
        (["evaluate", "{run}", "--json", "{new}/x.json"], 1, "no such directory to write x.json in"),
        (["evaluate", "{run}", "--batch-size", "0"], 1, "batch_size"),
        (["evaluate", "{run}", "--device", "warp"], 1, "--device warp cannot be used here"),
        (["train", "{data}", "-o", "{new}", "--devices", "²"], 1, "²"),
        (["evaluate", "{run}", "--json", "{run}"], 1, "{run} is a directory: name a file to write"),
        (["info", "{data}", "--twin", "--cutoffs", "5", "--ranks", "8,4"], 1, "leave out --cutoffs and --ranks"),
        (["train", "{data}", "-o", "{new}", "--length", "9" * 13], 1, "Unable to allocate"),
        (["train", "{data}", "-o", "{new}", "--length", "9" * 30], 1, "too large"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence_and_writes_nothing(run, trained, interactions, tmp_path, arguments, code, message):
    places = {"data": trained / "data", "run": trained / "run", "raw": interactions, "new": tmp_path / "new"}
    before = sorted(path.name for path in tmp_path.iterdir())
    _, err = run(*(argument.format(**places) for argument in arguments), expect=code)
    flat = " ".join(err.replace("│", " ").split())
    wanted = message.format(**places)
    assert wanted in flat or wanted in err.replace("\n", "")
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_demo_compares_the_twin_and_the_compressed_model(run, tmp_path):
    out, _ = run("demo", "--out", tmp_path / "demo", "--items", 400, "--users", 150, "--epochs", 1, "-q")
    for word in ("twin", "compressed", "popularity", "compression", "NDCG@10", "seconds per epoch", "user 1: ..."):
        assert word in out
    figures = json.loads((tmp_path / "demo" / "comparison.json").read_text(encoding="utf-8"))
    twin, compressed = figures["models"]
    assert twin["parameters"] > compressed["parameters"]
    assert (tmp_path / "demo" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for name in ("data", "twin", "compressed"):
        assert (tmp_path / "demo" / name).is_dir()
    _, err = run("demo", "--out", tmp_path / "demo", "-q", expect=1)
    assert "pass --overwrite to run it again" in err


def test_demo_leaves_foreign_folders_alone(run, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious", encoding="utf-8")
    _, err = run("demo", "--out", tmp_path, "--overwrite", expect=1)
    assert "holds thesis.tex, which is not of a demo" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_random_state_of_torch_survives_a_command(run, trained):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    run("info", trained / "run")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("items", [10, 11])
def test_what_prepare_says_comes_next_suits_the_catalogue(run, tmp_path, items):
    lines = [" ".join(f"i{(user + step) % items}" for step in range(5)) for user in range(20)]
    (tmp_path / "log.txt").write_text("\n".join(lines) + "\n")
    out, _ = run("prepare", tmp_path / "log.txt", "-o", tmp_path / "data", "-q")
    advice = out.splitlines()[-1].removeprefix("next: cprec ").replace("RUN", str(tmp_path / "run"))
    run(*advice.split(), "--epochs", 1, "--dim", 8, "-q")
