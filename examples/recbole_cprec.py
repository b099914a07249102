"""RecBole trains and evaluates CpRec: generated interactions, a few epochs, metrics, recommendations."""

import contextlib
import random
import tempfile
from pathlib import Path

import numpy as np
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.trainer import Trainer
from recbole.utils import init_seed

from cprec.integrations.recbole import CpRec

# RecBole 1.2.1 looks up three names that numpy 2.0 took away; with numpy 1.26 this line is not needed.
np.float_, np.complex_, np.unicode_ = np.float64, np.complex128, np.str_

SETTINGS = {
    "data_path": ".",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "MAX_ITEM_LIST_LENGTH": 20,
    "embedding_size": 32,
    "cutoffs": [0.1, 0.3],
    "ranks": [32, 8, 4],
    "sharing": "adjacent-block",
    "train_neg_sample_args": None,  # the loss is over the whole catalogue
    "learning_rate": 0.003,
    "train_batch_size": 256,
    "epochs": 3,
    "metrics": ["Hit", "NDCG"],
    "topk": [10],
    "valid_metric": "NDCG@10",
}


def write_interactions(path: Path) -> None:
    """300 users who go through 200 items in cycles, popular ones more often."""
    generator = random.Random(0)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(300):
        item = min(int(generator.paretovariate(0.7)), 200)
        for time in range(generator.randint(6, 15)):
            lines.append(f"u{user}\ti{item}\t{time}")
            item = item % 200 + 1 if generator.random() < 0.8 else min(int(generator.paretovariate(0.7)), 200)
    path.parent.mkdir()
    path.write_text("\n".join(lines))


# RecBole writes its logs and checkpoints where it runs.
with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    write_interactions(Path("cycles/cycles.inter"))
    config = Config(model=CpRec, dataset="cycles", config_dict=SETTINGS)
    init_seed(config["seed"], config["reproducibility"])
    train_data, valid_data, test_data = data_preparation(config, create_dataset(config))

    model = CpRec(config, train_data._dataset).to(config["device"])
    trainer = Trainer(config, model)
    # RecBole 1.2.1 cannot read its own checkpoints under torch 2.6 or newer: there is no best model to go back to.
    trainer.fit(train_data, valid_data, saved=False)
    metrics = trainer.evaluate(test_data, load_best_model=False)
    print({name: float(value) for name, value in metrics.items()})

    batch = next(iter(test_data))[0].to(config["device"])
    scores, ids = model.topk(batch, k=5, exclude=batch[model.ITEM_SEQ])
    print(test_data._dataset.id2token(model.ITEM_ID, ids[0].cpu()).tolist())
