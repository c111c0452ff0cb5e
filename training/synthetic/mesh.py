"""What scenes are drawn of: one mesh for a batch of images, with an owner and a material for each triangle."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

PLAIN, STRIPES, CHECKS, DOTS = range(4)
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Material:
    """Two colours (BGR, 0…1) in a pattern that is fixed to the body at rest: `waves` [3] are its periods a metre by axis."""

    colour: npt.ArrayLike
    second: npt.ArrayLike = (0.0, 0.0, 0.0)
    pattern: int = PLAIN
    waves: npt.ArrayLike = (0.0, 0.0, 0.0)
    mottled: float = 0.04  # how much it varies from place to place


@dataclass(frozen=True, slots=True)
class Materials:
    """A table of M materials: colours [M, 3], patterns [M], waves [M, 3], mottled [M]."""

    first: Tensor
    second: Tensor
    pattern: Tensor
    waves: Tensor
    mottled: Tensor

    @classmethod
    def of(cls, materials: list[Material], device: torch.device) -> "Materials":
        """The table of these."""

        def column(values: list[npt.ArrayLike]) -> Tensor:
            return torch.tensor(np.asarray(values, np.float32), device=device)

        return cls(
            column([material.colour for material in materials]).clamp(0, 1),
            column([material.second for material in materials]).clamp(0, 1),
            torch.tensor([material.pattern for material in materials], device=device),
            column([material.waves for material in materials]),
            column([material.mottled for material in materials]),
        )

    def colours(self, material: Tensor, rest: Tensor) -> Tensor:
        """Colours [N, 3] of materials [N] at places of the body at rest [N, 3]."""
        phase = torch.sin(2 * torch.pi * rest * self.waves[material])
        pattern = self.pattern[material]
        striped = (phase.sum(1) > 0) & (pattern == STRIPES)
        checked = ((phase[:, 0] > 0) ^ (phase[:, 1] > 0)) & (pattern == CHECKS)
        dotted = (phase[:, 0] > 0.5) & (phase[:, 1] > 0.5) & (pattern == DOTS)
        colours = torch.where((striped | checked | dotted)[:, None], self.second[material], self.first[material])
        # Folds and blotches: sines of the place at rest, bent by others so that they do not repeat within a body.
        bent = 2.5 * torch.sin(rest @ rest.new_tensor([[7.0, 19.0, -11.0], [13.0, -5.0, 17.0], [-9.0, 11.0, 15.0]]))
        waves = rest @ rest.new_tensor([[23.0, 61.0, 9.0], [37.0, -29.0, 83.0], [17.0, 47.0, -59.0]])
        wrinkles = torch.sin(waves + bent).mean(1)
        return colours * (1 + 2 * self.mottled[material] * wrinkles)[:, None]


@dataclass(frozen=True, slots=True)
class Mesh:
    """P points in the world and at rest [P, 3] (metres) of images [P], and T triangles [T, 3].

    `owner` [T] is the number of a person in the batch, -1 for things; `material` [T] counts in a table; the backs of what is
    `closed` [T] are never seen.
    """

    points: Tensor
    rest: Tensor
    image: Tensor
    triangles: Tensor
    owner: Tensor
    material: Tensor
    closed: Tensor

    def normals(self) -> Tensor:
        """Normals [P, 3] of points: means of those of their triangles by area."""
        a, b, c = self.points[self.triangles].unbind(1)
        across = torch.linalg.cross(b - a, c - a)
        sums = torch.zeros_like(self.points)
        for corner in range(3):
            sums.index_add_(0, self.triangles[:, corner], across)
        return functional.normalize(sums, dim=1)


def joined(meshes: list[Mesh]) -> Mesh:
    """All meshes as one."""
    firsts = np.cumsum([0, *(len(mesh.points) for mesh in meshes)]).tolist()
    return Mesh(
        torch.cat([mesh.points for mesh in meshes]),
        torch.cat([mesh.rest for mesh in meshes]),
        torch.cat([mesh.image for mesh in meshes]),
        torch.cat([mesh.triangles + first for mesh, first in zip(meshes, firsts, strict=False)]),
        torch.cat([mesh.owner for mesh in meshes]),
        torch.cat([mesh.material for mesh in meshes]),
        torch.cat([mesh.closed for mesh in meshes]),
    )


@dataclass(frozen=True, slots=True)
class Thing:
    """A thing in an image: points [P, 3] about its own centre, triangles [T, 3], centre [3] in metres and yaw in radians."""

    points: Vector
    triangles: npt.NDArray[np.int64]
    centre: Vector
    yaw: float
    material: Material

    def mesh(self, image: int, material: int, device: torch.device) -> Mesh:
        """Its mesh, with the number of its material in the table."""
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        turn = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
        count = len(self.triangles)
        return Mesh(
            torch.tensor(self.points @ turn.T + self.centre, dtype=torch.float32, device=device),
            torch.tensor(self.points, dtype=torch.float32, device=device),
            torch.full((len(self.points),), image, device=device),
            torch.tensor(self.triangles, device=device),
            torch.full((count,), -1, device=device),
            torch.full((count,), material, device=device),
            torch.zeros(count, dtype=torch.bool, device=device),
        )


def box(centre: Vector, sides: Vector, yaw: float, material: Material) -> Thing:
    """An upright box with sides [3] in metres."""
    corners = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)]) * sides
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    points = np.concatenate([corners[list(quad)] for quad in quads])  # four of its own for each side: sharp edges
    triangles = np.array([[4 * side + corner for corner in three] for side in range(6) for three in ((0, 1, 2), (0, 2, 3))])
    return Thing(points, triangles, centre, yaw, material)


def cylinder(centre: Vector, radius: float, height: float, material: Material) -> Thing:
    """An upright cylinder of 24 sides, closed above."""
    angles = np.arange(24) * 2 * np.pi / 24
    ring = np.stack([radius * np.sin(angles), 0 * angles, radius * np.cos(angles)], 1)
    up = np.array([0, height / 2, 0])
    points = np.concatenate([ring - up, ring + up, ring + up, [up]])
    following = [(i, (i + 1) % 24) for i in range(24)]
    sides = [three for i, j in following for three in ([i, j, 24 + j], [i, 24 + j, 24 + i])]
    return Thing(points, np.array(sides + [[48 + i, 48 + j, 72] for i, j in following]), centre, 0.0, material)
