"""The LPN pose service: a picture and people's boxes in, COCO keypoints out."""
