# SPDX-License-Identifier: Apache-2.0
"""Many labels per image, learned from text alone (TAI-Adapter, arXiv 2312.04160)."""
