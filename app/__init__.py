"""The LPN pose service: a picture in, the COCO keypoints of its people out."""

import os

__version__ = "0.2.0"

# ONNX Runtime tells its maker of every start and model unless this stands in the environment before it is imported; versions
# to come may know the second name alone.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("ORT_TELEMETRY_DISABLED", "1")
