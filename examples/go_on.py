"""A recommender that goes on with later data: items are matched by their raw ids."""

import random
import tempfile
from pathlib import Path

from cprec import checkpoint, warm_start
from cprec.data import PreparedData, prepare
from cprec.model import NextItNetConfig
from cprec.training import TrainingConfig, train


def watched(log: Path, series: int, viewers: int) -> PreparedData:
    """Viewers of some series, eight episodes each."""
    draw = random.Random(viewers)
    starts = [(draw.randrange(series), draw.randrange(20)) for _ in range(viewers)]
    lines = [" ".join(f"s{number}e{first + step}" for step in range(8)) for number, first in starts]
    log.write_text("\n".join(lines) + "\n")
    return prepare(log, log.with_suffix(""), format="sequences")


with tempfile.TemporaryDirectory() as folder:
    run, run2 = Path(folder, "run"), Path(folder, "run2")
    data = watched(Path(folder, "yesterday.txt"), series=20, viewers=2_000)
    config = NextItNetConfig.from_plan(data.num_items, 32, [50, 150], [32, 16, 8], dilations=(1, 4), tie_tails=True)
    first = train(data, config, TrainingConfig(epochs=4, accelerator="cpu"), run, progress=False)

    data = watched(Path(folder, "today.txt"), series=22, viewers=2_500)  # two new series, other counts
    config = warm_start.grown(checkpoint.read_config(run)[0], data.num_items)
    second = train(data, config, TrainingConfig(epochs=1, accelerator="cpu", start_from=str(run)), run2, progress=False)

print(f"loss of the first epoch: {first.history[0].train_loss:.2f} anew, {second.history[0].train_loss:.2f} going on")
