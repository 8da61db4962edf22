# SPDX-License-Identifier: Apache-2.0
"""Arms and seeds compared: what a sweep's runs say together."""
