# SPDX-License-Identifier: Apache-2.0
"""Proves a run before it is paid for: compiles the real step for machines that are not there."""
