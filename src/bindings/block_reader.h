// Reads blocks and nothing else: the roof that `pagedattn bench` holds attention over a paged cache to on the CPU.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>

namespace pagedattn::bindings {

// Reads the blocks `blocks` of a K and a V cache, in this order, block after block, `passes` times, on the calling
// thread and without the GIL.  Both caches are host arrays [num_blocks, ...] whose blocks are dense.  Returns what the
// bytes read sum up to as 64-bit words, so that nothing is left out; a block's last few bytes that fill no line are.
uint64_t read_blocks(const pybind11::array &k_cache, const pybind11::array &v_cache,
                     const pybind11::array_t<int32_t, pybind11::array::c_style> &blocks, int64_t passes);

}  // namespace pagedattn::bindings
