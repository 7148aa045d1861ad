# SPDX-License-Identifier: Apache-2.0
"""Bytes to sharded global batches: sources, text, images, loaders and the embedded data set."""
