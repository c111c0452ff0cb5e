"""The LPN pose service: a picture and people's boxes in, COCO keypoints out."""

__version__ = "0.1.0"
