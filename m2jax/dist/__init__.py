# SPDX-License-Identifier: Apache-2.0
"""Where am I, who else is here: processes, mesh, and which axis of which array lies where."""
