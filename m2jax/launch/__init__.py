# SPDX-License-Identifier: Apache-2.0
"""Jobs for other people's schedulers: one description, one template for each."""
