"""The measurement of following runs, on little, and tells tremble and lag as they are."""

import numpy as np
import pytest

from training.following import _seed_of, main, tremble_and_lag


def test_tremble_and_lag_are_shares_of_the_size():
    still = np.zeros((24, 5, 2))
    assert tremble_and_lag(still, 100, 0) == pytest.approx((0, 0, 0))
    _, _, lag = tremble_and_lag(still, 100, 1)
    assert 0.01 < lag < 0.03
    trembling = np.random.default_rng(1).normal(0, 1, (24, 5, 2))
    before, after, _ = tremble_and_lag(trembling, 100, 0)
    assert before == pytest.approx(0.014, abs=0.003)
    assert after < before / 2


def test_pictures_may_have_any_ids():
    assert _seed_of(139) == 139
    for image in ("000139", -1):
        assert np.random.default_rng(_seed_of(image)).random() == np.random.default_rng(_seed_of(image)).random()
    assert _seed_of("000139") != _seed_of("000140")


def test_the_command_measures(reference_people, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["following", "--model", "lpn50/1", "--annotations", str(reference_people), "--videos", "1"]
    )
    main()
    told = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in told[2:8]] == [f"after {count} frames" for count in (0, 1, 2, 4, 8, 17)]
    assert [float(line.split("|")[1]) for line in told[-4:]] == [0, 0.25, 1, 3]
