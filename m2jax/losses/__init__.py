# SPDX-License-Identifier: Apache-2.0
"""Objectives as mathematics on arrays: no model, no data, no trainer."""
