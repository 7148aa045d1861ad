# SPDX-License-Identifier: Apache-2.0
"""Time: the state of a run, its step, its loop, and the story that ties them together."""
