"""Pure functions on arrays: pictures, boxes, crops, heatmaps. No state, no I/O, no settings."""
