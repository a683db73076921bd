"""A run whose data lose their weights on the way stops by itself, whatever the normalization."""

from tests.helpers.forked import run
from tests.helpers.tiny import config_file, write_data

RUN = """
import sys
from exact_megatron.dataset import ExactGPTDataset
from exact_megatron.training.config import load_config
from exact_megatron.utils.ranks import be_single_rank
from exact_megatron.training.trainer import Trainer, shutdown

be_single_rank()
weighted = ExactGPTDataset._weighted
for folder, normalization in zip(sys.argv[2:], ("corpus", "none")):
    run = load_config([sys.argv[1]], [f"exp_manager.exp_dir={folder}", f"model.exact.normalization={normalization}"])
    trainer = Trainer(run, progress=False)
    drawn = 0

    def loses_its_weights(dataset, mask, *segments):
        global drawn
        drawn += dataset is trainer.train_data
        return mask if dataset is trainer.train_data and drawn > 24 else weighted(dataset, mask, *segments)

    ExactGPTDataset._weighted = loses_its_weights
    try:
        print(normalization, trainer.fit())
    except RuntimeError as error:
        print(normalization, trainer.step, error)
    shutdown()
"""


def test_a_run_whose_data_lose_their_weights_midway_stops(tmp_path):
    config = config_file(tmp_path, write_data(tmp_path))
    config.write_text(config.read_text().replace("max_steps: 4", "max_steps: 40, limit_val_batches: 0"))
    done = run(["-c", RUN, str(config), str(tmp_path / "corpus"), str(tmp_path / "none")])
    assert done.returncode == 0, done.stderr[-3000:]
    corpus, none = done.stdout.strip().splitlines()[-2:]
    assert corpus.startswith("corpus 3 ") and "carries the weight 1, which is not in the weight table" in corpus
    assert none.startswith("none ") and "no weight of the tail in the last" in none, none
    assert 3 < int(none.split()[1]) < 20
