# SPDX-License-Identifier: Apache-2.0
"""Models in other formats: names, layouts, hostile files, checks."""
