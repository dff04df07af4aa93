/* pagedattn: attention over a paged KV cache.  The C ABI.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 * Every operation takes one argument struct and a caller-owned error buffer, and returns a status.  A call
 * validates everything before it writes or launches anything; a failed call has changed nothing.  The same call
 * serves host memory (computed by the CPU backend, finished on return) and CUDA memory (enqueued on `stream`,
 * finished when the stream gets there); the device of the tensors decides which.
 *
 * Names of dimensions: T query tokens of the whole batch, B sequences, Hq query heads, Hkv KV heads, D head
 * dimension, N blocks of the cache, S tokens a block.
 *
 * The structs grow only at their end.  Initialise each with its *_init function, which fills `struct_size` and the
 * defaults; a library newer than the caller's header then knows which fields the caller has.
 */
#ifndef PAGEDATTN_H_
#define PAGEDATTN_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define PA_API
#else
#define PA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/** \brief Largest number of dimensions of a tensor. */
#define PA_MAX_DIMS 5
/** \brief Bytes of an error message, the terminating zero included. */
#define PA_ERROR_MESSAGE_SIZE 1024

/** \brief What a call returns; 0 is success. */
typedef enum pa_status {
  PA_OK = 0,
  PA_ERROR_INVALID_ARGUMENT = 1, /**< an argument is wrong: nothing was launched or written */
  PA_ERROR_UNSUPPORTED = 2,      /**< the arguments are consistent, but this build or device cannot serve them */
  PA_ERROR_NO_DEVICE = 3,        /**< CUDA memory was given, and no usable CUDA device or driver was found */
  PA_ERROR_OUT_OF_MEMORY = 4,    /**< the operation's own scratch memory could not be allocated */
  PA_ERROR_CUDA = 5,             /**< the CUDA runtime reported an error */
  PA_ERROR_INTERNAL = 6          /**< a bug in pagedattn */
} pa_status;

/** \brief Element types.  Values are part of the ABI. */
typedef enum pa_dtype {
  PA_DTYPE_NONE = 0,
  PA_FLOAT32 = 1,
  PA_FLOAT16 = 2,
  PA_BFLOAT16 = 3,
  PA_FLOAT8_E4M3 = 4, /**< OCP e4m3 "fn": no infinities, largest value 448 */
  PA_FLOAT8_E5M2 = 5, /**< OCP e5m2: largest finite value 57344 */
  PA_INT32 = 6,
  PA_INT64 = 7,
  PA_UINT8 = 8,   /**< storage of an 8-bit float that an argument names */
  PA_UINT16 = 9,  /**< storage of a 16-bit float that an argument names */
  PA_FLOAT64 = 10 /**< known so that errors can name it; no operation takes it */
} pa_dtype;

/** \brief Where memory lives (the values are DLPack's). */
typedef enum pa_device_type { PA_CPU = 1, PA_CUDA = 2, PA_CUDA_HOST = 3 } pa_device_type;

/** \brief `pa_tensor.flags`: the memory must not be written. */
#define PA_TENSOR_READONLY 1u

/** \brief A strided view of memory.  Strides are in elements.  PA_CUDA_HOST is page-locked host memory. */
typedef struct pa_tensor {
  void *data;
  int32_t dtype;       /**< a pa_dtype */
  int32_t device_type; /**< a pa_device_type */
  int32_t device_id;
  int32_t ndim;
  uint32_t flags;
  int64_t shape[PA_MAX_DIMS];
  int64_t strides[PA_MAX_DIMS];
} pa_tensor;

/** \brief Caller-owned buffer that receives the message of a failed call.  May be NULL wherever it is taken. */
typedef struct pa_error {
  char message[PA_ERROR_MESSAGE_SIZE];
} pa_error;

/* ---- paged attention ------------------------------------------------------------------------------------- */

/** \brief Arguments of pa_paged_attention.  Tensors marked "optional" may be NULL. */
typedef struct pa_attention_args {
  size_t struct_size;
  const pa_tensor *q;               /**< [T, Hq, D] float32, float16, bfloat16 or float8 */
  const pa_tensor *k_cache;         /**< [N, S, Hkv, D] of q's type, or float8 with a 16-bit q */
  const pa_tensor *v_cache;         /**< like k_cache; its strides may differ */
  const pa_tensor *block_tables;    /**< [B, max_blocks] int32; entries past ceil(seq_len / S) are never read */
  const pa_tensor *seq_lens;        /**< [B] int32: tokens in the cache of each sequence, its query tokens included */
  const pa_tensor *query_start_loc; /**< optional [B + 1] int32, non-decreasing from 0 to T; NULL: one token each */
  const pa_tensor *alibi_slopes;    /**< optional [Hq] float32 */
  const pa_tensor *sinks;           /**< optional [Hq] float32: exp(sink) is added to the softmax denominator */
  const pa_tensor *k_scale;         /**< optional [1] or [Hkv] float32: stored K times this is K; float8 caches only */
  const pa_tensor *v_scale;         /**< optional, like k_scale */
  const pa_tensor *out;             /**< [T, Hq, D] of q's type, or float16 or bfloat16 with a float8 q; must not
                                         overlap an input */
  const pa_tensor *lse;             /**< optional [T, Hq] float32 output: natural log of the denominator */
  const pa_tensor *workspace;       /**< optional [bytes] uint8, CUDA only; see pa_paged_attention_workspace_size */
  double scale;                     /**< of the scores; NaN (the default): 1 / sqrt(D) */
  double softcap;                   /**< > 0: scores become softcap * tanh(score / softcap); 0: off */
  double k_scale_value;             /**< used where k_scale is NULL; default 1 */
  double v_scale_value;             /**< used where v_scale is NULL; default 1 */
  int64_t window;                   /**< >= 1: only the last `window` of the visible keys; 0: off */
  int32_t causal;                   /**< 1 (default): row r of n at position L - n + r sees keys up to itself */
  int32_t kv_dtype;                 /**< what uint8 or uint16 storage holds; PA_DTYPE_NONE: the tensors say */
  int32_t deterministic;            /**< 1: the bits of a sequence do not depend on the rest of the batch */
  int32_t check;                    /**< 1: verify index values on the GPU too (synchronises); 0: no; -1: as
                                         PAGEDATTN_CHECK says.  On the CPU they are always verified */
  void *stream;                     /**< cudaStream_t; ignored for host memory */
  int64_t max_query_len;            /**< query tokens that no sequence has more of; 0: not known.  Where it is small,
                                         or what all have, fewer kernels are launched.  One with more is an error
                                         where index values are verified, and gets no results elsewhere */
  const pa_tensor *q_scale;         /**< optional [1] or [Hkv] float32: stored q times this is q; float8 q only */
  double q_scale_value;             /**< used where q_scale is NULL; default 1 */
} pa_attention_args;

/** \brief Fills the defaults. */
PA_API void pa_attention_args_init(pa_attention_args *args);

/** \brief Attention of every query token over its sequence's paged keys and values.
 *
 * One call serves decode, speculative decode, chunked prefill, full prefill and any mix of them.  A row that sees no
 * key gives zeros and a log-sum-exp of minus infinity, or of its sink where there are sinks.  Slots past a sequence's
 * length never reach the output, whatever they hold. */
PA_API pa_status pa_paged_attention(const pa_attention_args *args, pa_error *error);

/** \brief Bytes of workspace that let pa_paged_attention run on the GPU without allocating.
 *
 * The size depends on shapes, types and the device, not on the lengths.  Its contents must be zero when it is first
 * used; every call leaves them fit for the next.  Calls that may run at the same time need workspaces of their own.
 * With `workspace` NULL the call takes memory from the stream-ordered allocator, out of a pool that the library keeps.
 * 0 bytes for host memory. */
PA_API pa_status pa_paged_attention_workspace_size(const pa_attention_args *args, size_t *bytes, pa_error *error);

/* ---- merging partial attention --------------------------------------------------------------------------- */

/** \brief Arguments of pa_merge_states: partial results over disjoint sets of keys. */
typedef struct pa_merge_states_args {
  size_t struct_size;
  int64_t num_parts;     /**< >= 1 */
  const pa_tensor *outs; /**< array of num_parts tensors [T, Hq, D], all of one type */
  const pa_tensor *lses; /**< array of num_parts tensors [T, Hq] float32 */
  const pa_tensor *out;  /**< [T, Hq, D] of the parts' type */
  const pa_tensor *lse;  /**< optional [T, Hq] float32 output */
  void *stream;
} pa_merge_states_args;

PA_API void pa_merge_states_args_init(pa_merge_states_args *args);
/** \brief Joins partial attention results by their log-sum-exp (cascade and context-parallel attention). */
PA_API pa_status pa_merge_states(const pa_merge_states_args *args, pa_error *error);

/* ---- writing, copying, gathering and swapping blocks ----------------------------------------------------- */

/** \brief Arguments of pa_reshape_and_cache. */
typedef struct pa_reshape_and_cache_args {
  size_t struct_size;
  const pa_tensor *key;     /**< array of num_layers tensors [T', Hkv, D] float32, float16 or bfloat16, of one
                                 shape, type and strides; T' >= T, rows past T are ignored */
  const pa_tensor *value;   /**< like key; its strides may differ */
  const pa_tensor *k_cache; /**< array of num_layers tensors [N, S, Hkv, D] of key's type, or float8 (any key type),
                                 of one shape, type and strides */
  const pa_tensor *v_cache; /**< like k_cache; its strides may differ */
  const pa_tensor *slot_mapping; /**< [T] int64: block * S + offset; negative: skipped; no slot twice.  All layers' */
  const pa_tensor *k_scale; /**< optional [1] or [Hkv] float32, or of several layers [num_layers, 1] or [num_layers,
                                 Hkv]: K is divided by it and saturated; float8 only */
  const pa_tensor *v_scale; /**< optional, like k_scale */
  double k_scale_value;     /**< used where k_scale is NULL; default 1 */
  double v_scale_value;     /**< used where v_scale is NULL; default 1 */
  int32_t kv_dtype;         /**< what uint8 or uint16 storage holds */
  int32_t check;            /**< as in pa_attention_args */
  void *stream;
  int64_t num_layers; /**< default 1 */
} pa_reshape_and_cache_args;

PA_API void pa_reshape_and_cache_args_init(pa_reshape_and_cache_args *args);
/** \brief Writes the keys and values of new tokens into their slots, quantising where the cache is float8.
 *
 * Several layers take one launch, like one (up to 96). */
PA_API pa_status pa_reshape_and_cache(const pa_reshape_and_cache_args *args, pa_error *error);

/** \brief Arguments of pa_rope_and_cache. */
typedef struct pa_rope_and_cache_args {
  size_t struct_size;
  const pa_tensor *key;          /**< [T', Hkv, D] float32, float16 or bfloat16, D even; T' >= T */
  const pa_tensor *value;        /**< like key */
  const pa_tensor *k_cache;      /**< [N, S, Hkv, D] of key's type, or float8 (any key type) */
  const pa_tensor *v_cache;      /**< like k_cache; its strides may differ */
  const pa_tensor *slot_mapping; /**< [T] int64: block * S + offset; negative: skipped; no slot twice */
  const pa_tensor *positions; /**< [T] int64 or int32, 0 <= position < max_position, also where the slot is negative */
  const pa_tensor *cos_sin;   /**< [max_position, R] float32, float16 or bfloat16: R / 2 cosines, then R / 2 sines; R
                                   is even and at most D, and the dimensions from R on are not rotated */
  const pa_tensor *query;     /**< optional [T', Hq, D] of key's type */
  const pa_tensor *query_out; /**< [T', Hq, D]: the rotated query, of which rows past T are left alone.  May be query;
                                   must be given with it */
  const pa_tensor *k_scale;   /**< optional [1] or [Hkv] float32: K is divided by it and saturated; float8 only */
  const pa_tensor *v_scale;   /**< optional, like k_scale */
  double k_scale_value;       /**< used where k_scale is NULL; default 1 */
  double v_scale_value;       /**< used where v_scale is NULL; default 1 */
  int32_t interleaved;        /**< 1: dimensions 2 i and 2 i + 1 are a pair; 0 (default): i and i + R / 2 */
  int32_t kv_dtype;           /**< what uint8 or uint16 storage holds */
  int32_t check;              /**< as in pa_attention_args */
  void *stream;
} pa_rope_and_cache_args;

PA_API void pa_rope_and_cache_args_init(pa_rope_and_cache_args *args);
/** \brief Rotates keys by their positions (rotary embedding) on their way into the cache, writes the values beside
 * them, and rotates queries.
 *
 * A pair (x, y) becomes (x cos - y sin, y cos + x sin), in float32; the result is rounded once, to the cache's or the
 * query's type.  The key itself is not changed. */
PA_API pa_status pa_rope_and_cache(const pa_rope_and_cache_args *args, pa_error *error);

/** \brief Arguments of pa_copy_blocks. */
typedef struct pa_copy_blocks_args {
  size_t struct_size;
  int64_t num_caches;             /**< K and V of all layers */
  const pa_tensor *caches;        /**< array of num_caches tensors [N, ...], of one shape, type and strides */
  const pa_tensor *block_mapping; /**< [M, 2] int64 (source, destination), on the caches' device.  No destination
                                       twice, and no destination that is also a source */
  int32_t check;
  void *stream;
} pa_copy_blocks_args;

PA_API void pa_copy_blocks_args_init(pa_copy_blocks_args *args);
/** \brief Copies whole blocks within caches (copy-on-write), all caches in one launch. */
PA_API pa_status pa_copy_blocks(const pa_copy_blocks_args *args, pa_error *error);

/** \brief Arguments of pa_swap_blocks. */
typedef struct pa_swap_blocks_args {
  size_t struct_size;
  int64_t num_caches;
  const pa_tensor *src;           /**< array of num_caches tensors [N_src, ...] */
  const pa_tensor *dst;           /**< array of num_caches tensors [N_dst, ...]; one block has src's shape and type */
  const pa_tensor *block_mapping; /**< [M, 2] int64 (source, destination) in host memory; always verified */
  void *stream;
  void *event; /**< optional cudaEvent_t, recorded on `stream` behind the copies; needs a device on either side */
} pa_swap_blocks_args;

PA_API void pa_swap_blocks_args_init(pa_swap_blocks_args *args);
/** \brief Copies blocks between host and device, device and device, or host and host.
 *
 * With a device on either side the copies are enqueued on `stream`; host memory must then stay alive until the stream
 * has passed them, and is moved fast and asynchronously only if it is page-locked.  Memory of pa_host_alloc may be
 * freed at any time.  The mapping has been read on return. */
PA_API pa_status pa_swap_blocks(const pa_swap_blocks_args *args, pa_error *error);

/** \brief Allocates page-locked host memory that CUDA device `device` can reach: the host's side of pa_swap_blocks. */
PA_API pa_status pa_host_alloc(size_t bytes, int32_t device, void **data, pa_error *error);
/** \brief Frees what pa_host_alloc gave; NULL is ignored.
 *
 * Waits for every pa_swap_blocks that uses the memory, on whatever stream; of other uses, and of swaps captured in a
 * graph, it knows nothing. */
PA_API pa_status pa_host_free(void *data, pa_error *error);

/** \brief Arguments of pa_gather_kv. */
typedef struct pa_gather_kv_args {
  size_t struct_size;
  const pa_tensor *k_cache;       /**< [N, S, Hkv, D] */
  const pa_tensor *v_cache;       /**< like k_cache; its strides may differ */
  const pa_tensor *block_tables;  /**< [B, max_blocks] int32 */
  const pa_tensor *seq_lens;      /**< [B] int32: tokens up to here are gathered */
  const pa_tensor *seq_starts;    /**< optional [B] int32: tokens from here on; NULL: from 0 */
  const pa_tensor *out_start_loc; /**< optional [B + 1] int32 rows of `k_out`; NULL: sequences follow each other */
  const pa_tensor *k_scale;       /**< optional [1] or [Hkv] float32; float8 caches with a wider output only */
  const pa_tensor *v_scale;       /**< optional, like k_scale */
  const pa_tensor *k_out;         /**< [R, Hkv, D]; the cache's type, or float32/float16/bfloat16 from a float8 cache.
                                       Rows that no token fills are left as they were */
  const pa_tensor *v_out;         /**< like k_out */
  double k_scale_value;
  double v_scale_value;
  int32_t kv_dtype;
  int32_t check;
  void *stream;
} pa_gather_kv_args;

PA_API void pa_gather_kv_args_init(pa_gather_kv_args *args);
/** \brief Copies pages back to contiguous keys and values, dequantising where the output is wider than the cache. */
PA_API pa_status pa_gather_kv(const pa_gather_kv_args *args, pa_error *error);

/* ---- what was built, what is here ------------------------------------------------------------------------ */

/** \brief Version of the library, a static string. */
PA_API const char *pa_version(void);
/** \brief Name of a status, a static string. */
PA_API const char *pa_status_name(pa_status status);

/** \brief Facts of the build and of this machine's processor.  Strings are static. */
typedef struct pa_build_info {
  size_t struct_size;
  const char *version;
  const char *compiler;
  int32_t cuda_built;       /**< 1 if the CUDA kernels are in this library */
  int32_t cuda_version;     /**< of the compiler, as 1000 * major + 10 * minor; 0 without CUDA */
  const char *cuda_archs;   /**< CMake's list, as "80-real;90a-real;90-virtual"; "" without CUDA */
  const char *cpu_isas;     /**< instruction sets compiled in, as "generic;avx2;avx512" */
  const char *cpu_isa;      /**< the one chosen on this processor (PAGEDATTN_CPU_ISA forces another) */
  const char *kernel_table; /**< which kernel serves which case: lines of "operation<TAB>case<TAB>kernel" */
} pa_build_info;

/** \brief Fills `info`, whose struct_size the caller has set.  Touches no GPU. */
PA_API pa_status pa_get_build_info(pa_build_info *info, pa_error *error);

/** \brief Facts of a CUDA device. */
typedef struct pa_device_info {
  size_t struct_size;
  char name[256];
  int32_t compute_capability; /**< 10 * major + minor */
  int32_t num_multiprocessors;
  int32_t driver_version;  /**< as cudaDriverGetVersion gives it */
  int32_t runtime_version; /**< as cudaRuntimeGetVersion gives it */
  int64_t total_memory;    /**< bytes */
  int64_t l2_cache_size;   /**< bytes */
} pa_device_info;

/** \brief Number of CUDA devices; an error says why there is none. */
PA_API pa_status pa_cuda_device_count(int32_t *count, pa_error *error);
/** \brief Fills `info`, whose struct_size the caller has set. */
PA_API pa_status pa_cuda_device_info(int32_t device, pa_device_info *info, pa_error *error);

/** \brief The kernel that the calling thread's last successful operation used; "" before the first. */
PA_API const char *pa_last_kernel(void);

/** \brief Threads of the CPU backend.  Initially PAGEDATTN_NUM_THREADS, else OMP_NUM_THREADS, else the CPUs this
 * process may run on; an error where the first is no number of threads. */
PA_API pa_status pa_get_num_threads(int32_t *num_threads, pa_error *error);
PA_API pa_status pa_set_num_threads(int32_t num_threads, pa_error *error);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* PAGEDATTN_H_ */
