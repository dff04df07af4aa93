# SPDX-License-Identifier: Apache-2.0
"""Measuring attention honestly: shapes, inputs, clocks, ceilings, and other people's attention beside ours.

``pagedattn bench`` is its command; the asv suite uses the same parts.  It calls the public functions of the package
alone, so that the suite can measure an older commit with the clocks of today.
"""
