"""Which folders the demo takes for its own."""

import json

import pytest

from cprec.data import prepare_synthetic
from cprec.demo import MARKER, _claim


def prepared(folder, name="synthetic"):
    prepare_synthetic(folder, 30, 20, name=name)
    return (folder / "meta.json").read_bytes()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["mine", "synthetic"])
def test_data_that_no_demo_made_is_never_taken(tmp_path, overwrite, name):
    before = prepared(tmp_path / "data", name)
    with pytest.raises(FileExistsError, match=r"holds data but no \.cprec-demo.*choose another"):
        _claim(tmp_path, overwrite)
    assert (tmp_path / "data" / "meta.json").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_data_put_into_a_demo_is_not_taken_either(tmp_path, overwrite):
    _claim(tmp_path / "demo", False)
    prepared(tmp_path / "demo" / "data", "mine")
    with pytest.raises(FileExistsError, match="data holds the prepared data 'mine'"):
        _claim(tmp_path / "demo", overwrite)


def test_a_demo_that_was_stopped_starts_again_and_a_finished_one_when_asked(tmp_path):
    out = tmp_path / "demo"
    _claim(out, True)
    assert (out / MARKER).is_file()
    prepared(out / "data")
    (out / ".data.0123abcd.tmp").mkdir()  # of a kill while the data was written
    _claim(out, False)
    assert sorted(entry.name for entry in out.iterdir()) == [MARKER, "data"]
    (out / "comparison.json").write_text(json.dumps({}))
    with pytest.raises(FileExistsError, match="pass --overwrite to run it again"):
        _claim(out, False)
    _claim(out, True)


@pytest.mark.parametrize("name", ["thesis.tex", ".env", ".data.bak"])
def test_files_of_others_stop_it(tmp_path, name):
    _claim(tmp_path, False)
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError, match=f"holds {name}, which is not of a demo"):
        _claim(tmp_path, True)
    assert (tmp_path / name).read_text() == "precious"


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "demo").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        _claim(tmp_path / "demo", True)
