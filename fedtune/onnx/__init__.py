"""Inference graphs: export (torch), quantise, verify and predict.

The last two need onnxruntime and numpy, never torch.
"""
