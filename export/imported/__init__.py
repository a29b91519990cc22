"""Import of CLIP models that somebody exported to ONNX. It needs no torch."""
