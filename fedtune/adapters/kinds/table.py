"""The adapter methods there are.

To add one takes three files and a row in each of two tables:

1. `adapters/kinds/NAME.py`: an `AdapterMethod`, which says what is trained and what others may ask of it; its
   row is in METHODS, and its word in `adapter.method` of `job.sections`, which is all that a file can name.
2. `adapters/layers/NAME.py`: an `Attachment`, which puts it on a model, with the stacked and lean twins of
   modules of its own; its row is in ATTACHMENTS of `adapters.methods`. A method that trains parameters of the
   base alone has nothing to put there and takes that of `layers.own`.
3. A test of its maths in `tests/adapters`. What all methods share is tested in
   `tests/contracts/test_adapter_methods.py` for each row of METHODS.
"""

from fedtune.adapters.kinds.fed_sb import FED_SB
from fedtune.adapters.kinds.lora import FFA_LORA, LORA
from fedtune.adapters.kinds.method import AdapterMethod
from fedtune.adapters.kinds.own import BIAS, FULL, HEAD
from fedtune.adapters.kinds.tinytl import TINYTL

METHODS: dict[str, AdapterMethod] = {
    method.name: method for method in (FED_SB, LORA, FFA_LORA, BIAS, TINYTL, HEAD, FULL)
}
WITH_CORES = tuple(name for name, method in METHODS.items() if method.cores)
WITH_GRADIENT_FRAME = tuple(name for name, method in METHODS.items() if method.gradient_frame)
HEAD_ONLY = tuple(name for name, method in METHODS.items() if method.head_only)
BIASES_ONLY = tuple(name for name, method in METHODS.items() if method.biases_only)
