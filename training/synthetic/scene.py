"""What is in a scene: people in a place, things before and behind them, light and a camera; drawn from one generator."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.synthetic.assets import Assets
from training.synthetic.body import ARMS, Posed, entangled, mirrored, pose, turned
from training.synthetic.mesh import Mesh, box, cylinder, joined
from training.synthetic.people import Regions, cloth, dressed

Vector = npt.NDArray[np.float64]

_PEOPLE = (0.4, 0.25, 0.15, 0.1, 0.06, 0.04)  # the shares of scenes with one, two … people
_TRIES = 8  # to find a pose whose limbs keep apart


@dataclass(frozen=True, slots=True)
class Camera:
    """A pinhole camera: place [3] in metres, axes [3, 3] (right, down, forwards), focal length and centre [2] in pixels."""

    place: Vector
    axes: Vector
    focal: float
    centre: Vector

    def project(self, points: Tensor) -> Tensor:
        """Points [..., 3] in the world → x, y in pixels and depth in metres [..., 3]; depths may be negative."""
        seen = (points - torch.tensor(self.place, dtype=torch.float32)) @ torch.tensor(self.axes.T, dtype=torch.float32)
        depth = seen[..., 2:]
        safe = torch.where(depth.abs() < 1e-3, 1e-3, depth)
        return torch.cat([self.focal * seen[..., :2] / safe + torch.tensor(self.centre, dtype=torch.float32), depth], -1)


@dataclass(frozen=True, slots=True)
class Light:
    """A direction [3] that light comes from, its colour [3] (BGR), and the share that comes from everywhere."""

    direction: Vector
    colour: Vector
    ambient: float


@dataclass(frozen=True, slots=True)
class Scene:
    """People [N] with keypoints [N, 17, 3] and heights [N] in metres, and everything that is drawn, in the world."""

    mesh: Mesh
    keypoints: Tensor
    heights: Tensor
    camera: Camera
    light: Light


def random_scene(assets: Assets, regions: Regions, width: int, height: int, rng: np.random.Generator) -> Scene:
    """A scene for a picture of that size."""
    count = 1 + int(rng.choice(len(_PEOPLE), p=_PEOPLE))
    posed, who = _people(assets, count, rng)
    places = _places(count, rng)
    meshes, keypoints = [], []
    for person in range(count):
        mesh = dressed(assets, regions, posed, person, bool(assets.body.female[who[person]] > 0.5), rng)
        lift = rng.uniform(0.1, 0.6) if rng.random() < 0.06 else 0.0
        shift = torch.tensor([places[person, 0], lift, places[person, 1]], dtype=torch.float32)
        shift[1] -= mesh.points[:, 1].amin()
        meshes.append(replace(mesh, points=mesh.points + shift))
        keypoints.append(posed.keypoints[person] + shift)
    joints = torch.stack(keypoints)
    camera = _camera(joints, width, height, rng)
    things = [_thing(joints[rng.integers(count)].mean(0).double().numpy(), camera, rng) for _ in range(rng.poisson(0.7))]
    return Scene(joined(meshes + things), joints, posed.heights, camera, _light(rng))


def _people(assets: Assets, count: int, rng: np.random.Generator) -> tuple[Posed, npt.NDArray[np.int64]]:
    """That many bodies in poses whose limbs do not go through one another, where such are found in a few tries."""
    who = rng.integers(len(assets.body.shapes), size=count)
    shapes = torch.tensor(assets.body.shapes[who])
    q = _poses(assets, count, rng)
    posed = pose(assets.body, shapes, q)
    for _ in range(_TRIES):
        bad = entangled(posed.keypoints, posed.heights)
        if not bad.any():
            break
        q[bad] = _poses(assets, int(bad.sum()), rng)
        posed = pose(assets.body, shapes, q)
    return posed, who


def _poses(assets: Assets, count: int, rng: np.random.Generator) -> Tensor:
    """Rotations [count, 22, 4]: captured poses, some mirrored, some with an arm or the head of another like it."""
    poses = assets.poses
    chosen = rng.choice(len(poses.q), count, p=poses.share)
    q = poses.q[chosen].copy()
    for person, number in enumerate(chosen):
        for limb in (*ARMS, (12, 15)):
            if rng.random() < 0.15:
                alike = np.flatnonzero(poses.posture == poses.posture[number])
                q[person, limb] = poses.q[rng.choice(alike), limb]
    rotations = torch.tensor(q)
    flipped = torch.tensor(rng.random(count) < 0.5)
    rotations = torch.where(flipped[:, None, None], mirrored(rotations), rotations)
    facing = np.where(rng.random(count) < 0.5, rng.normal(0, 0.7, count), rng.uniform(-np.pi, np.pi, count))
    return turned(rotations, torch.tensor(facing, dtype=torch.float32))


def _places(count: int, rng: np.random.Generator) -> Vector:
    """Where people stand [count, 2] (x, z): about the first, some of them close."""
    places = np.zeros((count, 2))
    for person in range(1, count):
        angle, distance = rng.uniform(0, 2 * np.pi), rng.choice([rng.uniform(0.5, 0.9), rng.uniform(0.8, 3.5)])
        places[person] = places[rng.integers(person)] + distance * np.array([np.cos(angle), np.sin(angle)])
    return places


def _camera(joints: Tensor, width: int, height: int, rng: np.random.Generator) -> Camera:
    """A camera that looks at one of the people, or at all, from before (+Z) and some side; it may cut them."""
    looked_at = joints[rng.integers(len(joints))] if rng.random() < 0.6 else joints.flatten(0, 1)
    low, high = looked_at.amin(0).double().numpy(), looked_at.amax(0).double().numpy()
    target = (low + high) / 2 + rng.normal(0, 0.12, 3)
    if rng.random() < 0.12:  # a close look at a part
        target = looked_at[rng.integers(len(looked_at))].double().numpy()
    view = np.radians(rng.uniform(18, 65))  # of the picture's longer side
    focal = max(width, height) / 2 / np.tan(view / 2)
    extent = max(0.5, float(np.linalg.norm(high - low)))
    share = rng.uniform(0.35, 1.3) * (2.0 if rng.random() < 0.1 else 1.0)  # of the shorter side that they fill
    distance = max(0.7, focal * extent / (share * min(width, height)))
    azimuth, elevation = rng.normal(0, 0.5), rng.normal(0.08, 0.22)
    away = np.array([np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)])
    place = target + distance * away
    place[1] = max(place[1], 0.15)
    forwards = (target - place) / np.linalg.norm(target - place)
    right = np.cross(forwards, [0, 1, 0])
    right /= np.linalg.norm(right)
    roll = rng.normal(0, 0.05) + (rng.normal(0, 0.4) if rng.random() < 0.06 else 0)
    down = np.cross(forwards, right)
    right, down = np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right
    centre = np.array([width - 1, height - 1]) / 2 + rng.normal(0, 0.08, 2) * [width, height]
    return Camera(place, np.stack([right, down, forwards]), float(focal), centre)


def _thing(near: Vector, camera: Camera, rng: np.random.Generator) -> Mesh:
    """A box or a cylinder on the ground or in the air, between the camera and somebody or behind."""
    to_camera = camera.place - near
    centre = near + rng.choice([rng.uniform(0.15, 0.5), -rng.uniform(0.2, 1.0)]) * to_camera
    centre += rng.normal(0, 0.35, 3) * [1, 0.3, 1]
    tall = rng.uniform(0.2, 1.3)
    if rng.random() < 0.7:
        centre[1] = tall / 2
    if rng.random() < 0.5:
        return box(
            centre, np.array([rng.uniform(0.15, 0.9), tall, rng.uniform(0.15, 0.9)]), rng.uniform(0, np.pi), cloth(rng)
        )
    return cylinder(centre, float(rng.uniform(0.04, 0.3)), tall, cloth(rng))


def _light(rng: np.random.Generator) -> Light:
    angle, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 1.5)
    direction = np.array([np.cos(angle) * np.cos(height), np.sin(height), np.sin(angle) * np.cos(height)])
    return Light(direction, 1 + rng.normal(0, 0.06, 3), float(rng.uniform(0.3, 0.8)))
