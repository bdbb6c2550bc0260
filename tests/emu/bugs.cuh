// Kernels that are right while `bug` is `none`, and otherwise hold the one bug that it names; for bugs.py.
#include "ptx.h"

enum Bug {
  none,
  read_past_array,
  write_past_array,
  write_past_static_shared,
  pointer_past_static_shared,
  write_past_dynamic_shared,
  read_past_dynamic_shared,
  write_past_local,
  wild_pointer,
  null_pointer,
  misaligned_vector,
  misaligned_instruction,
  shared_as_global,
  no_barrier,
  no_barrier_before_reuse,
  two_barriers,
  no_syncwarp_after_copy,
  no_syncwarp_before_reuse,
  no_wait_for_copy,
  wait_leaves_one_copy_too_many,
  copy_left_pending,
  unwritten_shared,
  shuffle_by_half_a_warp,
  shuffles_at_two_lines,
  shuffle_after_exit,
  shuffle_from_outside_the_mask,
  lane_outside_its_mask,
  mask_beyond_the_block,
  barrier_while_others_shuffle,
  sum_without_atomics,
  blocks_share_an_element,
  flag_without_a_fence,
  trust_in_block_order,
  never_set_flag,
  trap,
  endless_recursion
};

struct Arguments {
  const float *x;  // (rows, columns)
  float *sums;     // (columns)
  int *flags;      // (1 + blocks), zero: the next number, and which blocks are done
  long long rows, columns;
  int bug;
};
#define BUG(name) (a.bug == name)

// ---------------------------------------------------------------------------------------------------------------------
// sums[j] = x[0][j] + x[1][j] + ... A block of 4 warps sums 32 columns. Each warp takes every fourth row, by way of its
// two buffers in dynamic shared memory, which its first 8 lanes fill.

constexpr int warps = 4, buffers = 2;

extern "C" __global__ void __launch_bounds__(32 * warps) column_sums(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  __shared__ float part[warps][33];
  __shared__ float unwritten;
  const int lane = threadIdx.x, warp = threadIdx.y;
  float *const buffer = (float *)dynamic + warp * buffers * 32;
  const float *const column = a.x + blockIdx.x * 32;

  const auto fetch = [&](int i, long long row) {
    if (lane < 8 && row < a.rows) cp_async_16(buffer + i * 32 + lane * 4, column + row * a.columns + lane * 4);
    cp_async_commit();
  };
  float sum = 0.0f;
  fetch(0, warp);
  int i = 0;
  for (long long row = warp; row < a.rows; row += warps, i ^= 1) {
    fetch(i ^ 1, row + warps);
    if (BUG(wait_leaves_one_copy_too_many))
      cp_async_wait<2>();
    else if (!BUG(no_wait_for_copy))
      cp_async_wait<1>();
    if (!BUG(no_syncwarp_after_copy)) __syncwarp();
    sum += buffer[i * 32 + lane];
    if (!BUG(no_syncwarp_before_reuse)) __syncwarp();
  }
  cp_async_wait<0>();
  if (BUG(copy_left_pending)) fetch(0, warp);

  part[warp][lane] = sum;
  if (BUG(shuffle_after_exit) && lane == 3) return;
  if (BUG(barrier_while_others_shuffle) && lane == 5) __syncthreads();
  if (BUG(barrier_while_others_shuffle)) __syncwarp();
  if (BUG(two_barriers) && warp == 1)
    __syncthreads();
  else if (!BUG(no_barrier))
    __syncthreads();
  if (BUG(no_barrier_before_reuse)) {
    if (warp == 0)
      part[3][lane] = 0.0f;
    else
      (void)*(volatile float *)&part[3][lane];
    __syncthreads();
  }

  for (int j = warp; j < 32; j += warps) {
    sum = lane < warps ? part[lane][j] : 0.0f;
    if (BUG(shuffle_by_half_a_warp) && lane >= 16) continue;
    const unsigned mask = BUG(lane_outside_its_mask)           ? 0xffff0000u
                          : BUG(shuffle_from_outside_the_mask) ? 1u << lane
                                                               : 0xffffffffu;
    if (BUG(shuffles_at_two_lines) && lane > 7)
      sum += __shfl_down_sync(mask, sum, 2);
    else
      sum += __shfl_down_sync(mask, sum, 2);
    sum += __shfl_down_sync(mask, sum, 1);
    if (lane == 0) a.sums[blockIdx.x * 32 + j] = BUG(unwritten_shared) ? unwritten : sum;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The same in another way: a block of 40 threads takes all of up to 40 columns, and every gridDim.x-th row. It waits
// for the block before it, and adds its rows to what that one left in `sums`. As blocks may start in any order, each
// takes a number when it starts.

static __device__ float recurse(volatile float *x, int depth) {
  volatile float here[64];
  here[depth & 63] = x[0];
  return recurse(here, depth + 1) + here[depth & 31];
}

extern "C" __global__ void rows_in_turn(const __grid_constant__ Arguments a) {
  __shared__ float shared[40];
  __shared__ int number;
  const int j = threadIdx.x;
  float local[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  volatile float kept = 0.0f;
  shared[j] = 0.0f;

  if (BUG(read_past_array)) kept = a.x[a.rows * a.columns + j];
  if (BUG(write_past_array)) a.sums[a.columns + j] = 0.0f;
  if (BUG(write_past_static_shared)) shared[j + 1] = 1.0f;
  if (BUG(pointer_past_static_shared)) *(&shared[0] + j + 1) = 1.0f;
  if (BUG(write_past_dynamic_shared) || BUG(read_past_dynamic_shared)) {
    extern __shared__ __align__(16) unsigned char dynamic[];
    if (BUG(write_past_dynamic_shared)) ((float *)dynamic)[a.rows] = 1.0f;
    if (BUG(read_past_dynamic_shared)) kept = ((float *)dynamic)[a.rows];
  }
  if (BUG(write_past_local)) {
    float *volatile p = local;  // the compiler does not know what it points to
    p[4 + (j & 1)] = 1.0f;
  }
  if (BUG(wild_pointer)) kept = *(const float *)((unsigned long long)a.x | 1ull << 62);
  if (BUG(null_pointer)) kept = *(const float *)(a.rows - a.rows);
  if (BUG(misaligned_vector)) kept = (*(const float4 *)(a.x + 1)).x;
  if (BUG(misaligned_instruction)) kept = load_once((const float2 *)(a.x + 1)).x;
  if (BUG(shared_as_global)) kept = load_once(shared + j);
  if (BUG(mask_beyond_the_block)) __syncwarp(0xffffffffu);
  if (BUG(sum_without_atomics)) a.sums[0] += 0.0f;
  if (BUG(trap)) __trap();
  if (BUG(endless_recursion)) kept = recurse(&kept, 0);

  if (j == 0) number = BUG(trust_in_block_order) ? (int)blockIdx.x : atomicAdd(&a.flags[0], 1);
  __syncthreads();
  const int block = number;
  if (block > 0 && !BUG(blocks_share_an_element)) {
    while (atomicAdd(&a.flags[block], 0) == 0 || BUG(never_set_flag)) __nanosleep(100);
    if (!BUG(flag_without_a_fence)) __threadfence();
  }
  if (j < a.columns) {
    float sum = block == 0 ? 0.0f : a.sums[j];
    for (long long row = block; row < a.rows; row += gridDim.x) sum += a.x[row * a.columns + j];
    a.sums[j] = sum;
  }
  __syncthreads();
  if (j == 0) {
    if (!BUG(flag_without_a_fence)) __threadfence();
    atomicExch(&a.flags[1 + block], 1);
  }
}
