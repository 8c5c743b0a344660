#include "xla/groups.h"

#include "core/groups.h"
#include "core/limits.h"
#include "core/numerics.h"

namespace jax_tsq {

ffi::ErrorOr<GroupSizes> ReadGroupSizes(const ffi::AnyBuffer& buffer, const Dims& batch) {
  const auto dims = buffer.dimensions();
  const int64_t groups = dims.size() == 0 ? -1 : dims[dims.size() - 1];
  if (groups < 0) return ffi::Unexpected(Invalid("group_sizes must have at least one dimension."));
  const ffi::Error error = CheckBuffer("group_sizes", buffer, ffi::S32, batch, {groups});
  if (error.failure()) return ffi::Unexpected(error);
  // An empty buffer may have no address, which would tell quantize_rows that there are no sizes.
  static constexpr int32_t kEmpty = 0;
  return GroupSizes{groups == 0 ? &kEmpty : static_cast<const int32_t*>(buffer.untyped_data()), groups};
}

ffi::ErrorOr<int64_t> CountPadded(const Input& input, int64_t groups, bool aligned) {
  const int64_t padded = input.tokens > kMostTokens ? -1 : PaddedTokens(input.tokens, groups, aligned);
  if (padded < 0 || padded > kMostTokens) {
    return ffi::Unexpected(Invalid("x and group_sizes need more than 2**31 - 128 padded tokens."));
  }
  if (padded > 0 && input.features > kMostElements / padded) return ffi::Unexpected(Invalid("x is too large."));
  return padded;
}

}  // namespace jax_tsq
