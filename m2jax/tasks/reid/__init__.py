# SPDX-License-Identifier: Apache-2.0
"""Re-identification of persons and objects: metrics, samplers, DC-Former, readers."""
