# SPDX-License-Identifier: Apache-2.0
"""What lies in a run's directory and who may touch it: checkpoints, records, locks, warnings."""
