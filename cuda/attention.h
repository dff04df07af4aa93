// Which attention kernel serves which case.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace pagedattn::cuda {

// Lines of "paged_attention\tcase\tkernel\n", a static string.
const char *attention_kernel_table();

}  // namespace pagedattn::cuda
