"Files as damage or an attacker leaves them."
import warnings
from pathlib import Path


def sparse_tiff(path, side=100_000):
    "Write a valid TIFF of side x side pixels, none of which is stored."
    import rasterio
    profile = dict(driver='GTiff', height=side, width=side, count=3, dtype='uint8', sparse_ok=True)
    blocks = dict(tiled=True, blockxsize=4096, blockysize=4096)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with rasterio.open(path, 'w', **profile, **blocks): pass


def flip_bit(path, at=-1):
    "Change one bit of a file; `at` is the position of its byte."
    data = bytearray(Path(path).read_bytes())
    data[at] ^= 1
    Path(path).write_bytes(data)
