"""Images as arrays: values, shape, orientation, and files that are no images."""

import numpy as np
import pytest
from PIL import Image

from fedtune.data.images import ImageEncoder, check_image
from fedtune.errors import ContractError, DataError


def saved(path, array) -> str:
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)
    return str(path)


def one(path: str, size: int = 32, **keys) -> np.ndarray:
    return ImageEncoder(size, **keys).encode([path])[0]["pixels"]


def test_an_image_of_the_right_size_is_only_rescaled(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    pixels = one(saved(tmp_path / "a.png", array))
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, array.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert (pixels.min(), pixels.max()) == (-1.0, 1.0)


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (16, 24), (64, 64)])
def test_short_side_then_centre(tmp_path, shape):
    array = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    height, width = (32 * side // min(shape) for side in shape)
    top, left = (height - 32) // 2, (width - 32) // 2
    whole = np.asarray(
        Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32
    )
    expected = whole[top : top + 32, left : left + 32].transpose(2, 0, 1) / 127.5 - 1
    # 8-bit rounding may fall to either side once per axis
    np.testing.assert_allclose(one(saved(tmp_path / "a.png", array)), expected, atol=2.01 / 127.5)


def test_a_very_long_image_stays_small(tmp_path):
    assert one(saved(tmp_path / "a.png", np.zeros((2, 20_000, 3)))).shape == (3, 32, 32)


def test_mean_and_scale_per_channel(tmp_path):
    path = saved(tmp_path / "a.png", np.full((32, 32, 3), 100))
    pixels = one(path, mean=(0.0, 50.0, 100.0), scale=(1.0, 2.0, 4.0))
    assert pixels[:, 0, 0].tolist() == [100.0, 25.0, 0.0]


def test_every_mode_becomes_three_channels(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK", "1", "LA"):
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new("RGB", (40, 40), "white").convert(mode if mode != "LA" else "L").convert(mode).save(path)
        np.testing.assert_allclose(one(str(path)), 1.0, atol=1e-6, err_msg=mode)


def test_sixteen_bit_grey_is_not_clipped(tmp_path):
    Image.fromarray(np.full((32, 32), 32896, dtype=np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_allclose(one(str(tmp_path / "a.png")), 128 / 127.5 - 1, atol=1e-6)


def test_the_exif_turn_is_applied(tmp_path):
    array = np.zeros((32, 32, 3), dtype=np.uint8)
    array[0] = 255  # the top row; orientation 3 turns the picture upside down
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    pixels = one(str(tmp_path / "a.png"))
    assert (pixels[0, 0, 0], pixels[0, -1, 0]) == (-1.0, 1.0)


def test_collate(tmp_path):
    encoder = ImageEncoder(32)
    paths = [saved(tmp_path / f"{n}.png", np.full((40, 50, 3), n)) for n in (0, 255)]
    batch = encoder.collate(encoder.encode(paths))
    assert list(batch) == ["pixels"]
    assert batch["pixels"].shape == (2, 3, 32, 32)
    assert batch["pixels"][:, 0, 0, 0].tolist() == [-1.0, 1.0]
    with pytest.raises(ContractError, match="at least one image"):
        encoder.collate([])


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"hello")
    for read in (lambda path: check_image(path), lambda path: one(str(path))):
        with pytest.raises(
            DataError, match=r"a.png: not a readable image \(.*\); replace or remove the file"
        ):
            read(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"gone.png: not a readable image"):
        one(str(tmp_path / "gone.png"))


def test_saved_and_read_again(tmp_path):
    encoder = ImageEncoder(96, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    encoder.save(tmp_path / "new")
    assert (
        ImageEncoder.from_folder(tmp_path / "new") == encoder == ImageEncoder.from_config(encoder.to_config())
    )
    with pytest.raises(DataError, match=r"no usable image_encoder.json"):
        ImageEncoder.from_folder(tmp_path)
