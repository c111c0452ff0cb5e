"""What is in scenes: people in their poses and places, things before and behind them, light and a camera.

Each scene is drawn from a generator of its own, so that it does not depend on the others of its batch. Everything here is
small and on the CPU: bodies are sketched with few vertices, to judge poses, to find the ground and to aim the camera.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.synthetic.assets import Assets, Body
from training.synthetic.body import LIMBS, entangled, girths, mirrored, pose, turned
from training.synthetic.camera import Camera, Light, random_camera, random_light
from training.synthetic.mesh import Thing, box, cylinder
from training.synthetic.outfits import Outfit, cloth, random_outfit

Vector = npt.NDArray[np.float64]

_PEOPLE = (0.4, 0.25, 0.15, 0.1, 0.06, 0.04)  # the shares of scenes with one, two … people
_TRIES = 4  # poses of which the first whose limbs keep apart is taken
# How often each of LIMBS is another pose's, by posture: who sits keeps the legs, who lies all that the floor carries.
_UP, _SITTING, _LYING = (0.15, 0.15, 0.07, 0.07, 0.15), (0.15, 0.15, 0.0, 0.0, 0.15), (0.0, 0.0, 0.0, 0.0, 0.15)
_SWAPPED = (_UP, _UP, _SITTING, _LYING, _UP)


@dataclass(frozen=True, slots=True)
class Cast:
    """N people of a batch: rotations q [N, 22, 4], shapes [N, K], shift [N, 3] to their places, image [N] and outfits."""

    q: Tensor
    shapes: Tensor
    shift: Tensor
    image: Tensor
    outfits: list[Outfit]


@dataclass(frozen=True, slots=True)
class Scenes:
    """A batch of S scenes of one size (height, width) in drawn pixels.

    `things` come with their image; `held` are the outlines [P, 2], in drawn pixels, of what is before each camera, or None.
    """

    size: tuple[int, int]
    cast: Cast
    cameras: list[Camera]
    lights: list[Light]
    things: list[tuple[int, Thing]]
    held: list[npt.NDArray[np.int32] | None]


@dataclass(frozen=True, slots=True)
class _Player:
    """Somebody before the pose is settled: candidates [_TRIES, 22, 4] with what is done to them, and a place (x, y, z)."""

    shape: npt.NDArray[np.float32]
    q: npt.NDArray[np.float32]
    mirrored: npt.NDArray[np.bool_]
    yaw: npt.NDArray[np.float64]
    place: Vector
    outfit: Outfit


def random_scenes(assets: Assets, sketched: Body, size: tuple[int, int], rngs: list[np.random.Generator]) -> Scenes:
    """A scene from each generator; `sketched` is the body with few vertices (body.sketch)."""
    groups = [_players(assets, rng) for rng in rngs]
    image = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    players = [player for group in groups for player in group]
    shapes = torch.tensor(np.array([player.shape for player in players]))
    q = _settled(sketched, players, shapes)
    posed = pose(sketched, shapes, q)
    shift = torch.tensor(np.array([player.place for player in players]), dtype=torch.float32)
    shift[:, 1] -= posed.vertices[..., 1].amin(1)
    joints = (posed.keypoints + shift[:, None]).double().numpy()
    cameras: list[Camera] = []
    lights, things, held = [], [], []
    for number, rng in enumerate(rngs):
        own = joints[image.numpy() == number]
        cameras.append(random_camera(own, size[1], size[0], rng))
        lights.append(random_light(rng))
        near = [own[rng.integers(len(own))].mean(0) for _ in range(rng.poisson(0.7))]
        things += [(number, _thing(place, cameras[-1], rng)) for place in near]
        held.append(_outline(size, rng) if rng.random() < 0.15 else None)
    return Scenes(size, Cast(q, shapes, shift, image, [each.outfit for each in players]), cameras, lights, things, held)


def _players(assets: Assets, rng: np.random.Generator) -> list[_Player]:
    """The people of one scene."""
    body, players = assets.body, []
    count = 1 + int(rng.choice(len(_PEOPLE), p=_PEOPLE))
    places = _places(count, rng)
    for person in range(count):
        who = rng.integers(len(body.shapes))
        towards_camera = rng.random(_TRIES) < 0.5
        yaw = np.where(towards_camera, rng.normal(0, 0.7, _TRIES), rng.uniform(-np.pi, np.pi, _TRIES))
        lift = rng.uniform(0.1, 0.6) if rng.random() < 0.06 else 0.0  # somebody jumps
        players.append(
            _Player(
                shape=body.shapes[who],
                q=np.stack([_mixed_pose(assets, rng) for _ in range(_TRIES)]),
                mirrored=rng.random(_TRIES) < 0.5,
                yaw=yaw,
                place=np.array([places[person, 0], lift, places[person, 1]]),
                outfit=random_outfit(assets.garments, bool(body.female[who] > 0.5), rng),
            )
        )
    return players


def _mixed_pose(assets: Assets, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """A captured pose [22, 4] with, now and then, a limb of another of the same posture.

    Each joint keeps an angle that was captured with people of that posture, and so within what joints allow.
    """
    poses = assets.poses
    number = poses.draw(rng)
    q = np.array(poses.q[number])
    for limb, share in zip(LIMBS, _SWAPPED[poses.posture[number]], strict=True):
        if rng.random() < share:
            alike = poses.alike[poses.posture[number]]
            q[list(limb)] = poses.q[alike[rng.integers(len(alike))]][list(limb)]
    return q


def _settled(sketched: Body, players: list[_Player], shapes: Tensor) -> Tensor:
    """The first pose [N, 22, 4] of each player's candidates whose limbs keep apart, or the last."""
    candidates = torch.tensor(np.array([player.q for player in players])).flatten(0, 1)
    flipped = torch.tensor(np.array([player.mirrored for player in players])).flatten()
    yaw = torch.tensor(np.array([player.yaw for player in players]), dtype=torch.float32).flatten()
    candidates = turned(torch.where(flipped[:, None, None], mirrored(candidates), candidates), yaw)
    candidates = candidates.reshape(len(players), _TRIES, *candidates.shape[1:])
    q, left = candidates[:, 0].clone(), torch.arange(len(players))
    for number in range(1, _TRIES):
        posed = pose(sketched, shapes[left], q[left])
        left = left[entangled(posed.keypoints, posed.heights, girths(sketched, posed))]
        if not len(left):
            break
        q[left] = candidates[left, number]
    return q


def _places(count: int, rng: np.random.Generator) -> Vector:
    """Where people stand [count, 2] (x, z): about the first, some of them close."""
    places = np.zeros((count, 2))
    for person in range(1, count):
        angle, distance = rng.uniform(0, 2 * np.pi), rng.choice([rng.uniform(0.5, 0.9), rng.uniform(0.8, 3.5)])
        places[person] = places[rng.integers(person)] + distance * np.array([np.cos(angle), np.sin(angle)])
    return places


def _thing(near: Vector, camera: Camera, rng: np.random.Generator) -> Thing:
    """A box or a cylinder on the ground or in the air, between the camera and somebody or behind."""
    to_camera = camera.place - near
    centre = near + rng.choice([rng.uniform(0.15, 0.5), -rng.uniform(0.2, 1.0)]) * to_camera
    centre += rng.normal(0, 0.35, 3) * [1, 0.3, 1]
    tall = rng.uniform(0.2, 1.3)
    if rng.random() < 0.7:
        centre[1] = tall / 2
    if rng.random() < 0.5:
        sides = np.array([rng.uniform(0.15, 0.9), tall, rng.uniform(0.15, 0.9)])
        return box(centre, sides, rng.uniform(0, np.pi), cloth(rng))
    return cylinder(centre, float(rng.uniform(0.04, 0.3)), tall, cloth(rng))


def _outline(size: tuple[int, int], rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """A polygon [7, 2] somewhere in the picture."""
    centre, reach = rng.uniform([0, 0], size[::-1]), rng.uniform(0.08, 0.35) * min(size)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
    corners = centre + reach * rng.uniform(0.5, 1.4, (7, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
    return np.asarray(corners, np.int32)
