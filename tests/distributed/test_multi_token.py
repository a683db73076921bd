"""Multi-token prediction: every depth's targets and weights, on packed documents and under context parallelism."""

from __future__ import annotations

import pytest

from tests.helpers.ranks import launch
from tests.helpers.tiny import config_file, write_data


@pytest.mark.parametrize("world", [1, 2], ids=["one_rank", "cp2"])
def test_targets_and_weights_of_every_depth_stay_in_their_document(world, tmp_path):
    config = config_file(tmp_path, write_data(tmp_path))
    launch("distributed/run_multi_token.py", [str(config)], world)
