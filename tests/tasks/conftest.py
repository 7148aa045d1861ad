# SPDX-License-Identifier: Apache-2.0
"""pymilvus is imported before any test runs.

Its import sets logging up anew, which closes all handlers there are, and absl's closes the stream
it writes to unless that is sys.stderr. Within a test that captures, it is not: pytest would lose
its own.
"""

import contextlib

with contextlib.suppress(ImportError):
    import pymilvus  # noqa: F401
