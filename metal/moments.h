// The two monoids that everything is made of, and their merge over a threadgroup.
#pragma once

#include "bindings.h"

/// In front of a loop over an array of a thread's own: not unrolled, the loop would index the array,
/// which could not stay in registers then.
#define WELFORD_UNROLL _Pragma("clang loop unroll(full)")

/// Count, mean and sum of squared deviations of a set of values. The identity has count 0.
///
/// The mean is mean + tail; the tail is what one float cannot hold of it. Without it the rounding
/// of large means would end up in the variance when sets are merged.
struct Moments {
  float count;
  float mean;
  float tail;
  float m2;
};

inline Moments no_moments() { return Moments{0.0f, 0.0f, 0.0f, 0.0f}; }

/// Moments whose mean is the sum a + b, rounded and what is left of it (Knuth's two-sum).
inline Moments moments_about(float count, float a, float b, float m2) {
  const float mean = a + b;
  const float part = mean - a;
  return Moments{count, mean, (a - (mean - part)) + (b - part), m2};
}

/// Chan's merge of two sets. An empty side is skipped, so that (inf - 0) * 0 never makes a nan.
inline Moments merge(Moments a, Moments b) {
  if (b.count == 0.0f) {
    return a;
  }
  if (a.count == 0.0f) {
    return b;
  }
  const float n = a.count + b.count;
  const float share = b.count / n;
  const float d = (b.mean - a.mean) + (b.tail - a.tail);
  return moments_about(n, a.mean, a.tail + d * share, a.m2 + b.m2 + d * d * (a.count * share));
}

/// Welford's step: the merge with a single value.
inline Moments push(Moments a, float x) { return merge(a, Moments{1.0f, x, 0.0f, 0.0f}); }

/// What the gradients need of a set of values: the sums of g and of g * d, where g is the cotangent
/// of y and d = x - mean. The identity is zero.
struct Sums {
  float g;
  float gd;
};

inline Sums merge(Sums a, Sums b) { return Sums{a.g + b.g, a.gd + b.gd}; }

inline Moments shuffle_xor(Moments m, ushort offset) {
  return Moments{metal::simd_shuffle_xor(m.count, offset), metal::simd_shuffle_xor(m.mean, offset),
                 metal::simd_shuffle_xor(m.tail, offset), metal::simd_shuffle_xor(m.m2, offset)};
}

inline Sums shuffle_xor(Sums s, ushort offset) {
  return Sums{metal::simd_shuffle_xor(s.g, offset), metal::simd_shuffle_xor(s.gd, offset)};
}

/// A thread's place in its threadgroup: which of the statistics side by side, and which of the
/// threads along their reduction.
struct Place {
  uint across;
  uint along;
  uint lane;
  uint lane_step;    // lanes between two of the same statistic: a simdgroup merges those by itself,
  bool writes;       // and its lanes that hold the results
  uint entry;        // write them to these entries of threadgroup memory;
  uint first_entry;  // those of this statistic begin here,
  uint entry_step;   // lie this far apart,
  uint entries;      // and are so many.
};

/// Neighbouring threads stand across. `across` is a power of two up to kSimd.
inline Place place_across(uint thread_index, uint across, uint along) {
  Place p;
  p.across = thread_index % across;
  p.along = thread_index / across;
  p.lane = thread_index % kSimd;
  p.lane_step = across;
  p.writes = p.lane < across;
  p.entry = thread_index / kSimd * across + p.lane;
  p.first_entry = p.across;
  p.entry_step = across;
  p.entries = across * along / kSimd;
  return p;
}

/// Neighbouring threads stand along. `along` is a multiple of kSimd.
inline Place place_along(uint thread_index, uint along) {
  Place p;
  p.across = thread_index / along;
  p.along = thread_index % along;
  p.lane = thread_index % kSimd;
  p.lane_step = 1;
  p.writes = p.lane == 0;
  p.entry = thread_index / kSimd;
  p.entries = along / kSimd;
  p.first_entry = p.across * p.entries;
  p.entry_step = 1;
  return p;
}

/// Merges values[0], ..., values[n - 1], each over all threads of the same statistic; all of these
/// get the same results. Every thread of the threadgroup must come here.
template <typename M, int n>
inline void merge_along(thread M* values, Place p, threadgroup M* entries) {
  WELFORD_UNROLL
  for (int i = 0; i < n; ++i) {
    M m = values[i];
    for (uint offset = p.lane_step; offset < kSimd; offset *= 2) {
      const M other = shuffle_xor(m, ushort(offset));
      // In the order of the lanes on both sides, so that both round alike.
      if (p.lane & offset) {
        m = merge(other, m);
      } else {
        m = merge(m, other);
      }
    }
    if (p.entries > 1) {
      // What these entries held before may still be being read.
      metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
      if (p.writes) {
        entries[p.entry] = m;
      }
      metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
      m = entries[p.first_entry];
      for (uint j = 1; j < p.entries; ++j) {
        m = merge(m, entries[p.first_entry + j * p.entry_step]);
      }
    }
    values[i] = m;
  }
}
