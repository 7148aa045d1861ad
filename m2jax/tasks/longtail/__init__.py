# SPDX-License-Identifier: Apache-2.0
"""Fine-grained classes on a long tail, with side information (arXiv 2207.01216, 2207.11637)."""
