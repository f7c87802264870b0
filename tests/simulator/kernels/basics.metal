// Small kernels on which the simulator is tested.

#include <metal_stdlib>
using namespace metal;

// The sum over the threadgroup's threads; every thread must call it.
template <typename T>
T threadgroup_sum(T value, threadgroup T* shared, uint lane, uint simdgroup, uint simdgroups) {
  value = simd_sum(value);
  if (lane == 0) {
    shared[simdgroup] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_sum(lane < simdgroups ? shared[lane] : T(0));
}

// out[g] = sum of in[g * per_group ... (g + 1) * per_group), cut off at size
template <typename T, int N>
[[kernel]] void sum(const device T* in [[buffer(0)]], device float* out [[buffer(1)]],
                    constant uint& size [[buffer(2)]], constant uint& per_group [[buffer(3)]],
                    uint group [[threadgroup_position_in_grid]],
                    uint thread_index [[thread_index_in_threadgroup]],
                    uint3 threads [[threads_per_threadgroup]],
                    uint lane [[thread_index_in_simdgroup]],
                    uint simdgroup [[simdgroup_index_in_threadgroup]],
                    uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float shared[32];
  const uint begin = group * per_group;
  const uint end = min(begin + per_group, size);
  float total = 0.0f;
  for (uint i = begin + thread_index * N; i < end; i += threads.x * N) {
    for (uint k = i; k < min(i + N, end); ++k) {
      total += float(in[k]);
    }
  }
  total = threadgroup_sum(total, shared, lane, simdgroup, simdgroups);
  if (thread_index == 0) {
    out[group] = total;
  }
}

// out = in, sixteen bytes at a time
template <typename T>
[[kernel]] void copy16(const device T* in [[buffer(0)]], device T* out [[buffer(1)]],
                       uint i [[thread_position_in_grid]]) {
  reinterpret_cast<device uint4*>(out)[i] = reinterpret_cast<const device uint4*>(in)[i];
}

// Both halves of every 32-bit word of a 16-byte load, as float: out[8i ... 8i + 8)
template <typename T>
[[kernel]] void widen8(const device T* in [[buffer(0)]], device float* out [[buffer(1)]],
                       uint i [[thread_position_in_grid]]) {
  const uint4 words = reinterpret_cast<const device uint4*>(in)[i];
  for (int k = 0; k < 4; ++k) {
    const vec<T, 2> pair = as_type<vec<T, 2>>(words[k]);
    out[8 * i + 2 * k] = float(pair.x);
    out[8 * i + 2 * k + 1] = float(pair.y);
  }
}

template <typename From, typename To>
[[kernel]] void convert(const device From* in [[buffer(0)]], device To* out [[buffer(1)]],
                        uint i [[thread_position_in_grid]]) {
  out[i] = To(in[i]);
}

// Buffer indices by name, as in a header shared with the host.
enum Index { kA = 4, kB, kC, kOut };

// a * b + c, which contraction rounds once
[[kernel]] void multiply_add(const device float* a [[buffer(kA)]],
                             const device float* b [[buffer(kB)]],
                             const device float* c [[buffer(kC)]],
                             device float* out [[buffer(kOut)]],
                             uint i [[thread_position_in_grid]]) {
  out[i] = a[i] * b[i] + c[i];
}

// The order in which threadgroups and threads ran: order[0] counts, order[1...] are the threads.
[[kernel]] void record_order(device uint* order [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  device atomic_uint* count = reinterpret_cast<device atomic_uint*>(order);
  order[1 + atomic_fetch_add_explicit(count, 1, memory_order_relaxed)] = i;
}

struct Moments {
  float count;
  float mean;
  float m2;
};

struct Range {
  uint begin;
  uint end;
};

// Structs in every address space: a range by value, moments through threadgroup memory.
[[kernel]] void moments(const device float* in [[buffer(0)]], device Moments* out [[buffer(1)]],
                        constant Range& whole [[buffer(2)]],
                        uint thread_index [[thread_index_in_threadgroup]],
                        uint3 threads [[threads_per_threadgroup]]) {
  threadgroup Moments shared[256];
  const Range range = whole;
  Moments own = {0.0f, 0.0f, 0.0f};
  for (uint i = range.begin + thread_index; i < range.end; i += threads.x) {
    own.count += 1.0f;
    const float delta = in[i] - own.mean;
    own.mean += delta / own.count;
    own.m2 += delta * (in[i] - own.mean);
  }
  shared[thread_index] = own;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index == 0) {
    for (uint i = 1; i < threads.x; ++i) {
      const Moments other = shared[i];
      if (other.count == 0.0f) {
        continue;
      }
      const float count = own.count + other.count;
      const float delta = other.mean - own.mean;
      own.mean += delta * other.count / count;
      own.m2 += other.m2 + delta * delta * own.count * other.count / count;
      own.count = count;
    }
    out[0] = own;
  }
}

// A function constant switches the bias on, argument and all; another has a default.
constant bool has_bias [[function_constant(0)]];
constant float factor [[function_constant(7)]];

[[kernel]] void scale(const device float* in [[buffer(0)]],
                      const device float* bias [[buffer(1), function_constant(has_bias)]],
                      device float* out [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  const float scaled = in[i] * (is_function_constant_defined(factor) ? factor : 1.0f);
  out[i] = has_bias ? scaled + bias[i] : scaled;
}

// Reverses a threadgroup's elements in memory whose size the host gives; arguments unnumbered.
kernel void reverse(const device float* in, device float* out,
                    threadgroup float* scratch [[threadgroup(0)]],
                    uint2 group [[threadgroup_position_in_grid]],
                    ushort3 position [[thread_position_in_threadgroup]],
                    uint3 threads [[threads_per_threadgroup]]) {
  const uint start = group.x * threads.x;
  scratch[position.x] = in[start + position.x];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[start + position.x] = scratch[threads.x - 1 - position.x];
}

// One simdgroup operation per row of out, (rows, 32)
[[kernel]] void simdgroup_operations(const device float* in [[buffer(0)]],
                                     device float* out [[buffer(1)]],
                                     uint lane [[thread_index_in_simdgroup]],
                                     uint size [[threads_per_simdgroup]]) {
  const float x = in[lane];
  float results[] = {
      simd_sum(x),
      simd_max(x),
      simd_min(x),
      simd_product(x),
      simd_prefix_inclusive_sum(x),
      simd_prefix_exclusive_sum(x),
      simd_broadcast(x, 5),
      simd_broadcast_first(x),
      simd_shuffle(x, ushort(31 - lane)),
      simd_shuffle_xor(x, 3),
      simd_shuffle_down(x, 7),
      simd_shuffle_up(x, 7),
      simd_shuffle_rotate_down(x, 7),
      simd_shuffle_rotate_up(x, 7),
      simd_shuffle_and_fill_down(x, -1.0f, 7),
      simd_shuffle_and_fill_up(x, -1.0f, 7),
      simd_any(x > 0.0f) ? 1.0f : 0.0f,
      simd_all(x > 0.0f) ? 1.0f : 0.0f,
  };
  for (uint row = 0; row < sizeof(results) / sizeof(float); ++row) {
    out[row * size + lane] = results[row];
  }
}

// Copies structs from one address space to another without looking into them.
[[kernel]] void copy_moments(const device Moments* in [[buffer(0)]],
                             device Moments* out [[buffer(1)]],
                             uint i [[thread_index_in_threadgroup]]) {
  threadgroup Moments here[64], there[64];
  here[i] = in[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  there[i] = here[63 - i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = there[63 - i];
}

// Vector arithmetic and comparison, and compound assignment through device memory.
[[kernel]] void vectors(const device float4* in [[buffer(0)]], device float4* out [[buffer(1)]],
                        uint i [[thread_position_in_grid]]) {
  const float4 x = in[i];
  float2 pair(x.x, x.w);
  pair *= 2.0f;
  const float4 y = select(x * x + 1.0f, -x, x < 0.0f);
  out[i] = max(y, float4(pair, pair)) + float4(half4(x)) - precise::sqrt(abs(x));
  out[i] += float4(dot(x, x));
}
