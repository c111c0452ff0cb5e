"""Posed bodies and outfits → one mesh: what of each body is skin, what is cloth or hair, and the garments over it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from training.synthetic.assets import GROUPS, Assets, Body, before_face, on_device
from training.synthetic.body import Posed, wear
from training.synthetic.mesh import Mesh, joined
from training.synthetic.outfits import (
    MATERIALS,
    OF_BROWS,
    OF_HAIR,
    OF_IRIS,
    OF_LEGS,
    OF_LIPS,
    OF_SHOES,
    OF_SKIN,
    OF_SKIRT,
    OF_TOP,
    OF_WHITE,
    Outfit,
)

_WAIST = 0.10  # metres above the pelvis of the mean body


@dataclass(frozen=True, slots=True)
class Regions:
    """Where the triangles [T] of the mean body lie; what is known of it holds for all bodies."""

    arm: Tensor  # 0 at the shoulder … 1 at the wrist, nan elsewhere
    leg: Tensor  # 0 at the hip … 1 at the ankle, nan elsewhere
    height: Tensor  # metres above the pelvis
    trunk: Tensor
    skin: Tensor  # neither eyes nor shells
    tights: Tensor
    skirt: Tensor
    long_hair: Tensor
    feet: Tensor
    outwards: Tensor  # [V, 3] normals of the shell of cloth at rest, 0 elsewhere
    below_waist: Tensor  # [V]
    material: Tensor  # of what never changes: skin, eyes, lips, scalp and brows

    @classmethod
    def of(cls, body: Body) -> "Regions":
        """The regions of this body's triangles."""
        names = np.array(body.bone_names)
        strongest = names[body.skin.argmax(1).numpy()][body.triangles[:, 0].numpy()]
        centres = body.mean[body.triangles].mean(1)
        centre = centres.double().numpy()
        heads = dict(zip(body.bone_names, body.bone_mean.double().numpy(), strict=True))
        arm, leg = np.full((2, len(centre)), np.nan)
        for side in "LR":
            start, end = heads[f"upperarm01.{side}"], heads[f"wrist.{side}"]
            on_arm = _named(strongest, side, "upperarm", "lowerarm", "wrist", "finger", "metacarpal")
            arm[on_arm] = (centre[on_arm] - start) @ (end - start) / ((end - start) ** 2).sum()
            hip, ankle = heads[f"upperleg01.{side}"][1], heads[f"foot.{side}"][1]
            on_leg = _named(strongest, side, "upperleg", "lowerleg", "foot", "toe")
            leg[on_leg] = (hip - centre[on_leg, 1]) / (hip - ankle)
        head = body.part == "head"
        tights = torch.tensor(body.group == GROUPS.index("tights"))
        pelvis = float(heads["root"][1])
        return cls(
            arm=torch.tensor(arm),
            leg=torch.tensor(leg),
            height=torch.tensor(centre[:, 1] - pelvis),
            trunk=torch.tensor(np.isnan(arm) & np.isnan(leg) & ~head),
            skin=torch.tensor(np.isin(body.group, (0, 1, 2))),
            tights=tights,
            skirt=torch.tensor(body.group == GROUPS.index("skirt")),
            long_hair=torch.tensor(body.group == GROUPS.index("hair")) & ~before_face(centres, body),
            feet=torch.tensor(np.isin(body.part, ("foot.L", "foot.R"))),
            outwards=_normals(body.mean, body.triangles[tights]),
            below_waist=body.mean[:, 1] < pelvis + _WAIST,
            material=torch.tensor(_lasting_materials(body, centre - heads["eye.L"], head)),
        )

    def on(self, device: torch.device) -> "Regions":
        """The same on a device."""
        return on_device(self, device)


def _named(strongest: npt.NDArray[np.str_], side: str, *starts: str) -> npt.NDArray[np.bool_]:
    own = np.char.endswith(strongest, side)
    return np.asarray(own & np.logical_or.reduce([np.char.startswith(strongest, start) for start in starts]))


def _normals(points: Tensor, triangles: Tensor) -> Tensor:
    none = torch.zeros(0)
    return functional.normalize(Mesh(points, points, none, triangles, none, none, none).normals(), dim=1)


def _lasting_materials(body: Body, from_eye: npt.NDArray[np.float64], head: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    x, y, z = (
        np.abs(from_eye[:, 0] + body.bone_mean[body.bone_names.index("eye.L"), 0].item()),
        from_eye[:, 1],
        from_eye[:, 2],
    )
    material = np.full(len(from_eye), OF_SKIN)
    material[np.isin(body.part, ("mouth_cavity", "tongue"))] = OF_LIPS
    eyes = np.isin(body.group, (1, 2))
    material[eyes] = OF_WHITE
    if eyes.any():
        material[eyes & (z > np.quantile(z[eyes], 0.6))] = OF_IRIS
    material[head & ((y > 0.07) | ((z < -0.09) & (y > -0.06)))] = OF_HAIR
    material[head & (y > 0.017) & (y < 0.029) & (x > 0.012) & (x < 0.05) & (z > -0.02)] = OF_BROWS
    material[head & (y > -0.087) & (y < -0.066) & (x < 0.024) & (z > 0.0)] = OF_LIPS
    return material


def dressed(assets: Assets, regions: Regions, posed: Posed, outfits: list[Outfit], shift: Tensor, image: Tensor) -> Mesh:
    """N bodies, moved by shift [N, 3] in images [N], as one mesh; person n has the materials from n · MATERIALS on."""
    body, device = assets.body, shift.device
    drawn, material = _painted(regions, outfits, device)
    hidden = torch.zeros(posed.rest.shape[:2], dtype=torch.bool, device=device)
    for wearer, outfit in enumerate(outfits):
        for number, kind in outfit.worn:
            if kind in (OF_TOP, OF_SHOES):
                hidden[wearer] |= assets.garments[number].hidden
    drawn &= ~hidden[:, body.triangles].all(2)
    loose = torch.tensor([outfit.loose for outfit in outfits], device=device)
    off = torch.where(regions.below_waist, loose[:, 1:], loose[:, :1])[..., None] * regions.outwards
    points = posed.vertices + (posed.transforms[..., :3] * off[..., None, :]).sum(-1) + shift[:, None]
    person, triangle = torch.nonzero(drawn, as_tuple=True)
    count = points.shape[1]
    meshes = [
        Mesh(
            points.flatten(0, 1),
            posed.rest.flatten(0, 1),
            image.repeat_interleave(count),
            body.triangles[triangle] + count * person[:, None],
            person,
            material[person, triangle] + MATERIALS * person,
            regions.skin[triangle],
        )
    ]
    wearers: dict[tuple[int, int], list[int]] = {}
    for number, outfit in enumerate(outfits):
        for worn in outfit.worn:
            wearers.setdefault(worn, []).append(number)
    for (garment, kind), who in sorted(wearers.items()):
        meshes.append(_worn(assets, garment, kind, posed, torch.tensor(who, device=device), shift, image))
    return joined(meshes)


def _painted(regions: Regions, outfits: list[Outfit], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which triangles of each body are drawn [N, T], and their materials [N, T]."""

    def each(values: list[float] | list[bool]) -> Tensor:
        return torch.tensor(values, device=device)[:, None]

    skirted = each([outfit.hem is not None for outfit in outfits])
    shell = each([outfit.shell for outfit in outfits])
    arm = regions.arm < each([outfit.sleeve for outfit in outfits])
    leg = regions.leg < each([outfit.leg for outfit in outfits])
    trunk = regions.trunk & (regions.height < each([outfit.collar for outfit in outfits]))
    upper = regions.height >= _WAIST
    material = regions.material.repeat(len(outfits), 1)
    material = torch.where(arm | (trunk & upper), OF_TOP, material)
    material = torch.where(leg | (trunk & ~upper), torch.where(skirted, OF_SKIRT, OF_LEGS), material)
    material = torch.where(regions.skirt, OF_SKIRT, material)
    material = torch.where(regions.long_hair, OF_HAIR, material)
    material = torch.where(regions.feet & ~each([outfit.barefoot for outfit in outfits]), OF_SHOES, material)
    hems = each([outfit.hem if outfit.hem is not None else np.inf for outfit in outfits])
    drawn = regions.skin | (regions.tights & shell & (arm | leg | trunk)) | (regions.skirt & (regions.height > hems))
    return drawn | (regions.long_hair & each([outfit.long_hair for outfit in outfits])), material


def _worn(assets: Assets, number: int, kind: int, posed: Posed, who: Tensor, shift: Tensor, image: Tensor) -> Mesh:
    """A garment on those of the bodies."""
    garment, body = assets.garments[number], assets.body
    rest, points = wear(garment, posed, who)
    material = torch.full((len(who), len(garment.triangles)), kind, device=who.device)
    if kind == OF_TOP:  # a suit is one mesh: below the waist it is the trousers
        pelvis = body.bone_mean[0, 1] * (posed.rest[who][..., 1].amax(1) / body.mean[:, 1].amax())
        material[rest[:, garment.triangles].mean(2)[..., 1] < pelvis[:, None] + _WAIST] = OF_LEGS
    count = rest.shape[1]
    triangles = garment.triangles + count * torch.arange(len(who), device=who.device)[:, None, None]
    owner = who.repeat_interleave(len(garment.triangles))
    return Mesh(
        (points + shift[who, None]).flatten(0, 1),
        rest.flatten(0, 1),
        image[who].repeat_interleave(count),
        triangles.flatten(0, 1),
        owner,
        material.flatten() + MATERIALS * owner,
        torch.zeros(len(owner), dtype=torch.bool, device=who.device),
    )
