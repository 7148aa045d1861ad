# SPDX-License-Identifier: Apache-2.0
"""What outlives a process: checkpoints, exported models, conversion from and to other formats."""
