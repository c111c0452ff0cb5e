"""The mean of trained weights."""

import pytest
import torch

from training import mean
from training.lpn import LPN


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["mean", *map(str, arguments)])
    mean.main()


def weights(file, value, depth=50):
    content = LPN(depth).state_dict()
    for key, tensor in content.items():
        content[key] = torch.full_like(tensor, value)
    torch.save(
        {key: tensor.half() if value == 3 and tensor.is_floating_point() else tensor for key, tensor in content.items()}, file
    )
    return file


def test_the_mean_is_of_all_floats_whatever_their_precision(tmp_path, monkeypatch):
    files = [weights(tmp_path / f"{value}.pth", value) for value in (1, 3, 8)]
    run(monkeypatch, *files, "--out", tmp_path / "mean.pth")
    for tensor in torch.load(tmp_path / "mean.pth", weights_only=True).values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, 4 if tensor.is_floating_point() else 1))


def test_weights_of_two_depths_have_none(tmp_path, monkeypatch):
    files = [weights(tmp_path / "a.pth", 1), weights(tmp_path / "b.pth", 1, 101)]
    with pytest.raises(
        SystemExit, match=r"b\.pth is of another network than .*a\.pth: \d+ tensors differ, [a-z0-9_.]+ is one"
    ):
        run(monkeypatch, *files, "--out", tmp_path / "mean.pth")
    assert not (tmp_path / "mean.pth").exists()


def test_a_file_counts_as_often_as_it_is_given_and_any_network_has_a_mean(tmp_path, monkeypatch):
    for name, value in (("a", 0.0), ("b", 3.0)):
        torch.save({"weight": torch.full((2,), value)}, tmp_path / f"{name}.pth")
    files = [tmp_path / f"{name}.pth" for name in "bba"]
    run(monkeypatch, *files, "--out", tmp_path / "mean.pth")
    assert torch.load(tmp_path / "mean.pth", weights_only=True)["weight"].tolist() == [2, 2]


def test_a_file_without_weights_is_named(tmp_path, monkeypatch):
    torch.save(5, tmp_path / "five.pth")
    with pytest.raises(SystemExit, match=r"five\.pth holds no weights: it is no table of named tensors"):
        run(monkeypatch, tmp_path / "five.pth", "--out", tmp_path / "mean.pth")
