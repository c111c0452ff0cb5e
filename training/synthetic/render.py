"""Scenes → colours, and for every drawn pixel who is seen at what depth; whole batches, on whatever device the bodies are."""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from training.synthetic.assets import Assets
from training.synthetic.body import pose
from training.synthetic.camera import Cameras, Lights
from training.synthetic.mesh import Materials, Mesh, joined
from training.synthetic.people import Regions, dressed
from training.synthetic.raster import barycentric, rasterise
from training.synthetic.scene import Scenes

NOBODY, THING, HELD = -3, -1, -2  # owners of pixels
_HELD_AT = 0.0  # metres: before everybody
_SHADED_AT_ONCE = {"cpu": 50_000}  # pixels: more do not fit into a core's cache


@dataclass(frozen=True, slots=True)
class Drawn:
    """A batch of S images: colours [S, H, W, 3] (BGR, 0…1), depth [S, H, W] in metres, owner [S, H, W].

    The owner is the number of a person in the batch, THING, HELD (something before the camera) or NOBODY; the last two are
    black. `bare` [S, H, W] tells skin and eyes from cloth and hair; `shadow` [S, H, W] is what is left of the background's
    light. People have `keypoints` [N, 17, 3] (x, y in drawn pixels, depth in metres), `heights` [N] in metres and their
    `image` [N].
    """

    colours: Tensor
    depth: Tensor
    owner: Tensor
    bare: Tensor
    shadow: Tensor
    keypoints: Tensor
    heights: Tensor
    image: Tensor


def render(assets: Assets, regions: Regions, scenes: Scenes) -> Drawn:
    """Draw a batch of scenes where the assets' tensors are."""
    cast, device = scenes.cast, assets.body.mean.device
    shift, image = cast.shift.to(device), cast.image.to(device)
    posed = pose(assets.body, cast.shapes.to(device), cast.q.to(device), cast.curl.to(device))
    materials = [material for outfit in cast.outfits for material in outfit.materials]
    meshes = [dressed(assets, regions, posed, cast.outfits, shift, image)]
    for number, thing in scenes.things:
        meshes.append(thing.mesh(number, len(materials), device))
        materials.append(thing.material)
    mesh, table = joined(meshes), Materials.of(materials, device)
    cameras, lights = Cameras.of(scenes.cameras, device), Lights.of(scenes.lights, device)
    count, size = len(scenes.cameras), scenes.size
    projected = cameras.project(mesh.points, mesh.image)
    numbers, depth = rasterise(projected, mesh.triangles, mesh.image[mesh.triangles[:, 0]], (count, *size), mesh.closed)
    where = torch.nonzero(numbers >= 0, as_tuple=True)
    triangles = numbers[where]
    colours = torch.zeros(count, *size, 3, device=device)
    points = torch.cat([mesh.points, mesh.rest, mesh.normals(), projected], 1)
    for part in torch.split(torch.arange(len(triangles), device=device), _SHADED_AT_ONCE.get(device.type, 16_000_000)):
        place = (where[0][part], where[1][part], where[2][part])
        colours[place] = _shaded(
            points, mesh.triangles[triangles[part]], mesh.material[triangles[part]], table, cameras, lights, place
        )
    owner = torch.full((count, *size), NOBODY, device=device)
    owner[where] = mesh.owner[triangles]
    bare = torch.zeros((count, *size), dtype=torch.bool, device=device)
    bare[where] = mesh.closed[triangles]
    _hold(scenes, colours, depth, owner)
    joints = (posed.keypoints + shift[:, None]).flatten(0, 1)
    keypoints = cameras.project(joints, image.repeat_interleave(17)).view(-1, 17, 3)
    return Drawn(colours, depth, owner, bare, _shadow(mesh, cameras, lights, size), keypoints, posed.heights, image)


def _shaded(
    points: Tensor,
    corners: Tensor,
    material: Tensor,
    table: Materials,
    cameras: Cameras,
    lights: Lights,
    where: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Colours [M, 3] of triangles with these corners [M, 3] and materials [M] at pixels `where` (image, y, x).

    points [P, 12]: places in the world and at rest, normals, and places in the picture with depth.
    """
    image, y, x = where
    values = points[corners]
    weights = barycentric(values[..., 9:], x.float(), y.float())
    between = (weights[:, None] @ values[..., :9])[:, 0]
    place, rest, normals = between[:, :3], between[:, 3:6], functional.normalize(between[:, 6:], dim=1)
    back = (normals * (cameras.places[image] - place)).sum(1, keepdim=True) < 0  # of a sheet
    normals = torch.where(back, -normals, normals)
    return (table.colours(material, rest) * lights.falling(normals, image)).clamp(0, 1)


def _hold(scenes: Scenes, colours: Tensor, depth: Tensor, owner: Tensor) -> None:
    """Cover the outlines of what is held before the cameras."""
    for number, outline in enumerate(scenes.held):
        if outline is not None:
            mask = cv2.fillPoly(np.zeros(scenes.size, np.uint8), [outline], 1)
            covered = torch.from_numpy(np.asarray(mask)).to(owner.device) > 0
            colours[number][covered], depth[number][covered], owner[number][covered] = 0, _HELD_AT, HELD


def _shadow(mesh: Mesh, cameras: Cameras, lights: Lights, size: tuple[int, int]) -> Tensor:
    """How much light is left [S, H, W] where shadows fall on the ground: points along the light, made soft."""
    points, image = mesh.points[::7], mesh.image[::7]
    direction = lights.directions[image]
    x, y, depth = cameras.project(points - points[:, 1:2] * direction / direction[:, 1:2].clamp(min=0.05), image).unbind(1)
    inside = (depth > 0.2) & (x >= 0) & (y >= 0) & (x < size[1]) & (y < size[0])
    small = (-(-size[0] // 4), -(-size[1] // 4))
    dark = torch.zeros(len(cameras.focal), 1, *small, device=points.device)
    dark[image[inside], 0, (y[inside] / 4).long(), (x[inside] / 4).long()] = 1.0
    dark = functional.max_pool2d(dark, 3, 1, 1)
    for _ in range(3):
        dark = functional.avg_pool2d(dark, 5, 1, 2, count_include_pad=False)
    cast = (lights.ambient < 0.7) & (lights.directions[:, 1] > 0.3)
    dark = functional.interpolate(dark * cast[:, None, None, None], size, mode="bilinear", align_corners=False)[:, 0]
    return 1 - 0.55 * (1.5 * dark).clamp(max=1)
