"""The edge role: onnxruntime, numpy and no torch."""
