"""What training gives: the row that was kept, plain data, a table."""

from __future__ import annotations

import json

import pytest
from torch import nn

from torchslice.errors import TorchsliceError
from torchslice.training import Outcome

LOG = (
    {"step": "before", "validation_accuracy": 0.5, "seconds": 0.0},
    {"step": "cut", "validation_accuracy": 0.25, "seconds": 1.26, "loss": 0.123456, "epoch": 1},
)


def test_the_row_that_was_kept_and_rows_by_their_step():
    outcome = Outcome(nn.Identity(), LOG, kept=1)
    assert outcome.best is LOG[1] and outcome["before"] is LOG[0]
    with pytest.raises(TorchsliceError, match="unknown step 'cutt'. Did you mean 'cut'"):
        outcome["cutt"]


def test_plain_data_is_all_but_the_network():
    outcome = Outcome(nn.Identity(), LOG, 0, {"method": "lamp"})
    assert json.loads(json.dumps(outcome.to_plain())) == {"log": list(LOG), "kept": 0, "method": "lamp"}


def test_it_prints_as_a_table_with_a_star():
    text = str(Outcome(nn.Identity(), LOG, 1, {"method": "lamp", "param_retention": 0.5})).splitlines()
    assert text[0].split() == ["step", "validation", "accuracy", "seconds", "loss", "epoch"]
    assert text[2].split() == ["before", "50.0%", "0.0", "-", "-"]
    assert text[3].split() == ["cut", "*", "25.0%", "1.3", "0.1235", "1"]
    assert text[4] == "* kept; method: lamp; param retention: 50.0%"
    assert "Identity" not in repr(Outcome(nn.Identity(), LOG, 1))
