# SPDX-License-Identifier: Apache-2.0
"""Which parts of a video were copied from which parts of another: VCSL's metric, SSAN's system."""
