# SPDX-License-Identifier: Apache-2.0
"""Scores: zero-shot classification, retrieval, baselines, and the page that shows them."""
