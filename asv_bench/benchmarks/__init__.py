"""Benchmarks of pagedattn: one file an area, one class a question, the same random data in every run.

SPDX-License-Identifier: Apache-2.0
"""
