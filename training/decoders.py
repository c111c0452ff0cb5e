"""Ways from heatmaps to keypoints, with numbers: the paper's, ours, and those they are compared with."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.vision import heatmap

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Decoder:
    """One way from heatmaps [N, K, H, W] to keypoints [N, K, 3]; β = ∞ is the plain argmax, no window the whole map.

    `mirror_shift` is for the flip test, and in cells, as in model.toml.
    """

    beta: float
    quarter_shift: bool = False
    window: int | None = None
    mirror_shift: float = 1.0

    @property
    def name(self) -> str:
        """As tables have it."""
        kind = "argmax" if self.beta == np.inf else f"Beta-Soft-Argmax, β = {self.beta:g}"
        about = f", {self.window}×{self.window} cells" if self.window else ""
        return kind + about + (", quarter shift" if self.quarter_shift else "")

    def __call__(self, heatmaps: Float32) -> Float32:
        if self.beta < np.inf:
            return heatmap.decode(heatmaps, self.beta, self.quarter_shift, self.window)
        places = heatmap.argmax(heatmaps)
        scores = heatmap.scores_at(heatmaps, places)[..., None]
        shifted = heatmap.quarter_shift(heatmaps, places) if self.quarter_shift else places
        return np.concatenate([shifted, scores], axis=2)


AUTHORS = Decoder(160.0, quarter_shift=True)  # the paper's best β and the authors' shift, for their weights
OURS = Decoder(15.0, window=13, mirror_shift=0.75)  # measured better on our weights; training/MEASURED.md


def all_decoders() -> list[Decoder]:
    """The paper's ablation, and Beta-Soft-Argmax as a function of β: with and without quarter shift, and in windows."""
    whole = [Decoder(beta, shift) for shift in (False, True) for beta in (np.inf, 20.0, 40.0, 80.0, 160.0, 320.0)]
    return whole + [Decoder(beta, window=window) for window in (5, 9, 13) for beta in (10.0, 15.0, 20.0, 40.0)]
