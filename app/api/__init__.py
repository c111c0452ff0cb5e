"""The HTTP face: bodies in, JSON, pictures and problems out. Knows no ONNX and no OpenCV."""
