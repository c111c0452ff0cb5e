"""Rendered people with exact keypoints: bodies, clothes, scenes, a rasteriser, and a command that writes a COCO set."""
