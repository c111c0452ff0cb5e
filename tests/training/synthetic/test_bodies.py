"""Bodies: poses move what hangs on a joint, clothes fit, limbs do not go through the trunk."""

import numpy as np
import pytest
import torch

from training.keypoints import MIRROR
from training.synthetic.body import entangled, girths, mirrored, pose, sketch, turned, wear
from training.synthetic.garments import HAIR, SHOES, SUIT
from training.synthetic.outfits import MATERIALS, OF_HAIR, OF_SKIN, random_outfit
from training.synthetic.people import Regions, dressed

HALF = np.sqrt(0.5)


def still(assets) -> torch.Tensor:
    return torch.tensor(assets.poses.q[[0]])


def test_the_rest_pose_leaves_the_body_as_it_is_and_shapes_move_it(assets):
    posed = pose(assets.body, torch.tensor([[0.0, 0.0], [0.1, 0.0]]), still(assets).repeat(2, 1, 1))
    torch.testing.assert_close(posed.vertices[0], assets.body.mean, atol=1e-4, rtol=0)
    assert posed.heights.tolist() == pytest.approx([1.75, 1.1 * 1.75], abs=0.01)


def test_a_turned_limb_moves_what_hangs_on_it_and_nothing_else(assets):
    q = still(assets)
    q[0, 16] = torch.tensor([HALF, 0, 0, HALF])  # the left arm by 90° about Z: upwards
    moved = pose(assets.body, torch.zeros(1, 2), q).keypoints[0] - (assets.body.keypoints @ assets.body.mean.double()).float()
    left_arm = [5, 7, 9]
    assert (moved[left_arm, 1] > 0.2).all()
    assert moved[[joint for joint in range(17) if joint not in left_arm]].abs().max() < 1e-3


def test_yaw_turns_the_person_round(assets):
    there = pose(assets.body, torch.zeros(1, 2), turned(still(assets), torch.tensor([np.pi], dtype=torch.float32)))
    here = pose(assets.body, torch.zeros(1, 2), still(assets))
    torch.testing.assert_close(there.keypoints[..., 0], -here.keypoints[..., 0], atol=1e-3, rtol=0)


def test_a_mirrored_pose_has_mirrored_keypoints(assets):
    q = still(assets)
    q[0, 16] = torch.tensor([HALF, 0, 0, HALF])
    q[0, 1] = torch.tensor([HALF, HALF, 0, 0])
    ours, theirs = (pose(assets.body, torch.zeros(1, 2), each).keypoints[0] for each in (q, mirrored(q)))
    torch.testing.assert_close(theirs, ours[MIRROR] * torch.tensor([-1.0, 1, 1]), atol=1e-3, rtol=0)


def test_a_sketched_body_has_the_same_keypoints_and_ends(assets):
    q = still(assets)
    whole, few = (pose(body, torch.zeros(1, 2), q) for body in (assets.body, sketch(assets.body)))
    torch.testing.assert_close(few.keypoints, whole.keypoints)
    torch.testing.assert_close(few.heights, whole.heights)


def test_limbs_that_sink_into_the_trunk_are_noticed_sooner_on_a_thick_one(assets):
    standing = torch.tensor([[0, 1.6, 0]] * 5 + [[x, y, 0] for y in (1.4, 1.2, 1.0, 0.9, 0.5, 0.1) for x in (0.2, -0.2)])
    through, close = standing.clone(), standing.clone()
    through[9] = torch.tensor([-0.2, 1.1, 0.0])  # the left wrist on the right side, straight through
    close[7], close[9] = torch.tensor([0.2, 1.2, 0.09]), torch.tensor([-0.2, 1.15, 0.09])  # before the belly
    people, tall = torch.stack([standing, through, close, close]).float(), torch.full((4,), 1.7)
    assert entangled(people, tall, torch.tensor([0.1, 0.1, 0.1, 0.2])).tolist() == [False, True, False, True]
    posed = pose(assets.body, torch.tensor([[0.0, 0], [0.5, 0]]), still(assets).repeat(2, 1, 1))
    assert girths(assets.body, posed).tolist() == pytest.approx([0.1, 0.15], abs=0.01)


def test_garments_fit_the_body_and_follow_its_shape(assets):
    suit = next(each for each in assets.garments if each.kind == SUIT)
    posed = pose(assets.body, torch.tensor([[0.0, 0.0], [0.5, 0.0]]), still(assets).repeat(2, 1, 1))
    _, points = wear(suit, posed, torch.tensor([0, 1]))
    sides = (points.amax(1) - points.amin(1)).tolist()
    trunk = np.array([0.4, 0.55, 0.2])
    assert sides[0] == pytest.approx(trunk + 0.04, abs=2e-3)
    assert sides[1] == pytest.approx(1.5 * (trunk + 0.04), abs=3e-3)
    assert suit.hidden.nonzero().flatten().tolist() == list(range(8))
    assert [each.kind for each in assets.garments].count(HAIR) == [each.kind for each in assets.garments].count(SHOES) == 1


def test_nobody_is_nude_and_nobody_is_bald(assets):
    q, regions = still(assets), Regions.of(assets.body)
    posed = pose(assets.body, torch.zeros(1, 2), q)
    nowhere, first = torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64)
    for seed in range(40):
        outfit = random_outfit(assets.garments, seed % 2 == 0, np.random.default_rng(seed))
        mesh = dressed(assets, regions, posed, [outfit], nowhere, first)
        middle = mesh.points[mesh.triangles].mean(1)
        trunk = (middle[:, 0].abs() < 0.15) & (middle[:, 1] > 0.95) & (middle[:, 1] < 1.25)
        assert trunk.any()
        assert (mesh.material[trunk] % MATERIALS != OF_SKIN).all()
        crown = (middle[:, 1] > 1.74) & (mesh.owner == 0)
        assert OF_HAIR in (mesh.material[crown] % MATERIALS).tolist()
