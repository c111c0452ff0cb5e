"""A scene and a background → a picture with what a camera does to it, and for every pixel who is seen at what depth."""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from training.synthetic.mesh import CHECKS, DOTS, STRIPES, Mesh
from training.synthetic.raster import barycentric, rasterise
from training.synthetic.scene import Light, Scene

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

OVERSAMPLED = 2  # pixels drawn for one of the picture, in both directions
_NOBODY, _THING = -2, -1


@dataclass(frozen=True, slots=True)
class Seen:
    """What is seen at each drawn pixel: owner [H, W] (-2: background, -1: a thing) and depth [H, W] in metres."""

    owner: npt.NDArray[np.int64]
    depth: Float32


def render(scene: Scene, background: Float32, patch: Float32, rng: np.random.Generator) -> tuple[Float32, Seen]:
    """Colours [H, W, 3] (BGR, 0…1) before background [H, W, 3], and what is seen; the sizes are those that are drawn.

    Sometimes a piece of `patch` [H, W, 3] is held before everything, at a depth of half a metre.
    """
    height, width = background.shape[:2]
    mesh = scene.mesh
    projected = scene.camera.project(mesh.points)
    image = torch.zeros(len(mesh.triangles), dtype=torch.int64)
    numbers, depths = (values[0] for values in rasterise(projected, mesh.triangles, image, (1, height, width)))
    y, x = torch.nonzero(numbers >= 0, as_tuple=True)
    triangles = numbers[y, x]
    colours = background * _shadow(scene, (height, width))[..., None]
    if len(triangles):
        corners = mesh.triangles[triangles]
        weights = barycentric(projected[corners], x.float(), y.float())[..., None]
        normals = functional.normalize((mesh.normals[corners] * weights).sum(1), dim=1)
        rest = (mesh.rest[corners] * weights).sum(1)
        seen_from = torch.tensor(scene.camera.place, dtype=torch.float32) - (mesh.points[corners] * weights).sum(1)
        normals = torch.where((normals * seen_from).sum(1, keepdim=True) < 0, -normals, normals)  # the back of a sheet
        colours[y, x] = (_albedo(mesh, mesh.material[triangles], rest) * _lit(scene.light, normals)).clamp(0, 1).numpy()
    owner = torch.full((height, width), _NOBODY)
    owner[y, x] = mesh.owner[triangles]
    seen = Seen(owner.numpy(), depths.numpy())
    if rng.random() < 0.15:
        _hold_before(colours, seen, patch, rng)
    return colours, seen


def photographed(colours: Float32, size: tuple[int, int], rng: np.random.Generator) -> UInt8:
    """Drawn colours [H, W, 3] → a picture (height, width): exposure, defocus, few pixels, noise and JPEG."""
    picture = np.asarray(cv2.resize(colours, size[::-1], interpolation=cv2.INTER_AREA), np.float32)
    if rng.random() < 0.2:
        factor = rng.uniform(0.35, 0.8)
        small = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        picture = np.asarray(cv2.resize(small, size[::-1], interpolation=cv2.INTER_LINEAR), np.float32)
    if rng.random() < 0.3:
        picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 1.4)), np.float32)
    picture = np.clip(picture, 0, 1) ** rng.uniform(0.7, 1.4) * rng.uniform(0.75, 1.2)
    picture += rng.normal(0, rng.uniform(0, 0.03), picture.shape).astype(np.float32)
    pixels = np.asarray(np.clip(picture * 255, 0, 255), np.uint8)
    if rng.random() < 0.5:
        data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 95))])[1]
        pixels = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)
    return pixels


def _albedo(mesh: Mesh, material: Tensor, rest: Tensor) -> Tensor:
    """Colours [M, 3] of materials [M] at places of the rest body [M, 3]."""

    def table(values: list[npt.NDArray[np.float32]]) -> Tensor:
        return torch.tensor(np.stack(values))[material]

    first, second = table([m.colour for m in mesh.materials]), table([m.second for m in mesh.materials])
    waves = table([np.zeros(3, np.float32) if m.waves is None else m.waves for m in mesh.materials])
    pattern = torch.tensor([m.pattern for m in mesh.materials])[material]
    phase = torch.sin(2 * torch.pi * rest * waves)
    striped = (phase.sum(1) > 0) & (pattern == STRIPES)
    checked = ((phase[:, 0] > 0) ^ (phase[:, 1] > 0)) & (pattern == CHECKS)
    dotted = ((phase[:, 0] > 0.5) & (phase[:, 1] > 0.5)) & (pattern == DOTS)
    colours = torch.where((striped | checked | dotted)[:, None], second, first)
    # Folds and blotches: a few sines of the place at rest, which do not repeat within a body.
    wrinkles = torch.sin(rest @ torch.tensor([[23.0, 61.0, 9.0], [37.0, -29.0, 83.0], [17.0, 47.0, -59.0]])).mean(1)
    mottled = torch.tensor([m.mottled for m in mesh.materials])[material]
    return colours * (1 + mottled * wrinkles * 2)[:, None]


def _lit(light: Light, normals: Tensor) -> Tensor:
    direction, colour = (torch.tensor(values, dtype=torch.float32) for values in (light.direction, light.colour))
    diffuse = (normals @ direction).clamp(min=0)
    sky = 0.85 + 0.15 * normals[:, 1]
    return (light.ambient * sky + (1.1 - light.ambient) * diffuse)[:, None] * colour


def _shadow(scene: Scene, size: tuple[int, int]) -> Float32:
    """A soft dark patch [H, W] where people's shadows fall on the ground; 1 elsewhere."""
    light = scene.light
    if light.ambient > 0.7 or light.direction[1] < 0.3:
        return np.ones(size, np.float32)
    points = scene.mesh.points[::7]
    away = torch.tensor(light.direction / light.direction[1], dtype=torch.float32)
    x, y, depth = scene.camera.project(points - points[:, 1:2] * away).unbind(1)
    inside = (depth > 0.2) & (x >= 0) & (y >= 0) & (x < size[1]) & (y < size[0])
    dark = np.zeros(size, np.float32)
    dark[y[inside].long().numpy(), x[inside].long().numpy()] = 1.0
    spread = max(size) / 90
    dark = np.asarray(cv2.GaussianBlur(cv2.dilate(dark, np.ones((7, 7), np.uint8)), (0, 0), spread), np.float32)
    return np.asarray(1 - 0.55 * np.clip(dark * 1.5, 0, 1), np.float32)


def _hold_before(colours: Float32, seen: Seen, patch: Float32, rng: np.random.Generator) -> None:
    """Cover a random polygon by the same place of another photo."""
    height, width = seen.owner.shape
    centre, reach = rng.uniform([0, 0], [width, height]), rng.uniform(0.08, 0.35) * min(height, width)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
    outline = centre + reach * rng.uniform(0.5, 1.4, (7, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [outline.astype(np.int32)], 1)
    covered = mask > 0
    colours[covered] = patch[covered]
    seen.owner[covered] = _THING
    seen.depth[covered] = 0.5
