"""Training, evaluation and export of the Lightweight Pose Network. Needs the `training` extra (PyTorch)."""

import app  # noqa: F401  before ONNX Runtime, which it forbids to tell its maker of its use
