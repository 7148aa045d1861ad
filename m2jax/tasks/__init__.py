# SPDX-License-Identifier: Apache-2.0
"""Downstream systems on the shared backbones."""
