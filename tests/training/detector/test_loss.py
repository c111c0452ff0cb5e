"""Which cells answer for whom, and that the loss can be learned from."""

import pytest
import torch

from training.detector.loss import assign, detection_loss, giou, pairwise_iou
from training.detector.network import PersonDetector, cells, decode, normalised

CENTRES, STRIDES = cells(64, 64)
UNTRAINED = decode(torch.full((1, len(CENTRES), 4), 0.7), CENTRES, STRIDES)[0]  # four strides wide
LOGITS = torch.full((len(CENTRES),), -4.6)
NOBODY = torch.zeros(0, 4)


def test_overlaps_are_those_of_known_boxes():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    others = torch.tensor([[5.0, 0, 15, 10], [20, 0, 30, 10]])
    assert pairwise_iou(boxes, others).flatten().tolist() == pytest.approx([1 / 3, 0, 0, 1])
    assert giou(boxes[:1], others[1:]).item() == pytest.approx(-1 / 3)
    assert giou(boxes, boxes).tolist() == [1, 1]


def test_a_small_person_is_given_to_a_fine_cell_and_a_large_one_to_a_coarse_cell():
    people = torch.tensor([[2.0, 2, 22, 30], [0, 0, 64, 64]])
    person, _ = assign(LOGITS, UNTRAINED, people, CENTRES, STRIDES)
    assert STRIDES[person == 0].max() < STRIDES[person == 1].min()
    for number, box in enumerate(people):
        inside = CENTRES[person == number]
        assert ((inside > box[:2]) & (inside < box[2:])).all()


def test_everyone_has_a_cell_and_its_iou_as_target():
    people = torch.tensor([[0.0, 0, 12, 16], [40, 30, 60, 62]])
    person, quality = assign(LOGITS, UNTRAINED, people, CENTRES, STRIDES)
    assert set(person.tolist()) == {-1, 0, 1}
    answering = person >= 0
    expected = pairwise_iou(UNTRAINED[answering], people)[torch.arange(int(answering.sum())), person[answering]]
    torch.testing.assert_close(quality[answering], expected)
    assert (quality[~answering] == 0).all()


def test_nobody_leaves_all_cells_free():
    person, quality = assign(LOGITS, UNTRAINED, NOBODY, CENTRES, STRIDES)
    assert (person == -1).all()
    assert (quality == 0).all()


def test_an_ignored_area_costs_nothing():
    certain = torch.where((CENTRES < 32).all(1), 5.0, -20.0)[None]
    wrong = detection_loss(certain, UNTRAINED[None], [NOBODY], [NOBODY], CENTRES, STRIDES)
    spared = detection_loss(certain, UNTRAINED[None], [NOBODY], [torch.tensor([[0.0, 0, 32, 32]])], CENTRES, STRIDES)
    assert wrong["score"] > 10
    assert spared["score"] < 1e-3
    assert wrong["box"] == 0


def test_the_loss_goes_down_on_one_picture():
    torch.manual_seed(0)
    model = PersonDetector(16)
    picture = torch.full((1, 64, 64, 3), 110, dtype=torch.uint8)
    picture[:, 10:50, 20:40] = torch.tensor([20, 20, 230], dtype=torch.uint8)
    people = torch.tensor([[20.0, 10, 40, 50]])
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if "backbone" not in name], 3e-3)
    losses = []
    for _ in range(40):
        found = detection_loss(*model(normalised(picture)), [people], [NOBODY], CENTRES, STRIDES)
        loss = found["score"] + found["box"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
