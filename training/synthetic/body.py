"""Shapes and joint rotations → posed bodies with their keypoints, and whatever they wear; linear blend skinning.

The formulas are those of the body's own documentation: bones follow one or two joints of the pose skeleton, and a limb's
twist is spread along it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.synthetic.assets import Body
from training.synthetic.garments import Garment, fitted

_LEFT_AND_RIGHT = ((1, 2), (4, 5), (7, 8), (10, 11), (13, 14), (16, 17), (18, 19), (20, 21))  # joints of the pose skeleton
LIMBS = ((13, 16, 18, 20), (14, 17, 19, 21), (1, 4, 7, 10), (2, 5, 8, 11), (12, 15))  # arms, legs, neck and head
_MIRROR = list(range(22))
for _left, _right in _LEFT_AND_RIGHT:
    _MIRROR[_left], _MIRROR[_right] = _right, _left
_KEPT_APART = 0.055  # metres between limbs' axes for a person of 1.7 m
_TRUNK = 0.6  # of half the trunk's depth: how near the axis of a limb may come to the trunk's


@dataclass(frozen=True, slots=True)
class Posed:
    """N bodies, in metres: rest and posed vertices [N, V, 3], the vertices' transforms [N, V, 3, 4], keypoints [N, 17, 3]."""

    rest: Tensor
    vertices: Tensor
    transforms: Tensor
    keypoints: Tensor
    heights: Tensor  # [N] of the rest bodies


def pose(body: Body, shapes: Tensor, q: Tensor, curl: Tensor | None = None) -> Posed:
    """Shape coefficients [N, K] and joint rotations q [N, 22, 4] → bodies about the pose's own origin.

    The captured hands are open; curl [N, 2] in radians bends each joint of the left and right fingers.
    """
    rest = body.mean + torch.einsum("nk,kvc->nvc", shapes, body.basis)
    heads = body.bone_mean + torch.einsum("nk,kbc->nbc", shapes, body.bone_basis)
    rotations = _bone_rotations(body, q)
    if curl is not None:
        rotations = rotations @ _matrices(_about((curl[:, :, None, None] * body.curl_axis).sum(1)))
    places = [heads[:, 0]]
    for bone, parent in enumerate(body.bone_parent):
        if parent >= 0:
            step = (heads[:, bone] - heads[:, parent])[:, :, None]
            places.append(places[parent] + (rotations[:, parent] @ step)[:, :, 0])
    shift = torch.stack(places, 1)[..., None] - rotations @ heads[..., None]
    bones = torch.cat([rotations, shift], 3)  # [N, B, 3, 4]
    transforms = (body.skin @ bones.flatten(2).double()).float().reshape(len(rest), -1, 3, 4)
    vertices = _moved(transforms, rest)
    tall = rest[:, body.surface, 1]
    return Posed(rest, vertices, transforms, (body.keypoints @ vertices.double()).float(), tall.amax(1) - tall.amin(1))


def sketch(body: Body, every: int = 8) -> Body:
    """The same body with few vertices: all that keypoints are means of, the ends of the head and feet, some others."""
    ends = body.surface[torch.stack([body.mean[body.surface, 1].argmin(), body.mean[body.surface, 1].argmax()])]
    kept = torch.unique(torch.cat([torch.nonzero(body.keypoints.any(0))[:, 0], ends, body.surface[::every]]))
    return replace(
        body,
        mean=body.mean[kept],
        basis=body.basis[:, kept],
        skin=body.skin[kept],
        keypoints=body.keypoints[:, kept],
        surface=torch.arange(len(kept)),
        triangles=body.triangles[:0],
    )


def wear(garment: Garment, posed: Posed, people: Tensor) -> tuple[Tensor, Tensor]:
    """The garment's rest and posed vertices [P, G, 3] on those of the bodies [P]."""
    rest, own = fitted(garment, posed.rest[people]), posed.transforms[people]
    share = garment.weights.clamp(min=0)
    share = share / share.sum(1, keepdim=True).clamp(min=1e-6)
    transforms = sum(share[:, corner, None, None] * own[:, garment.vertices[:, corner]] for corner in range(3))
    return rest, _moved(torch.as_tensor(transforms), rest)


def mirrored(q: Tensor) -> Tensor:
    """Rotations q [N, 22, 4] of the same poses seen in a mirror."""
    return q[:, _MIRROR] * q.new_tensor([1.0, 1.0, -1.0, -1.0])


def turned(q: Tensor, yaw: Tensor) -> Tensor:
    """Rotations q [N, 22, 4] with the whole person turned about the vertical by yaw [N] in radians."""
    turn = torch.stack([torch.cos(yaw / 2), 0 * yaw, torch.sin(yaw / 2), 0 * yaw], 1)
    return torch.cat([product(turn, q[:, 0])[:, None], q[:, 1:]], 1)


def girths(body: Body, posed: Posed) -> Tensor:
    """Half the depth of the trunks [N] in metres, from front to back, of bodies at rest."""
    joints = body.keypoints @ body.mean.double()
    hips, shoulders = joints[11:13].mean(0), joints[5:7].mean(0)
    x, y, _ = body.mean.unbind(1)
    trunk = (x.abs() < 0.6 * joints[5, 0]) & (y > hips[1]) & (y < shoulders[1])
    depths = posed.rest[:, trunk, 2]
    return (depths.amax(1) - depths.amin(1)) / 2


def entangled(keypoints: Tensor, heights: Tensor, girth: Tensor) -> Tensor:
    """Whether a limb [N] sinks deeply into trunk or limbs; keypoints [N, 17, 3], heights and girths [N] in metres."""
    trunk = (keypoints[:, 11:13].mean(1), keypoints[:, 5:7].mean(1))
    limbs = {name: (keypoints[:, a], keypoints[:, b]) for name, a, b in _LIMBS}
    found = torch.zeros(len(keypoints), dtype=torch.bool, device=keypoints.device)
    for name in ("left forearm", "right forearm", "left shin", "right shin"):
        found |= _gap(limbs[name], trunk) < _TRUNK * girth
    for first, second in _CROSSINGS:
        found |= _gap(limbs[first], limbs[second]) < _KEPT_APART * heights / 1.7
    return found


_LIMBS = (
    ("left forearm", 7, 9),
    ("right forearm", 8, 10),
    ("left thigh", 11, 13),
    ("right thigh", 12, 14),
    ("left shin", 13, 15),
    ("right shin", 14, 16),
)
_CROSSINGS = (
    ("left shin", "right shin"),
    ("left forearm", "left thigh"),
    ("left forearm", "right thigh"),
    ("right forearm", "left thigh"),
    ("right forearm", "right thigh"),
)


def _gap(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """The least distance [N] of ten points of each segment."""
    steps = torch.linspace(0, 1, 10, device=first[0].device)[:, None]
    a, b = (start[:, None] + steps * (end - start)[:, None] for start, end in (first, second))
    return torch.cdist(a, b).flatten(1).amin(1)


def _moved(transforms: Tensor, points: Tensor) -> Tensor:
    return (transforms[..., :3] * points[..., None, :]).sum(-1) + transforms[..., 3]


def _bone_rotations(body: Body, q: Tensor) -> Tensor:
    """Joint rotations q [N, 22, 4] → rotations of the bones from rest to pose [N, B, 3, 3]."""
    in_world: list[Tensor] = []
    for number, parent in enumerate(body.joint_parent):
        in_world.append(q[:, number] if parent < 0 else product(in_world[parent], q[:, number]))
    joints = torch.stack(in_world, 1)
    aligned = product(joints, body.rest_align)
    first, second = aligned[:, body.bone_joints[:, 0]], aligned[:, body.bone_joints[:, 1]]
    second = torch.where((first * second).sum(2, keepdim=True) < 0, -second, second)
    mix = body.bone_mix[:, None]
    bones = torch.nn.functional.normalize((1 - mix) * first + mix * second, dim=2)
    # The twist of a joint about its limb, half of whose angle is `half`.
    twisted = body.twist_joint >= 0
    joint, driver = body.twist_joint[twisted], body.bone_joints[twisted, 0]
    axis = body.twist_axis[joint]
    half = torch.atan2((q[:, joint, 1:] * axis).sum(2), q[:, joint, 0])
    half = (torch.remainder(half + torch.pi / 2, torch.pi) - torch.pi / 2) * body.twist_gain[twisted]
    twist = torch.cat([torch.cos(half)[..., None], torch.sin(half)[..., None] * axis], 2)
    bones[:, twisted] = product(product(joints[:, driver], twist), body.rest_align[driver])
    return _matrices(bones)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Quaternions [..., 4] (w, x, y, z): first b, then a."""
    w1, x1, y1, z1 = a.unbind(-1)
    w2, x2, y2, z2 = b.unbind(-1)
    return torch.stack(
        [
            w1 * w2 - x1 * x2 - y1 * y2 - z1 * z2,
            w1 * x2 + x1 * w2 + y1 * z2 - z1 * y2,
            w1 * y2 - x1 * z2 + y1 * w2 + z1 * x2,
            w1 * z2 + x1 * y2 - y1 * x2 + z1 * w2,
        ],
        -1,
    )


def _about(turns: Tensor) -> Tensor:
    """Axes times angles in radians [..., 3] → unit quaternions [..., 4]."""
    angle = torch.linalg.vector_norm(turns, dim=-1, keepdim=True)
    return torch.cat([torch.cos(angle / 2), turns * torch.sinc(angle / (2 * torch.pi)) / 2], -1)


def _matrices(q: Tensor) -> Tensor:
    """Unit quaternions [..., 4] → rotation matrices [..., 3, 3]."""
    w, x, y, z = q.unbind(-1)
    return torch.stack(
        [
            1 - 2 * (y * y + z * z),
            2 * (x * y - w * z),
            2 * (x * z + w * y),
            2 * (x * y + w * z),
            1 - 2 * (x * x + z * z),
            2 * (y * z - w * x),
            2 * (x * z - w * y),
            2 * (y * z + w * x),
            1 - 2 * (x * x + y * y),
        ],
        -1,
    ).reshape(*q.shape[:-1], 3, 3)
