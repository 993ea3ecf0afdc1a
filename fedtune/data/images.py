"""Folders of images, and images as arrays.

A label is a sub-folder: ROOT/LABEL/file, or ROOT/DOMAIN/LABEL/file when the data is divided by folder. Files
whose suffix is not that of an image, and names that start with a dot, are passed over.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from fedtune.errors import ContractError, DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

_CONFIG = "image_encoder.json"

# what Pillow raises for a file that is not an image, cut short, or absurdly large
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    MemoryError,
    Image.DecompressionBombError,
)


class ImageFile(NamedTuple):
    path: Path
    label: str
    domain: str


def list_images(root: Path, by_folder: bool) -> list[ImageFile]:
    """The image files under `root`, sorted by path; `domain` is "" unless `by_folder`. Opens none of them.

    Raises:
        DataError: images outside a label folder, folders nested deeper, or no image at all.
    """
    layout = f"{root}/DOMAIN/LABEL/FILE" if by_folder else f"{root}/LABEL/FILE"
    domains = _folders(root, layout) if by_folder else [root]
    found = [
        image for domain in domains for image in _labelled(domain, domain.name if by_folder else "", layout)
    ]
    if not found:
        raise DataError(
            f"{root}: holds no labelled image ({', '.join(SUFFIXES)}); lay the files out as {layout}"
        )
    return found


def _labelled(folder: Path, domain: str, layout: str) -> Iterator[ImageFile]:
    for label in _folders(folder, layout):
        for path in _visible(label):
            if path.is_dir():
                hint = "" if domain else ', or set data.by = "folder" for ROOT/DOMAIN/LABEL/FILE'
                raise DataError(
                    f"{path}: a folder where an image should be; lay the files out as {layout}{hint}"
                )
            if path.suffix.lower() in SUFFIXES:
                yield ImageFile(path, label.name, domain)


def _folders(folder: Path, layout: str) -> list[Path]:
    entries = _visible(folder)
    loose = [path for path in entries if path.is_file() and path.suffix.lower() in SUFFIXES]
    if loose:
        raise DataError(f"{loose[0]}: an image without a label folder; lay the files out as {layout}")
    return [path for path in entries if path.is_dir()]


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as e:
        raise DataError(f"{folder}: cannot be read ({e.strerror}); check its permissions") from None


def check_image(path: Path) -> None:
    """Raise DataError, naming the file, unless Pillow reads it to the end.

    Checks sums where the format has them.
    """
    try:
        with Image.open(path) as image:
            kind = image.format
            image.verify()
        if kind == "JPEG":  # verify does not see a cut JPEG; decoding at an eighth of the size does
            with Image.open(path) as image:
                image.draft("RGB", (1, 1))
                image.load()
    except _BROKEN as e:
        raise _unreadable(path, e) from None


def _unreadable(path: Path | str, error: BaseException) -> DataError:
    reason = str(error).replace(f" {str(path)!r}", "").splitlines()
    return DataError(
        f"{path}: not a readable image ({(reason or [type(error).__name__])[0][:120]}); "
        "replace or remove the file"
    )


@dataclass(frozen=True)
class ImageEncoder:
    """Image files as float32 arrays (x - mean) / scale of RGB values x from 0 to 255.

    The image is turned as its EXIF tag says, scaled bilinearly so that its short side is `size`, and cut to
    the centre square. The default mean and scale give x / 127.5 - 1.
    """

    size: int
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    scale: tuple[float, float, float] = (127.5, 127.5, 127.5)

    def encode(self, paths: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """One {"pixels": float32 [3, size, size]} per path. Raises DataError that names the file."""
        return [{"pixels": self._pixels(path)} for path in paths]

    def lengths(self, paths: Sequence[str]) -> list[int]:
        """What orders examples into batches of about equal length: the same for every image."""
        return [self.size] * len(paths)

    def collate(self, encoded: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """{"pixels": float32 [n, 3, size, size]}. Raises ContractError for no images."""
        if not encoded:
            raise ContractError("a batch needs at least one image")
        return {"pixels": np.stack([one["pixels"] for one in encoded])}

    def made_up(self, lengths: Sequence[int], draw: np.random.Generator) -> list[dict[str, np.ndarray]]:
        """As many encoded images of noise."""
        return [
            {"pixels": draw.standard_normal((3, self.size, self.size)).astype(np.float32)} for _ in lengths
        ]

    def sides(self, lengths: Sequence[int]) -> Sequence[int]:
        """Rows of pixels of each."""
        return [self.size] * len(lengths)

    def span(self, tokens: int, images: int) -> int:
        """The rows of pixels of so many images."""
        return images * self.size

    def decode(self, place: int) -> str:
        """Raises ContractError: an image has no tokens."""
        raise ContractError(f"token {place}: images have none; ask a task of texts")

    def to_config(self) -> dict[str, Any]:
        """What `from_config` needs, as plain values."""
        return {"kind": "image", **asdict(self), "mean": list(self.mean), "scale": list(self.scale)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ImageEncoder":
        return cls(int(config["size"]), _three(config["mean"]), _three(config["scale"]))

    def save(self, folder: Path) -> None:
        """Writes image_encoder.json."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CONFIG).write_text(json.dumps(self.to_config(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_folder(cls, folder: Path) -> "ImageEncoder":
        """Reads what `save` wrote. Raises DataError."""
        try:
            return cls.from_config(json.loads((folder / _CONFIG).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(
                f"{folder}: no usable {_CONFIG} ({type(e).__name__}); export the run again"
            ) from None

    def _pixels(self, path: str) -> np.ndarray:
        try:
            with Image.open(path) as image:
                # fit crops before it scales, so a very long image never becomes a huge one
                square = ImageOps.fit(
                    _rgb(ImageOps.exif_transpose(image)), (self.size, self.size), Image.Resampling.BILINEAR
                )
        except _BROKEN as e:
            raise _unreadable(path, e) from None
        values = (np.asarray(square, dtype=np.float32) - np.array(self.mean, dtype=np.float32)) / np.array(
            self.scale, dtype=np.float32
        )
        return np.ascontiguousarray(values.transpose(2, 0, 1))


def _rgb(image: Image.Image) -> Image.Image:
    """Three channels of 8 bits.

    Grey values of 16 bits are divided down, since Pillow's own conversion clips them at 255.
    """
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image, dtype=np.int64) // 257, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    return image.convert("RGB")


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(v) for v in values)
    return red, green, blue
