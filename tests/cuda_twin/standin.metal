// What a stand-in for metal_stdlib must do as Metal does, on which the one for CUDA is tested.

#include <metal_stdlib>
using namespace metal;

struct Affine {
  float slope;
  float level;
};

// Values through half and bfloat and back, (6, size): rounded, the products
// of two, the sign changed as bits, and the sum with a float.
[[kernel]] void narrow(const device float* in [[buffer(0)]], device float* out [[buffer(1)]],
                       constant uint& size [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  if (i < size) {
    const half h = half(in[i]);
    const bfloat b = bfloat(in[i]);
    out[i] = float(h);
    out[size + i] = float(b);
    out[2 * size + i] = float(h * h);
    out[3 * size + i] = float(b * b);
    out[4 * size + i] = float(as_type<half>(ushort(as_type<ushort>(h) ^ 0x8000)));
    out[5 * size + i] = h + in[i];
  }
}

// One simdgroup operation per row of out, (rows, 32)
[[kernel]] void lanes(const device float* in [[buffer(0)]], device float* out [[buffer(1)]],
                      uint lane [[thread_index_in_simdgroup]],
                      uint size [[threads_per_simdgroup]]) {
  const float x = in[lane];
  float results[] = {
      simd_sum(x),
      simd_max(x),
      simd_min(x),
      simd_broadcast(x, 5),
      simd_broadcast_first(x),
      simd_shuffle(x, ushort(31 - lane)),
      simd_shuffle_xor(x, 3),
      simd_shuffle_down(x, 7),
      simd_shuffle_up(x, 7),
      simd_shuffle_rotate_down(x, 7),
      simd_shuffle_rotate_up(x, 7),
      float(simd_shuffle_xor(half(x), 3)),
      simd_any(x > 0.0f) ? 1.0f : 0.0f,
      simd_all(x > 0.0f) ? 1.0f : 0.0f,
  };
  for (uint row = 0; row < sizeof(results) / sizeof(float); ++row) {
    out[row * size + lane] = results[row];
  }
}

// Reverses each threadgroup's elements through threadgroup memory, then slope * x + level.
[[kernel]] void reverse(constant Affine& f [[buffer(0)]], const device float* in [[buffer(1)]],
                        device float* out [[buffer(2)]],
                        uint group [[threadgroup_position_in_grid]],
                        ushort3 position [[thread_position_in_threadgroup]],
                        uint3 threads [[threads_per_threadgroup]],
                        uint simdgroup [[simdgroup_index_in_threadgroup]],
                        uint groups [[threadgroups_per_grid]]) {
  threadgroup float values[256], of_simdgroup[8];
  const uint start = group * threads.x;
  values[position.x] = in[start + position.x];
  of_simdgroup[simdgroup] = float(groups);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float x = values[threads.x - 1 - position.x];
  out[start + position.x] = f.slope * x + f.level + of_simdgroup[simdgroup];
}

// Vector arithmetic, comparison, selection and mathematics.
[[kernel]] void vectors(const device float4* in [[buffer(0)]], device float4* out [[buffer(1)]],
                        uint i [[thread_position_in_grid]]) {
  const float4 x = in[i];
  float2 pair(x.x, x.w);
  pair *= 2.0f;
  const float4 y = select(x * x + 1.0f, -x, x < 0.0f);
  out[i] = max(y, float4(pair, pair)) + float4(half4(x)) - precise::sqrt(abs(x));
  out[i] += float4(dot(x, x)) * precise::rsqrt(1.0f + abs(x.y));
}
