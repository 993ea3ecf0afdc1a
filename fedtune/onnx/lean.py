"""Graphs that `fedtune prepare --edge` made, opened so that they take little memory.

What the session options below do to one step of 4 texts of 64 tokens on MiniLM with Fed-SB of rank 16 (one
thread, resident memory of a process that does nothing else): onnxruntime's own settings 250 MB; weights left
where they are mapped instead of packed into copies of their own 207 MB; without its record of each batch
shape's pattern 179 MB, as a record keeps a block of its own. Its memory arena stays on: it uses freed blocks
again at once, where malloc keeps holes (262 MB) or gives them back to the system and takes twice the time.
Nodes run in the order of the file, in which the masks of ReLUs come before the next layer: nothing for
MiniLM, but a step of 8 images of 128 pixels on EfficientNet-Lite0's biases takes 171 MB instead of 239.
"""

from pathlib import Path

import onnxruntime

from fedtune.onnx.verify import open_session

WIDENING = ("CommonSubexpressionElimination", "ConstantFolding")
"""Optimizers that would turn an 8-bit weight into floats once and keep these."""


def open_lean(path: Path, weights: str, threads: int = 0) -> onnxruntime.InferenceSession:
    """A graph of such a folder in little memory. weights: as its card has it.

    Raises ModelError for a file that onnxruntime cannot open.
    """
    options = lean_options()
    if weights == "int8":
        # it would round activations to 8 bits as well
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return open_session(
        path,
        options,
        threads,
        "copy the folder again, or use a newer onnxruntime",
        WIDENING if weights == "int8" else (),
    )


def lean_options() -> onnxruntime.SessionOptions:
    """See above."""
    options = onnxruntime.SessionOptions()
    options.enable_mem_pattern = False
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.add_session_config_entry("session.disable_prepacking", "1")
    # threads that wait busily cost a shared machine more than they gain
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
