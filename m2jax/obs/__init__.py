# SPDX-License-Identifier: Apache-2.0
"""What a run says of itself: rows for machines, one line for people."""
