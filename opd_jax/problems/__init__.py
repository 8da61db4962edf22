# SPDX-License-Identifier: Apache-2.0
"""Problems, their text and their answers: data sets, tokenizers, verification, intervals."""
