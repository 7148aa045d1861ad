# SPDX-License-Identifier: Apache-2.0
"""What reading an .npz file that may come from anywhere can raise."""

import struct
import tokenize
import zipfile
import zlib

# NumPy and zipfile on a file that is cut, changed, or another: not of one kind.
DAMAGED = (
    *(OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, IndexError),
    *(NotImplementedError, RuntimeError, MemoryError, OverflowError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError, struct.error),
)
