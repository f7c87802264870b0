// What shaders and host share: parameter structs, layouts of results, buffer indices, limits.
//
// An array lies as (merge, outer, reduce, inner); see csrc/geometry.h.
//
//   position   an index along the reduction
//   column     an inner index
//   segment    one (merge, outer) index: reduce x inner neighbouring elements
//   slot       one (outer, inner) index: the values that share a channel and a statistic
//   statistic  what a mean and a variance belong to
//   strip      columns, or segments, that a threadgroup processes side by side
//   piece      a contiguous range of reduction positions of a strip, processed by one threadgroup
//   part       a partial result of a slot: of one piece of one segment
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
  kSimd = 32,           // threads of a simdgroup, on every Apple GPU
  kEntries = 256,       // of threadgroup memory: simdgroups * across (columns), simdgroups (rows)
  kKept = 4,            // vectors that a thread of a fused kernel keeps in registers
  kSpan = 1 << 30,      // elements, within which a thread counts in 32 bits
  kLargestHalf = 65504  // the largest finite float16
};

namespace shared {

/// Moments of a set of values: how many they are, their mean, and the sum of squared deviations
/// from it, m2. The identity of a merge has count 0.
///
/// The mean is mean + tail: the tail is what one float cannot hold of it. Without it the rounding
/// of large means would end up in the variance when sets are merged.
struct Moments {
  float count;
  float mean;
  float tail;
  float m2;
};

/// What the gradients need of a set of values: the sums of g and of g * d, where g is the cotangent
/// of y and d = x - mean. The identity of a merge is zero.
struct Sums {
  float g;
  float gd;
};

}  // namespace shared

/// X(name in mlx.nn). The activations that a normalisation may be followed by; see activations.h.
#define WELFORD_ACTIVATIONS(X) \
  X(none)                      \
  X(relu)                      \
  X(relu6)                     \
  X(leaky_relu)                \
  X(silu)                      \
  X(gelu)                      \
  X(gelu_approx)               \
  X(hardswish)

#define X(name) name,
enum class Activation { WELFORD_ACTIVATIONS(X) };
#undef X

/// The array that an epilogue reads besides x: the residual, or, in a gradient, where it decides
/// the derivative, the output z.
enum class Auxiliary { none, residual, output };

/// Indices of the function constants, which are set when a pipeline is made: no element takes time
/// for what its problem does not have.
enum FunctionConstant {
  kActivationConstant = 0,  // int: an Activation
  kAuxiliaryConstant = 1,   // int: an Auxiliary
  kGradientConstant = 2,    // bool: a sweep that finds sums of g writes grad x, too
};

/// Buffer indices, the same in every kernel that has the buffer. In place of an absent weight, bias
/// or sums, var is bound and never read.
enum BufferIndex {
  kParameters = 0,     // Sweep or Merge
  kX = 1,              // x
  kMean = 2,           // float, per statistic
  kVar = 3,            // float, per statistic
  kWeight = 4,         // per channel, or per slot
  kBias = 5,           // likewise
  kOut = 6,            // z, or gradient of x
  kG = 7,              // cotangent of z
  kGradMean = 8,       // float, per statistic: cotangent of mean, or gradient of the given mean
  kGradVar = 9,        // float, per statistic: likewise of var
  kPartials = 10,      // Moments or Sums, (part, slot)
  kSums = 11,          // Sums, per slot
  kGradWeight = 12,    // as weight
  kGradBias = 13,      // as bias
  kMoments = 14,       // Moments, per statistic
  kUpdate = 15,        // float, 3: 1 - momentum, momentum, unbiased by biased variance
  kRunningMean = 16,   // per channel
  kRunningVar = 17,    // per channel
  kNextMean = 18,      // per channel: the running mean after this batch
  kNextVar = 19,       // per channel
  kGroupSums = 20,     // Sums, weighted, per statistic of a group
  kResidual = 21,      // added to y
  kZ = 22,             // output of the epilogue, where a gradient needs it
  kGradResidual = 23,  // cotangent of the residual, and of y
  kBuffers = 24,
};

/// The channels that share statistics. Slot q is that of channel q % channels of instance
/// q / channels.
struct Grouping {
  shared_uint channels;
  shared_uint groups;       // of an instance
  shared_uint members;      // channels of a group
  shared_uint interleaved;  // channel c is in group c % groups; otherwise in c / members
};

/// A walk over an array.
///
/// A threadgroup takes one piece of one strip. Its threads stand `across` slots and `along` the
/// reduction; a strip is `across` vectors of columns of one segment (columns), or `across` segments
/// (rows).
struct Sweep {
  shared_long segments;  // merge * outer
  shared_long outer;
  shared_long reduce;
  shared_long inner;
  shared_long channels;  // values of weight: of slot q it is q % channels
  shared_uint piece;     // positions of a piece; a thread's own are within kSpan elements
  shared_uint pieces;    // of a strip
  shared_uint strips;    // of a segment (columns) or in all (rows)
  shared_uint across;    // a power of two, up to kSimd (columns)
  shared_uint along;     // a multiple of kSimd (rows)
  shared_uint has_weight;
  shared_uint has_bias;
  shared_uint has_sums;
  float count;  // values per statistic
  float eps;
  float negative_slope;
  Grouping grouping;
  shared_uint run;   // of columns of groups: vectors that lie side by side
  shared_uint jump;  // columns, or rows, from a run to the next member's; 0: there is one run
};

/// A merge of `parts` partial results of each of `columns`, which lie as (part, column); or of each
/// member of a group, which lie as (part, slot).
struct Merge {
  shared_long columns;
  shared_long parts;
  shared_uint across;  // columns of a threadgroup, a power of two up to kSimd
  shared_uint along;   // its threads for each of them
  shared_uint has_weight;
  shared_uint has_bias;
  float eps;
  shared_uint weight_per_slot;  // weight has a value for each slot
  Grouping grouping;
};

#ifndef __METAL_VERSION__
}  // namespace mlx_welford
#endif
