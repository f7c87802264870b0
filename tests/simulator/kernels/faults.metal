// Kernels with one mistake each. The simulator must find every one.

#include <metal_stdlib>
using namespace metal;

// Reads (writes) `by` elements off its own.
template <typename T>
[[kernel]] void read_beyond(const device T* in [[buffer(0)]], device T* out [[buffer(1)]],
                            constant int& by [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  out[i] = in[int(i) + by];
}

template <typename T>
[[kernel]] void write_beyond(const device T* in [[buffer(0)]], device T* out [[buffer(1)]],
                             constant int& by [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  out[int(i) + by] = in[i];
}

// Writes an input, past its const.
[[kernel]] void write_input(const device float* in [[buffer(0)]], device float* out [[buffer(1)]],
                            uint i [[thread_position_in_grid]]) {
  const_cast<device float*>(in)[i] = out[i];
}

// Reads what another thread wrote. `order`: 0 no barrier, 1 one that orders device memory only,
// 2 one within simdgroups, 3 the right one.
template <int order>
[[kernel]] void neighbour(const device float* in [[buffer(0)]], device float* out [[buffer(1)]],
                          constant uint& distance [[buffer(2)]],
                          uint i [[thread_index_in_threadgroup]],
                          uint3 threads [[threads_per_threadgroup]]) {
  threadgroup float shared[1024];
  shared[i] = in[i];
  if (order == 1) {
    threadgroup_barrier(mem_flags::mem_device);
  } else if (order == 2) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
  } else if (order == 3) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  out[i] = shared[(i + distance) % threads.x];
}

// Overwrites what others may not have read yet.
[[kernel]] void overwrite(const device float* in [[buffer(0)]], device float* out [[buffer(1)]],
                          uint i [[thread_index_in_threadgroup]],
                          uint3 threads [[threads_per_threadgroup]]) {
  threadgroup float shared[1024];
  shared[i] = in[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float other = shared[(i + 32) % threads.x];
  shared[i] = other + 1.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = shared[i];
}

// Every threadgroup adds to one element.
[[kernel]] void race_between_threadgroups(const device float* in [[buffer(0)]],
                                          device float* out [[buffer(1)]],
                                          uint group [[threadgroup_position_in_grid]]) {
  out[0] += in[group];
}

// Half of the threads reach the barrier.
[[kernel]] void half_at_barrier(const device float* in [[buffer(0)]],
                                device float* out [[buffer(1)]],
                                uint i [[thread_index_in_threadgroup]],
                                uint3 threads [[threads_per_threadgroup]]) {
  if (i < threads.x / 2) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  out[i] = in[i];
}

// All threads reach a barrier, but not the same one.
[[kernel]] void two_barriers(const device float* in [[buffer(0)]], device float* out [[buffer(1)]],
                             uint i [[thread_index_in_threadgroup]]) {
  if (i % 2 == 0) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  } else {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  out[i] = in[i];
}

// Threads past the end return before a barrier.
[[kernel]] void return_early(const device float* in [[buffer(0)]], device float* out [[buffer(1)]],
                             constant uint& size [[buffer(2)]],
                             uint i [[thread_index_in_threadgroup]]) {
  if (i >= size) {
    return;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = in[i];
}

// Half of each simdgroup reduces while the rest goes on to the barrier.
[[kernel]] void diverged_sum(const device float* in [[buffer(0)]], device float* out [[buffer(1)]],
                             uint i [[thread_index_in_threadgroup]],
                             uint lane [[thread_index_in_simdgroup]]) {
  float x = in[i];
  if (lane < 16) {
    x = simd_sum(x);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = x;
}

// The two halves of a simdgroup reduce at different places.
[[kernel]] void two_sums(const device float* in [[buffer(0)]], device float* out [[buffer(1)]],
                         uint i [[thread_index_in_threadgroup]],
                         uint lane [[thread_index_in_simdgroup]]) {
  if (lane < 16) {
    out[i] = simd_sum(in[i]);
  } else {
    out[i] = simd_max(in[i]);
  }
}

// Reads from a lane that has returned, or that a short simdgroup lacks.
[[kernel]] void shuffle_from_inactive(const device float* in [[buffer(0)]],
                                      device float* out [[buffer(1)]],
                                      constant uint& size [[buffer(2)]],
                                      uint i [[thread_index_in_threadgroup]]) {
  if (i >= size) {
    return;
  }
  out[i] = simd_shuffle_xor(in[i], 16);
}

// One slot of threadgroup memory is never written.
[[kernel]] void uninitialised(const device float* in [[buffer(0)]], device float* out [[buffer(1)]],
                              uint i [[thread_index_in_threadgroup]]) {
  threadgroup float shared[64];
  if (i != 5) {
    shared[i] = in[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = shared[i];
}

// Threadgroup memory is written one element past its end.
[[kernel]] void threadgroup_beyond(const device float* in [[buffer(0)]],
                                   device float* out [[buffer(1)]],
                                   uint i [[thread_index_in_threadgroup]]) {
  threadgroup float shared[64];
  shared[i + 1] = in[i];
  out[i] = 0.0f;
}

// Loads sixteen bytes from an address that is not a multiple of sixteen.
[[kernel]] void misaligned(const device float* in [[buffer(0)]], device float4* out [[buffer(1)]],
                           uint i [[thread_position_in_grid]]) {
  out[i] = *reinterpret_cast<const device float4*>(in + 4 * i + 1);
}

// More threadgroup memory than there is.
[[kernel]] void too_much_memory(device float* out [[buffer(0)]],
                                uint i [[thread_index_in_threadgroup]]) {
  threadgroup float shared[8193];
  shared[i] = 0.0f;
  out[i] = shared[i];
}

// Follows a pointer that was never set.
[[kernel]] void wild_pointer(device float* out [[buffer(0)]],
                             constant ulong& address [[buffer(1)]]) {
  out[0] = *reinterpret_cast<const device float*>(address);
}
