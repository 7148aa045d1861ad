# SPDX-License-Identifier: Apache-2.0
"""Instance retrieval that can be upgraded: metrics, compatible training, the vector database."""
