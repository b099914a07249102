"""The generator: what it promises on popularity, order and reproducibility."""

import numpy as np
import pytest

from cprec.data import (
    DataError,
    PreparedData,
    detect_format,
    generate,
    prepare,
    prepare_synthetic,
    synthetic,
    write_interactions,
)


def test_same_seed_same_sequences(tmp_path, monkeypatch):
    first = list(generate(50, 64, seed=3))
    monkeypatch.setattr(synthetic, "_CHUNK", 64)  # several parts, and a last one that is not full
    made = generate(50, 400, seed=3)
    assert len(made) == 400
    assert (made.lengths >= 3).all()
    # The first part has a stream of its own; lengths, which are drawn before, come first.
    assert all(np.array_equal(a, b) for a, b in zip(first, list(made)[:64], strict=True))
    path = write_interactions(tmp_path / "made.txt", made)
    lines = [np.array(line.split(), dtype=np.int32) for line in path.read_text().splitlines()]
    assert all(np.array_equal(a, b) for a, b in zip(lines, made, strict=True))
    assert np.array_equal(made.items, generate(50, 400, seed=3).items)
    assert not np.array_equal(made.items[:500], generate(50, 400, seed=4).items[:500])
    assert made.items.dtype == np.int32
    assert made.items.min() >= 0
    assert made.items.max() < 50


def test_popularity_is_zipf_and_ids_say_nothing_about_it():
    made = generate(200, 20_000, zipf=1.0, mean_length=20, seed=1)
    shares = np.bincount(made.items, minlength=200) / made.num_interactions
    expected = 1 / np.arange(1, 201)
    expected /= expected.sum()
    assert np.abs(np.sort(shares)[::-1] - expected).max() < 0.005
    ranks = np.argsort(np.argsort(-shares))
    assert abs(np.corrcoef(ranks, np.arange(200))[0, 1]) < 0.3
    flat = np.bincount(generate(200, 5_000, zipf=0.0).items, minlength=200)
    assert flat.max() < 2 * flat.min()


def test_lengths():
    made = generate(100, 20_000, mean_length=12, min_length=4)
    assert made.lengths.min() == 4
    assert abs(made.lengths.mean() - 12) < 0.3
    assert (generate(100, 50, mean_length=5, min_length=5).lengths == 5).all()


def test_the_order_can_be_learned():
    """Counting what follows what, on half of the sequences, foretells the rest far better than popularity does."""
    num_items = 300
    made = generate(num_items, 6_000, zipf=0.8, seed=2)
    after = np.zeros((num_items, num_items))
    hits = {"after": 0, "popular": 0}
    for row in list(made)[:3_000]:
        np.add.at(after, (row[:-1], row[1:]), 1)
    popular = np.argsort(-after.sum(0))[:10]
    best = np.argsort(-after, axis=1)[:, :10]
    rest = list(made)[3_000:]
    for row in rest:
        hits["after"] += row[-1] in best[row[-2]]
        hits["popular"] += row[-1] in popular
    assert hits["after"] > 0.5 * len(rest)
    assert hits["after"] > 1.8 * hits["popular"]


def test_a_large_catalogue_needs_no_table():
    made = generate(1_000_000, 1_000)
    assert made.items.max() > 500_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_items": 0}, "num_items must be at least 1"),
        ({"num_sequences": 0}, "num_sequences must be at least 1"),
        ({"mean_length": 2.0}, "mean_length must be at least min_length"),
        ({"zipf": -1.0}, "zipf >= 0"),
        ({"restart": 1.5}, r"restart in 0\.\.1"),
        ({"num_items": 2**31}, "below"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(**({"num_items": 5, "num_sequences": 5} | arguments))


def test_written_text_is_read_back(tmp_path):
    made = generate(40, 70, seed=5)
    path = write_interactions(tmp_path / "log.txt", made)
    assert path.read_text() == "".join(" ".join(map(str, row)) + "\n" for row in made)
    assert detect_format(path) == "sequences"
    data = prepare(path, tmp_path / "out")
    assert [data.catalogue.decode(row) for row in data.sequences] == [[str(item) for item in row] for row in made]
    with pytest.raises(DataError, match="exists already"):
        write_interactions(path, made)
    write_interactions(path, generate(40, 70, seed=6), overwrite=True)
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["log.txt", "out"]


def test_straight_to_a_prepared_folder(tmp_path):
    made = generate(90, 60, seed=7)
    data = prepare_synthetic(tmp_path / "direct", 90, 60, seed=7)
    text = prepare(write_interactions(tmp_path / "log.txt", made), tmp_path / "text")
    assert data.num_items == 90
    known = text.num_items
    assert data.counts[:known].tolist() == text.counts.tolist()
    assert data.counts[known:].sum() == 0
    assert data.catalogue.raw_ids[:known].to_list() == text.catalogue.raw_ids.to_list()
    assert sorted(map(int, data.catalogue.raw_ids)) == list(range(90))
    assert np.array_equal(data.sequences.items, text.sequences.items)
    assert PreparedData.open(tmp_path / "direct").meta["source"]["generator"]["drift"] == 0.381966
    with pytest.raises(DataError, match="exists already"):
        prepare_synthetic(tmp_path / "direct", 90, 60)
    with pytest.raises(DataError, match="was not prepared from a file"):
        data.check_source(tmp_path / "log.txt")
    with pytest.raises(DataError, match="needs timestamps"):
        prepare_synthetic(tmp_path / "other", 90, 60, split="time")
