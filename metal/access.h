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

struct Division {
  long quotient;
  long remainder;
};

/// a / b for a >= 0. Beyond 32 bits, which is hardly ever needed, bit by bit: a division of 64 bits
/// is so long a piece of code that kernels take more registers for its sake.
inline Division division_of(long a, long b) {
  if (a < b) {
    return Division{0, a};
  }
  if (a <= 0xffffffff) {
    return Division{long(uint(a) / uint(b)), long(uint(a) % uint(b))};
  }
  Division d{0, 0};
  for (int bit = 62; bit >= 0; --bit) {
    const long r = 2 * d.remainder + (a >> bit & 1);
    d = Division{2 * d.quotient + (r < b ? 0 : 1), r - (r < b ? 0 : b)};
  }
  return d;
}

inline long remainder(long a, long b) { return division_of(a, b).remainder; }

/// What the values of one column belong to. Statistic and channel are maps of their own: of several
/// slots in a row, take the first from slot_at and the others from next.
struct Slot {
  long statistic;
  long channel;   // index of weight and bias
  uint position;  // of a group: see Grouped
};

/// Without a division, since every thread takes this step for each of its columns.
inline long channel_behind(constant Sweep& sweep, Slot s) {
  return s.channel + 1 == sweep.channels ? 0 : s.channel + 1;
}

/// Each slot has a statistic of its own.
struct Separate {
  enum { grouped = 0 };

  /// The weight of sums that were not weighted yet.
  static float of_sums(float weight) { return weight; }

  /// True for the slot that writes what is of its statistic.
  static bool leads(constant Sweep&, Place, Slot) { return true; }

  static Slot slot_at(constant Sweep& sweep, long index) {
    return Slot{index, remainder(index, sweep.channels), 0};
  }

  static Slot next(constant Sweep& sweep, Slot s) {
    return Slot{s.statistic + 1, channel_behind(sweep, s), 0};
  }
};

/// The statistic of a group, and a channel's position in the pattern in which groups repeat: among
/// the members of its group, or among the groups if they are interleaved.
struct InGroup {
  long statistic;
  uint position;
};

inline uint period_of(constant Grouping& of) { return of.interleaved ? of.groups : of.members; }

inline InGroup in_group(constant Grouping& of, long slot) {
  const Division d = division_of(slot, of.channels);
  const uint channel = uint(d.remainder);
  const uint position = channel % period_of(of);
  const uint group = of.interleaved ? position : channel / of.members;
  return InGroup{d.quotient * of.groups + group, position};
}

/// What one thread reads: vectors at first, first + step, ..., and perhaps a single element from
/// before the first or after the last aligned vector. Offsets from `first` have 32 bits: 64-bit
/// arithmetic takes Apple's GPUs several times as long.
struct Walk {
  long first;
  uint step;
  uint vectors;
  int edge;  // offset of the single element
  bool has_edge;
  bool inside;  // the array; if not, there is nothing to read or write
  long slot;    // of the first column
  long part;    // index of its partial result
};

/// Which piece of which strip a threadgroup works on. The second pass over an array takes the
/// threadgroups in the reverse order of the first: what it reads first is what is still in cache.
struct Piece {
  uint segment;
  uint strip;
  uint piece;
};

inline uint in_order(uint group, uint groups, bool reverse) {
  return reverse ? groups - 1 - group : group;
}

/// inner > 1: lanes across neighbouring columns, each with V statistics of its own.
struct Columns : Separate {
  template <int V>
  struct Statistics {
    enum { count = V };
  };

  static Place place(constant Sweep& sweep, uint thread_index) {
    return place_across(thread_index, sweep.across, sweep.along);
  }

  /// Neighbouring threadgroups take neighbouring strips, then pieces, then segments.
  static Piece locate(constant Sweep& sweep, uint group, uint groups, bool reverse) {
    const uint i = in_order(group, groups, reverse);
    const uint strips_before = i / sweep.strips;
    return Piece{strips_before / sweep.pieces, i % sweep.strips, strips_before % sweep.pieces};
  }

  template <int V>
  static Walk walk(constant Sweep& sweep, Piece at, Place p) {
    const long column = (long(at.strip) * sweep.across + p.across) * V;
    return walk_down(sweep, at, p, column, column < sweep.inner);
  }

  /// From the column on.
  static Walk walk_down(constant Sweep& sweep, Piece at, Place p, long column, bool inside) {
    const long outer = remainder(at.segment, sweep.outer);
    const long begin = long(at.piece) * sweep.piece;
    const uint positions = uint(metal::min(long(sweep.piece), sweep.reduce - begin));
    Walk w;
    w.inside = inside;
    w.first = (at.segment * sweep.reduce + begin + p.along) * sweep.inner + column;
    w.step = sweep.along * uint(sweep.inner);
    w.vectors =
        w.inside && p.along < positions ? (positions - p.along + sweep.along - 1) / sweep.along : 0;
    w.edge = 0;
    w.has_edge = false;
    w.slot = outer * sweep.inner + column;
    w.part = (long(at.piece) * sweep.segments + at.segment) * sweep.inner + column;
    return w;
  }
};

/// inner == 1: lanes along the reduction, all with the same statistic.
struct Rows : Separate {
  template <int V>
  struct Statistics {
    enum { count = 1 };
  };

  static Place place(constant Sweep& sweep, uint thread_index) {
    return place_along(thread_index, sweep.along);
  }

  /// Neighbouring threadgroups take neighbouring pieces, then strips, which are of all segments.
  static Piece locate(constant Sweep& sweep, uint group, uint groups, bool reverse) {
    const uint i = in_order(group, groups, reverse);
    return Piece{0, i / sweep.pieces, i % sweep.pieces};
  }

  template <int V>
  static Walk walk(constant Sweep& sweep, Piece at, Place p) {
    return walk_along<V>(sweep, at, p, long(at.strip) * sweep.across + p.across);
  }

  /// Along the segment.
  template <int V>
  static Walk walk_along(constant Sweep& sweep, Piece at, Place p, long segment) {
    const long outer = remainder(segment, sweep.outer);
    Walk w;
    w.inside = segment < sweep.segments;
    const long before = long(at.piece) * sweep.piece;
    const uint positions =
        w.inside ? uint(metal::min(long(sweep.piece), sweep.reduce - before)) : 0;
    const long begin = segment * sweep.reduce + before;
    // Up to V - 1 elements before the first vector that is aligned, and behind the last
    const uint to_aligned = uint(-begin & (V - 1));
    const uint head = to_aligned + V <= positions ? to_aligned : 0;
    const uint vectors = to_aligned + V <= positions ? (positions - head) / V : 0;
    const uint tail = positions - head - vectors * V;
    w.first = begin + head + long(p.along) * V;
    w.step = sweep.along * V;
    w.vectors = p.along < vectors ? (vectors - p.along + sweep.along - 1) / sweep.along : 0;
    // Fewer than 2 V single elements, one for each of the first threads
    const uint single = p.along < head ? p.along : p.along + vectors * V;
    w.edge = int(single) - int(head + p.along * V);
    w.has_edge = p.along < head + tail;
    w.slot = outer;
    w.part = long(at.piece) * sweep.segments + segment;
    return w;
  }
};

/// The same walks where the channels of a group share statistics. The sums of a group are weighted
/// when they are merged.
template <typename A>
struct Grouped : A {
  enum { grouped = 1 };

  static float of_sums(float) { return 1.0f; }

  static bool leads(constant Sweep& sweep, Place p, Slot s) {
    return sweep.grouping.interleaved ? p.across < sweep.run : s.position == 0;
  }

  static Slot slot_at(constant Sweep& sweep, long index) {
    const InGroup in = in_group(sweep.grouping, index);
    return Slot{in.statistic, remainder(index, sweep.channels), in.position};
  }

  /// Within an instance, in which all columns of a vector are.
  static Slot next(constant Sweep& sweep, Slot s) {
    constant Grouping& of = sweep.grouping;
    const bool again = s.position + 1 == period_of(of);
    const long behind = of.interleaved ? 1 - long(of.groups) : 1;
    return Slot{s.statistic + (again ? behind : long(of.interleaved)), channel_behind(sweep, s),
                again ? 0 : s.position + 1};
  }
};

/// Strips of whole groups: `run` vectors side by side, and as many of each other member `jump`
/// columns behind them.
struct GroupedColumns : Grouped<Columns> {
  template <int V>
  static Walk walk(constant Sweep& sweep, Piece at, Place p) {
    const long first = (long(at.strip) * sweep.run + p.across % sweep.run) * V;
    const uint member = p.across / sweep.run;
    const bool inside = sweep.jump == 0
                            ? member == 0 && first < sweep.inner
                            : member < sweep.grouping.members && first < long(sweep.jump);
    return walk_down(sweep, at, p, first + member * long(sweep.jump), inside);
  }
};

/// Rows of whole groups: members one after another, or `run` rows of each, `jump` rows apart.
struct GroupedRows : Grouped<Rows> {
  template <int V>
  static Walk walk(constant Sweep& sweep, Piece at, Place p) {
    if (sweep.jump == 0) {
      return Rows::walk<V>(sweep, at, p);
    }
    const uint member = p.across / sweep.run;
    const Division first = division_of(long(at.strip) * sweep.run, sweep.jump);
    return walk_along<V>(sweep, at, p,
                         first.quotient * sweep.grouping.channels + first.remainder + p.across -
                             member * sweep.run + member * long(sweep.jump));
  }
};
