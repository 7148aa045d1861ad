# SPDX-License-Identifier: Apache-2.0
"""Pure architecture: modules with logical axes, no data, no optimiser, no time."""
