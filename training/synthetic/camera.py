"""Pinhole cameras and light for a batch of images: drawn one by one, projected all at once."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Camera:
    """A place [3] in metres, axes [3, 3] (right, down, forwards), the focal length and the centre [2] in drawn pixels."""

    place: Vector
    axes: Vector
    focal: float
    centre: Vector


@dataclass(frozen=True, slots=True)
class Light:
    """A direction [3] that light comes from, its colour [3] (BGR), and the share that comes from everywhere."""

    direction: Vector
    colour: Vector
    ambient: float


@dataclass(frozen=True, slots=True)
class Cameras:
    """The cameras of S images: places [S, 3], axes [S, 3, 3], focal lengths [S], centres [S, 2]."""

    places: Tensor
    axes: Tensor
    focal: Tensor
    centres: Tensor

    @classmethod
    def of(cls, cameras: list[Camera], device: torch.device) -> "Cameras":
        """These, on a device."""
        columns = ([camera.place, camera.axes, camera.focal, camera.centre] for camera in cameras)
        return cls(*(torch.tensor(np.array(each), dtype=torch.float32, device=device) for each in zip(*columns, strict=True)))

    def project(self, points: Tensor, image: Tensor) -> Tensor:
        """Points [N, 3] in the worlds of images [N] → x, y in pixels and depth in metres [N, 3]; depths may be negative."""
        seen = (self.axes[image] * (points - self.places[image])[:, None]).sum(2)
        depth = seen[:, 2:]
        safe = torch.where(depth.abs() < 1e-3, 1e-3, depth)
        return torch.cat([self.focal[image, None] * seen[:, :2] / safe + self.centres[image], depth], 1)


@dataclass(frozen=True, slots=True)
class Lights:
    """The lights of S images: directions [S, 3], colours [S, 3], ambient shares [S]."""

    directions: Tensor
    colours: Tensor
    ambient: Tensor

    @classmethod
    def of(cls, lights: list[Light], device: torch.device) -> "Lights":
        """These, on a device."""
        columns = ([light.direction, light.colour, light.ambient] for light in lights)
        return cls(*(torch.tensor(np.array(each), dtype=torch.float32, device=device) for each in zip(*columns, strict=True)))

    def falling(self, normals: Tensor, image: Tensor) -> Tensor:
        """The light [N, 3] on surfaces with normals [N, 3] of images [N]; Lambert's law, and a sky that is brighter above."""
        diffuse = (normals * self.directions[image]).sum(1).clamp(min=0)
        ambient = self.ambient[image]
        return (ambient * (0.85 + 0.15 * normals[:, 1]) + (1.1 - ambient) * diffuse)[:, None] * self.colours[image]


def random_camera(joints: Vector, width: int, height: int, rng: np.random.Generator) -> Camera:
    """A camera that looks at one of the people [N, 17, 3], or at all, from before (+Z) and some side; it may cut them."""
    looked_at = joints.reshape(-1, 3)
    if rng.random() < 0.65:
        looked_at = joints[rng.integers(len(joints)), : 13 if rng.random() < 0.4 else 17]  # the upper body, or the whole one
    low, high = looked_at.min(0), looked_at.max(0)
    target = (low + high) / 2 + rng.normal(0, 0.12, 3)
    if rng.random() < 0.12:  # a joint in the middle, and others outside
        target = looked_at[rng.integers(len(looked_at))]
    view = np.radians(rng.uniform(18, 65))  # of the picture's longer side
    focal = max(width, height) / 2 / np.tan(view / 2)
    extent = max(0.5, float(np.linalg.norm(high - low)))
    share = rng.uniform(0.35, 1.15) * (2.0 if rng.random() < 0.1 else 1.0)  # of the shorter side that they fill
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
    centre = np.array([width - 1, height - 1]) / 2 + rng.normal(0, 0.05, 2) * [width, height]
    return Camera(place, np.stack([right, down, forwards]), float(focal), centre)


def random_light(rng: np.random.Generator) -> Light:
    """Light from anywhere above."""
    angle, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 1.5)
    direction = np.array([np.cos(angle) * np.cos(height), np.sin(height), np.sin(angle) * np.cos(height)])
    return Light(direction, 1 + rng.normal(0, 0.06, 3), float(rng.uniform(0.3, 0.8)))
