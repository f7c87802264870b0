// What shaders and host agree on: parameter structs, buffer indices, limits. Included by both.
//
//   position   an index along a reduction
//   column     an index across neighbouring statistics of a segment
//   segment    one (merge, outer) index of an array that lies as (merge, outer, reduce, inner)
//   statistic  one (outer, inner) index: what a mean and a variance belong to
//   piece      some positions in a row, of a strip that threads take side by side
//   part       a partial result for a statistic: of one piece of one segment
#pragma once

#ifdef __METAL_VERSION__
typedef long shared_long;
typedef uint shared_uint;
#else
#include <cstdint>
namespace mlx_welford {
typedef std::int64_t shared_long;
typedef std::uint32_t shared_uint;
#endif

enum Limit {
  kSimd = 32,      // threads of a simdgroup, on every Apple GPU
  kEntries = 256,  // of threadgroup memory: simdgroups * across (columns), simdgroups (rows)
  kKept = 4,       // vectors that a thread of a fused kernel keeps in registers
  kSpan = 1 << 30  // elements, within which a thread counts in 32 bits
};

/// Buffer indices, the same in every kernel that has the buffer. An absent weight or bias, or absent
/// sums, are bound to var and never read.
enum BufferIndex {
  kParameters = 0,    // Sweep or Merge
  kX = 1,             // x
  kMean = 2,          // float, per statistic
  kVar = 3,           // float, per statistic
  kWeight = 4,        // per channel
  kBias = 5,          // per channel
  kOut = 6,           // y or gradient of x
  kG = 7,             // cotangent of y
  kGradMean = 8,      // float, per statistic: cotangent of mean, or gradient of the given mean
  kGradVar = 9,       // float, per statistic: likewise of var
  kPartials = 10,     // Moments or Sums, (part, statistic)
  kSums = 11,         // Sums, per statistic
  kGradWeight = 12,   // per channel
  kGradBias = 13,     // per channel
  kMoments = 14,      // Moments, per statistic
  kUpdate = 15,       // float, 3: 1 - momentum, momentum, unbiased by biased variance
  kRunningMean = 16,  // per channel
  kRunningVar = 17,   // per channel
  kNextMean = 18,     // per channel: the running mean after this batch
  kNextVar = 19,      // per channel
  kBuffers = 20,
};

/// A walk over an array that is row-contiguous as (segments = merge * outer, reduce, inner).
///
/// A threadgroup takes one piece of the positions of one strip. Its threads stand `across`
/// statistics and `along` the reduction; a strip is `across` vectors of columns of one segment
/// (columns), or `across` segments (rows).
struct Sweep {
  shared_long segments;
  shared_long outer;  // statistic of a column: segment % outer * inner + column
  shared_long reduce;
  shared_long inner;
  shared_long channels;
  shared_long blocks;  // channel of a column: segment % outer % blocks * inner + column,
  shared_uint wraps;   // modulo channels
  shared_uint piece;   // positions of a piece; a thread's own are within kSpan elements
  shared_uint pieces;
  shared_uint strips;  // of a segment (columns) or in all (rows)
  shared_uint across;  // a power of two, up to kSimd (columns)
  shared_uint along;   // a multiple of kSimd (rows)
  shared_uint has_weight;
  shared_uint has_bias;
  shared_uint has_sums;
  float count;  // values per statistic
  float eps;
  shared_uint padding;  // to whole words of 8 bytes, so that every byte is a defined one
};

/// A merge of `parts` partial results of each of `columns`, which lie as (part, column).
struct Merge {
  shared_long columns;
  shared_long parts;
  shared_uint across;  // columns of a threadgroup, a power of two up to kSimd
  shared_uint along;   // its threads for each of them
  shared_uint has_weight;
  shared_uint has_bias;
  float eps;
  shared_uint padding;  // as in Sweep
};

#ifndef __METAL_VERSION__
}  // namespace mlx_welford
#endif
