"""What a scene is drawn of: one mesh with an owner and a material for each triangle."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

PLAIN, STRIPES, CHECKS, DOTS = range(4)


@dataclass(frozen=True, slots=True)
class Material:
    """Two colours (BGR, 0…1) in a pattern that is fixed to the rest body: `waves` [3] are its periods a metre by axis."""

    colour: npt.NDArray[np.float32]
    second: npt.NDArray[np.float32]
    pattern: int = PLAIN
    waves: npt.NDArray[np.float32] | None = None
    mottled: float = 0.04  # how much it varies from place to place


@dataclass(frozen=True, slots=True)
class Mesh:
    """P points in the world and at rest [P, 3] (metres), their normals [P, 3], and T triangles [T, 3].

    `owner` [T] is the number of a person, -1 for things; `material` [T] indexes `materials`.
    """

    points: Tensor
    rest: Tensor
    normals: Tensor
    triangles: Tensor
    owner: Tensor
    material: Tensor
    materials: list[Material]


def surface(points: Tensor, rest: Tensor, triangles: Tensor, owner: int, material: Tensor, materials: list[Material]) -> Mesh:
    """A mesh of one owner with smooth normals; points that no triangle uses are left out."""
    used, numbers = torch.unique(triangles, return_inverse=True)
    points, rest = points[used], rest[used]
    a, b, c = points[numbers].unbind(1)
    across = torch.linalg.cross(b - a, c - a)
    normals = torch.zeros_like(points)
    for corner in range(3):
        normals.index_add_(0, numbers[:, corner], across)
    owners = torch.full((len(numbers),), owner)
    return Mesh(points, rest, functional.normalize(normals, dim=1), numbers, owners, material, materials)


def joined(meshes: list[Mesh]) -> Mesh:
    """All meshes as one."""
    points = [len(mesh.points) for mesh in meshes]
    materials = [len(mesh.materials) for mesh in meshes]
    first_point, first_material = np.cumsum([0, *points]).tolist(), np.cumsum([0, *materials]).tolist()
    return Mesh(
        torch.cat([mesh.points for mesh in meshes]),
        torch.cat([mesh.rest for mesh in meshes]),
        torch.cat([mesh.normals for mesh in meshes]),
        torch.cat([mesh.triangles + first for mesh, first in zip(meshes, first_point, strict=False)]),
        torch.cat([mesh.owner for mesh in meshes]),
        torch.cat([mesh.material + first for mesh, first in zip(meshes, first_material, strict=False)]),
        [material for mesh in meshes for material in mesh.materials],
    )


def box(centre: npt.NDArray[np.float64], sides: npt.NDArray[np.float64], yaw: float, material: Material) -> Mesh:
    """An upright box; centre [3] and sides [3] in metres, turned by yaw in radians."""
    corners = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)]) * sides
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    points = np.concatenate([corners[list(quad)] for quad in quads])  # four of its own for each side: sharp edges
    triangles = [[4 * side + corner for corner in three] for side in range(6) for three in ((0, 1, 2), (0, 2, 3))]
    return _thing(points, triangles, centre, yaw, material)


def cylinder(centre: npt.NDArray[np.float64], radius: float, height: float, material: Material) -> Mesh:
    """An upright cylinder of 24 sides, closed above."""
    angles = np.arange(24) * 2 * np.pi / 24
    ring = np.stack([radius * np.sin(angles), 0 * angles, radius * np.cos(angles)], 1)
    up = np.array([0, height / 2, 0])
    points = np.concatenate([ring - up, ring + up, ring + up, [up]])
    following = [(i, (i + 1) % 24) for i in range(24)]
    sides = [three for i, j in following for three in ([i, j, 24 + j], [i, 24 + j, 24 + i])]
    return _thing(points, sides + [[48 + i, 48 + j, 72] for i, j in following], centre, 0.0, material)


def _thing(
    points: npt.NDArray[np.float64],
    triangles: list[list[int]],
    centre: npt.NDArray[np.float64],
    yaw: float,
    material: Material,
) -> Mesh:
    turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    placed = torch.tensor(points @ turn.T + centre, dtype=torch.float32)
    numbers = torch.tensor(triangles)
    none = torch.zeros(len(numbers), dtype=torch.int64)
    return surface(placed, torch.tensor(points, dtype=torch.float32), numbers, -1, none, [material])
