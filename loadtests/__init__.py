"""What the service can do on a machine, measured."""

import app  # noqa: F401  before ONNX Runtime, which it forbids to tell its maker of its use
