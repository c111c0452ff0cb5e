"""Training, evaluation and export of the Lightweight Pose Network. Needs the `training` extra (PyTorch)."""
