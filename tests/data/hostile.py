# SPDX-License-Identifier: Apache-2.0
"""NumPy files that say what is not so, for tests."""

import struct
import zipfile


def npy(shape, descr="<f4", body=b"\0" * 64, version=1):
    """An .npy whose header says anything."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + body


def archive(file, *bodies, names=("features", "ids"), how=zipfile.ZIP_STORED):
    """An .npz with these members."""
    with zipfile.ZipFile(file, "w", how) as packed:
        for name, body in zip(names, bodies, strict=False):
            packed.writestr(f"{name}.npy", body)
    return file


TERABYTES = npy((2**20, 2**20))
