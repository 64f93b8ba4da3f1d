"""`bench.saves`: the parts of a save are all of it, and nothing is left behind."""

import pytest

from bench.saves import Saves, study


def test_the_parts_of_a_save_are_all_of_it(tmp_path, capsys):
    rows = study(Saves(model="ViT-Nano/4", folder=tmp_path, saves=2))
    assert len(rows) == 2
    for row in rows:
        assert all(seconds > 0 for seconds in row.values())
        assert sum(seconds for part, seconds in row.items() if part != "whole") == pytest.approx(row["whole"])
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out.count("save ") == 2
