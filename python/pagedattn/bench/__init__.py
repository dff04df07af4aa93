# SPDX-License-Identifier: Apache-2.0
"""Measuring attention honestly: shapes, inputs, clocks, ceilings, and other people's attention beside ours.

``pagedattn bench`` is its command; the asv suite uses the same parts, from its own checkout, so that it can measure an
older commit with the clocks of today.  Of the package these call the public functions and ``pagedattn._device`` alone.
"""
