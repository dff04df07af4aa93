/* The C ABI at its smallest: one query token attends to three keys that lie in one block.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 * All keys are equal, so the answer is the mean of the values: (1 + 2 + 6) / 3 = 3 in every element.
 */
#include <math.h>
#include <pagedattn/pagedattn.h>
#include <stdio.h>

enum { HEAD_DIM = 8, BLOCK_SIZE = 4 };

/* A contiguous tensor of up to four dimensions in host memory. */
static pa_tensor host_tensor(void *data, pa_dtype dtype, int ndim, int64_t s0, int64_t s1, int64_t s2, int64_t s3) {
  const int64_t shape[4] = {s0, s1, s2, s3};
  pa_tensor t = {0};
  t.data = data;
  t.dtype = (int32_t)dtype;
  t.device_type = PA_CPU;
  t.ndim = ndim;
  int64_t stride = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    t.shape[i] = shape[i];
    t.strides[i] = stride;
    stride *= shape[i];
  }
  return t;
}

int main(void) {
  float q[HEAD_DIM], out[HEAD_DIM];
  float k[BLOCK_SIZE][HEAD_DIM], v[BLOCK_SIZE][HEAD_DIM];
  const float values[BLOCK_SIZE] = {1.0f, 2.0f, 6.0f, NAN}; /* the fourth slot is past the sequence: never read */
  int32_t block_table[1] = {0}, seq_len[1] = {3};
  for (int d = 0; d < HEAD_DIM; ++d) {
    q[d] = 1.0f;
    for (int token = 0; token < BLOCK_SIZE; ++token) {
      k[token][d] = 0.5f;
      v[token][d] = values[token];
    }
  }

  const pa_tensor q_tensor = host_tensor(q, PA_FLOAT32, 3, 1, 1, HEAD_DIM, 1);
  const pa_tensor out_tensor = host_tensor(out, PA_FLOAT32, 3, 1, 1, HEAD_DIM, 1);
  const pa_tensor k_cache = host_tensor(k, PA_FLOAT32, 4, 1, BLOCK_SIZE, 1, HEAD_DIM);
  const pa_tensor v_cache = host_tensor(v, PA_FLOAT32, 4, 1, BLOCK_SIZE, 1, HEAD_DIM);
  const pa_tensor block_tables = host_tensor(block_table, PA_INT32, 2, 1, 1, 1, 1);
  const pa_tensor seq_lens = host_tensor(seq_len, PA_INT32, 1, 1, 1, 1, 1);

  pa_attention_args args;
  pa_attention_args_init(&args);
  args.q = &q_tensor;
  args.k_cache = &k_cache;
  args.v_cache = &v_cache;
  args.block_tables = &block_tables;
  args.seq_lens = &seq_lens;
  args.out = &out_tensor;

  pa_error error;
  const pa_status status = pa_paged_attention(&args, &error);
  if (status != PA_OK) {
    fprintf(stderr, "%s: %s\n", pa_status_name(status), error.message);
    return 1;
  }
  for (int d = 0; d < HEAD_DIM; ++d) {
    if (!(fabsf(out[d] - 3.0f) < 1e-5f)) {
      fprintf(stderr, "element %d is %g, not 3\n", d, (double)out[d]);
      return 1;
    }
  }
  printf("pagedattn %s: every element is 3\n", pa_version());
  return 0;
}
