// How threads walk over memory: vectors of 16 bytes, and the two access patterns.
#pragma once

#include "moments.h"

// ---- Vectors -----------------------------------------------------------------------------------

/// V neighbouring elements: 16 bytes, moved at once and kept as they are until they are needed, or
/// a single element where 16 bytes are not aligned.
template <typename T, int V>
struct Elements;

template <typename T>
struct Elements<T, 1> {
  typedef T Raw;
  static Raw load(const device T* x, long i) { return x[i]; }
  static void store(device T* y, long i, Raw raw) { y[i] = raw; }
  static void unpack(Raw raw, thread float* v) { v[0] = float(raw); }
  static Raw pack(const thread float* v) { return T(v[0]); }
};

/// What vectors of every type have in common.
template <typename T>
struct Vector {
  typedef uint4 Raw;
  static Raw load(const device T* x, long i) { return *((const device uint4*)(x + i)); }
  static void store(device T* y, long i, Raw raw) { *((device uint4*)(y + i)) = raw; }
};

template <>
struct Elements<float, 4> : Vector<float> {
  static void unpack(Raw raw, thread float* v) {
    v[0] = as_type<float>(raw.x);
    v[1] = as_type<float>(raw.y);
    v[2] = as_type<float>(raw.z);
    v[3] = as_type<float>(raw.w);
  }
  static Raw pack(const thread float* v) {
    return uint4(as_type<uint>(v[0]), as_type<uint>(v[1]), as_type<uint>(v[2]),
                 as_type<uint>(v[3]));
  }
};

/// Two elements of 16 bits in 32.
template <typename T>
struct Pair {
  static void unpack(uint bits, thread float* v) {
    v[0] = float(as_type<T>(ushort(bits & 0xffff)));
    v[1] = float(as_type<T>(ushort(bits >> 16)));
  }
  static uint pack(float low, float high) {
    return uint(as_type<ushort>(T(low))) | (uint(as_type<ushort>(T(high))) << 16);
  }
};

template <typename T>
struct Elements<T, 8> : Vector<T> {
  static void unpack(uint4 raw, thread float* v) {
    Pair<T>::unpack(raw.x, v);
    Pair<T>::unpack(raw.y, v + 2);
    Pair<T>::unpack(raw.z, v + 4);
    Pair<T>::unpack(raw.w, v + 6);
  }
  static uint4 pack(const thread float* v) {
    return uint4(Pair<T>::pack(v[0], v[1]), Pair<T>::pack(v[2], v[3]), Pair<T>::pack(v[4], v[5]),
                 Pair<T>::pack(v[6], v[7]));
  }
};

// ---- Access patterns ---------------------------------------------------------------------------

/// What one thread reads: vectors at first, first + step, ..., and perhaps one element by itself,
/// from before the first or after the last place where a vector is aligned.
struct Walk {
  long first;
  long step;
  long vectors;
  long edge;       // or -1
  bool inside;     // the array; if not, there is nothing to read and no statistic
  long statistic;  // of the first column
  long partial;    // its place among the partial results
};

/// Which piece of which strip a threadgroup works on. The second pass over an array takes the
/// threadgroups in the reverse order of the first: what it reads first is what is still in cache.
struct Piece {
  long segment;
  long strip;
  long piece;
};

inline Piece locate(constant Sweep& s, uint threadgroup_index, uint threadgroups, bool reverse) {
  const uint i = reverse ? threadgroups - 1 - threadgroup_index : threadgroup_index;
  const uint pieces_and_segments = i / s.strips;
  return Piece{long(pieces_and_segments / s.pieces), long(i % s.strips),
               long(pieces_and_segments % s.pieces)};
}

/// inner > 1: lanes across neighbouring columns, each with V statistics of its own.
struct Columns {
  template <int V>
  struct Statistics {
    enum { count = V };
  };

  static Place place(constant Sweep& s, uint thread_index) {
    return place_across(thread_index, s.across, s.along);
  }

  template <int V>
  static Walk walk(constant Sweep& s, Piece at, Place p) {
    const long column = (at.strip * s.across + p.a) * V;
    const long begin = at.piece * s.piece;
    const long positions = metal::min(long(s.piece), s.reduce - begin);
    Walk w;
    w.inside = column < s.inner;
    w.first = (at.segment * s.reduce + begin + p.l) * s.inner + column;
    w.step = s.along * s.inner;
    w.vectors = w.inside && p.l < positions ? (positions - p.l + s.along - 1) / s.along : 0;
    w.edge = -1;
    w.statistic = at.segment % s.outer * s.inner + column;
    w.partial = (at.piece * s.segments + at.segment) * s.inner + column;
    return w;
  }
};

/// inner == 1: lanes along the reduction, all with the same statistic.
struct Rows {
  template <int V>
  struct Statistics {
    enum { count = 1 };
  };

  static Place place(constant Sweep& s, uint thread_index) {
    return place_along(thread_index, s.along);
  }

  template <int V>
  static Walk walk(constant Sweep& s, Piece at, Place p) {
    const long segment = at.strip * s.across + p.a;
    Walk w;
    w.inside = segment < s.segments;
    const long positions = w.inside ? metal::min(long(s.piece), s.reduce - at.piece * s.piece) : 0;
    const long begin = segment * s.reduce + at.piece * s.piece;
    const long end = begin + positions;
    long aligned_begin = (begin + V - 1) / V * V;
    long aligned_end = end / V * V;
    if (aligned_end <= aligned_begin) {
      aligned_begin = begin;
      aligned_end = begin;
    }
    const long vectors = (aligned_end - aligned_begin) / V;
    w.first = aligned_begin + p.l * V;
    w.step = s.along * V;
    w.vectors = p.l < vectors ? (vectors - p.l + s.along - 1) / s.along : 0;
    // Fewer than 2 V elements before and after, one for each of the first threads.
    const long head = begin + p.l;
    const long tail = aligned_end + (p.l - (aligned_begin - begin));
    w.edge = head < aligned_begin ? head : tail < end ? tail : -1;
    w.statistic = segment % s.outer;
    w.partial = at.piece * s.segments + segment;
    return w;
  }
};
