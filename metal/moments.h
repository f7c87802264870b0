// The two monoids that everything is made of, and their merge over a threadgroup.
#pragma once

#include "bindings.h"

/// Unroll loops over thread-local arrays; dynamic indexing would spill them.
#define WELFORD_UNROLL _Pragma("clang loop unroll(full)")

using shared::Moments;
using shared::Sums;

inline Moments no_moments() { return Moments{0.0f, 0.0f, 0.0f, 0.0f}; }

/// Moments whose mean is the sum a + b, rounded and what is left of it (Knuth's two-sum).
inline Moments moments_about(float count, float a, float b, float m2) {
  const float mean = a + b;
  const float part = mean - a;
  return Moments{count, mean, (a - (mean - part)) + (b - part), m2};
}

/// What Chan's merge of a and b values needs of these counts.
struct Shares {
  float count;  // a + b
  float of_b;   // b / (a + b)
  float both;   // a b / (a + b)
};

inline Shares shares_of(float a, float b) {
  const float count = a + b;
  Shares shares{count, 0.5f, 0.25f * count};  // of equal sets
  // A division takes longer than the rest of a merge; equal sets and empty ones need none. Together
  // with the product it is too much for a compiler to compute it in any case, as it may by itself.
  if (a != b && a != 0.0f && b != 0.0f) {
    shares.of_b = b / count;
    shares.both = a * shares.of_b;
  }
  return shares;
}

/// Chan's merge of two sets in this order, with d = b.mean - a.mean, where mean + tail is that of
/// a. If a side is empty, d is 0 and mean + tail is the other's: (inf - 0) * 0 would be a nan.
inline Moments merge(float mean, float tail, float d, float m2, Shares s) {
  return moments_about(s.count, mean, tail + d * s.of_b, m2 + d * d * s.both);
}

/// Chan's merge of two sets. What is chosen is numbers: structs might stay in memory.
inline Moments merge(Moments a, Moments b) {
  const bool a_empty = a.count == 0.0f;
  const float d = (b.mean - a.mean) + (b.tail - a.tail);
  return merge(a_empty ? b.mean : a.mean, a_empty ? b.tail : a.tail,
               a_empty || b.count == 0.0f ? 0.0f : d, a.m2 + b.m2, shares_of(a.count, b.count));
}

/// Welford's step: the merge with a single value.
inline Moments push(Moments a, float x) { return merge(a, Moments{1.0f, x, 0.0f, 0.0f}); }

/// Moments ready to leave the kernel. A value that is not finite leaves inf in the mean, or nan if
/// more values came after it; here all of it becomes nan, so that results do not depend on the
/// order.
inline Moments finalized(Moments m) {
  const float zero = m.mean - m.mean;  // or nan
  return Moments{m.count, m.mean + zero, m.tail + zero, m.m2 + zero};
}

inline Sums merge(Sums a, Sums b) { return Sums{a.g + b.g, a.gd + b.gd}; }

/// Merges each of values[0], ..., values[n - 1] over the lanes of a simdgroup that are a multiple
/// of `step` apart; all of these get the same results. All of a thread's sets have equally many
/// values.
template <int n>
inline void merge_lanes(thread Moments* values, uint lane, uint step) {
  for (uint offset = step; offset < kSimd; offset *= 2) {
    // In the order of the lanes on both sides, so that both round alike
    const bool upper = (lane & offset) != 0;
    const float own = values[0].count;
    const float other = metal::simd_shuffle_xor(own, ushort(offset));
    const Shares shares = shares_of(upper ? other : own, upper ? own : other);
    const bool either_empty = own == 0.0f || other == 0.0f;
    const bool theirs = own == 0.0f || (upper && other != 0.0f);  // is the mean to begin with
    WELFORD_UNROLL
    for (int i = 0; i < n; ++i) {
      const Moments m = values[i];
      const float mean = metal::simd_shuffle_xor(m.mean, ushort(offset));
      const float tail = metal::simd_shuffle_xor(m.tail, ushort(offset));
      const float m2 = metal::simd_shuffle_xor(m.m2, ushort(offset));
      const float d = (mean - m.mean) + (tail - m.tail);
      values[i] = merge(theirs ? mean : m.mean, theirs ? tail : m.tail,
                        either_empty ? 0.0f : (upper ? -d : d), m.m2 + m2, shares);
    }
  }
}

template <int n>
inline void merge_lanes(thread Sums* values, uint, uint step) {
  for (uint offset = step; offset < kSimd; offset *= 2) {
    WELFORD_UNROLL
    for (int i = 0; i < n; ++i) {
      values[i] = merge(values[i], Sums{metal::simd_shuffle_xor(values[i].g, ushort(offset)),
                                        metal::simd_shuffle_xor(values[i].gd, ushort(offset))});
    }
  }
}

/// A thread's place in its threadgroup: which of the statistics side by side, and which of the
/// threads along their reduction.
struct Place {
  uint across;
  uint along;
  uint lane;
  uint lane_step;    // lanes between two of the same statistic,
  uint lanes;        // of which a simdgroup has so many: it merges those by itself,
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
  p.lanes = kSimd / across;
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
  p.lanes = kSimd;
  p.writes = p.lane == 0;
  p.entry = thread_index / kSimd;
  p.entries = along / kSimd;
  p.first_entry = p.across * p.entries;
  p.entry_step = 1;
  return p;
}

/// Merges each of values[0], ..., values[n - 1] over all threads of the same statistic. Every
/// thread of the threadgroup must come here. All of them get the results if they are wanted
/// everywhere; otherwise those of the first simdgroup of a statistic do, among them the one that is
/// first along.
template <typename M, int n, bool everywhere>
inline void merge_along(thread M* values, Place p, threadgroup M* entries) {
  merge_lanes<n>(values, p.lane, p.lane_step);
  if (p.entries > 1) {
    WELFORD_UNROLL
    for (int i = 0; i < n; ++i) {
      if (i > 0) {  // the entries before may still be being read
        metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
      }
      if (p.writes) {
        entries[p.entry] = values[i];
      }
      metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
      const threadgroup M* own = entries + p.first_entry;
      if (p.along < p.lanes) {
        M merged[1] = {M{}};
        for (uint j = p.along; j < p.entries; j += p.lanes) {
          merged[0] = merge(merged[0], M(own[j * p.entry_step]));
        }
        merge_lanes<1>(merged, p.lane, p.lane_step);
        values[i] = merged[0];
      }
      if (everywhere) {
        // Where only this simdgroup has read, before the shuffles of the merge
        if (p.along == 0) {
          entries[p.first_entry] = values[i];
        }
        metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
        values[i] = *own;
      }
    }
  }
}
